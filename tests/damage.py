"""What can happen to a file that nobody watches."""

from collections.abc import Callable
from pathlib import Path


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


DAMAGES: list[Callable[[Path], None]] = [flip_a_bit, truncate, empty, remove]


def folder_of(run: Path, step: int) -> Path:
    """Return the folder of a step's only checkpoint, whatever its record has become."""
    (folder,) = (run / "checkpoints").glob(f"{step:09d}-*")
    return folder


def record_of(run: Path, index: int) -> Path:
    return run / "log" / f"{index:012d}.json"
