"""What there is to see of a submitted run: its Job, its pods, and the head of its log."""

import sys
import time
from typing import Any

from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.errors import FmnistDistError, TransientError
from fmnist_dist.inspection.foundrun import find_run
from fmnist_dist.inspection.page import columns
from fmnist_dist.inspection.summary import summarise
from launch.k8s.kubectl import Kubectl
from launch.k8s.live import LiveJob, find_job
from launch.k8s.manifest import INDEX

_POLL_SECONDS = 2.0
_TRIES = 10  # within a minute and a half: an API server that is upgraded is away for a while


def describe(job: LiveJob) -> dict[str, Any]:
    """Return the Job's state, its pods, and its run as seen from here."""
    condition = job.decisive or {}
    return {
        "job": job.name,
        "state": job.state,
        "reason": ": ".join(filter(None, map(condition.get, ("reason", "message")))) or None,
        "pods": {
            "wanted": job.spec["completions"],
            "active": job.status.get("active", 0),
            "ready": job.status.get("ready", 0),
            "terminating": job.status.get("terminating", 0),
            "failed": job.status.get("failed", 0),
            "failed_indexes": job.status.get("failedIndexes") or None,
        },
        "ends": [
            {"pod": each.pod, "exit_code": each.code, "message": each.message}
            for each in job.ends()
        ],
        "run": _run(job.run_dir),
    }


def _run(run_dir: str) -> dict[str, Any]:
    """Return the head of the run's log, or why it cannot be read from here."""
    try:
        found = find_run(run_dir)
        summary = summarise(found, found.history())
    except (FmnistDistError, StorageError) as error:
        return {"run": run_dir, "unreadable": str(error)}
    keys = ("run", "status", "step", "epoch", "same_bits")
    attempts = summary["attempts"]
    return {**{key: summary[key] for key in keys}, "attempts": len(attempts)}


def page(told: dict[str, Any], pods: list[dict[str, Any]]) -> str:
    """Return what `describe` tells, for people."""
    counts = told["pods"]
    active = f"{counts['active']} of {counts['wanted']} active"
    others = f"{counts['terminating']} terminating, {counts['failed']} failures counted"
    rows = [("job", f"{told['job']} ({told['state']})"), ("pods", f"{active}, {others}")]
    if told["reason"]:
        rows.append(("reason", told["reason"]))
    for pod in sorted(pods, key=lambda each: each["metadata"]["name"]):
        node = pod["spec"].get("nodeName", "no node yet")
        index = pod["metadata"].get("labels", {}).get(INDEX, "?")
        rows.append((f"  index {index}", f"{pod['status'].get('phase', '?')} on {node}"))
    rows += [
        (f"  {each['pod']}", f"exit code {each['exit_code']} {each['message']}")
        for each in told["ends"]
    ]
    run = told["run"]
    if "unreadable" in run:
        rows.append(("run", f"{run['run']} cannot be read from here: {run['unreadable']}"))
    else:
        rows.append(("run", f"{run['run']} ({run['status']}, step {run['step']})"))
        rows.append(("attempts", str(run["attempts"])))
    return columns(rows)


def wait(kubectl: Kubectl, name: str, *, limit_seconds: float | None) -> tuple[int, str]:
    """Wait until the Job has ended; return its exit code and why. Raises `TransientError`."""
    deadline = float("inf") if limit_seconds is None else time.monotonic() + limit_seconds
    job = find_job(kubectl, name)
    while not job.has_ended:
        if time.monotonic() > deadline:
            raise TransientError(f"{name}: still {job.state} after {limit_seconds:g} s")
        time.sleep(_POLL_SECONDS)
        job = _look_again(kubectl, name)
    return job.verdict()


def _look_again(kubectl: Kubectl, name: str) -> LiveJob:
    """Return a Job that was there before; a cluster that does not answer is asked a few times."""
    for attempt in range(1, _TRIES):
        try:
            return find_job(kubectl, name)
        except TransientError as error:
            print(f"warning: {error}; trying again", file=sys.stderr)
        time.sleep(_POLL_SECONDS * attempt)
    return find_job(kubectl, name)
