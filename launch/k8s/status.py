"""What there is to see of a submitted run: its Job, its pods, and the head of its log."""

import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.errors import Drained, FmnistDistError, TransientError
from fmnist_dist.inspection.foundrun import find_run
from fmnist_dist.inspection.page import columns
from fmnist_dist.inspection.summary import summarise
from launch.k8s.kubectl import Kubectl
from launch.k8s.live import LiveJob, find_job, job_called, with_pods
from launch.k8s.manifest import INDEX

T = TypeVar("T")

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
    """Wait until the Job has ended; return its exit code and why.

    Raises `TransientError` where it has not within the limit, `Drained` where it is deleted.
    """
    deadline = float("inf") if limit_seconds is None else time.monotonic() + limit_seconds
    job = find_job(kubectl, name)
    while not job.has_ended:
        if time.monotonic() > deadline:
            raise TransientError(f"{name}: still {job.state} after {limit_seconds:g} s")
        time.sleep(_POLL_SECONDS)
        seen = _patiently(lambda: job_called(kubectl, name), deadline)
        if seen is None or seen.uid != job.uid:
            raise Drained(
                f"{name}: its Job was deleted before it had ended; the same submission goes on "
                f"with {job.run_dir}"
            )
        job = seen
    return _patiently(lambda: with_pods(kubectl, job), deadline).verdict()


def _patiently(ask: Callable[[], T], deadline: float) -> T:
    """Ask a cluster that has answered before; one that does not is asked a few times more."""
    for attempt in range(1, _TRIES):
        try:
            return ask()
        except TransientError as error:
            if time.monotonic() > deadline:
                raise
            print(f"warning: {error}; trying again", file=sys.stderr)
        time.sleep(_POLL_SECONDS * attempt)
    return ask()
