"""A folder or an object on S3, handled as tests handle a `Path`.

Every method asks the server, with the plain client. Nothing is remembered from one to the next, as
the path classes over fsspec do, and nothing of the storage under test takes part. As everywhere on
object storage, a folder is there as long as something lies in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path, PurePosixPath

from plain_s3 import PlainStorage, Server


@dataclass(frozen=True, order=True)
class S3Path:
    """`str` of it is its URL."""

    _path: PurePosixPath  # the bucket, and the key in it
    _server: Server = field(compare=False, repr=False)

    @staticmethod
    def of(url: str, server: Server) -> "S3Path":
        return S3Path(PurePosixPath(url.removeprefix("s3://")), server)

    def __str__(self) -> str:
        return f"s3://{self._path}"

    def __truediv__(self, path: str) -> "S3Path":
        return self._at(self._path / path)

    @property
    def name(self) -> str:
        return self._path.name

    @property
    def stem(self) -> str:
        return self._path.stem

    @property
    def parent(self) -> "S3Path":
        return self._at(self._path.parent)

    def with_name(self, name: str) -> "S3Path":
        return self._at(self._path.with_name(name))

    def relative_to(self, other: "S3Path") -> PurePosixPath:
        return self._path.relative_to(other._path)

    def storage(self) -> PlainStorage:
        """Return what lies below, as a plain client sees it."""
        return PlainStorage(self._server, str(self))

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return self.name in self.parent.storage().paths()

    def is_dir(self) -> bool:
        return bool(self.storage().paths())

    def iterdir(self) -> Iterator["S3Path"]:
        return self.glob("*")

    def glob(self, pattern: str) -> Iterator["S3Path"]:
        """Yield what matches relative to this folder, part by part; `**` is not known."""
        depth = len(PurePosixPath(pattern).parts)
        return (
            self / str(each)
            for each in self._below()
            if len(each.parts) == depth and each.match(pattern)
        )

    def rglob(self, pattern: str) -> Iterator["S3Path"]:
        return (self / str(each) for each in self._below() if each.match(pattern))

    def read_bytes(self) -> bytes:
        return self.parent.storage().read(self.name)

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes | bytearray) -> None:
        self.parent.storage().replace(self.name, bytes(data))

    def written_at(self) -> datetime:
        return self.parent.storage().written_at(self.name)

    def unlink(self) -> None:
        """Raises `FileNotFoundError`, which S3 does not."""
        if not self.is_file():
            raise FileNotFoundError(str(self))
        self.parent.storage().delete(self.name)

    def upload(self, folder: Path) -> "S3Path":
        """Put all files of a folder on a disk here, and return this one."""
        storage = self.storage()
        for path in folder.rglob("*"):
            if path.is_file():
                storage.create(path.relative_to(folder).as_posix(), path.read_bytes())
        return self

    def _below(self) -> list[PurePosixPath]:
        """Return the objects and the folders in this one, relative to it."""
        found = set[PurePosixPath]()
        for path in map(PurePosixPath, self.storage().paths()):
            found |= {path, *path.parents} - {PurePosixPath()}
        return sorted(found)

    def _at(self, path: PurePosixPath) -> "S3Path":
        return replace(self, _path=path)
