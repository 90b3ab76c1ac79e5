"""What the Job makes of real ends: real agents and signals, the rendered policy, its controller.

Pods are processes here (`launch.k8s.localpods`); the clock of the controller's back-off is turned.
"""

import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from jobdocuments import job_document, pod_documents
from jobs import show
from shipped import rendered

from fmnist_dist.checkpoint.hint import read_hints
from fmnist_dist.errors import ExitCode
from launch.k8s.controller import Ended, JobController, Pod
from launch.k8s.live import LiveJob
from launch.k8s.localpods import LocalPods
from launch.k8s.manifest import Manifest

FLAGS = ["--batch-size=64", "--save-every-seconds=10", "--eval-every-epochs=99", "--device=cpu"]
LIMIT_SECONDS = 120.0
BACKOFF_SECONDS = 600.0  # the longest; so far does the clock go on from one look to the next

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


class Pending(LocalPods):
    """A cluster without room for some indexes."""

    def __init__(self, *given: Manifest, pending: set[int], **named: object) -> None:
        super().__init__(*given, **named)  # type: ignore[arg-type] # handed on as it is
        self._pending = pending
        self._stopped: set[Pod] = set()

    def start(self, pod: Pod) -> None:
        if pod.index not in self._pending:
            super().start(pod)

    def end_of(self, pod: Pod) -> Ended | None:
        if pod.index not in self._pending:
            return super().end_of(pod)
        return Ended(int(ExitCode.DRAINED)) if pod in self._stopped else None

    def stop(self, pod: Pod) -> None:
        if pod.index in self._pending:
            self._stopped.add(pod)
        else:
            super().stop(pod)


class Cluster:
    def __init__(self, manifest: Manifest, run: Path, pods: LocalPods) -> None:
        job = {**manifest.job, "spec": {**manifest.spec, "suspend": False}}
        self.run = run
        self.pods = pods
        self.controller = JobController(job, pods)
        self._now = 0.0

    def await_that(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what}:\n{self.pods.tail()}"
            self.controller.sync(self._now)
            self._now += BACKOFF_SECONDS
            time.sleep(0.02)

    def pod(self, *, after: Pod | None = None) -> Pod:
        """Return the pod of index 0 that runs, another one than `after`."""
        found: list[Pod] = []

        def is_there() -> bool:
            found[:] = [p for p in self.pods.running() if p.index == 0 and p is not after]
            return bool(found)

        self.await_that(is_there, "a pod")
        return found[0]

    def await_end(self) -> None:
        self.await_that(lambda: self.controller.condition is not None, "the end of the Job")

    @property
    def step(self) -> int:
        return max(
            (each.last_step for each in read_hints(self.run / "progress").values()), default=0
        )

    @property
    def outcome(self) -> tuple[str, str]:
        assert self.controller.condition is not None
        return self.controller.condition[:2]

    @property
    def verdict(self) -> int:
        return LiveJob(job_document(self.controller), pod_documents(self.controller)).verdict()[0]


@contextmanager
def cluster(
    tmp_path: Path, *, overlay: str, nodes: str, steps: int, pending: frozenset[int] = frozenset()
) -> Iterator[Cluster]:
    manifest = rendered(overlay, nodes=nodes)
    run = tmp_path / "run"
    pods = Pending(
        manifest,
        run=str(run),
        flags=[*FLAGS, f"--max-steps={steps}"],
        folder=tmp_path / "pods",
        uid="uid-1",
        pending=set(pending),
    )
    try:
        yield Cluster(manifest, run, pods)
    finally:
        pods.end()


@pytest.mark.timeout(2000)
@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_preemptions_in_a_row_do_not_fail_the_job_and_lose_nothing(
    times: int, tmp_path: Path
) -> None:
    draw = random.Random(times)
    with cluster(tmp_path, overlay="cpu-local", nodes="1:1", steps=8 * times) as watched:
        pod = None
        for number in range(times):
            pod = watched.pod(after=pod)
            log = tmp_path / "pods" / pod.name / "log"
            before = watched.step
            moments: dict[str, Callable[[], object]] = {
                "a step is finished": lambda before=before: watched.step > before,
                "it starts": lambda: True,
                "workers start": lambda log=log: "workers are started" in log.read_text(),
            }
            what = list(moments)[number] if number < len(moments) else draw.choice(list(moments))
            watched.await_that(moments[what], what)
            watched.pods.evict(pod)
            watched.await_that(lambda pod=pod: pod.name in watched.pods.codes, "its end")
            assert watched.pods.codes[pod.name] == ExitCode.DRAINED, log.read_text()
        watched.await_end()
        assert watched.outcome == ("Complete", "SuccessPolicy")
        assert watched.verdict == 0
        assert watched.controller.counted == 0
        assert watched.controller.created == times + 1
    story = show(watched.run)
    assert (story["status"], story["step"]) == ("finished", 8 * times)
    assert sum(each["lost_steps"] or 0 for each in story["attempts"]) == 0


def test_pods_that_are_killed_use_up_their_index_and_fail_the_job(tmp_path: Path) -> None:
    with cluster(tmp_path, overlay="cpu-local", nodes="1:1", steps=1000) as watched:
        allowed = watched.controller.spec["backoffLimitPerIndex"]
        pod = None
        for _ in range(allowed + 1):
            assert watched.controller.condition is None
            pod = watched.pod(after=pod)
            assert watched.pods.destroy(pod, disrupted=False)
            watched.await_that(lambda pod=pod: pod.name in watched.pods.codes, "its death")
            assert watched.pods.codes[pod.name] == 137
        watched.await_end()
        assert watched.outcome == ("Failed", "MaxFailedIndexesExceeded")
        assert watched.verdict == 137


def test_a_training_that_crashes_again_and_again_fails_the_job_by_its_own_verdict(
    tmp_path: Path,
) -> None:
    with cluster(tmp_path, overlay="cpu-local", nodes="1:1", steps=1000) as watched:
        watched.pods.manifest.trainer["env"].append(
            {"name": "FMNIST_DIST_FAULTS", "value": "forward:segv:3+"}
        )
        watched.await_end()
        assert watched.outcome == ("Failed", "PodFailurePolicy")
        assert watched.verdict == ExitCode.NO_PROGRESS
        assert watched.controller.created == 1, "the agent's own restarts were enough"
        (log,) = (tmp_path / "pods").glob("*/log")
        assert "fault: segv" in log.read_text()


@pytest.mark.slow
def test_an_index_without_a_node_does_not_hold_a_finished_job(tmp_path: Path) -> None:
    with cluster(
        tmp_path, overlay="gke-spot", nodes="1:2", steps=4, pending=frozenset({1})
    ) as watched:
        watched.pods.keep_store()
        watched.await_end()
        assert watched.outcome == ("Complete", "SuccessPolicy")
        assert watched.controller.succeeded == {0}
        assert watched.verdict == 0
