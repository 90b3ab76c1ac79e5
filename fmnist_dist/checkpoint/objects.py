"""A run on any other file system of fsspec: Google Cloud Storage, Azure, memory.

Put-if-absent is each one's own `pipe_file(mode="create")`. Where that is known to look first and
to write then, two writers could both succeed, so it is refused without `--single-writer`.
"""

import contextlib
import threading
import time
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.asyn import sync
from fsspec.core import url_to_fs

from fmnist_dist import limits
from fmnist_dist.checkpoint.deadline import deadline
from fmnist_dist.checkpoint.storage import (
    AlreadyExistsError,
    MissingError,
    RefusedError,
    StorageError,
)
from fmnist_dist.errors import IncompatibleError
from fmnist_dist.masking import masked

# Their `create` is one request that the store decides; `memory` is made so here.
_PUT_IF_ABSENT = {"gs", "gcs", "az", "abfs", "abfss", "memory"}
_memory = threading.Lock()


class ObjectStorage:
    """`Storage` in a folder of an fsspec file system, opened at its first use."""

    def __init__(self, url: str, *, single_writer: bool = False) -> None:
        self._scheme = url.partition("://")[0]
        self._url = url
        self._root = ""
        self._single_writer = single_writer
        self._files: AbstractFileSystem | None = None

    def create(self, path: str, data: bytes | memoryview) -> None:
        if self._scheme not in _PUT_IF_ABSENT and not self._single_writer:
            raise IncompatibleError(
                f"{self._url}: {self._scheme}:// has no put-if-absent, so two writers could not be "
                "told apart; use another --run-dir, or --single-writer if nothing else can ever "
                "write to this run"
            )
        held = _memory if self._scheme == "memory" else contextlib.nullcontext()
        try:
            with held:
                self._create(path, bytes(data))
        except FileExistsError as error:
            raise AlreadyExistsError(f"{self._url}/{path}") from error

    def read(self, path: str) -> bytes:
        try:
            size = self._do("read", path, "size") or 0
            data: bytes = self._do("read", path, "cat_file", size=size)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise MissingError(f"{self._url}/{path}") from error
        return data

    def list(self, folder: str) -> list[str]:
        try:
            found = self._do("list", folder, "find")
        except (FileNotFoundError, NotADirectoryError):
            return []
        start = len(self._at(folder)) + 1
        inside = (path.lstrip("/")[start:] for path in found)
        return sorted({name.partition("/")[0] for name in inside} - {""})

    def delete(self, *paths: str) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self._do("delete", path, "rm_file")

    def delete_folder(self, folder: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._do("delete", folder, "rm", recursive=True)

    def _create(self, path: str, data: bytes) -> None:
        if self._single_writer and self._do("write", path, "exists"):
            raise FileExistsError(path)
        if self._scheme in _PUT_IF_ABSENT:
            self._do("write", path, "pipe_file", data, size=len(data), mode="create")
        else:
            self._do("write", path.rpartition("/")[0], "makedirs", exist_ok=True)
            self._do("write", path, "pipe_file", data, size=len(data))

    def _do(
        self, verb: str, path: str, method: str, *values: Any, size: int = 0, **how: Any
    ) -> Any:
        """Call a method of the file system, with the limit of an operation on `size` bytes."""
        where = f"{self._url}/{path}"
        seconds = limits.STORAGE_SECONDS + size / limits.STORAGE_BYTES_PER_SECOND
        try:
            if self._files is None:
                self._files, root = url_to_fs(
                    self._url, skip_instance_cache=True, use_listings_cache=False
                )
                self._root = root.strip("/")
            files, at = self._files, self._at(path)
            if not files.async_impl:
                return getattr(files, method)(at, *values, **how)
            coroutine = getattr(files, f"_{method}")  # fsspec's name for what is behind a method
            left = max(0.001, min(seconds, deadline() - time.monotonic()))
            return sync(files.loop, coroutine, at, *values, timeout=left, **how)
        except (FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except ImportError as error:
            raise IncompatibleError(f"{self._url}: {_first_line(error)}") from error
        except PermissionError as error:
            raise RefusedError(f"cannot {verb} {where}: {_first_line(error)}") from error
        except Exception as error:  # each of these packages raises what it likes
            raise StorageError(f"cannot {verb} {where}: {_first_line(error)}") from error

    def _at(self, path: str) -> str:
        return "/".join(part for part in (self._root, path) if part)


def _first_line(error: Exception) -> str:
    text = masked(str(error)).strip() or type(error).__name__
    return text.splitlines()[0]
