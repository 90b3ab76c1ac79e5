"""A run in an S3 bucket: on AWS, or any store that speaks its language.

An object appears whole: with one put, or with an upload in parts that is completed last and aborted
on any error. Both are put-if-absent (`If-None-Match: *`), which the store decides; `probe` sees to
it that it does. A put whose answer was lost is tried again and finds its own object: that is
`AlreadyExistsError`, and the caller compares what stands there with what it wrote.

What a killed upload leaves behind is no object, but is stored and paid for. So `list` names the
folders it lies in and `delete_folder` aborts it: sweeps treat it like any other leftover. Stores
that do not list uploads under a prefix (MinIO) end them by themselves after some time.
"""

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fmnist_dist.checkpoint.s3bucket import Bucket
from fmnist_dist.checkpoint.s3client import S3Client, S3Failure
from fmnist_dist.checkpoint.s3errors import Meaning
from fmnist_dist.checkpoint.storage import (
    AlreadyExistsError,
    MissingError,
    RefusedError,
    StorageError,
)

T = TypeVar("T")


class S3Storage:
    """`Storage` under a prefix of a bucket. `single_writer` accepts stores without put-if-absent.

    Made without opening anything; whatever it opens belongs to the process that used it first.
    """

    def __init__(self, url: str, *, single_writer: bool = False) -> None:
        self._url = url.rstrip("/")
        name, _, prefix = url.partition("://")[2].strip("/").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._client = S3Client()
        self._bucket = Bucket(name, self._client, single_writer=single_writer)

    def create(self, path: str, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        self._do("write", path, lambda: self._bucket.create(self._prefix + path, view))

    def read(self, path: str) -> bytes:
        return self._do("read", path, lambda: self._bucket.read(self._prefix + path))

    def list(self, folder: str) -> list[str]:
        return self._do("list", folder, lambda: self._bucket.names(self._folder(folder)))

    def delete(self, *paths: str) -> None:
        keys = [self._prefix + path for path in paths]
        self._do("delete", ", ".join(paths), lambda: self._bucket.delete(keys))

    def delete_folder(self, folder: str) -> None:
        self._do("delete", folder, lambda: self._bucket.delete_all(self._folder(folder)))

    def _folder(self, folder: str) -> str:
        return f"{self._prefix}{folder}/" if folder else self._prefix

    def _do(self, verb: str, path: str, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        where = f"{self._url}/{path}"
        try:
            return self._client.run(operation)
        except S3Failure as failure:
            match failure.meaning:
                case Meaning.TAKEN:
                    raise AlreadyExistsError(where) from failure
                case Meaning.MISSING:
                    raise MissingError(where) from failure
                case Meaning.REFUSED:
                    raise RefusedError(f"cannot {verb} {where}: {failure}") from failure
                case _:
                    raise StorageError(f"cannot {verb} {where}: {failure}") from failure
