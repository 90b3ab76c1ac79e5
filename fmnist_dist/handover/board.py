"""What a keeper and its trainer tell each other: numbers and two texts in memory that both map.

The board is one anonymous shared mapping; a fork keeps it shared, and it outlives any trainer. Each
number has one writer (the trainer, or the keeper where it says so) and is one aligned 8-byte word,
written by one store of the processor: on the systems that we support (64-bit Linux) a reader sees
the old number or the new one. `struct.pack_into` would not do: it clears the word first, and a
reader next to it saw zeros (docstring of `test_a_reader_never_sees_half_a_number`).

A text has two places. The one that is not in use is filled, then one word that names place, length
and CRC-32 makes it the text: a writer killed at any instant leaves the old text or the new one.
"""

import math
import mmap
import time
import zlib
from enum import IntEnum
from typing import Self

RESUMPTION_BYTES = 256 * 1024
ERROR_CHARACTERS = 2000
_ERROR_BYTES = 4 * ERROR_CHARACTERS  # no character of UTF-8 takes more
_WORD = 8
_ENTERED, _VISITS = 0, 1  # words that `enter` writes past the descriptors: 1.1 us instead of 1.5
_SMOOTHING = 0.1  # the weight of the newest step: the mean follows a change within ten to twenty
_TEXT_READS = 100  # tries of a reader that a writer overtakes twice within one read, each time


class Section(IntEnum):
    """What a trainer is doing."""

    START = 0  # forked, building model and buffers
    MEETING = 1  # waiting for peers, building the group
    RESTORE = 2
    DATA = 3
    COMPUTE = 4
    COLLECTIVE = 5  # waiting for peers inside a collective
    UPDATE = 6
    EVALUATE = 7
    SAVE = 8
    FINISH = 9
    LEAVE = 10  # taking the process group down
    DONE = 11  # out of the group


class _Whole:
    """One word as a signed integer."""

    def __init__(self, word: int) -> None:
        self._word = word

    def __get__(self, board: "Board", owner: type["Board"]) -> int:
        return board.wholes[self._word]

    def __set__(self, board: "Board", value: int) -> None:
        board.wholes[self._word] = value


class _Real:
    """One word as a float."""

    def __init__(self, word: int) -> None:
        self._word = word

    def __get__(self, board: "Board", owner: type["Board"]) -> float:
        return board.reals[self._word]

    def __set__(self, board: "Board", value: float) -> None:
        board.reals[self._word] = value


class _Flag:
    """One word as a truth value."""

    def __init__(self, word: int) -> None:
        self._word = word

    def __get__(self, board: "Board", owner: type["Board"]) -> bool:
        return board.wholes[self._word] != 0

    def __set__(self, board: "Board", value: bool) -> None:  # noqa: FBT001 - an assignment
        board.wholes[self._word] = int(value)


class _Text:
    """A text or None, whole at any instant: two places, and one word that names the valid one.

    The word: bit 63 there is a text, bit 62 its place, bits 32 to 61 its bytes, below its CRC-32.
    """

    def __init__(self, *, word: int, offset: int, capacity: int) -> None:
        self._word = word
        self._offset = offset
        self._capacity = capacity

    def __get__(self, board: "Board", owner: type["Board"]) -> str | None:
        for _ in range(_TEXT_READS):
            word = board.words[self._word]
            if not word >> 63:
                return None
            start = self._offset + (word >> 62 & 1) * self._capacity
            data = board.bytes[start : start + (word >> 32 & (1 << 30) - 1)].tobytes()
            if zlib.crc32(data) == word & 0xFFFFFFFF:
                return data.decode(errors="surrogatepass")
        return None

    def __set__(self, board: "Board", value: str | None) -> None:
        if value is None:
            board.words[self._word] = 0
            return
        data = value.encode(errors="surrogatepass")
        if len(data) > self._capacity:
            raise ValueError(f"a text of {len(data)} bytes, expected at most {self._capacity}")
        place = 1 - (board.words[self._word] >> 62 & 1)
        start = self._offset + place * self._capacity
        board.bytes[start : start + len(data)] = data
        board.words[self._word] = 1 << 63 | place << 62 | len(data) << 32 | zlib.crc32(data)


class Board:
    """The numbers and texts. Seconds are those of `time.monotonic`, one clock for all processes."""

    _entered = _Whole(_ENTERED)  # microseconds << 8 | section: both are of the same instant
    visits = _Whole(_VISITS)  # sections entered so far
    generation = _Whole(2)
    step = _Whole(3)  # finished steps; -1: none yet
    collectives = _Whole(4)  # entered in this generation; all ranks count alike, from 0
    _step_seconds = _Real(5)
    beaten = _Real(6)  # when the trainer was last heard of
    finished = _Flag(7)  # the `finish` record is durable
    draining = _Flag(8)  # keeper: a signal came
    drain_deadline = _Real(9)  # keeper: when a drain must be over; 0: none
    restoring = _Whole(10)  # record of the checkpoint that is being restored; -1: none
    saving = _Whole(13)  # the step whose save is under way; 0: none. It starts again if it dies
    _resumption = _Text(word=11, offset=14 * _WORD, capacity=RESUMPTION_BYTES)
    _error = _Text(word=12, offset=14 * _WORD + 2 * RESUMPTION_BYTES, capacity=_ERROR_BYTES)
    _SIZE = 14 * _WORD + 2 * RESUMPTION_BYTES + 2 * _ERROR_BYTES

    def __init__(self, memory: mmap.mmap) -> None:
        self.bytes = memoryview(memory)
        self.wholes = self.bytes.cast("q")
        self.words = self.bytes.cast("Q")
        self.reals = self.bytes.cast("d")

    @classmethod
    def create(cls) -> Self:
        """Return a fresh board, to be shared by forking."""
        board = cls(mmap.mmap(-1, cls._SIZE))
        board.step = board.restoring = -1
        board.renew()
        return board

    def renew(self) -> None:
        """Prepare the board for a new trainer: what keepers do before they fork one.

        Section START, a beat, no error and no collectives; everything else is kept. Read what the
        dead trainer left (section, error, collectives) before.
        """
        visits = self.visits
        self.beat()
        self.enter(Section.START)
        self.visits = visits
        self._error = None
        self.collectives = 0

    def enter(self, section: Section) -> None:
        """Note that the trainer enters a section now."""
        self.wholes[_ENTERED] = time.monotonic_ns() // 1000 << 8 | section
        self.wholes[_VISITS] += 1

    def visit(self) -> tuple[Section, int]:
        """Return the trainer's section and when it entered it, in microseconds, of one instant."""
        entered = self._entered
        return Section(entered & 0xFF), entered >> 8

    def where(self) -> tuple[Section, float]:
        """Return the trainer's section and for how many seconds it has been there."""
        section, entered = self.visit()
        return section, max(0.0, time.monotonic_ns() / 1e9 - entered / 1e6)

    @property
    def section(self) -> Section:
        return self.where()[0]

    def section_seconds(self) -> float:
        return self.where()[1]

    def beat(self) -> None:
        """Note that the trainer is alive."""
        self.beaten = time.monotonic()

    def beat_age(self) -> float:
        """Return the seconds since the last beat."""
        return max(0.0, time.monotonic() - self.beaten)

    @property
    def step_seconds(self) -> float:
        """The exponential mean of the seconds that a step takes; 0: not known yet."""
        return self._step_seconds

    def step_took(self, seconds: float) -> None:
        """Count one step into the mean; what no clock can have measured is not counted."""
        if not math.isfinite(seconds) or seconds < 0:
            return
        mean = self._step_seconds
        self._step_seconds = mean + _SMOOTHING * (seconds - mean) if mean else seconds

    @property
    def resumption(self) -> str | None:
        """What a new trainer needs to go on where the last one was.

        Setting more than `RESUMPTION_BYTES` of UTF-8 raises ValueError and keeps the old one.
        """
        return self._resumption

    @resumption.setter
    def resumption(self, text: str | None) -> None:
        self._resumption = text

    @property
    def error(self) -> str | None:
        """Why the trainer ends, for the keeper to tell; cut to `ERROR_CHARACTERS`."""
        return self._error

    @error.setter
    def error(self, text: str | None) -> None:
        self._error = text if text is None else text[:ERROR_CHARACTERS]
