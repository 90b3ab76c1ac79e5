"""The drill on a rendered Kubernetes Job: its pods run as processes here and are preempted.

    python -m launch.k8s render … > job.yaml
    python -m launch.drill --job job.yaml

A model of the Job controller starts pods, replaces them and ends the Job, by the manifest's own
rules: `launch.k8s.controller`; `launch.k8s.localpods` says what is not as on a cluster. The pauses
of its back-off pass sixty times as fast.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fmnist_dist.checkpoint.place import Place
from fmnist_dist.errors import ExitCode, UsageError
from launch.k8s.controller import JobController, Pod
from launch.k8s.localpods import LocalPods
from launch.k8s.manifest import Manifest
from launch.launched import LIMIT_SECONDS, HangError, advanced, has_passed, reached
from launch.verdict import Struck, show

_HASTE = 60.0  # seconds of the controller's clock in one of ours
_POLL_SECONDS = 0.01

# What happens, and how often.
FAULTS = {
    "preempt a pod": 4,  # evicted: SIGTERM, and the condition DisruptionTarget
    "delete a pod": 2,  # kubectl delete: SIGTERM alone
    "lose a node": 4,  # nobody is told; the condition comes later
    "kill a pod": 1,  # out of memory: SIGKILL alone, and it counts
    "kill the store": 1,  # of the rendezvous, where it has a pod of its own
}
_STORE = "kill the store"
_WITH_NOTICE = {"preempt a pod", "delete a pod"}
_UID = "00000000-0000-0000-0000-000000000001"


class JobDrill:
    """The disturbed training."""

    def __init__(
        self, manifest: Path, run: Place, flags: list[str], *, folder: Path, seed: int
    ) -> None:
        self._run = run
        self._draw = random.Random(seed)
        self._noticed: list[Pod] = []
        self._killed = 0
        documents = _read(manifest)
        self.pods = LocalPods(
            documents, run=str(run), flags=flags, folder=folder / "pods", uid=_UID
        )
        job = {**documents.job, "spec": {**documents.spec, "suspend": False}}
        self.controller = JobController(job, self.pods)
        self._began = time.monotonic()

    def start(self) -> None:
        self._sync()

    def strike(self) -> Struck | None:
        """Do one fault at a random moment; None if the Job ended before."""
        possible = {n: often for n, often in FAULTS.items() if n != _STORE or self.pods.has_store}
        (what,) = self._draw.choices(list(possible), weights=list(possible.values()))
        steps = self._draw.randrange(2, 10)
        attempt, step = reached(self._run)
        self._wait_for(
            lambda: self.has_ended or has_passed(self._run, attempt, step + steps), "steps"
        )
        victims = [pod for pod in self.pods.running() if pod.is_active]
        if self.has_ended or not victims:
            return None
        victim = None if what == _STORE else self._draw.choice(victims)
        workers = _workers(self._run)
        before, began = reached(self._run), time.monotonic()
        if not (self.pods.kill_store() if victim is None else self._hit(what, victim)):
            return None if self.has_ended else self.strike()
        if victim is not None:
            self._wait_for(lambda: victim.ended is not None, "the pod's end")
        before = max(before, reached(self._run))
        self._wait_for(lambda: self.has_ended or self._goes_on(before), "the next finished step")
        return Struck(
            what=what,
            at_step=before[1],
            workers=workers,
            level="trained on" if reached(self._run)[0] == before[0] else "restarted",
            seconds=time.monotonic() - began,
            leaves_nobody=workers == 1 and what in {"lose a node", "kill a pod"},
        )

    def finish(self) -> None:
        self._wait_for(lambda: self.has_ended, "the end of the Job")

    def problems(self) -> list[str]:
        """Return what is wrong with how the Job and its pods have ended."""
        found = []
        condition = self.controller.condition
        if condition is None or condition[0] != "Complete":
            found.append(f"the Job has not completed: {condition}\n{self.pods.tail()}")
        if self.controller.counted > self._killed:
            found.append(f"{self.controller.counted} failures count, {self._killed} are its own")
        codes = {pod.name: self.pods.codes.get(pod.name) for pod in self._noticed}
        expected = {ExitCode.DRAINED, ExitCode.FINISHED}
        found += [
            f"pod {n} was asked to stop and ended with {c}"
            for n, c in codes.items()
            if c not in expected
        ]
        return found

    def end(self) -> None:
        self.pods.end()

    @property
    def has_ended(self) -> bool:
        return self.controller.condition is not None

    def _hit(self, what: str, pod: Pod) -> bool:
        """Do it to a pod; return whether something ran there."""
        if not self.pods.processes(pod):
            return False
        if what in _WITH_NOTICE:
            pod.is_deleted = True  # the API server's deletionTimestamp
            self._noticed.append(pod)
            (self.pods.evict if what == "preempt a pod" else self.pods.stop)(pod)
            return True
        disrupted = what == "lose a node"
        pod.is_deleted = disrupted  # by the pod garbage collector
        self._killed += not disrupted
        return self.pods.destroy(pod, disrupted=disrupted)

    def _goes_on(self, before: tuple[int, int]) -> bool:
        attempt, step = reached(self._run)
        return advanced(self._run) if attempt > before[0] else step >= before[1] + 2

    def _sync(self) -> None:
        self.pods.keep_store()
        self.controller.sync((time.monotonic() - self._began) * _HASTE)

    def _wait_for(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise HangError(f"waited {LIMIT_SECONDS:g} s for {what}:\n{self.pods.tail()}")
            self._sync()
            time.sleep(_POLL_SECONDS)


def _read(manifest: Path) -> Manifest:
    try:
        found = Manifest.parse(manifest.read_text())
    except OSError as error:
        raise UsageError(f"flag --job: {manifest} cannot be read: {error.strerror}") from error
    if len(found.of_kind("Job")) != 1:
        raise UsageError(
            f"flag --job: {manifest} holds no Job, or several; expected what "
            "`python -m launch.k8s render` has printed"
        )
    return found


def _workers(run: Place) -> int:
    """Return the world size of the newest attempt."""
    attempts = show(run).get("attempts")
    return int(attempts[-1]["world_size"]) if attempts else 0
