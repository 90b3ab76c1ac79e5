"""What tests show in memory or on a disk, they show on a real S3 server too.

Importing `every_storage` into a module runs each of its tests that makes a `MemoryStorage` once
more, with an S3 storage in its place. Tests that handle a run's files ask for `root` (`conftest`).
"""

import secrets
from collections.abc import Iterator, MutableMapping

import pytest
from memory_storage import MemoryStorage
from plain_s3 import PlainStorage
from seaweed import BUCKET, Seaweed

from fmnist_dist.checkpoint import s3client
from fmnist_dist.checkpoint.s3 import S3Storage
from fmnist_dist.checkpoint.storage import MissingError

# For tests of what only a disk can do, in a module whose other ones run on both.
disk_only = pytest.mark.parametrize("root", ["disk"], indirect=True)


class _Objects(MutableMapping[str, bytes]):
    """All objects of a run, as a plain client sees them."""

    def __init__(self, plain: PlainStorage) -> None:
        self._plain = plain

    def __getitem__(self, path: str) -> bytes:
        try:
            return self._plain.read(path)
        except MissingError as error:
            raise KeyError(path) from error

    def __setitem__(self, path: str, data: bytes) -> None:
        self._plain.replace(path, data)

    def __delitem__(self, path: str) -> None:
        self._plain.delete(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain.paths())

    def __len__(self) -> int:
        return len(self._plain.paths())


class StorageOnS3(S3Storage):
    """A run of its own in the server's bucket."""

    server: Seaweed

    def __init__(self) -> None:
        url = f"s3://{BUCKET}/{secrets.token_hex(6)}/run"
        super().__init__(url)
        self.objects = _Objects(PlainStorage(self.server, url))
        self.reads = 0

    def read(self, path: str) -> bytes:
        self.reads += 1
        return super().read(path)


@pytest.fixture(autouse=True, params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def every_storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put S3 in the place of memory, in the module of the test."""
    if request.param == "memory":
        return
    request.getfixturevalue("s3_url")  # the environment
    client = s3client.S3Client()
    monkeypatch.setattr("fmnist_dist.checkpoint.s3.S3Client", lambda: client)
    monkeypatch.setattr(StorageOnS3, "server", request.getfixturevalue("seaweed"), raising=False)
    assert request.module.MemoryStorage is MemoryStorage
    monkeypatch.setattr(request.module, "MemoryStorage", StorageOnS3)
