"""Brings a rendered run into a cluster: checked by the server, suspended, completed, released."""

import sys

from fmnist_dist.errors import FencedError, FmnistDistError, UsageError
from launch.k8s.kubectl import Kubectl
from launch.k8s.live import LiveJob, find_job, job_called, rivals
from launch.k8s.manifest import QUEUE, RUN_DIR, Document, Manifest, node_range


def submit(kubectl: Kubectl, manifest: Manifest) -> str:
    """Create the Job of a run, and what it needs; return a line that says so.

    What a Job that has ended left behind is removed: the run goes on from its newest checkpoint.
    Raises `FencedError` where a Job that has not ended has the run.
    """
    job = manifest.job
    name, run_dir = job["metadata"]["name"], job["metadata"]["annotations"][RUN_DIR]
    for rival in rivals(kubectl, run_id=name, run_dir=run_dir):
        raise _taken(run_dir, rival)
    former = job_called(kubectl, name)
    if former is not None:
        if not former.has_ended:  # somebody else's submission, since the list was read
            raise _taken(run_dir, former)
        kubectl.delete("job", name)
    kubectl.check(manifest.documents)
    created = kubectl.create(job)
    try:
        _complete(kubectl, manifest, created)
    except FmnistDistError:
        _take_back(kubectl, name)
        raise
    done = "resumed" if former is not None else "submitted"
    return f"{done} {name}: {job['spec']['completions']} pods, run {run_dir}"


def _taken(run_dir: str, rival: LiveJob) -> FencedError:
    return FencedError(
        f"run {run_dir}: Job {rival.name} has it and is {rival.state}; expected at most one live "
        f"Job on a run: wait for it, or python -m launch.k8s cancel {rival.name} (doctor says what "
        "holds it)"
    )


def _take_back(kubectl: Kubectl, name: str) -> None:
    """Delete what could not be completed, or the next try would find the run taken."""
    try:
        kubectl.delete("job", name)
    except FmnistDistError as error:  # the reason of the submission's end says more
        print(
            f"warning: Job {name} is left: {error}; python -m launch.k8s cancel {name}",
            file=sys.stderr,
        )


def _complete(kubectl: Kubectl, manifest: Manifest, created: Document) -> None:
    owner = {
        "apiVersion": created["apiVersion"],
        "kind": created["kind"],
        "name": created["metadata"]["name"],
        "uid": created["metadata"]["uid"],
        # Or a deletion of the Job would not wait for the store, and the next submission, under the
        # same names, apply what is about to go.
        "blockOwnerDeletion": True,
    }
    rest = [each for each in manifest.documents if each["kind"] != "Job"]
    for document in rest:
        if document["kind"] != "ServiceAccount":  # all runs share it
            document["metadata"]["ownerReferences"] = [owner]
    kubectl.apply(rest)
    if QUEUE not in created["metadata"].get("labels", {}):  # else Kueue does
        kubectl.patch("job", created["metadata"]["name"], {"spec": {"suspend": False}})


def scale(kubectl: Kubectl, name: str, nodes: int) -> str:
    """Change the number of pods, within the limits that the rendezvous was given."""
    job = _live(kubectl, name)
    low, high = node_range(job.manifest.args)
    if not low <= nodes <= high:
        raise UsageError(
            f"flag --nodes: found {nodes}, expected {low} to {high}: the pods of {name} were told "
            "so; cancel it and submit it again with other --nodes"
        )
    # One patch: the server refuses completions that differ from parallelism.
    changes = {"completions": nodes, "parallelism": nodes, "maxFailedIndexes": nodes - low}
    kubectl.patch("job", name, {"spec": changes})
    return f"{name}: {nodes} pods"


def suspend(kubectl: Kubectl, name: str, *, on: bool) -> str:
    """End all pods with notice, or start them again."""
    queue = _live(kubectl, name).document["metadata"]["labels"].get(QUEUE)
    if queue is not None:
        raise UsageError(
            f"run {name}: Kueue starts and stops what is in its queue {queue} and would undo this; "
            "expected a change of its Workload (spec.active)"
        )
    kubectl.patch("job", name, {"spec": {"suspend": on}})
    return f"{name}: {'suspended' if on else 'goes on'}"


def cancel(kubectl: Kubectl, name: str) -> str:
    """Delete the Job; its pods save before they end."""
    job = find_job(kubectl, name)
    kubectl.delete("job", name)
    return f"{name}: cancelled; the same submission goes on with {job.run_dir}"


def _live(kubectl: Kubectl, name: str) -> LiveJob:
    job = find_job(kubectl, name)
    if job.has_ended:
        raise UsageError(f"run {name}: its Job is {job.state}; submit it again to go on")
    return job
