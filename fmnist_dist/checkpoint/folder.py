"""Writing the files of one checkpoint, which nobody knows of before its record stands."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping

from fmnist_dist.checkpoint.record import File
from fmnist_dist.checkpoint.storage import (
    AlreadyExistsError,
    MissingError,
    Storage,
    StorageError,
)

_HASHED_AT_ONCE = 8 << 20  # bytes; Python's other threads run meanwhile


def describe(
    files: Mapping[str, bytes | memoryview], *, go_on: Callable[[], None] = lambda: None
) -> dict[str, File]:
    """Return what a record says of these files. `go_on` is called in between, and may raise."""
    return {name: _describe(memoryview(data), go_on) for name, data in files.items()}


def _describe(data: memoryview, go_on: Callable[[], None]) -> File:
    digest = hashlib.sha256()
    for start in range(0, len(data), _HASHED_AT_ONCE):
        go_on()
        digest.update(data[start : start + _HASHED_AT_ONCE])
    return File(size=len(data), sha256=digest.hexdigest())


def write_files(
    storage: Storage,
    folder: str,
    files: Mapping[str, bytes | memoryview],
    *,
    go_on: Callable[[], None] = lambda: None,
) -> None:
    """Make all files durable. The folder's name is fresh.

    `go_on` is called before each file, and may raise. Raises `StorageError`.
    """
    for name, data in files.items():
        go_on()
        write_file(storage, f"{folder}/{name}", data)


def write_file(storage: Storage, path: str, data: bytes | memoryview) -> None:
    """Create one file. Raises `StorageError`."""
    try:
        storage.create(path, data)
    except AlreadyExistsError as error:
        # The folder's name is fresh, so it is our own: the answer was lost (NFS repeats a
        # `link` of which it lost the reply, object stores a put).
        try:
            own = storage.read(path) == data
        except MissingError:  # a newer attempt has swept it meanwhile
            own = False
        if not own:
            raise StorageError(f"{path}: wrote it, and reads back something else") from error


def give_back(storage: Storage, folder: str) -> None:
    """Delete a folder that no record names; what cannot be deleted now, a sweep finds."""
    with contextlib.suppress(StorageError):
        storage.delete_folder(folder)
