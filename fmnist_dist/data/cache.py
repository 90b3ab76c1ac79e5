"""The decoded files of a data set on this machine: fetched once, verified at every start.

The cache holds the raw files themselves, so the pinned digests that judge every source judge the
cache too; nothing that it says about itself is believed. Workers map them, and share the memory.

1. Files that are all there and whole are used without a lock.
2. Otherwise one process of the machine, under a lock, looks again, fetches and writes; the lock
   goes with its process, so that a killed one leaves nothing to clear up.
3. A file is replaced by rename and never changed in place: who has mapped it keeps what he has.
4. A cache that cannot be written costs a warning and a fetch, never the run.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import filelock
import numpy as np
from numpy.typing import NDArray

from fmnist_dist import limits
from fmnist_dist.data.files import Contents, DataFile, verified
from fmnist_dist.errors import DataDamagedError, TransientError

_log = logging.getLogger("fmnist_dist.data")
_LOCK_NAME = ".lock"
_TEMPORARY_SUFFIX = ".tmp"


def folder_of(name: str) -> Path | None:
    """Return where data set `name` is cached, or None where this user has no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(base).is_absolute():  # also if empty: the XDG specification wants it ignored
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:
            return None
    return Path(base) / "fmnist_dist" / "datasets" / name


def load(
    files: Sequence[DataFile],
    *,
    folder: Path | None,
    fetch: Callable[[], Contents],
    lock_seconds: float = limits.DATA_LOCK_SECONDS,
) -> Contents:
    """Return the decoded `files`, mapped from `folder`; call `fetch` only if they are not there.

    Raises:
        TransientError: Another process held the lock for longer than `lock_seconds`.
        Whatever `fetch` raises.
    """
    if folder is None:
        _log.warning("no cache: this user has no home folder; set XDG_CACHE_HOME to have one")
        return fetch()
    with contextlib.suppress(OSError, DataDamagedError):
        return _mapped(folder, files)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(folder, lock_seconds))
        except (OSError, NotImplementedError) as error:
            _log.warning("no cache, the data set is fetched at each start: %s", error)
            return fetch()
        return _mapped_or_fetched(folder, files, fetch)


def _mapped_or_fetched(
    folder: Path, files: Sequence[DataFile], fetch: Callable[[], Contents]
) -> Contents:
    try:
        return _mapped(folder, files)  # another process was faster
    except FileNotFoundError:
        _log.info("cache is empty: %s", folder)
    except (OSError, DataDamagedError) as error:
        _log.warning("cache is rebuilt: %s", error)
    contents = fetch()
    try:
        for name, content in contents.items():
            _write(folder / name, content)
        return _mapped(folder, files)
    except (OSError, DataDamagedError) as error:
        _log.warning("no cache, the data set is fetched at each start: %s", error)
        return contents


@contextlib.contextmanager
def _locked(folder: Path, seconds: float) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK_NAME
    try:
        with filelock.FileLock(path, timeout=seconds):
            yield
    except filelock.Timeout as error:
        raise TransientError(
            f"another process has held {path} for {seconds:g} s, expected it to have fetched the "
            "data set by then; end that process, or name the data with --data-dir"
        ) from error


def _mapped(folder: Path, files: Sequence[DataFile]) -> Contents:
    return {file.name: _map(folder / file.name, file) for file in files}


def _map(path: Path, file: DataFile) -> NDArray[np.uint8]:
    if path.stat().st_size == 0:  # cannot be mapped
        raise DataDamagedError(f"{path} is damaged: it is empty")
    # Copy-on-write, because torch wants writable memory: no write of ours can reach the file.
    content = np.memmap(path, dtype=np.uint8, mode="c").view(np.ndarray)
    return verified(content, file, where=str(path))


def _write(path: Path, content: NDArray[np.uint8]) -> None:
    temporary = path.with_name(path.name + _TEMPORARY_SUFFIX)  # whoever writes holds the lock
    try:
        with temporary.open("wb") as stream:
            stream.write(content.data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
