"""One published file of a data set: accepted only if every decoded bit is the pinned one."""

import gzip
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fmnist_dist.errors import DataDamagedError

# Decoded files by name, uint8 [num_bytes]. Writable, because torch.from_numpy warns otherwise.
Contents = Mapping[str, NDArray[np.uint8]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A file by its decoded content: re-packed archives differ in their headers, not in that."""

    name: str  # without `.gz`
    sha256: str  # of the decoded content, in hex: holds for every source
    gz_md5: str  # of the web mirror's `.gz`, as its publisher states it


class SourceUnavailableError(Exception):
    """A source does not have the data; the message says why, and the next source is tried."""


def read_folder(folder: Path, files: Sequence[DataFile]) -> Contents:
    """Read all `files`, raw or as `.gz`, into memory.

    Raises:
        FileNotFoundError: The folder or one of the files is missing.
        OSError: The system cannot read one of them.
        DataDamagedError: The content is not the pinned one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    paths = {file: _find(folder, file.name) for file in files}
    return {file.name: _read(path, file) for file, path in paths.items()}


def gunzip(data: bytes, file: DataFile, *, where: str) -> NDArray[np.uint8]:
    """Decode and verify the content of a `.gz`; `where` names it in the error."""
    try:
        decoded = gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise DataDamagedError(
            f"{where} is damaged: found no whole gzip file ({error}), "
            f"expected content with sha256 {file.sha256}"
        ) from error
    content = np.frombuffer(bytearray(decoded), dtype=np.uint8)
    return verified(content, file, where=where)


def verified(content: NDArray[np.uint8], file: DataFile, *, where: str) -> NDArray[np.uint8]:
    """Return `content` if it is what was pinned, or raise `DataDamagedError`."""
    found = hashlib.sha256(content.data).hexdigest()
    if found != file.sha256:
        raise DataDamagedError(
            f"{where} is damaged: found content of {content.size} bytes with sha256 {found}, "
            f"expected sha256 {file.sha256}"
        )
    return content


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz")


def _read(path: Path, file: DataFile) -> NDArray[np.uint8]:
    # Read, not mapped: somebody else's folder may change while the job runs, and a mapped file
    # that shrinks kills the process with SIGBUS.
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gunzip(data, file, where=str(path))
    return verified(np.frombuffer(bytearray(data), dtype=np.uint8), file, where=str(path))
