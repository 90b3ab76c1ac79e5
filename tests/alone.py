"""A training with a keeper as a process of its own: a world of one that nobody launched.

Its exit code is the real one, which a bare torchrun hides.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Self

from in_process import clean_environ
from jobs import LIMIT_SECONDS, ROOT, alive, files_of_newest, log_beside, reached, wait_for
from run_files import Folder

from fmnist_dist.checkpoint.hint import read_hints
from fmnist_dist.checkpoint.place import Place

FLAGS = ["--batch-size=64", "--save-every-seconds=none", "--device=cpu"]


class Alone:
    """One `python -m train_small`; stdout and stderr go to one file. Killed when left.

    `logs` is the folder of that file, for a run on object storage.
    """

    def __init__(
        self, run: Folder | str, *flags: str, logs: Path | None = None, **environ: str
    ) -> None:
        self.run = run
        self.before = reached(run)[0]  # the attempts that there were
        self.log = log_beside(run, logs)
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "train_small", "--run-dir", str(run), *FLAGS, *flags],
                cwd=ROOT,
                env={**clean_environ(), "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environ},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # the trainer follows
        self.process.wait()

    def text(self) -> str:
        return self.log.read_text()

    def await_steps(self, number: int) -> None:
        """Wait until this launch has finished so many steps of its own."""

        def there() -> bool:
            assert self.process.poll() is None, self.text()[-5000:]
            attempt, last = reached(self.run)
            return attempt > self.before and last >= self.first_step() + number

        wait_for(there, f"{number} steps")

    def first_step(self) -> int:
        return read_hints(Place.of(str(self.run)).notes)[self.before + 1].first_step

    def trainer(self) -> int:
        """Return the living trainer."""

        def find() -> int:
            task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            for child in task.read_text().split():
                comm = Path(f"/proc/{child}/comm")
                if comm.exists() and comm.read_text().strip() == "fmnist-trainer":
                    return int(child) if alive(int(child)) else 0
            return 0

        return wait_for(find, "a trainer")

    def await_text(self, text: str, times: int = 1) -> None:
        wait_for(
            lambda: self.text().count(text) >= times or self.process.poll() is not None,
            f"{text!r} in the log",
        )
        assert self.text().count(text) >= times, self.text()[-3000:]

    def end(self) -> tuple[int, str]:
        """Wait for the end; return exit code and output."""
        try:
            code = self.process.wait(LIMIT_SECONDS)
        finally:
            self.process.kill()
        return code, self.text()


def files_of_undisturbed(folder: Path, *flags: str) -> dict[str, str]:
    """Train in a new folder, in a world of one; return the files of the newest checkpoint."""
    run = folder / "run"
    code, text = Alone(run, *flags).end()
    assert code == 0, text
    return files_of_newest(run)
