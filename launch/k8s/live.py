"""A Job as the cluster holds it: what state it is in, and with which exit code it has ended."""

import json
import re
from dataclasses import dataclass
from typing import Any

from fmnist_dist.errors import ExitCode, UsageError
from launch.k8s.kubectl import Kubectl
from launch.k8s.manifest import (
    APP,
    INDEX,
    JOB_NAME,
    NAME,
    RUN_DIR,
    RUN_ID,
    TRAINER,
    Document,
    Manifest,
)
from launch.k8s.rules.ends import FAIL_CODES, IGNORED_CODES

_POLICY_CODE = re.compile(r"failed with exit code (\d+) matching")
# By the conditions of the Job, those first that say more; pods still end after the first of two.
_STATES = {
    "Complete": "complete",
    "Failed": "failed",
    "SuccessCriteriaMet": "completing",
    "FailureTarget": "failing",
    "Suspended": "suspended",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one pod's trainer has ended."""

    pod: str
    code: int
    at: str
    message: str  # its post-mortem, or the end of its log
    is_disrupted: bool  # has the condition DisruptionTarget

    @property
    def is_fault(self) -> bool:
        """Whether `podFailurePolicy` holds it against the Job."""
        if self.is_disrupted:
            return self.code in FAIL_CODES
        return self.code not in {int(ExitCode.FINISHED), *IGNORED_CODES}


@dataclass(frozen=True, slots=True)
class LiveJob:
    """One Job, with the pods that are left of it."""

    document: Document
    pods: list[Document]

    @property
    def name(self) -> str:
        return str(self.document["metadata"]["name"])

    @property
    def uid(self) -> str:
        return str(self.document["metadata"]["uid"])

    @property
    def run_dir(self) -> str:
        return str(self.document["metadata"].get("annotations", {}).get(RUN_DIR, ""))

    @property
    def spec(self) -> Document:
        spec: Document = self.document["spec"]
        return spec

    @property
    def status(self) -> Document:
        status: Document = self.document.get("status", {})
        return status

    def condition(self, kind: str) -> Document | None:
        """Return a condition of the Job that is true."""
        return condition_of(self.document, kind)

    @property
    def has_ended(self) -> bool:
        return self.condition("Complete") is not None or self.condition("Failed") is not None

    @property
    def manifest(self) -> Manifest:
        return Manifest([self.document])

    @property
    def decisive(self) -> Document | None:
        """Return the condition that says most about the Job; None for one that runs."""
        return next((c for kind in _STATES if (c := self.condition(kind)) is not None), None)

    @property
    def state(self) -> str:
        if not self.has_ended and "deletionTimestamp" in self.document["metadata"]:
            return "being deleted"
        if (condition := self.decisive) is not None:
            return _STATES[condition["type"]]
        return "suspended" if self.spec.get("suspend") else "running"

    def ends(self) -> list[Ended]:
        """Return how trainers have ended whose pods are still there, oldest first."""
        found = [each for pod in self.pods if (each := _end_of(pod)) is not None]
        return sorted(found, key=lambda each: each.at)

    def verdict(self) -> tuple[int, str]:
        """Return the exit code of a Job that has ended, and a line that says why.

        A pod that exits 0 has seen the run's end become durable, so the run is finished also where
        Kubernetes calls the Job failed: it does so if an index had used up its allowance before
        and all others end at the same moment.
        """
        failed = self.condition("Failed")
        if failed is None:
            return int(ExitCode.FINISHED), f"{self.name}: finished"
        if self.status.get("completedIndexes"):
            return int(ExitCode.FINISHED), (
                f"{self.name}: finished (index {self.status['completedIndexes']} has exited 0), "
                f"though Kubernetes calls the Job failed: {failed.get('reason')}"
            )
        said = f"{failed.get('reason')}: {failed.get('message')}"
        if matched := _POLICY_CODE.search(failed.get("message", "")):
            code = int(matched[1])
        else:  # the last fault: what survives is stopped, and ends later
            faults = [each for each in self.ends() if each.is_fault]
            if not faults:
                return int(
                    ExitCode.BUG
                ), f"{self.name}: failed, no pod is left that says why; {said}"
            code = faults[-1].code
        told = next((each for each in reversed(self.ends()) if each.code == code), None)
        line = f"{self.name}: failed with {_named(code)}; {said}"
        return code, f"{line}; pod {told.pod}: {told.message}" if told and told.message else line


def find_job(kubectl: Kubectl, name: str) -> LiveJob:
    """Return a Job of ours with its pods. Raises `UsageError`, with ours, where there is none."""
    job = job_called(kubectl, name)
    if job is None:
        there = sorted(each.name for each in all_jobs(kubectl))
        raise UsageError(
            f"run {name}: there is no such Job in namespace {kubectl.namespace}, found "
            f"{', '.join(there) or 'none of ours'}"
        )
    return with_pods(kubectl, job)


def with_pods(kubectl: Kubectl, job: LiveJob) -> LiveJob:
    return LiveJob(job.document, kubectl.all("pods", selector=f"{JOB_NAME}={job.name}"))


def job_called(kubectl: Kubectl, name: str) -> LiveJob | None:
    """Return our Job of a name, without its pods. Raises `UsageError` if it is somebody else's.

    Others may have Jobs in the namespace, which nothing here may suspend or delete.
    """
    document = kubectl.get("job", name)
    if document is None:
        return None
    labels = document["metadata"].get("labels", {})
    if labels.get(APP) != NAME or RUN_ID not in labels:
        raise UsageError(
            f"run {name}: the Job of this name in namespace {kubectl.namespace} is not one of ours,"
            f" expected the labels {APP}={NAME} and {RUN_ID}"
        )
    return LiveJob(document, [])


def all_jobs(kubectl: Kubectl) -> list[LiveJob]:
    """Return our Jobs of a namespace, without their pods."""
    return [LiveJob(each, []) for each in kubectl.all("jobs", selector=f"{APP}={NAME}")]


def rivals(kubectl: Kubectl, *, run_id: str, run_dir: str) -> list[LiveJob]:
    """Return the Jobs that have a run and have not ended."""
    return [
        each
        for each in all_jobs(kubectl)
        if not each.has_ended
        and (
            each.document["metadata"]["labels"].get(RUN_ID) == run_id
            or each.run_dir.rstrip("/") == run_dir.rstrip("/")
        )
    ]


def index_of(pod: Document) -> int | None:
    """Return the completion index of a pod; None of one that is not of an Indexed Job."""
    index = pod["metadata"].get("labels", {}).get(INDEX)
    return None if index is None else int(index)


def indexes(text: str | None) -> set[int]:
    """Return what the server writes as `1,3-5`."""
    ranges = [each.partition("-") for each in (text or "").split(",") if each]
    return {n for low, _, high in ranges for n in range(int(low), int(high or low) + 1)}


def condition_of(document: Document, kind: str) -> Document | None:
    conditions: list[Document] = document.get("status", {}).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), None)


def _end_of(pod: Document) -> Ended | None:
    statuses: list[Document] = pod.get("status", {}).get("containerStatuses", [])
    for each in statuses:
        ended: Any = each.get("state", {}).get("terminated")
        if each["name"] == TRAINER and ended is not None:
            name = pod["metadata"]["name"]
            at = ended.get("finishedAt") or ""
            return Ended(
                pod=name,
                code=int(ended["exitCode"]),
                at=at,
                message=_line_of(ended.get("message", "")),
                is_disrupted=condition_of(pod, "DisruptionTarget") is not None,
            )
    return None


def _line_of(message: str) -> str:
    """Return one line of a termination message: the agent's post-mortem is JSON, logs are not."""
    try:
        told = json.loads(message)
    except ValueError:
        told = None
    if isinstance(told, dict):
        named = [str(told[key]) for key in ("reason", "message", "error") if told.get(key)]
        return "; ".join(named) or message.strip()
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _named(code: int) -> str:
    known = {int(each): each.name for each in ExitCode}
    return f"exit code {code}" + (f" ({known[code]})" if code in known else "")
