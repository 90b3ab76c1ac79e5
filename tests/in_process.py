"""The `train` command as a user meets it, run inside the test's process.

Importing torch takes seconds; a run over thirty images takes a tenth of one. So most claims about
the command are tested by calling its `main` again and again, as a world of one.
"""

import contextlib
import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from published import data_files, small_files, small_spec, write_folder
from run_files import Folder

from fmnist_dist import job, train  # noqa: F401 - `job`: torch is imported before any clock runs
from fmnist_dist.checkpoint import disk
from fmnist_dist.data.dataset import DATASETS
from fmnist_dist.data.sources import Origin
from fmnist_dist.distributed import roster
from fmnist_dist.distributed.stop import SIGNALS
from fmnist_dist.saves import Saves

NUM_SAMPLES = 30  # of the small training set
BATCH = 8  # four steps an epoch, the last one of six samples
LIMIT_SECONDS = 120.0  # of one save
_TESTS = Path(__file__).resolve().parent
_wants = Saves.wants
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one launch ended, and what it said on stderr."""

    code: int
    lines: tuple[str, ...]

    def saying(self, text: str) -> list[str]:
        return [line for line in self.lines if text in line]

    @property
    def errors(self) -> list[str]:
        """What the user reads as an error: before the settings hold, and after."""
        return [line for line in self.lines if is_error(line)]


def is_error(line: str) -> bool:
    return line.startswith("fmnist_dist.train: ") or " error: " in line


class _Stderr(io.StringIO):
    """Tells each piece that is written."""

    def __init__(self, told: Callable[[str], None]) -> None:
        super().__init__()
        self._told = told

    def write(self, text: str) -> int:
        written = super().write(text)
        self._told(text)
        return written


def launch(
    *flags: str,
    environ: Mapping[str, str] | None = None,
    told: Callable[[str], None] = lambda _: None,
) -> Ended:
    """Run `fmnist_dist.train` with these flags; `told` hears its stderr as it is written."""
    stderr = _Stderr(told)
    with (
        mock.patch.object(sys, "argv", ["fmnist_dist.train", *flags]),
        mock.patch.dict(
            os.environ,
            {**clean_environ(), "FMNIST_DIST_NO_KEEPER": "true", **(environ or {})},
            clear=True,
        ),
        contextlib.redirect_stderr(stderr),
        _process_as_before(),
        mock.patch.object(Saves, "wants", _wants_patiently),
    ):
        try:
            code = train.main()
        except SystemExit as leaving:  # after --help
            code = int(leaving.code or 0)
    return Ended(code=code, lines=tuple(stderr.getvalue().splitlines()))


def clean_environ() -> dict[str, str]:
    """Return this process's environment without what a launcher or a user set for training."""
    foreign = ("FMNIST_DIST_", *_LAUNCHER)
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def _wants_patiently(saves: Saves, step: int, *, ends_epoch: bool) -> bool:
    """Let each save end before the next step: these steps take less time than a save."""
    assert saves._saver.wait(LIMIT_SECONDS)
    return _wants(saves, step, ends_epoch=ends_epoch)


@contextlib.contextmanager
def _process_as_before() -> Iterator[None]:
    """Give back what a process has once and a launch takes for itself."""
    root, package = logging.getLogger(), logging.getLogger("fmnist_dist")
    handlers, level, threads = list(root.handlers), package.level, torch.get_num_threads()
    hook = sys.excepthook  # each process group wraps it
    signals = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        sys.excepthook = hook
        for number, handler in signals.items():
            signal.signal(number, handler)
        if s3client := sys.modules.get("fmnist_dist.checkpoint.s3client"):
            s3client._preloaded.clear()  # a session keeps the credentials that it has found
        root.handlers[:] = handlers
        package.setLevel(level)
        logging.captureWarnings(capture=False)
        torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallRun:
    """A run over thirty images in a folder of its own; every launch of it is the same command.

    `url` says where else it lies. On S3, its environment is this process's.
    """

    root: Folder
    data: Path
    url: str | None = None

    def launch(
        self,
        *flags: str,
        environ: Mapping[str, str] | None = None,
        told: Callable[[str], None] = lambda _: None,
    ) -> Ended:
        batch = () if "--batch-size" in flags else ("--batch-size", str(BATCH))
        own = ("--run-dir", self.url or str(self.root), "--data-dir", str(self.data), *batch)
        return launch(*own, *flags, environ=environ, told=told)

    def beside(self, name: str) -> "SmallRun":
        """Return another run over the same images."""
        return SmallRun(root=self.root.with_name(name), data=self.data)


@contextlib.contextmanager
def small_run(folder: Path, root: Folder | None = None) -> Iterator[SmallRun]:
    """Make `fashion-mnist` mean thirty images, and give a run over them: at `root`, or here."""
    files = small_files()
    data = write_folder(folder / "data", files)
    spec = small_spec(Origin(files=data_files(files)))
    with mock.patch.dict(DATASETS, {"fashion-mnist": spec}):
        yield SmallRun(root=root or folder / "run", data=data)


@contextlib.contextmanager
def owned_by(name: str | None) -> Iterator[None]:
    """Give every launch this owner, as if one launcher had started them all; None: each its own."""
    if name is None:
        yield
        return
    with mock.patch.object(roster, "secrets", SimpleNamespace(token_hex=lambda _: name)):
        yield


def in_child(run: SmallRun, *flags: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Launch a small run in a process of its own: one that may be killed."""
    code = (
        "import sys; from pathlib import Path; import in_process\n"
        "root, data, url, *flags = sys.argv[1:]\n"
        "owned = in_process.owned_by(os.environ.pop('TEST_OWNER', None))\n"
        "with in_process.small_run(Path(data).parent), owned:\n"
        "    run = in_process.SmallRun(root=Path(root), data=Path(data), url=url)\n"
        "    ended = run.launch(*flags, environ=dict(os.environ), told=sys.__stderr__.write)\n"
        "sys.exit(ended.code)\n"
    )
    path = os.pathsep.join(str(folder) for folder in (_TESTS.parent, _TESTS))
    where = [str(run.root), str(run.data), run.url or str(run.root)]
    return subprocess.run(
        [sys.executable, "-c", f"import os; {code}", *where, *flags],
        env={**clean_environ(), "PYTHONPATH": path, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def operations(run: SmallRun, *flags: str) -> list[str]:
    """Return what these flags would ask of the disk, in order: `link PATH`, or `write`, `sync`.

    Nothing happens to the run itself. The place in the list is the number in `disk:full:NUMBER`.
    """
    names: list[str] = []

    class Watched(disk.FaultyDisk):
        def _point(self, name: str, path: Path) -> None:
            names.append(f"{name} {path}")

    assert isinstance(run.root, Path)
    copy = run.beside(f"{run.root.name}-watched")
    if run.root.exists():
        shutil.copytree(run.root, copy.root)
    with mock.patch.object(disk, "FaultyDisk", Watched):
        ended = copy.launch(*flags, environ={disk.FAULTS_VARIABLE: "disk:full:0"})
    assert ended.code == 0, ended.lines
    shutil.rmtree(copy.root)
    return names


def number_of(names: Sequence[str], pattern: str, *, after: str = "") -> int:
    """Return the number of the first operation that matches, from the first `after` on."""
    start = next(i for i, name in enumerate(names) if re.search(after, name))
    return next(i for i in range(start, len(names)) if re.search(pattern, names[i]))
