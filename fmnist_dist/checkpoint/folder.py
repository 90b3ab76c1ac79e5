"""Writing the files of one checkpoint, which nobody knows of before its record stands."""

import contextlib
from collections.abc import Mapping

from fmnist_dist.checkpoint.storage import (
    AlreadyExistsError,
    MissingError,
    Storage,
    StorageError,
)


def write_files(storage: Storage, folder: str, files: Mapping[str, bytes]) -> None:
    """Make all files durable, or none. The folder's name is fresh. Raises `StorageError`."""
    try:
        for name, data in files.items():
            write_file(storage, f"{folder}/{name}", data)
    except StorageError:
        # No record was tried yet, so nobody can have seen this folder.
        give_back(storage, folder)
        raise


def write_file(storage: Storage, path: str, data: bytes) -> None:
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
