"""Real trainings for tests: launched by torchrun, watched through their run folder, killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from run_files import Folder

from fmnist_dist.checkpoint.hint import read_hints
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.place import Place

T = TypeVar("T")

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 600.0  # of one wait; a test has its own limit


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@dataclass
class Job:
    """One `torchrun` of `fmnist_dist.train`, in a session of its own.

    `logs` is the folder of its output; None for the one beside a run on a disk.
    """

    run: Folder | str  # on S3, its environment is this process's
    flags: list[str]
    workers: int = 2
    max_restarts: int = 20
    module: str = "fmnist_dist.train"
    logs: Path | None = None

    def start(self) -> "Job":
        self.log = log_beside(self.run, self.logs)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--local-addr=127.0.0.1", f"--nproc_per_node={self.workers}"]
        command += [f"--max-restarts={self.max_restarts}", "-m", self.module]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--run-dir", str(self.run), *self.flags],
                cwd=ROOT,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def wait(self) -> str:
        """Wait for the end and return the output; the exit code is `process.returncode`."""
        try:
            self.process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            raise AssertionError(f"no end in {LIMIT_SECONDS} s:\n{self.text()[-5000:]}") from None
        return self.text()

    def finish(self) -> str:
        text = self.wait()
        assert self.process.returncode == 0, text[-5000:]
        return text

    def text(self) -> str:
        return self.log.read_text()

    def keeper_pids(self) -> list[int]:
        """Return the live keepers (what torchrun starts, with --no-keeper it trains), by rank."""
        return self._children_of({self.process.pid})

    def trainer_pids(self) -> list[int]:
        """Return the live trainers, by rank."""
        return self._children_of(set(self.keeper_pids()), name="fmnist-trainer")

    worker_pids = keeper_pids

    def _children_of(self, parents: set[int], *, name: str | None = None) -> list[int]:
        found: dict[int, int] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
                environ = (path.parent / "environ").read_bytes().split(b"\0")
                comm = (path.parent / "comm").read_text().strip()
            except OSError:
                continue
            if int(fields[1]) in parents and fields[0] != "Z" and name in {None, comm}:
                ranks = [int(e[5:]) for e in environ if e.startswith(b"RANK=")]
                found.update({rank: int(path.parent.name) for rank in ranks})
        return [found[rank] for rank in sorted(found)]

    def kill_keeper(self, rank: int) -> int:
        """SIGKILL one keeper and return its pid, seen dead; its trainer dies with it."""
        pid = wait_for(lambda: self.keeper_pids()[rank : rank + 1], "a keeper to kill")[0]
        return _kill(pid)

    kill_worker = kill_keeper

    def kill_trainer(self, rank: int) -> int:
        """SIGKILL one trainer and return its pid, seen dead."""
        pid = wait_for(lambda: self.trainer_pids()[rank : rank + 1], "a trainer to kill")[0]
        return _kill(pid)

    def kill_all(self) -> list[int]:
        """SIGKILL the agent alone; return the workers, which must have died with it."""
        pids = [*wait_for(self.keeper_pids, "keepers"), *self.trainer_pids()]
        self.process.kill()
        self.process.wait(LIMIT_SECONDS)
        wait_for(lambda: not any(map(alive, pids)), "the workers to die with their agent")
        return pids


def _kill(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(pid), f"process {pid} to be dead")
    return pid


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal has been sent to a process that has not taken it yet."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)$", status, re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def stop(pid: int) -> None:
    """SIGSTOP a process, seen stopped."""
    os.kill(pid, signal.SIGSTOP)
    stat = Path(f"/proc/{pid}/stat")
    wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "a stopped process")


def log_beside(run: Folder | str, logs: Path | None) -> Path:
    """Return a new name for the output of a launch of `run`."""
    name = "remote" if isinstance(run, str) else run.name
    folder = run.parent if isinstance(run, Path) else logs
    assert folder is not None, "a run on object storage has no folder for logs"
    return folder / f"{name}-{time.monotonic_ns()}.log"


def reached(run: Folder | str) -> tuple[int, int]:
    """Return (newest attempt that trains, its last finished step)."""
    hints = read_hints(Place.of(str(run)).notes)
    return (max(hints), hints[max(hints)].last_step) if hints else (0, 0)


def wait_for_step(job: Job, step: int, *, attempt: int = 0) -> None:
    """Wait until an attempt after `attempt` has finished `step`."""

    def there() -> bool:
        now, last = reached(job.run)
        assert job.process.poll() is None, job.text()[-5000:]
        return now > attempt and last >= step

    wait_for(there, f"step {step} after attempt {attempt}")


def wait_for(condition: Callable[[], T], what: str) -> T:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {LIMIT_SECONDS} s for {what}"
        time.sleep(0.01)
    return value


def show(run: Folder | str) -> dict[str, Any]:
    """Return `runs show --json`."""
    shown = _runs("show", run, "--json")
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout)


def ledger(run: Folder | str) -> subprocess.CompletedProcess[str]:
    return _runs("ledger", run)


def files_of_newest(run: Folder | str) -> dict[str, str]:
    """Return the SHA-256 of every file of the newest checkpoint but its metrics since the last."""
    log = RunLog(Place.of(str(run)).storage())
    body = log.record(log.read().head.checkpoints[-1].index).body
    return {n: f.sha256 for n, f in body.files.items() if n != "metrics.jsonl"}


def _runs(command: str, run: Folder | str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fmnist_dist.runs", command, str(run), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
