"""A keeper kills only a trainer that others wait for, and never one that waits."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmnist_dist.handover.board import Board, Section
from fmnist_dist.keeper.watchdog import (
    EVALUATE_SECONDS,
    FLOOR_SECONDS,
    LONGEST_LOOK_SECONDS,
    STEPS,
    STOPPED_SECONDS,
    UNMEASURED_SECONDS,
    Action,
    Reading,
    StepLimit,
    Verdict,
    Watch,
    judge,
)

LIMIT = StepLimit(configured=10, step_seconds=0)
RANK, WORLD = 1, 4
FINE = Reading(
    section=Section.COMPUTE,
    section_seconds=0.1,
    still_seconds=0.1,
    beat_age=0.1,
    collectives=7,
    stopped=False,
)
WAITS = replace(FINE, section=Section.COLLECTIVE, section_seconds=11, still_seconds=11)
SLOW = {Section.START, Section.RESTORE, Section.EVALUATE, Section.SAVE, Section.FINISH}
OUTSIDE = set(Section) - {Section.COLLECTIVE, Section.MEETING}


def verdict(
    reading: Reading,
    peers: dict[int, int] | None = None,
    *,
    world_size: int = WORLD,
    told: float | None = None,
) -> Verdict:
    return judge(
        reading, limit=LIMIT, peers=peers, rank=RANK, world_size=world_size, told_seconds=told
    )


@pytest.mark.parametrize("section", Section)
def test_a_trainer_that_moves_is_fine_in_every_section(section: Section) -> None:
    assert verdict(replace(FINE, section=section)).action is Action.FINE


@pytest.mark.parametrize("section", Section)
def test_a_stopped_trainer_is_killed_soon_wherever_it_is(section: Section) -> None:
    reading = replace(FINE, section=section, stopped=True, beat_age=STOPPED_SECONDS + 1)
    assert verdict(reading) == Verdict(Action.KILL, "stopped for 6 s")


def test_a_profiler_that_stops_a_trainer_for_a_moment_kills_nobody() -> None:
    assert verdict(replace(FINE, stopped=True, beat_age=1)).action is Action.FINE


def test_a_trainer_that_goes_on_after_a_stop_is_fine() -> None:
    assert verdict(replace(FINE, beat_age=STOPPED_SECONDS + 1)).action is Action.FINE


@pytest.mark.parametrize("section", Section)
def test_a_trainer_without_a_beat_for_too_long_is_killed_wherever_it_is(section: Section) -> None:
    age = LIMIT.seconds(section) + 1
    found = verdict(replace(FINE, section=section, beat_age=age))
    assert found == Verdict(Action.KILL, f"no sign of life for {age:.0f} s")


def test_a_meeting_has_limits_of_its_own() -> None:
    reading = replace(WAITS, section=Section.MEETING, section_seconds=1e6, still_seconds=1e6)
    assert verdict(reading, {0: 9, 2: 9, 3: 9}).action is Action.FINE


@pytest.mark.parametrize("section", OUTSIDE)
def test_a_trainer_too_long_outside_a_collective_is_killed(section: Section) -> None:
    reading = replace(FINE, section=section, section_seconds=LIMIT.seconds(section))
    assert verdict(reading).action is Action.FINE
    late = replace(reading, section_seconds=LIMIT.seconds(section) + 1)
    found = verdict(late)
    name, seconds = section.name.lower(), late.section_seconds
    assert found == Verdict(Action.KILL, f"stuck in {name} for {seconds:.0f} s")


def test_a_trainer_behind_a_reported_collective_is_killed_even_in_a_collective() -> None:
    found = verdict(WAITS, {0: 7, 2: 8})
    reason = "behind in collective 7, rank 2 waits in 8, for 11 s"
    assert found == Verdict(Action.KILL, reason)


def test_a_trainer_that_runs_in_circles_behind_its_peers_is_killed() -> None:
    """From section to section, each soon left, and never to a collective."""
    assert verdict(replace(FINE, still_seconds=11)).action is Action.FINE
    assert verdict(replace(FINE, still_seconds=11), {0: 8}).action is Action.KILL


@pytest.mark.parametrize("section", SLOW)
def test_peers_that_wait_are_no_reason_to_kill_a_rank_that_is_slow_within_its_limit(
    section: Section,
) -> None:
    reading = replace(FINE, section=section, section_seconds=100, still_seconds=100)
    assert verdict(reading, {0: 8, 2: 8, 3: 8}).action is Action.FINE


def test_a_trainer_that_has_just_moved_is_not_killed_for_being_behind() -> None:
    assert verdict(FINE, {0: 8, 2: 8, 3: 8}).action is Action.FINE


def test_a_trainer_that_waits_for_others_within_the_limit_is_fine() -> None:
    reading = replace(WAITS, section_seconds=10, still_seconds=10)
    assert verdict(reading, {0: 7, 2: 7, 3: 7}).action is Action.FINE


def test_several_collectives_in_one_section_are_timed_each_for_itself() -> None:
    assert verdict(replace(WAITS, section_seconds=100, still_seconds=1)).action is Action.FINE


@pytest.mark.parametrize(
    "peers", [None, {}, {RANK: 7}, {0: 7}, {0: 7, 2: 7, 3: 6}, {0: 7, RANK: 7, 3: 7}]
)
def test_a_trainer_that_waits_too_long_is_only_reported_while_somebody_may_be_behind(
    peers: dict[int, int] | None,
) -> None:
    assert verdict(WAITS, peers) == Verdict(Action.REPORT, "waits in collective 7 for 11 s")


@pytest.mark.parametrize("own", [{}, {RANK: 7}])
def test_where_all_wait_in_the_same_collective_all_meet_again(own: dict[int, int]) -> None:
    found = verdict(WAITS, {0: 7, 2: 7, 3: 7, **own})
    assert found == Verdict(Action.REGROUP, "waits in collective 7 for 11 s, and so do all")
    assert verdict(WAITS, {0: 7, 2: 7, 3: 7}, told=9).action is Action.REGROUP


def test_a_trainer_that_does_not_leave_when_told_to_is_killed_in_the_end() -> None:
    found = verdict(WAITS, {0: 7, 2: 7, 3: 7}, told=12)
    assert found == Verdict(Action.KILL, "told to leave collective 7, is there for 11 s")


def test_the_only_rank_waits_for_nobody() -> None:
    found = verdict(WAITS, {}, world_size=1)
    assert found == Verdict(Action.KILL, "stuck in collective 7, alone, for 11 s")


def test_a_limit_that_is_configured_holds_for_steps_and_leaves_slow_sections_their_time() -> None:
    for section in Section:
        seconds = StepLimit(configured=2, step_seconds=100).seconds(section)
        assert (seconds == 2) == (section not in SLOW)
        assert StepLimit(configured=5000, step_seconds=0).seconds(section) == 5000


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0.0, UNMEASURED_SECONDS), (0.1, FLOOR_SECONDS), (60.0, STEPS * 60.0)],
)
def test_a_limit_follows_how_long_steps_take(step: float, expected: float) -> None:
    limit = StepLimit(configured=None, step_seconds=step)
    assert limit.seconds(Section.COMPUTE) == limit.seconds(Section.COLLECTIVE) == expected
    assert limit.seconds(Section.EVALUATE) == max(EVALUATE_SECONDS, expected)


def looked_at(board: Board, seconds: float, *, start: float = 0.0) -> Reading:
    """Return a keeper's reading after so many seconds of looks, five a second."""
    watch = Watch(board, now=start)
    reading = watch.look(now=start, stopped=False)
    for look in range(1, round(seconds * 5) + 1):
        reading = watch.look(now=start + look / 5, stopped=False)
    return reading


def test_looks_count_for_how_long_a_trainer_stays_where_it_is() -> None:
    board = Board.create()
    board.enter(Section.DATA)
    board.collectives = 3
    reading = looked_at(board, 31)
    assert (reading.section, reading.collectives, reading.stopped) == (Section.DATA, 3, False)
    seconds = (reading.section_seconds, reading.still_seconds, reading.beat_age)
    assert seconds == pytest.approx((31, 31, 31))


def test_a_pod_that_was_frozen_for_an_hour_has_no_stuck_trainer() -> None:
    board = Board.create()
    board.enter(Section.COMPUTE)
    watch = Watch(board, now=0)
    watch.look(now=0.2, stopped=False)
    reading = watch.look(now=3600, stopped=False)
    for seconds in (reading.section_seconds, reading.still_seconds, reading.beat_age):
        assert seconds <= LONGEST_LOOK_SECONDS


def test_a_look_between_two_words_of_an_entry_gives_no_section_the_time_of_another() -> None:
    board = Board.create()
    board.enter(Section.EVALUATE)
    watch = Watch(board, now=0)
    for second in range(100):
        before = watch.look(now=second, stopped=False)
    visits = board.visits
    board.enter(Section.DATA)
    board.visits = visits  # what is seen before `enter` has written its second word
    after = watch.look(now=100, stopped=False)
    assert (before.section, before.section_seconds) == (Section.EVALUATE, 99)
    assert (after.section, after.section_seconds, after.still_seconds) == (Section.DATA, 0, 0)


def test_a_number_stands_still_from_when_a_slow_section_is_left() -> None:
    board = Board.create()
    watch = Watch(board, now=0)
    board.enter(Section.EVALUATE)
    for second in range(100):
        watch.look(now=second, stopped=False)
    still = []
    for second, section in enumerate([Section.DATA, Section.COMPUTE, Section.DATA], start=100):
        board.enter(section)
        still.append(watch.look(now=second, stopped=False).still_seconds)
    board.collectives += 1
    still.append(watch.look(now=103, stopped=False).still_seconds)
    assert still == [0, 1, 2, 0]


def test_beats_are_seen_whatever_the_section() -> None:
    board = Board.create()
    watch = Watch(board, now=0)
    ages = []
    for second in range(4):
        if second == 2:
            board.beat()
        ages.append(watch.look(now=second, stopped=False).beat_age)
    assert ages == [0, 1, 0, 1]


@dataclass
class Rank:
    """A trainer and its keeper. It enters a collective and leaves it when all have entered it."""

    number: int = 0  # of its collective
    entered: float = 0.0  # when it entered its section
    moved: float = 0.0
    inside: bool = False
    actions: list[Action] = field(default_factory=list)


@dataclass
class Group:
    """Ranks that take a tenth of a second to compute, then meet in a collective."""

    stuck: Callable[[int, int], bool]  # (rank, number): it never comes to this collective
    lost: tuple[int, int] | None = None  # rank, number: does not see that this one is over
    section: Section = Section.DATA  # of those that are stuck
    ranks: list[Rank] = field(default_factory=lambda: [Rank() for _ in range(WORLD)])
    reports: dict[int, int] = field(default_factory=dict)
    now: float = 0.0

    def advance(self) -> None:
        self.now += 0.2
        for at, rank in enumerate(self.ranks):
            if not rank.inside and not self.stuck(at, rank.number + 1):
                rank.number += 1
                rank.inside, rank.entered, rank.moved = True, self.now, self.now
        newest = min(rank.number for rank in self.ranks)
        for at, rank in enumerate(self.ranks):
            if rank.inside and rank.number <= newest and self.lost != (at, rank.number):
                rank.inside, rank.entered = False, self.now

    def judge(self) -> list[Verdict]:
        verdicts = []
        for at, rank in enumerate(self.ranks):
            section = Section.COLLECTIVE if rank.inside else self.section
            reading = replace(
                FINE,
                section=section,
                section_seconds=self.now - rank.entered,
                still_seconds=self.now - max(rank.moved, rank.entered),
                collectives=rank.number,
            )
            found = judge(reading, limit=LIMIT, peers=self.reports, rank=at, world_size=WORLD)
            if found.action in {Action.REPORT, Action.REGROUP}:
                self.reports[at] = rank.number
            else:
                self.reports.pop(at, None)
            rank.actions.append(found.action)
            verdicts.append(found)
        return verdicts

    def until(self, action: Action, *, seconds: float = 1000) -> list[int]:
        """Return the ranks that first get this verdict, all keepers looking at their own."""
        while self.now < seconds:
            self.advance()
            found = [at for at, each in enumerate(self.judge()) if each.action is action]
            if found:
                return found
        return []


@given(stuck=st.integers(0, WORLD - 1), number=st.integers(1, 50))
def test_one_stuck_rank_does_not_let_every_keeper_kill_its_own(stuck: int, number: int) -> None:
    group = Group(stuck=lambda rank, at: rank == stuck and at >= number)
    assert group.until(Action.KILL) == [stuck]
    assert group.now <= 0.2 * number + 10 + 1, "found within the limit"
    # Left to wait on, the others would never be killed either.
    for _ in range(100):
        group.now += 10
        killed = [at for at, each in enumerate(group.judge()) if each.action is Action.KILL]
        assert killed == [stuck]


@given(stuck=st.sets(st.integers(0, WORLD - 1), min_size=2), number=st.integers(1, 5))
def test_several_stuck_ranks_are_killed_and_only_they(stuck: set[int], number: int) -> None:
    group = Group(stuck=lambda rank, at: rank in stuck and at >= number)
    assert set(group.until(Action.KILL)) == stuck


def test_a_rank_that_evaluates_for_minutes_is_waited_for() -> None:
    group = Group(stuck=lambda rank, at: rank == 2 and at >= 3, section=Section.EVALUATE)
    assert group.until(Action.KILL) == [2]
    assert EVALUATE_SECONDS <= group.now <= EVALUATE_SECONDS + 2
    for rank in (0, 1, 3):
        assert Action.REPORT in group.ranks[rank].actions
        assert Action.REGROUP not in group.ranks[rank].actions


@given(behind=st.integers(0, WORLD - 1))
def test_a_rank_that_missed_the_end_of_a_collective_is_the_only_one_killed(behind: int) -> None:
    group = Group(stuck=lambda _rank, _at: False, lost=(behind, 5))
    assert group.until(Action.KILL) == [behind]


def test_where_an_answer_is_lost_to_all_everybody_meets_again_and_nobody_is_killed() -> None:
    group = Group(stuck=lambda _rank, _at: False)
    for _ in range(20):
        group.advance()
        group.judge()
    for rank in group.ranks:
        rank.number += 1
        rank.inside, rank.entered, rank.moved = True, group.now, group.now
    told = set[int]()
    for _ in range(60):
        group.now += 0.2
        verdicts = group.judge()
        told |= {at for at, each in enumerate(verdicts) if each.action is Action.REGROUP}
        assert all(each.action is not Action.KILL for each in verdicts)
    assert told == set(range(WORLD))


def test_ranks_that_work_are_left_alone() -> None:
    group = Group(stuck=lambda _rank, _at: False)
    for _ in range(500):
        group.advance()
        assert all(each.action is Action.FINE for each in group.judge())
    assert all(later == earlier for earlier, later in pairwise(r.number for r in group.ranks))
    assert group.ranks[0].number >= 499
