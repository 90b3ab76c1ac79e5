"""The agent as a process: the real command, or, where only its arithmetic matters, a fork.

The fork saves the two seconds in which torch is imported; all else is real: processes, signals.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from in_process import clean_environ
from jobs import LIMIT_SECONDS, ROOT, alive, reached, wait_for

# Of torch's rendezvous: a lost node is given up after 5 s instead of 15, one waits 1 s for more
# nodes instead of 30, no connection is tried for longer than 5 s instead of 60.
SHORT = "keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=1,read_timeout=5"
ALONE = ("--standalone", "--local-addr=127.0.0.1")


def environ_for(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**clean_environ(), "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def at(port: int, number: int, *, nodes: str = "1:2", conf: str = SHORT) -> tuple[str, ...]:
    """Return the flags of host `number` of those on this machine; host 1 has the store."""
    return (
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=run",
        f"--rdzv-conf=is_host={int(number == 1)},{conf}",
        f"--local-addr=127.0.0.{number}",
    )


class Agent:
    """One `python -m launch.agent`; all output goes to one file. Killed when left."""

    def __init__(
        self, folder: Path, *command: str, before: tuple[str, ...] = (), **environ: str
    ) -> None:
        number = len(list(folder.glob("agent-*.log")))
        self.log = folder / f"agent-{number}.log"
        self.message = folder / f"agent-{number}.message"
        words = [*before, sys.executable, "-m", "launch.agent", f"--termination-log={self.message}"]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [*words, *command],
                cwd=ROOT,
                env=environ_for(**environ),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        workers = self.workers() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait(LIMIT_SECONDS)
        for pid in filter(alive, workers):  # others than ours do not follow by themselves
            os.kill(pid, signal.SIGKILL)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def workers(self) -> list[int]:
        return children_of(self.process.pid)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def await_text(self, text: str, times: int = 1) -> None:
        def there() -> bool:
            return self.text().count(text) >= times or self.process.poll() is not None

        wait_for(there, f"{text!r} in the log")
        assert self.text().count(text) >= times, self.text()[-5000:]

    def await_step(self, run: Path, step: int, *, attempt: int = 0) -> None:
        """Wait until an attempt after `attempt` has finished a step."""

        def there() -> bool:
            assert self.process.poll() is None, self.text()[-5000:]
            now, last = reached(run)
            return now > attempt and last >= step

        wait_for(there, f"step {step} after attempt {attempt}")

    def end(self) -> int:
        """Wait for the end and return the exit code, below zero for a signal."""
        try:
            return self.process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end in {LIMIT_SECONDS} s:\n{self.text()[-5000:]}") from None

    def seconds_to_end(self) -> float:
        began = time.monotonic()
        self.end()
        return time.monotonic() - began

    def post_mortem(self) -> dict[str, Any]:
        return json.loads(self.message.read_text())


def children_of(parent: int, *, dead: bool = False) -> list[int]:
    """Return the living children of a process, and those that nobody has buried if asked to."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and (dead or fields[0] != "Z"):
            found.append(int(path.parent.name))
    return sorted(found)


def agent_code(folder: Path, *command: str, environ: Mapping[str, str] | None = None) -> int:
    """Run an agent in a fork, where torch is imported already; return its exit code.

    Its output goes to `folder/agent.log`, its post-mortem to `folder/message`.
    """
    from forked import fork

    import launch.agent.rounds  # noqa: F401 - once, for all forks

    def act() -> None:
        from launch.agent.life import live
        from launch.agent.notices import Notices

        output = os.open(folder / "agent.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)  # pytest's are elsewhere
        os.environ.clear()
        os.environ.update(environ_for(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", **(environ or {})))
        os._exit(live([f"--termination-log={folder / 'message'}", *command], Notices()))

    return os.waitstatus_to_exitcode(os.waitpid(fork(act), 0)[1])
