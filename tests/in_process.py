"""The `train` command as a user meets it, run inside the test's process.

Importing torch takes seconds; a run over thirty images takes a tenth of one. So most claims about
the command are tested by calling its `main` again and again, as a world of one.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from published import data_files, small_files, small_spec, write_folder

from fmnist_dist import job, train  # noqa: F401 - `job`: torch is imported before any clock runs
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import Checkpoint, Record
from fmnist_dist.checkpoint.verify import verify
from fmnist_dist.data.dataset import DATASETS
from fmnist_dist.data.sources import Origin

NUM_SAMPLES = 30  # of the small training set
BATCH = 8  # four steps an epoch, the last one of six samples
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
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FMNIST_DIST_", *_LAUNCHER))
    }
    stderr = _Stderr(told)
    with (
        mock.patch.object(sys, "argv", ["fmnist_dist.train", *flags]),
        mock.patch.dict(os.environ, {**inherited, **(environ or {})}, clear=True),
        contextlib.redirect_stderr(stderr),
        _own_telemetry(),
    ):
        try:
            code = train.main()
        except SystemExit as leaving:  # after --help
            code = int(leaving.code or 0)
    return Ended(code=code, lines=tuple(stderr.getvalue().splitlines()))


@contextlib.contextmanager
def _own_telemetry() -> Iterator[None]:
    """Give back what a process has once and a launch takes: logging and torch's threads."""
    root, package = logging.getLogger(), logging.getLogger("fmnist_dist")
    handlers, level, threads = list(root.handlers), package.level, torch.get_num_threads()
    try:
        yield
    finally:
        root.handlers[:] = handlers
        package.setLevel(level)
        logging.captureWarnings(capture=False)
        torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallRun:
    """A run over thirty images in a folder of its own; every launch of it is the same command."""

    root: Path
    data: Path

    def launch(
        self,
        *flags: str,
        environ: Mapping[str, str] | None = None,
        told: Callable[[str], None] = lambda _: None,
    ) -> Ended:
        batch = () if "--batch-size" in flags else ("--batch-size", str(BATCH))
        own = ("--run-dir", str(self.root), "--data-dir", str(self.data), *batch)
        return launch(*own, *flags, environ=environ, told=told)

    def beside(self, name: str) -> "SmallRun":
        """Return another run over the same images."""
        return SmallRun(root=self.root.with_name(name), data=self.data)


@contextlib.contextmanager
def small_run(folder: Path) -> Iterator[SmallRun]:
    """Make `fashion-mnist` mean thirty images, and give a run over them."""
    files = small_files()
    data = write_folder(folder / "data", files)
    spec = small_spec(Origin(files=data_files(files)))
    with mock.patch.dict(DATASETS, {"fashion-mnist": spec}):
        yield SmallRun(root=folder / "run", data=data)


def log_of(root: Path) -> RunLog:
    return RunLog(LocalStorage(root))


def records(root: Path) -> list[Record]:
    log = log_of(root)
    return [log.record(index) for index in range(log.read().head.index + 1)]


def kinds(root: Path) -> list[str]:
    return [record.kind.value for record in records(root)]


def bodies(root: Path, kind: str) -> list[object]:
    return [record.body for record in records(root) if record.kind == kind]


def checkpoints(root: Path) -> list[Checkpoint]:
    return [body for body in bodies(root, "checkpoint") if isinstance(body, Checkpoint)]


def model_sha256(root: Path) -> str:
    """Return the digest of the newest checkpoint's weights."""
    return checkpoints(root)[-1].files["model.safetensors"].sha256


def assert_sound(root: Path) -> None:
    """Every byte that the run retains is what was saved."""
    findings = verify(LocalStorage(root), log_of(root))
    assert findings.damage == ()
    assert findings.records > 0


def saved_bytes(root: Path) -> dict[str, bytes]:
    """Return every file of the log and the checkpoints."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in ("log", "checkpoints")
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }


def rewrite(path: Path, **changed: object) -> bytes:
    """Return the record at `path` with other fields and the checksum that fits them."""
    fields = {**json.loads(path.read_bytes()), **changed}
    del fields["sha256"]
    fields["sha256"] = hashlib.sha256(_canonical(fields)).hexdigest()
    return _canonical(fields)


def _canonical(fields: Mapping[str, object]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")


def fields_of(line: str) -> dict[str, str]:
    """Return the `key=value` fields of a log line."""
    return dict(re.findall(r"(\w+)=(\"[^\"]*\"|\S+)", line))
