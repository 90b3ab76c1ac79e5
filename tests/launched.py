"""Real launches of `train`: torchrun and its workers as processes, watched from outside.

Nothing here sleeps for a guessed time: `Launched.until` looks at what the processes have done, and
fails at once when they have ended instead.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from in_process import outside_environ

from fmnist_dist.checkpoint.hint import read_hints

ROOT = Path(__file__).resolve().parent.parent
_POLL_SECONDS = 0.02
_LIMIT_SECONDS = 120.0  # a start takes seconds, on a machine that others use much longer


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A process that was started, and the file that holds its stderr."""

    process: "subprocess.Popen[bytes]"
    stderr: Path

    @property
    def lines(self) -> list[str]:
        return self.stderr.read_text(errors="replace").splitlines()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds. The process must not end before it does."""
        deadline = time.monotonic() + _LIMIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, self._story("did not come so far in time")
            try:
                self.process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            assert condition(), self._story("ended too early")

    def until_step(self, root: Path, *, attempt: int, step: int) -> None:
        """Wait until an attempt has finished so many steps."""

        def reached() -> bool:
            hint = read_hints(root).get(attempt)
            return hint is not None and hint.last_step >= step

        self.until(reached)

    def ended(self, *, within: float = _LIMIT_SECONDS) -> int:
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(self._story(f"did not end within {within:g} s")) from None

    def workers(self) -> list[int]:
        """Return the ids of the workers that this launcher has started and that live."""
        return [pid for pid in _children(self.process.pid) if "fmnist_dist.train" in _command(pid)]

    def _story(self, what: str) -> str:
        return "\n".join([f"{what}; its stderr:", *self.lines[-60:]])


@contextmanager
def torchrun(*flags: str, workers: int, max_restarts: int, stderr: Path) -> Iterator[Launched]:
    """Start `torchrun … -m fmnist_dist.train FLAGS`, as README and `launch/local.sh` do."""
    own = [
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc_per_node={workers}",
        f"--max-restarts={max_restarts}",
    ]
    command = ["-m", "torch.distributed.run", *own, "-m", "fmnist_dist.train", *flags]
    with python(*command, stderr=stderr) as launched:
        yield launched


@contextmanager
def python(*arguments: str, stderr: Path, **environ: str) -> Iterator[Launched]:
    """Start Python with these arguments; whatever still runs on the way out is ended."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    variables = {**outside_environ(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environ}
    with (
        stderr.open("wb") as stream,
        subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=variables,
        ) as process,
    ):
        launched = Launched(process=process, stderr=stderr)
        try:
            yield launched
        finally:
            _end(launched)


def is_gone(pid: int) -> bool:
    """Whether a process runs no more; one that nobody has waited for yet does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in {"Z", "X"}


def _end(launched: Launched) -> None:
    if launched.process.poll() is not None:
        return
    workers = launched.workers()
    launched.process.kill()
    for pid in workers:  # by themselves they would follow, if what is tested here works
        if not is_gone(pid):
            os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    found = []
    for task in tasks.iterdir() if tasks.is_dir() else ():
        try:
            found += [int(child) for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sorted(found)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""
