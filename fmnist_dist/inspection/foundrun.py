"""The run that a reader's command names: found, or refused in one line with the nearest name."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from fmnist_dist.checkpoint.hint import read_hints
from fmnist_dist.checkpoint.history import History, read_history
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.place import Place
from fmnist_dist.checkpoint.storage import RefusedError, Storage
from fmnist_dist.errors import IncompatibleError, UsageError
from fmnist_dist.rule import URL
from fmnist_dist.usage import printable

_LOG = "log"
_RECORD = re.compile(r"\d{12}\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRun:
    """A folder that holds a run, opened for reading."""

    place: Place
    storage: Storage
    log: RunLog

    def history(self) -> History:
        """Return the run's story. Raises `DataDamagedError` where no record is intact."""
        return read_history(self.log, read_hints(self.place.notes))


def find_run(url: str) -> FoundRun:
    """Open the run at `url`, a path or any URL of fsspec; makes and changes nothing.

    Raises `UsageError` where there is none, `IncompatibleError` for what cannot be a run's folder,
    `StorageError` where its storage does not answer.
    """
    if not url or not URL.holds(url):
        raise UsageError(f"run '{printable(url)}': expected the path of a run{URL.expected}")
    place = Place.of(url)
    if place.folder is None:
        return _find_object(place)
    root = place.folder
    try:
        if root.exists() and not root.is_dir():
            raise IncompatibleError(f"run {url}: is a file; expected the folder of a run")
        if not _holds_run(root):
            raise UsageError(_nothing_there(url, root))
    except OSError as error:
        raise IncompatibleError(
            f"run {url}: cannot be read: {error.strerror}; expected the folder of a run"
        ) from error
    return _open(place)


def _open(place: Place) -> FoundRun:
    storage = place.storage()
    return FoundRun(place=place, storage=storage, log=RunLog(storage))


def _find_object(place: Place) -> FoundRun:
    run = _open(place)
    try:
        is_begun = run.log.is_begun()  # a list would grow with the run
    except RefusedError as error:
        raise IncompatibleError(f"run {place}: {error}") from error
    if not is_begun:
        raise UsageError(f"run {place}: there is no run; expected the --run-dir of a training")
    return run


def _holds_run(root: Path) -> bool:
    """Whether there is a run log; an empty one too, of a run that is just being made."""
    log = root / _LOG
    if not log.is_dir():
        return False
    names = [path.name for path in log.iterdir()]
    return not names or any(map(_RECORD.fullmatch, names))


def _nothing_there(url: str, root: Path) -> str:
    if root.is_dir():
        inside = ", ".join(str(Path(url) / name) for name in _runs_in(root))
        hint = f"; did you mean one of {inside}?" if inside else "; is it an --run-dir of train?"
        return f"run {url}: this folder holds no run{hint}"
    near = get_close_matches(root.name, _runs_in(root.parent), n=1, cutoff=0.5)
    hint = f"; did you mean {Path(url).parent / near[0]}?" if near else ""
    return f"run {url}: there is no such folder, expected that of a run{hint}"


def _runs_in(folder: Path) -> list[str]:
    return sorted(_names(folder))


def _names(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        try:
            if _holds_run(path):
                yield path.name
        except OSError:  # somebody else's: no candidate
            continue
