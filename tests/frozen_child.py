"""Launches that their own disk stops (SIGSTOP) at one storage operation; they go on when told.

    python frozen_child.py FOLDER [unfenced]

One launch per line of stdin, `RUN OPERATION FLAG...`, over the images in FOLDER/data, each in a
fork: where torch is loaded, a training of some steps takes a tenth of a second. The answer is the
child's pid once the kernel has reported it stopped. Any line lets it go on (SIGCONT), and its wait
status is the next answer, at once for a child that was never stopped. Its stderr goes to RUN.err.
With `unfenced` children do not look whether another attempt has come: a mistake to be found.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from in_process import SmallRun, clean_environ, small_run
from run_files import kinds, saved_bytes

from fmnist_dist import limits
from fmnist_dist.checkpoint.disk import FAULTS_VARIABLE
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.distributed.process import die_with, stat_fields

THIS = Path(__file__)
LIMIT_SECONDS = 60  # of a child's life; SIGALRM ends it then
RETRY_SECONDS = 0.05  # where a sweep took a half-written save away, only the next one is fenced
NEVER_STOPPED = "never stopped"


class Server:
    """Such a process, and its answers."""

    def __init__(self, folder: Path, *mistakes: str) -> None:
        path = os.pathsep.join(str(each) for each in (THIS.parents[1], THIS.parent))
        self.process = subprocess.Popen(
            [sys.executable, THIS, str(folder), *mistakes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**clean_environ(), "PYTHONPATH": path},
        )

    def ask(self, *words: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(*words, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()


@contextmanager
def serving(folder: Path, *mistakes: str) -> Iterator[Server]:
    server = Server(folder, *mistakes)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


def state(pid: int) -> str:
    return stat_fields(pid)[0]


@dataclass(slots=True)
class Frozen:
    """A launch that is stopped, and how it ends once it is continued."""

    server: Server
    root: Path
    pid: int
    stood: list[str]  # the kinds of record that were in the log when it stopped
    before: dict[str, bytes] = field(default_factory=dict)  # the run's files when it goes on
    after: dict[str, bytes] = field(default_factory=dict)  # and when it has ended
    code: int | None = None

    @staticmethod
    def at(server: Server, run: SmallRun, operation: int, *flags: str) -> "Frozen":
        """Launch, and see it stopped before a storage operation."""
        answer = server.ask(str(run.root), str(operation), *flags)
        told = Path(f"{run.root}.err").read_text()
        assert answer != NEVER_STOPPED, told
        assert f"fault: stop at storage operation {operation} " in told
        assert state(int(answer)) == "T"
        stood = kinds(run.root) if (run.root / "log").is_dir() else []
        return Frozen(server=server, root=run.root, pid=int(answer), stood=stood)

    def thaw(self) -> None:
        """Let it go on, and see it end."""
        assert state(self.pid) == "T"
        self.before = saved_bytes(self.root)
        self.code = os.waitstatus_to_exitcode(int(self.server.ask("go on")))
        self.after = saved_bytes(self.root)


def be_launch(run: SmallRun, operation: str, flags: list[str], parent: int) -> None:
    die_with(parent)  # nobody lets it go on any more
    signal.alarm(LIMIT_SECONDS)
    os.dup2(os.open(f"{run.root}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    faults = {FAULTS_VARIABLE: f"disk:stop:{operation}"}

    def told(text: str) -> None:
        os.write(2, text.encode())

    os._exit(run.launch(*flags, environ=faults, told=told).code)


def serve(folder: Path) -> None:
    import torch._dynamo  # noqa: F401 - else every child imports it, in a second

    parent, limits.SAVE_RETRY_SECONDS = os.getpid(), RETRY_SECONDS
    with small_run(folder) as run:
        for line in sys.stdin:
            root, operation, *flags = line.split()
            child = os.fork()
            if not child:
                try:
                    be_launch(SmallRun(root=Path(root), data=run.data), operation, flags, parent)
                finally:
                    os._exit(1)  # it must not go on as a second server
            _, status = os.waitpid(child, os.WUNTRACED)
            print(child if os.WIFSTOPPED(status) else NEVER_STOPPED, flush=True)
            if os.WIFSTOPPED(status):
                sys.stdin.readline()
                os.kill(child, signal.SIGCONT)
                _, status = os.waitpid(child, 0)
            print(status, flush=True)


if __name__ == "__main__":
    if "unfenced" in sys.argv[2:]:
        RunWriter._check_fence = lambda *_: None  # type: ignore[method-assign]
    serve(Path(sys.argv[1]))
