"""What Kubernetes makes of exit codes: the rendered policy, under a model of its controller."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from jobdocuments import job_document, pod_documents

from fmnist_dist.errors import ExitCode
from launch.k8s.controller import Ended, JobController, Pod
from launch.k8s.live import LiveJob
from launch.k8s.manifest import Document
from launch.k8s.render import render
from launch.k8s.request import K8S, Request

OVERLAYS = sorted(each.name for each in (K8S / "overlays").iterdir())
DAY = 86400.0
PREEMPTED = Ended(143, disrupted=True)
DELETED = Ended(143)
KILLED_BY_THE_NODE = Ended(137, disrupted=True)

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@cache
def job_of(overlay: str, nodes: str) -> Document:
    image = f"registry/fmnist-dist@sha256:{'a' * 64}"
    request = Request(overlay=overlay, image=image, run_dir="s3://bucket/run", nodes=nodes)
    job = render(request, []).job
    job["spec"]["suspend"] = False
    return job


@dataclass
class Scripted:
    """Pods that end as a function says; `None` is still running, or pending."""

    script: Callable[[Pod], Ended | None]
    started: list[Pod] = field(default_factory=list)
    stopped: list[Pod] = field(default_factory=list)

    def start(self, pod: Pod) -> None:
        self.started.append(pod)

    def end_of(self, pod: Pod) -> Ended | None:
        return Ended(143) if pod in self.stopped else self.script(pod)

    def stop(self, pod: Pod) -> None:
        self.stopped.append(pod)


@dataclass
class Cluster:
    """A Job, and a clock that goes on by a minute between two passes of its controller."""

    controller: JobController
    kubelet: Scripted
    now: float = 0.0

    def pass_time(self, *, seconds: float = DAY, until: Callable[[], bool] | None = None) -> None:
        end = self.now + seconds
        while self.now < end and not (until and until()):
            self.controller.sync(self.now)
            self.now += 60

    @property
    def outcome(self) -> tuple[str, str] | None:
        condition = self.controller.condition
        return None if condition is None else condition[:2]

    @property
    def verdict(self) -> tuple[int, str]:
        return LiveJob(job_document(self.controller), pod_documents(self.controller)).verdict()


def cluster(
    script: Callable[[Pod], Ended | None],
    *,
    overlay: str = "eks-spot-karpenter",
    nodes: str = "1:2",
    **changed: Any,
) -> Cluster:
    job = copy.deepcopy(job_of(overlay, nodes))
    job["spec"] |= changed
    kubelet = Scripted(script)
    return Cluster(JobController(job, kubelet), kubelet)


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("how", [PREEMPTED, DELETED, KILLED_BY_THE_NODE, Ended(79)])
def test_fifty_preemptions_in_a_row_do_not_fail_the_job(overlay: str, how: Ended) -> None:
    ends: list[Pod] = []

    def script(pod: Pod) -> Ended | None:
        if pod.index == 0 and pod.ignored >= 50:
            return Ended(0)
        if pod.index == 0:
            ends.append(pod)
            return how
        return None  # trains on

    watched = cluster(script, overlay=overlay)
    watched.pass_time()
    assert len(ends) == 50
    assert watched.outcome == ("Complete", "SuccessPolicy")
    assert watched.controller.counted == 0
    assert watched.verdict[0] == ExitCode.FINISHED


def test_replacements_wait_ten_minutes_at_last_though_no_preemption_is_counted() -> None:
    """Kubernetes' own back-off: the reason why what survives must not wait for it."""
    times: list[float] = []

    def script(pod: Pod) -> Ended | None:
        if pod.index:
            return None
        times.append(watched.now)
        return PREEMPTED

    watched = cluster(script)
    watched.pass_time(until=lambda: len(times) > 20)
    waits = [after - before for before, after in pairwise(times)]
    assert waits[0] <= 120
    assert waits[-1] == pytest.approx(600, abs=60)


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("code", [64, 65, 70, 76, 78])
def test_the_users_own_faults_fail_the_job_at_once(overlay: str, code: int) -> None:
    watched = cluster(lambda pod: Ended(code) if pod.index == 0 else None, overlay=overlay)
    watched.pass_time()
    assert watched.outcome == ("Failed", "PodFailurePolicy")
    assert len(watched.kubelet.started) == 2, "nothing is started again"
    assert [pod.index for pod in watched.kubelet.stopped] == [1]
    assert watched.verdict[0] == code


def test_an_own_fault_fails_the_job_though_the_pod_was_also_preempted() -> None:
    watched = cluster(lambda pod: Ended(78, disrupted=True) if pod.index == 0 else None)
    watched.pass_time()
    assert watched.outcome == ("Failed", "PodFailurePolicy")


@pytest.mark.parametrize("code", [1, 75, 134, 137, 139])
def test_a_crash_loop_fails_the_job_after_its_budget(code: int) -> None:
    watched = cluster(lambda _: Ended(code), nodes="2:2")
    watched.pass_time()
    assert watched.outcome == ("Failed", "MaxFailedIndexesExceeded")
    starts = [pod.index for pod in watched.kubelet.started]
    assert max(starts.count(0), starts.count(1)) == 11, "the first one, and ten more"
    assert watched.verdict[0] == code


def test_preemptions_between_two_crashes_do_not_use_up_the_budget() -> None:
    def script(pod: Pod) -> Ended | None:
        if pod.index == 1:
            return None
        return Ended(137) if (pod.failures + pod.ignored) % 2 else PREEMPTED

    watched = cluster(script, nodes="2:2")
    watched.pass_time(until=lambda: watched.outcome is not None)
    assert watched.outcome == ("Failed", "MaxFailedIndexesExceeded")
    assert len([pod for pod in watched.kubelet.started if pod.index == 0]) == 22


def test_a_pod_that_cannot_come_back_ends_the_job_only_below_the_smallest_world() -> None:
    lost = {2}
    watched = cluster(lambda pod: Ended(1) if pod.index in lost else None, nodes="2:3")
    watched.pass_time()
    assert watched.outcome is None
    assert watched.controller.failed == {2}
    lost.add(1)
    watched.pass_time()
    assert watched.outcome == ("Failed", "MaxFailedIndexesExceeded")
    assert [pod.index for pod in watched.kubelet.stopped] == [0]
    assert watched.verdict[0] == 1, "not 143, which the survivor ends with because of the failure"


@pytest.mark.parametrize("later", [PREEMPTED, KILLED_BY_THE_NODE, Ended(79)])
def test_the_verdict_is_a_fault_and_no_preemption_that_came_later(later: Ended) -> None:
    watched = cluster(lambda _: Ended(139), nodes="2:2")
    watched.pass_time()
    assert watched.outcome == ("Failed", "MaxFailedIndexesExceeded")
    watched.controller.pods.append(Pod("run-0-99", 0, ended=later, ended_at=watched.now))
    assert watched.verdict[0] == 139


def test_where_no_pod_is_left_the_verdict_blames_nobody() -> None:
    watched = cluster(lambda _: Ended(139), nodes="2:2")
    watched.pass_time()
    watched.controller.pods.clear()
    code, line = watched.verdict
    assert (code, "failed, no pod is left that says why; MaxFailedIndexes" in line) == (1, True)


def test_a_pending_pod_cannot_hold_a_finished_job() -> None:
    done = False
    watched = cluster(lambda pod: Ended(0) if done and pod.index == 0 else None, nodes="1:3")
    watched.pass_time(seconds=600)
    assert watched.outcome is None
    done = True
    watched.pass_time(seconds=600)
    assert watched.outcome == ("Complete", "SuccessPolicy")
    assert {pod.index for pod in watched.kubelet.stopped} == {1, 2}


def test_without_the_success_policy_a_pending_pod_would_hold_it() -> None:
    watched = cluster(lambda pod: Ended(0) if pod.index == 0 else None, successPolicy={})
    watched.pass_time()
    assert watched.outcome is None


def test_a_pod_that_does_not_end_holds_its_index_until_somebody_deletes_it() -> None:
    watched = cluster(lambda _: None)
    watched.pass_time(seconds=600)
    ghost = watched.kubelet.started[0]
    ghost.is_deleted = True  # its node is gone: nobody says that it has ended
    watched.pass_time()
    assert len(watched.kubelet.started) == 2
    watched.kubelet.stopped.append(ghost)  # kubectl delete pod --force
    watched.pass_time(seconds=600)
    assert [pod.index for pod in watched.kubelet.started] == [0, 1, 0]


def test_kubernetes_calls_a_finished_run_failed_where_an_index_had_given_up_before() -> None:
    done = False

    def script(pod: Pod) -> Ended | None:
        if pod.index == 1:
            return Ended(137)
        return Ended(0) if done else None

    watched = cluster(script)
    watched.pass_time()
    assert watched.controller.failed == {1}
    done = True
    watched.pass_time(seconds=600)
    assert watched.outcome == ("Failed", "FailedIndexes")
    code, line = watched.verdict
    assert code == ExitCode.FINISHED, "exit code 0 says that the end of the run is durable"
    assert "finished (index 0 has exited 0), though Kubernetes calls the Job failed" in line


def test_what_is_scaled_down_or_suspended_is_not_counted_and_comes_back() -> None:
    watched = cluster(lambda _: None, nodes="1:3")
    watched.pass_time(seconds=600)
    spec = watched.controller.spec
    spec |= {"completions": 2, "parallelism": 2, "maxFailedIndexes": 1}
    watched.pass_time(seconds=600)
    assert [pod.index for pod in watched.kubelet.stopped] == [2]
    spec["suspend"] = True
    watched.pass_time(seconds=600)
    assert {pod.index for pod in watched.kubelet.stopped} == {0, 1, 2}
    spec |= {"completions": 3, "parallelism": 3, "maxFailedIndexes": 2, "suspend": False}
    watched.pass_time(seconds=600)
    assert sorted(pod.index for pod in watched.kubelet.started) == [0, 0, 1, 1, 2, 2]
    assert watched.controller.counted == 0
    assert watched.outcome is None


def test_a_policy_without_disruptions_is_used_up_by_them() -> None:
    rules = job_of("gke-spot", "2:2")["spec"]["podFailurePolicy"]["rules"]
    watched = cluster(
        lambda _: KILLED_BY_THE_NODE,
        nodes="2:2",
        podFailurePolicy={"rules": [each for each in rules if "onExitCodes" in each]},
    )
    watched.pass_time()
    assert watched.outcome == ("Failed", "MaxFailedIndexesExceeded")
