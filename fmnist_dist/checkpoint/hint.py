"""How far an attempt got, as a hint for people: not part of the truth, and lost without harm.

Rank 0 writes its step into a small mapped file as it goes. The page cache keeps
it through SIGKILL, so the next attempt can say how many steps were lost; after a power cut nobody
can know.
"""

import contextlib
import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

_LAYOUT = struct.Struct("<qq")  # first step, last finished step


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    first_step: int
    last_step: int


class ProgressHint:
    """The writing end, for one attempt."""

    def __init__(self, notes: Path, *, attempt: int, first_step: int) -> None:
        """Begin an attempt's hint, or go on with that of the same attempt's lost worker.

        `notes` is the folder of all attempts' hints (`place`).
        """
        path = notes / f"{attempt:06d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "r+b") as file:
            if os.fstat(descriptor).st_size != _LAYOUT.size:
                file.write(_LAYOUT.pack(first_step, first_step))
                file.flush()
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        self._first_step = first_step

    def reached(self, step: int) -> None:
        _LAYOUT.pack_into(self._map, 0, self._first_step, step)

    def close(self) -> None:
        self._map.close()


def forget(notes: Path) -> None:
    """Remove what earlier attempts have left, failures too: they were of another run."""
    # Whoever fails here fails at the next hint, which is told.
    with contextlib.suppress(OSError):
        for path in notes.iterdir() if notes.is_dir() else ():
            path.unlink()


def read_hints(notes: Path) -> dict[int, Reached]:
    """Return what each attempt is known to have reached, by its number."""
    hints: dict[int, Reached] = {}
    try:
        paths = list(notes.iterdir())
    except OSError:  # none yet, or somebody else's home
        return hints
    for path in paths:
        data = path.read_bytes()
        if re.fullmatch(r"\d{6,}", path.name) and len(data) == _LAYOUT.size:
            first, last = _LAYOUT.unpack(data)
            hints[int(path.name)] = Reached(first_step=first, last_step=last)
    return hints
