"""Whatever kills a writer, and whenever: the newest state that it completed can be read."""

import array
import errno
import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
from forked import running_child, status_of

from fmnist_dist.handover.slots import HEADER_BYTES, Slots

KILLS = 100
STATE_BYTES = 200_000
PIECE_BYTES = 7


@pytest.fixture
def slots() -> Iterator[Slots]:
    made = Slots.create()
    yield made
    made.close()


def state(step: int, size: int = STATE_BYTES) -> bytes:
    """Return bytes that belong to this step and to no other one."""
    return step.to_bytes(4, "big") * (size // 4)


def test_fresh_slots_hold_nothing(slots: Slots) -> None:
    assert slots.newest() is None


def test_the_newest_state_is_the_one_written_last_even_if_its_step_is_lower(slots: Slots) -> None:
    for step in (1, 2, 3, 1):
        slots.write(step, [state(step)])
        newest = slots.newest()
        assert newest is not None
        assert (newest.step, newest.data) == (step, state(step))


def test_parts_of_any_kind_are_joined_as_they_lie_in_memory(slots: Slots) -> None:
    parts: list[Any] = [
        b"ab",
        b"",
        bytearray(b"c"),
        memoryview(b"d"),
        array.array("i", [1]),
        np.array([1, 2], np.float16),
        np.zeros((0, 3)),
        np.array(3.0),
        np.ones((2, 2), np.int8),
    ]
    slots.write(5, parts)
    newest = slots.newest()
    assert newest is not None
    assert newest.data == b"".join(memoryview(part).tobytes() for part in parts)


def test_a_state_may_be_empty(slots: Slots) -> None:
    slots.write(0, [])
    newest = slots.newest()
    assert newest is not None
    assert (newest.step, newest.data) == (0, b"")


def test_what_another_process_wrote_and_grew_is_read_here(slots: Slots) -> None:
    for step, size in enumerate([8, 100_000, 16, 1_000_000, 0], start=1):
        assert status_of(partial(slots.write, step, [state(step, size)])) == 0
        newest = slots.newest()
        assert newest is not None
        assert (newest.step, newest.data) == (step, state(step, size))


def pwrite_in_pieces(last: int) -> Callable[[int, bytes, int], int]:
    """Return a pwrite that stops its process by SIGKILL in place of piece `last` of all writes."""
    real = os.pwrite
    count = itertools.count()

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        for start in range(0, len(data), PIECE_BYTES):
            if next(count) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor, data[start : start + PIECE_BYTES], offset + start)
        return len(data)

    return pwrite


@pytest.mark.parametrize("size", [40, 96], ids=["shorter", "longer"])
@pytest.mark.parametrize("whole", [1, 2])
def test_a_writer_killed_between_any_two_pieces_of_a_write_leaves_the_state_before(
    whole: int, size: int
) -> None:
    """`whole` states of 64 bytes are there; the next one is shorter, or makes its slot grow."""
    pieces = 2 * -(-HEADER_BYTES // PIECE_BYTES) + 2 * -(-size // 2 // PIECE_BYTES)
    data = state(whole, size)
    for last in range(pieces + 1):
        slots = Slots.create()
        for step in range(whole):
            slots.write(step, [state(step, 64)])
        with mock.patch("os.pwrite", pwrite_in_pieces(last)):
            status = status_of(partial(slots.write, whole, [data[: size // 2], data[size // 2 :]]))
        newest = slots.newest()
        assert newest is not None
        if last < pieces:
            assert os.WTERMSIG(status) == signal.SIGKILL
            assert (newest.step, newest.data) == (whole - 1, state(whole - 1, 64))
        else:
            assert (status, newest.step, newest.data) == (0, whole, data)
        slots.write(9, [state(9)])
        after = slots.newest()
        assert after is not None
        assert after.data == state(9), "a new trainer goes on after any death"
        slots.close()


def test_a_writer_killed_at_random_moments_loses_one_write_at_most(slots: Slots) -> None:
    """It sends one byte for each write that it has completed."""
    choose = random.Random(0)
    step = 0
    torn = 0
    for _ in range(KILLS):
        seen, told = os.pipe()

        def writer(first: int = step + 1, told: int = told) -> None:
            for step in itertools.count(first):
                slots.write(step, [state(step), state(step)])
                os.write(told, b"x")

        with running_child(writer):
            os.close(told)
            completed = step + len(os.read(seen, 1))
            for _ in range(choose.randrange(3000)):
                newest = slots.newest() if choose.random() < 0.01 else None
                assert newest is None or newest.data == state(newest.step, 2 * STATE_BYTES)
        while done := os.read(seen, 65536):
            completed += len(done)
        os.close(seen)
        newest = slots.newest()
        assert newest is not None
        assert newest.data == state(newest.step, 2 * STATE_BYTES)
        assert newest.step - completed in {0, 1}  # 1: killed between the header and the pipe
        torn += min(header.sequence for header in slots._headers()) == 0
        step = newest.step
    assert torn > KILLS // 10, "the kills hit no write"


def test_a_reader_next_to_a_writer_always_finds_a_whole_state(slots: Slots) -> None:
    slots.write(0, [state(0)])

    def writer() -> None:
        for step in itertools.count(1):
            slots.write(step, [state(step, 4 * (1 + step % 50_000))])

    steps: list[int] = []
    with running_child(writer):
        while not steps or steps[-1] < 300:
            newest = slots.newest()
            assert newest is not None
            assert newest.data == state(newest.step, len(newest.data))
            steps.append(newest.step)
    assert steps == sorted(steps), "a state once seen is never followed by an older one"


def test_a_reader_that_is_overtaken_twice_reads_again(slots: Slots) -> None:
    slots.write(1, [state(1)])
    real = os.pread
    writes = [2, 3]

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        while offset and writes:
            slots.write(writes.pop(0), [state(9)])
        return real(descriptor, length, offset)

    with mock.patch("os.pread", pread):
        newest = slots.newest()
    assert newest is not None
    assert (newest.step, newest.data) == (3, state(9))


@pytest.mark.parametrize("bit", [*range(HEADER_BYTES * 8), HEADER_BYTES * 8 + 100])
def test_a_flipped_bit_in_the_newest_slot_falls_back_to_the_other_one(
    slots: Slots, bit: int
) -> None:
    slots.write(1, [state(1, 64)])
    slots.write(2, [state(2, 64)])
    flip(slots._headers()[1].descriptor, bit)
    newest = slots.newest()
    assert newest is not None
    assert (newest.step, newest.data) == (1, state(1, 64))


def test_damage_in_both_slots_is_no_state(slots: Slots) -> None:
    slots.write(1, [state(1, 64)])
    slots.write(2, [state(2, 64)])
    for header in slots._headers():
        flip(header.descriptor, HEADER_BYTES * 8)
    assert slots.newest() is None


def flip(descriptor: int, bit: int) -> None:
    byte = os.pread(descriptor, 1, bit // 8)[0]
    os.pwrite(descriptor, bytes([byte ^ 1 << bit % 8]), bit // 8)


def test_a_write_that_memory_does_not_suffice_for_leaves_the_state_before(slots: Slots) -> None:
    slots.write(1, [state(1)])
    real = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if offset > HEADER_BYTES:
            raise OSError(errno.ENOSPC, "no memory")
        return real(descriptor, data, offset)

    with mock.patch("os.pwrite", full), pytest.raises(OSError, match="no memory"):
        slots.write(2, [state(2), state(2)])
    newest = slots.newest()
    assert newest is not None
    assert newest.data == state(1)


def test_a_system_call_that_writes_or_reads_less_is_called_again(slots: Slots) -> None:
    """As Linux does beyond 2 GiB."""
    write, read = os.pwrite, os.pread
    with (
        mock.patch("os.pwrite", lambda fd, data, at: write(fd, memoryview(data)[:1000], at)),
        mock.patch("os.pread", lambda fd, length, at: read(fd, min(length, 1000), at)),
    ):
        slots.write(1, [state(1)])
        newest = slots.newest()
    assert newest is not None
    assert newest.data == state(1)


def test_cleared_slots_hold_nothing_and_take_new_states(slots: Slots) -> None:
    slots.write(7, [state(7)])
    slots.write(8, [state(8)])
    slots.clear()
    assert slots.newest() is None
    slots.write(3, [state(3)])
    newest = slots.newest()
    assert newest is not None
    assert newest.step == 3


def test_a_clearing_that_is_killed_half_way_never_brings_the_older_state_back(slots: Slots) -> None:
    slots.write(7, [state(7)])
    slots.write(8, [state(8)])
    real = os.ftruncate

    def killed_after_one() -> None:
        def ftruncate(descriptor: int, length: int) -> None:
            real(descriptor, length)
            os.kill(os.getpid(), signal.SIGKILL)

        with mock.patch("os.ftruncate", ftruncate):
            slots.clear()

    assert os.WTERMSIG(status_of(killed_after_one)) == signal.SIGKILL
    newest = slots.newest()
    assert newest is not None
    assert newest.step == 8
