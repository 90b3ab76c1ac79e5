"""A launch of the training as a user would type it, watched from outside by its run's hints."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fmnist_dist.checkpoint.hint import read_hints
from fmnist_dist.checkpoint.place import Place

LIMIT_SECONDS = 180.0  # of one wait: what takes longer hangs
DEAD = {"", "Z", "X"}  # what `state` says of a process that runs nothing any more
_POLL_SECONDS = 0.002
_ROOT = Path(__file__).resolve().parents[1]


class HangError(Exception):
    """Something that must happen within its limit did not."""


class Launched:
    """One `torchrun` with its keepers and trainers."""

    def __init__(self, run: Place, flags: list[str], *, workers: int, log: Path) -> None:
        self.run = run
        self.workers = workers
        self.log = log
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={workers}", "--max-restarts=100", "-m", "fmnist_dist.train"]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        with log.open("a") as output:
            self.agent = subprocess.Popen(
                [*command, "--run-dir", str(run), *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                start_new_session=True,
            )

    @property
    def has_ended(self) -> bool:
        return self.agent.poll() is not None

    def keepers(self) -> list[int]:
        return children(self.agent.pid, "fmnist-keeper")

    def trainers(self) -> list[int]:
        return [each for keeper in self.keepers() for each in children(keeper, "fmnist-trainer")]

    def processes(self) -> list[int]:
        """Return the agent and all that it has started, trainers' spares among them."""
        found = [self.agent.pid]
        for process in found:
            found += children(process)
        return found

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """Return what `condition` returns once it is true. Raises `HangError`."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise HangError(f"waited {LIMIT_SECONDS:g} s for {what}:\n{self.tail()}")
            time.sleep(_POLL_SECONDS)
        return value

    def await_end(self, what: str) -> None:
        self.wait_for(lambda: self.has_ended, what)

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def end(self) -> None:
        """Leave no process behind; workers die with their agent."""
        for process in (*self.trainers(), *self.keepers(), self.agent.pid):
            kill(process, signal.SIGCONT)
        if not self.has_ended:
            self.agent.kill()
            self.agent.wait(LIMIT_SECONDS)


def reached(run: Place) -> tuple[int, int]:
    """Return the newest attempt that has trained, and its last finished step."""
    hints = read_hints(run.notes)
    return (max(hints), hints[max(hints)].last_step) if hints else (0, -1)


def has_passed(run: Place, attempt: int, step: int) -> bool:
    """Whether a run has finished a step, or a later attempt goes on."""
    now = reached(run)
    return now[0] > attempt or now[1] >= step


def advanced(run: Place) -> bool:
    """Whether the newest attempt has finished a step of its own."""
    hints = read_hints(run.notes)
    newest = hints[max(hints)]
    return newest.last_step > newest.first_step


def kill(process: int, number: signal.Signals) -> bool:
    """Send a signal; return whether a living process got it."""
    if state(process) in DEAD:
        return False
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True


def state(process: int) -> str:
    """Return the letter of /proc/PID/stat; "" for no process."""
    return _read(Path(f"/proc/{process}/stat")).rpartition(")")[2][1:2]


def children(parent: int, name: str | None = None) -> list[int]:
    """Return the living children of a process, of that name if one is given."""
    found: list[int] = []
    try:
        tasks = list(Path(f"/proc/{parent}/task").iterdir())
    except OSError:  # it has ended
        return found
    for task in tasks:
        for child in map(int, _read(task / "children").split()):
            comm = _read(Path(f"/proc/{child}/comm")).strip()
            if name in {None, comm} and state(child) not in DEAD:
                found.append(child)
    return sorted(found)


def _read(path: Path) -> str:
    """Return what /proc says; "" for a thread or process that has ended meanwhile."""
    try:
        return path.read_text()
    except OSError:
        return ""
