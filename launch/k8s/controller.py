"""A model of Kubernetes' Job controller, for Indexed Jobs with restartPolicy Never.

Written from the controller's source, not from our manifests. Each function names what it stands
for. Files are those of pkg/controller/job in kubernetes/kubernetes: job_controller.go at
6ae037f1db84, indexed_job_utils.go at 78fc8e44052f, pod_failure_policy.go at 95f08499d652,
success_policy.go at 4a37f009ca61, backoff_utils.go at 21da0b6d5b46. Left out: finalizers and
expectations (the model sees every change at once), the limits on pods created in one pass,
activeDeadlineSeconds.

What pods do is the business of a `Kubelet`: scripted exit codes, or real processes.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

FIRST_BACKOFF_SECONDS = 10.0  # job_controller.go: DefaultJobPodFailureBackOff
LONGEST_BACKOFF_SECONDS = 600.0  # job_controller.go: MaxJobPodFailureBackOff
MAX_INT32 = 2**31 - 1


def backoff_seconds(ends: int) -> float:
    """`getRemainingTimePerIndex` of backoff_utils.go: `ends` of an index, ignored ones too."""
    doubled = min(ends - 1, 10)  # enough for the longest, and no overflow
    return min(FIRST_BACKOFF_SECONDS * 2.0**doubled, LONGEST_BACKOFF_SECONDS)


@dataclass(frozen=True, slots=True)
class Ended:
    """How the containers of a pod have ended."""

    code: int
    disrupted: bool = False  # whether the pod has the condition DisruptionTarget
    message: str = ""


@dataclass(slots=True, eq=False)
class Pod:
    """One pod of the Job; `failures` and `ignored` are its annotations."""

    name: str
    index: int
    failures: int = 0  # batch.kubernetes.io/job-index-failure-count
    ignored: int = 0  # batch.kubernetes.io/job-index-ignored-failure-count
    ended: Ended | None = None
    ended_at: float = 0.0
    is_deleted: bool = False  # has a deletionTimestamp
    is_tracked: bool = True  # has the Job's finalizer: its end will be counted

    @property
    def is_failed(self) -> bool:
        """`isPodFailed` of job_controller.go with onlyReplaceFailedPods: the phase alone counts."""
        return self.ended is not None and self.ended.code != 0

    @property
    def is_active(self) -> bool:
        return self.ended is None and not self.is_deleted

    @property
    def is_terminating(self) -> bool:
        return self.ended is None and self.is_deleted


class Kubelet(Protocol):
    """Where pods run."""

    def start(self, pod: Pod) -> None:
        """Begin to run a pod, which may stay pending for as long as it likes."""

    def end_of(self, pod: Pod) -> Ended | None:
        """Return how a pod has ended, None while it is pending, runs or terminates."""

    def stop(self, pod: Pod) -> None:
        """Ask a pod to end: it has been deleted."""


@dataclass(slots=True, eq=False)
class JobController:
    """One Job. `sync` is one pass of syncJob; call it again whenever something may have changed."""

    job: dict[str, Any]
    kubelet: Kubelet
    pods: list[Pod] = field(default_factory=list)
    succeeded: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    counted: int = 0  # .status.failed: failures that no rule ignores
    created: int = 0
    target: tuple[str, str, str] | None = None  # interim condition: type, reason, message
    condition: tuple[str, str, str] | None = None  # Complete or Failed, once it has ended

    def __post_init__(self) -> None:
        spec = self.spec
        assert spec["completionMode"] == "Indexed"
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
        assert "activeDeadlineSeconds" not in spec

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.job["spec"]
        return spec

    def sync(self, now: float) -> None:
        """`syncJob` of job_controller.go."""
        if self.condition is not None:
            return
        self._observe(now)
        if self.target is None:
            self.target = self._fail_job() or self._past_backoff_limit()
        fresh = [pod for pod in self.pods if pod.is_tracked and pod.ended is not None]
        self.succeeded |= {p.index for p in fresh if not p.is_failed and self._is_valid(p)}
        if "backoffLimitPerIndex" in self.spec:
            self.failed |= {p.index for p in fresh if self._is_valid(p) and self._fails_index(p)}
            if self.target is None:
                self.target = self._past_failed_indexes()
        if self.target is None:
            self.target = self._success_policy()
        if self.target is None:
            self._manage(now)
            active = any(pod.is_active for pod in self.pods)
            if len(self.succeeded) >= self.spec["completions"] and not active:
                self.target = ("SuccessCriteriaMet", "CompletionsReached", "")
        else:
            self._delete_active()
        self._count(fresh)
        # enactJobFinished: not before all pods have terminated.
        if self.target is not None and not any(pod.is_terminating for pod in self.pods):
            kind = "Complete" if self.target[0] == "SuccessCriteriaMet" else "Failed"
            self.condition = (kind, *self.target[1:])

    def _delete_active(self) -> None:
        """deleteActivePods: with their finalizers, since their ends are still counted."""
        for pod in self.pods:
            if pod.is_active:
                self._delete(pod)

    def _observe(self, now: float) -> None:
        for pod in self.pods:
            if pod.ended is None and (ended := self.kubelet.end_of(pod)) is not None:
                pod.ended, pod.ended_at = ended, now

    def _is_valid(self, pod: Pod) -> bool:
        return bool(pod.index < self.spec["completions"])

    def match(self, ended: Ended) -> tuple[bool, str | None, int]:
        """`matchPodFailurePolicy` of pod_failure_policy.go: is it counted, by which rule.

        `getMatchingContainerFromList` never matches exit code 0; `matchOnPodConditions` wants both
        type and status to be equal.
        """
        names = [each["name"] for each in self.spec["template"]["spec"]["containers"]]
        for number, rule in enumerate(self.spec.get("podFailurePolicy", {}).get("rules", ())):
            codes = rule.get("onExitCodes")
            if codes is not None:
                named = codes.get("containerName") in {None, names[0]}
                within = ended.code in codes["values"]
                hit = named and ended.code != 0 and within == (codes["operator"] == "In")
            else:
                pattern = {"type": "DisruptionTarget", "status": "True"}
                hit = ended.disrupted and pattern in rule.get("onPodConditions", ())
            if hit:
                return rule["action"] != "Ignore", rule["action"], number
        return True, None, -1

    def _fail_job(self) -> tuple[str, str, str] | None:
        """`getFailJobMessage` of job_controller.go: any pod that is there, however old."""
        for pod in self.pods:
            if pod.ended is not None and pod.is_failed:
                _, action, number = self.match(pod.ended)
                if action == "FailJob":
                    name = self.spec["template"]["spec"]["containers"][0]["name"]
                    said = (
                        f"Container {name} for pod ns/{pod.name} failed with exit code "
                        f"{pod.ended.code} matching FailJob rule at index {number}"
                    )
                    return ("FailureTarget", "PodFailurePolicy", said)
        return None

    def _past_backoff_limit(self) -> tuple[str, str, str] | None:
        """`exceedsBackoffLimit` of syncJob; its default is SetDefaults_Job of pkg/apis/batch/v1."""
        default = MAX_INT32 if "backoffLimitPerIndex" in self.spec else 6
        fresh = sum(
            self.match(pod.ended)[0]
            for pod in self.pods
            if pod.is_tracked and pod.ended is not None and pod.is_failed
        )
        if self.counted + fresh > self.spec.get("backoffLimit", default):
            said = "Job has reached the specified backoff limit"
            return ("FailureTarget", "BackoffLimitExceeded", said)
        return None

    def _fails_index(self, pod: Pod) -> bool:
        """`isIndexFailed` of indexed_job_utils.go."""
        if pod.ended is None or not pod.is_failed:
            return False
        is_counted, action, _ = self.match(pod.ended)
        spent = pod.failures >= self.spec["backoffLimitPerIndex"]
        return action == "FailIndex" or (is_counted and spent)

    def _past_failed_indexes(self) -> tuple[str, str, str] | None:
        """What syncJob asks before it looks at the success policy."""
        allowed = self.spec.get("maxFailedIndexes")
        if allowed is not None and len(self.failed) > allowed:
            said = "Job has exceeded the specified maximal number of failed indexes"
            return ("FailureTarget", "MaxFailedIndexesExceeded", said)
        if self.failed and len(self.failed) + len(self.succeeded) >= self.spec["completions"]:
            return ("FailureTarget", "FailedIndexes", "Job has failed indexes")
        return None

    def _success_policy(self) -> tuple[str, str, str] | None:
        """`matchSuccessPolicy` of success_policy.go, for rules without succeededIndexes."""
        for number, rule in enumerate(self.spec.get("successPolicy", {}).get("rules", ())):
            assert "succeededIndexes" not in rule, "not modelled"
            if self.succeeded and len(self.succeeded) >= rule["succeededCount"]:
                said = f"Matched rules at index {number}"
                return ("SuccessCriteriaMet", "SuccessPolicy", said)
        return None

    def _manage(self, now: float) -> None:
        """`manageJob` of job_controller.go."""
        active = [pod for pod in self.pods if pod.is_active]
        if self.spec.get("suspend", False):
            self._remove(active)
            return
        wanted = max(
            0, min(self.spec["completions"] - len(self.succeeded), self.spec["parallelism"])
        )
        # activePodsForRemoval: first those beyond the range, then any.
        beyond = [pod for pod in active if not self._is_valid(pod)]
        within = [pod for pod in active if self._is_valid(pod)]
        surplus = max(0, len(active) - wanted - len(beyond))
        if beyond or surplus:
            self._remove(beyond + within[:surplus])
            return
        terminating = sum(pod.is_terminating for pod in self.pods)
        for index in self._pending_indexes()[: max(0, wanted - terminating - len(active))]:
            former = self._last_failed(index)
            if former is None or now - former.ended_at >= backoff_seconds(
                former.failures + former.ignored + 1
            ):
                self._create(index, former)

    def _pending_indexes(self) -> list[int]:
        """`firstPendingIndexes` of indexed_job_utils.go; a terminating pod keeps its index."""
        taken = {pod.index for pod in self.pods if pod.is_active or pod.is_terminating}
        taken |= self.succeeded | self.failed
        return [each for each in range(self.spec["completions"]) if each not in taken]

    def _last_failed(self, index: int) -> Pod | None:
        """`getPodsWithDelayedDeletionPerIndex` of indexed_job_utils.go."""
        failed = [
            pod for pod in self.pods if pod.index == index and pod.is_failed and pod.is_tracked
        ]
        return max(failed, key=lambda pod: (pod.failures + pod.ignored, pod.ended_at), default=None)

    def _create(self, index: int, former: Pod | None) -> None:
        """`CreatePodsWithGenerateName`, and `getNewIndexFailureCounts` of indexed_job_utils.go."""
        self.created += 1
        pod = Pod(f"{self.job['metadata']['name']}-{index}-{self.created}", index)
        if former is not None and former.ended is not None:
            is_counted = self.match(former.ended)[0]
            pod.failures = former.failures + is_counted
            pod.ignored = former.ignored + (not is_counted)
            self.pods.remove(former)  # its finalizer goes, now that its count is handed on
            self.counted += is_counted
        self.pods.append(pod)
        self.kubelet.start(pod)

    def _remove(self, pods: list[Pod]) -> None:
        """deleteJobPods: without the finalizer, so nothing of their end is counted."""
        for pod in pods:
            pod.is_tracked = False
            self._delete(pod)

    def _delete(self, pod: Pod) -> None:
        pod.is_deleted = True
        self.kubelet.stop(pod)

    def _count(self, fresh: list[Pod]) -> None:
        """trackJobStatusAndRemoveFinalizers: all but the last failed pod of an index to replace."""
        for pod in fresh:
            waits = pod.is_failed and self.target is None and pod.index not in self.failed
            if pod.ended is None or (waits and self._is_valid(pod)) or not pod.is_tracked:
                continue
            pod.is_tracked = False
            if pod.is_failed:
                self.counted += self.match(pod.ended)[0]
        self.pods = [
            p for p in self.pods if p.is_tracked or p.ended is None or self.target is not None
        ]
