"""A run on a local (or POSIX network) file system.

An object is written under a temporary name in the run's `tmp` folder, synced, then linked to its
real name: `link` fails when the name is taken, so it is put-if-absent, and the name never shows
half an object. The folder is synced before `create` returns, and so is every folder made on the
way: a name that a power cut takes away was never committed. (Rename alone would replace; O_EXCL on
the real name alone would show a half-written object.)
"""

import contextlib
import errno
import os
import secrets
from pathlib import Path

from fmnist_dist.checkpoint.disk import Disk
from fmnist_dist.checkpoint.storage import (
    TEMPORARY_FOLDER,
    AlreadyExistsError,
    MissingError,
    StorageError,
)
from fmnist_dist.errors import IncompatibleError

_CREATE_TRIES = 3  # a sweeping newer attempt may take our temporary file away, once or twice
_DELETE_TRIES = 3  # a fenced attempt that is still writing may add a file to what is deleted
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class LocalStorage:
    """`Storage` in a folder. `single_writer` accepts file systems without hard links."""

    def __init__(
        self, root: Path, *, single_writer: bool = False, disk: Disk | None = None
    ) -> None:
        self.root = root
        self._single_writer = single_writer
        self._disk = disk or Disk()
        self._durable: set[Path] = set()  # folders whose names are synced

    def create(self, path: str, data: bytes | memoryview) -> None:
        target = self.root / path
        try:
            self._make_folders(self.root / TEMPORARY_FOLDER)
            self._make_folders(target.parent)
            for _ in range(_CREATE_TRIES - 1):
                with contextlib.suppress(FileNotFoundError):
                    return self._create(target, data)
            return self._create(target, data)
        except OSError as error:
            raise StorageError(f"cannot write {target}: {error.strerror or error}") from error

    def read(self, path: str) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingError(path) from error
        except OSError as error:
            raise StorageError(f"cannot read {self.root / path}: {error.strerror}") from error

    def list(self, folder: str) -> list[str]:
        try:
            return sorted(path.name for path in (self.root / folder).iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"cannot list {self.root / folder}: {error.strerror}") from error

    def delete(self, *paths: str) -> None:
        for target in (self.root / path for path in paths):
            try:
                self._disk.unlink(target)
                self._disk.sync_folder(target.parent)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StorageError(f"cannot delete {target}: {error.strerror}") from error

    def delete_folder(self, folder: str) -> None:
        target = self.root / folder
        try:
            gone = any(self._delete_folder(target) for _ in range(_DELETE_TRIES))
        except OSError as error:
            raise StorageError(f"cannot delete {target}: {error.strerror}") from error
        if not gone:
            raise StorageError(f"cannot delete {target}: somebody keeps adding files to it")

    def _create(self, target: Path, data: bytes | memoryview) -> None:
        temporary = self.root / TEMPORARY_FOLDER / f"{target.name}.{secrets.token_hex(8)}"
        descriptor = self._disk.open_new(temporary)
        try:
            try:
                rest = memoryview(data).cast("B")
                while rest:
                    rest = rest[self._disk.write(descriptor, rest) :]
                self._disk.sync(descriptor)
            finally:
                os.close(descriptor)
            self._publish(temporary, target)
        finally:
            # Taken away on every path; after a kill the next attempt's sweep finds it.
            with contextlib.suppress(FileNotFoundError):
                self._disk.unlink(temporary)
        self._disk.sync_folder(target.parent)

    def _publish(self, temporary: Path, target: Path) -> None:
        try:
            self._disk.link(temporary, target)
        except FileExistsError as error:
            raise AlreadyExistsError(str(target)) from error
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not self._single_writer:
                raise IncompatibleError(
                    f"{target.parent}: this file system has no hard links, so two writers could "
                    f"not be told apart ({error.strerror}); use another --run-dir, or "
                    "--single-writer if nothing else can ever write to this run"
                ) from error
            if target.exists():
                raise AlreadyExistsError(str(target)) from error
            self._disk.rename(temporary, target)

    def _delete_folder(self, target: Path) -> bool:
        """Return False where somebody has added a file meanwhile."""
        try:
            for path in sorted(target.iterdir()):
                if path.is_dir() and not path.is_symlink():
                    self._delete_folder(path)
                else:
                    with contextlib.suppress(FileNotFoundError):
                        self._disk.unlink(path)
            self._disk.remove_folder(target)
            self._disk.sync_folder(target.parent)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                return False
            raise
        return True

    def _make_folders(self, folder: Path) -> None:
        """Make a folder and its parents, each durable in its own parent before it is used.

        A folder that is there may be that of a process which was killed before it had synced it, so
        everybody who writes syncs each once, up to the file system's root.
        """
        found = folder.is_dir()
        if (found and folder in self._durable) or folder == folder.parent:
            return
        self._make_folders(folder.parent)
        if not found:
            with contextlib.suppress(FileExistsError):
                self._disk.make_folder(folder)
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder))
        try:
            self._disk.sync_folder(folder.parent)
        except OSError:
            # Folders above the run may belong to others, who let us pass and no more.
            if not found or folder.parent.is_relative_to(self.root):
                raise
        self._durable.add(folder)
