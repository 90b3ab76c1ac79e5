"""Two copies of the training state in memory that the keeper owns: what is left when trainers die.

1. A write goes to the slot that is not the newest whole one: its header is cleared first, the state
   follows, and a header with sequence, step, length and CRC-32 comes last.
2. A reader takes the newest slot whose checksums hold, else the other one.

So a writer killed at any instant leaves the newest state whole that it has completed. Each slot is
a memory file (memfd) of its own, written and read by system calls instead of being mapped: growing
one cannot touch the other, nobody has to map again, and no memory left is an OSError, not a SIGBUS.
There may be one writer at a time; several readers, also while it writes. No torch here.
"""

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_HEADER = struct.Struct("<QqQI")  # sequence (from 1), step, bytes and CRC-32 of the state
_SEAL = struct.Struct("<I")  # CRC-32 of the header
HEADER_BYTES = _HEADER.size + _SEAL.size
_READS = 100  # tries of a reader that the writer overtakes twice within one read, each time


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One state, as it was written."""

    step: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    descriptor: int
    sequence: int  # 0: nothing whole is here
    step: int
    length: int
    crc: int


class Slots:
    """Two slots, filled alternately. Made by the keeper, inherited by every trainer it forks."""

    def __init__(self, first: int, second: int) -> None:
        self._descriptors = (first, second)

    @classmethod
    def create(cls) -> Self:
        """Return two empty slots. Raises OSError."""
        return cls(os.memfd_create("fmnist-slot-0"), os.memfd_create("fmnist-slot-1"))

    def write(self, step: int, parts: "Sequence[ReadableBuffer]") -> None:
        """Keep the state of a step: `parts`, C-contiguous buffers, one after the other.

        Raises OSError where memory does not suffice; the newest state stays readable.
        """
        older, newest = self._headers()
        os.pwrite(older.descriptor, bytes(HEADER_BYTES), 0)
        length, crc = 0, 0
        for part in parts:
            length += _write_all(older.descriptor, part, HEADER_BYTES + length)
            crc = zlib.crc32(part, crc)
        header = _HEADER.pack(newest.sequence + 1, step, length, crc)
        os.pwrite(older.descriptor, header + _SEAL.pack(zlib.crc32(header)), 0)

    def newest(self) -> Slot | None:
        """Return the newest state that is whole, or None."""
        seen: tuple[_Header, ...] = ()
        for _ in range(_READS):
            headers = self._headers()
            for header in reversed(headers):
                if header.sequence:
                    data = _read_all(header.descriptor, header.length)
                    if len(data) == header.length and zlib.crc32(data) == header.crc:
                        return Slot(step=header.step, data=data)
            if headers == seen:  # nobody is writing: damaged, or empty
                return None
            seen = headers
        return None

    def clear(self) -> None:
        """Forget both states and give their memory back."""
        # The older one first: killed in between, the newest is still what it was.
        for header in self._headers():
            os.ftruncate(header.descriptor, 0)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)

    def _headers(self) -> tuple[_Header, _Header]:
        """Return the older (or empty) slot's header, then the newest one's."""
        first, second = (_header(descriptor) for descriptor in self._descriptors)
        return (first, second) if first.sequence <= second.sequence else (second, first)


def _header(descriptor: int) -> _Header:
    data = os.pread(descriptor, HEADER_BYTES, 0)
    fields, seal = data[: _HEADER.size], data[_HEADER.size :]
    if len(data) == HEADER_BYTES and _SEAL.pack(zlib.crc32(fields)) == seal:
        sequence, step, length, crc = _HEADER.unpack(fields)
    else:
        sequence = step = length = crc = 0
    return _Header(descriptor=descriptor, sequence=sequence, step=step, length=length, crc=crc)


def _write_all(descriptor: int, part: "ReadableBuffer", offset: int) -> int:
    """Write a buffer and return its bytes. One system call writes 2 GiB at most."""
    length = memoryview(part).nbytes
    written = os.pwrite(descriptor, part, offset)
    while written < length:
        rest = memoryview(part).cast("B")[written:]
        written += os.pwrite(descriptor, rest, offset + written)
    return length


def _read_all(descriptor: int, length: int) -> bytes:
    """Return the state's bytes; fewer where the writer has cleared the slot meanwhile."""
    pieces: list[bytes] = []
    found = 0
    while found < length:
        piece = os.pread(descriptor, length - found, HEADER_BYTES + found)
        if not piece:
            break
        pieces.append(piece)
        found += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
