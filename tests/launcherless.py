"""Two ranks that nobody launched together: rank 0's keeper serves their store."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from alone import FLAGS
from in_process import clean_environ
from jobs import ROOT, alive, free_port


class Launcherless:
    """Both ranks, each with a log of its own."""

    def __init__(self, run: Path, *flags: str, module: str = "train_small", **environ: str) -> None:
        self.run = run
        self.logs = [run.parent / f"rank-{rank}.log" for rank in range(2)]
        self._command = [sys.executable, "-m", module, "--run-dir", str(run), *FLAGS, *flags]
        self._environ = environ
        port = free_port()
        self.processes = [self._start(rank, port) for rank in range(2)]

    def _start(self, rank: int, port: int) -> "subprocess.Popen[bytes]":
        environ = {
            **clean_environ(),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **self._environ,
        }
        with self.logs[rank].open("w") as output:
            return subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=environ,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def child(self, name: str, *, rank: int = 0) -> int:
        """Return the living child of a keeper that has this name; 0 for none."""
        keeper = self.processes[rank].pid
        for pid in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split():
            try:
                found = Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                continue
            if found == name and alive(int(pid)):
                return int(pid)
        return 0

    def store(self) -> int:
        """Return the process that serves the store."""
        return self.child("fmnist-store")

    def text(self, rank: int | None = None) -> str:
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(log.read_text() for log in logs)

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
