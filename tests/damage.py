"""What can happen to a file that nobody watches."""

from collections.abc import Callable

from run_files import Folder


def flip_a_bit(path: Folder) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def truncate(path: Folder) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Folder) -> None:
    path.write_bytes(b"")


def remove(path: Folder) -> None:
    path.unlink()


DAMAGES: list[Callable[[Folder], None]] = [flip_a_bit, truncate, empty, remove]


def folder_of(run: Folder, step: int) -> Folder:
    """Return the folder of a step's only checkpoint, whatever its record has become."""
    (folder,) = (run / "checkpoints").glob(f"{step:09d}-*")
    return folder


def record_of(run: Folder, index: int) -> Folder:
    return run / "log" / f"{index:012d}.json"
