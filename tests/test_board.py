"""Numbers and texts that two processes share are whole at any instant."""

import itertools
import math
import os
import signal
import time
from unittest import mock

import pytest
from forked import running_child, status_of
from hypothesis import given
from hypothesis import strategies as st

from fmnist_dist.handover.board import ERROR_CHARACTERS, RESUMPTION_BYTES, Board, Section

READS = 200_000
KILLS = 40
LONG_AGO_SECONDS = 1000


def test_a_fresh_board_says_that_nothing_is_known_yet() -> None:
    board = Board.create()
    assert board.where()[0] is Section.START
    assert (board.generation, board.step, board.collectives) == (0, -1, 0)
    assert (board.visits, board.step_seconds, board.restoring) == (0, 0, -1)
    assert (board.finished, board.draining, board.drain_deadline) == (False, False, 0)
    assert (board.resumption, board.error) == (None, None)
    assert board.beat_age() < 60


def test_the_keeper_reads_what_its_trainer_wrote_before_it_was_killed() -> None:
    board = Board.create()

    def trainer() -> None:
        board.enter(Section.DATA)
        board.enter(Section.COLLECTIVE)
        board.generation, board.step = 3, 17
        board.collectives += 5
        board.finished = True
        board.step_took(0.25)
        board.resumption = '{"epoch": 1}'
        board.error = "NaN"
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(status_of(trainer)) == signal.SIGKILL
    assert (board.section, board.visits) == (Section.COLLECTIVE, 2)
    assert 0 <= board.section_seconds() < 60
    assert (board.generation, board.step, board.collectives) == (3, 17, 5)
    assert (board.finished, board.step_seconds) == (True, 0.25)
    assert (board.resumption, board.error) == ('{"epoch": 1}', "NaN")


def test_a_trainer_reads_what_its_keeper_wrote_after_the_fork() -> None:
    board = Board.create()
    seen, told = os.pipe()

    def trainer() -> None:
        os.read(seen, 1)
        assert (board.draining, board.drain_deadline) == (True, 1e9)

    os.set_inheritable(seen, True)
    with running_child(trainer) as pid:
        board.draining, board.drain_deadline = True, 1e9
        os.write(told, b"x")
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        assert ended.si_status == 0
    os.close(seen)
    os.close(told)


def test_a_reader_never_sees_half_a_number() -> None:
    """With `struct.pack_into` in its place, 14 % of four million reads were of a cleared word."""
    board = Board.create()
    values = {-1, 0x0101010101010101}
    board.step = -1

    def writer() -> None:
        while True:
            for board.step in values:
                pass

    with running_child(writer):
        seen = {board.step for _ in range(READS)}
        while not seen >= values:  # on a busy machine the writer may not have had its turn
            seen.add(board.step)
    assert seen == values


def test_a_section_is_never_seen_with_the_time_of_another() -> None:
    board = Board.create()
    now = time.monotonic_ns()

    def enter_long_ago() -> None:
        with mock.patch("time.monotonic_ns", return_value=now - LONG_AGO_SECONDS * 10**9):
            board.enter(Section.EVALUATE)

    def writer() -> None:
        while True:
            enter_long_ago()
            board.enter(Section.DATA)

    enter_long_ago()
    with running_child(writer):
        seen = [board.where() for _ in range(READS)]
        while not {section for section, _ in seen} >= {Section.EVALUATE, Section.DATA}:
            seen.append(board.where())  # on a busy machine the writer may not have had its turn
    assert {section for section, _ in seen} == {Section.EVALUATE, Section.DATA}
    assert all((seconds > 500) == (section is Section.EVALUATE) for section, seconds in seen)


@given(texts=st.lists(st.none() | st.text(st.characters(), max_size=50)))
def test_a_text_is_what_was_set_last(texts: list[str | None]) -> None:
    board = Board.create()
    for text in texts:
        board.resumption = board.error = text
        assert board.resumption == board.error == text


def test_a_text_may_hold_what_was_no_utf_8_in_a_file_name() -> None:
    board = Board.create()
    board.error = os.fsdecode(b"r\xe9sultats")
    assert os.fsencode(str(board.error)) == b"r\xe9sultats"


def test_a_resumption_that_is_too_long_is_refused_and_the_old_one_stays() -> None:
    board = Board.create()
    board.resumption = "é" * (RESUMPTION_BYTES // 2)
    with pytest.raises(ValueError, match=f"{RESUMPTION_BYTES + 1} bytes, expected at most"):
        board.resumption = "x" * (RESUMPTION_BYTES + 1)
    assert board.resumption == "é" * (RESUMPTION_BYTES // 2)
    assert board.error is None


def test_an_error_that_is_too_long_is_cut() -> None:
    board = Board.create()
    board.resumption = "kept"
    board.error = "\N{SKULL}" * (ERROR_CHARACTERS + 1)
    assert board.error == "\N{SKULL}" * ERROR_CHARACTERS
    assert board.resumption == "kept"


class DiesHalfWay:
    """Memory whose writer is killed in the middle of a copy."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def __setitem__(self, where: slice, data: bytes) -> None:
        half = len(data) // 2
        self._memory[where.start : where.start + half] = data[:half]
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("before", [["old"], ["older", "old"], ["older", None, "old"], [None]])
def test_a_writer_killed_in_the_middle_of_a_text_leaves_the_old_one(
    before: list[str | None],
) -> None:
    board = Board.create()
    for text in before:
        board.resumption = text

    def writer() -> None:
        board.bytes = DiesHalfWay(board.bytes)  # type: ignore[assignment]
        board.resumption = "new"

    assert os.WTERMSIG(status_of(writer)) == signal.SIGKILL
    assert board.resumption == before[-1]
    board.resumption = "newer"
    assert board.resumption == "newer"


def test_a_reader_next_to_a_writer_and_after_its_kill_sees_whole_texts() -> None:
    board = Board.create()

    def writer() -> None:
        for number in itertools.count(1):
            board.resumption = str(number) * 5000

    def whole(text: str | None) -> bool:
        return text is None or text == text[: len(text) // 5000] * 5000

    for kill in range(KILLS):
        before = board.visits, board.resumption
        with running_child(writer):
            while board.resumption == before[1]:
                pass
            assert all(whole(board.resumption) for _ in range(kill))
        assert board.resumption is not None
        assert whole(board.resumption)


def test_a_new_trainer_finds_what_it_goes_on_from_but_not_the_old_ones_end() -> None:
    board = Board.create()
    board.generation, board.step, board.collectives = 3, 17, 5
    board.finished = board.draining = True
    board.resumption, board.error = "here", "NaN"
    board.step_took(0.25)
    with mock.patch("time.monotonic", return_value=0.0):
        board.beat()
    board.enter(Section.COMPUTE)
    board.renew()
    assert (board.section, board.collectives) == (Section.START, 0)
    assert not board.error
    assert board.beat_age() < 60
    assert (board.generation, board.step) == (3, 17)
    assert (board.resumption, board.visits, board.step_seconds) == ("here", 1, 0.25)
    assert (board.finished, board.draining) == (True, True)


def test_the_mean_of_step_times_follows_a_change_and_ignores_what_is_no_time() -> None:
    board = Board.create()
    board.step_took(1.0)
    assert board.step_seconds == 1.0
    for nonsense in (math.nan, math.inf, -1.0):
        board.step_took(nonsense)
    assert board.step_seconds == 1.0
    for _ in range(50):
        board.step_took(3.0)
    assert board.step_seconds == pytest.approx(3.0, rel=0.01)


def test_a_beat_ages_by_the_clock_that_all_processes_share() -> None:
    board = Board.create()
    board.beat()
    later = time.monotonic() + 100
    with mock.patch("time.monotonic", return_value=later):
        assert 99 < board.beat_age() < 101
