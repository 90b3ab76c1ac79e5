"""Rollbacks: the line is cut, what lay beyond is never chosen again, training passes over it."""

from collections.abc import Iterable
from functools import reduce
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_storage import MemoryStorage
from on_s3 import every_storage  # noqa: F401 - once more, on a real server
from ranks import Rank, expected_rows, learned_by_the_newest, rows_of_the_line
from run_builders import attempt, begin, files_of, snapshot, start, step_of

from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.fold import fold
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.hint import Reached
from fmnist_dist.checkpoint.history import AttemptStory, read_history
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import Finish, Rollback, path_of
from fmnist_dist.checkpoint.restore import read_newest
from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.checkpoint.sweep import prune
from fmnist_dist.checkpoint.verify import verify
from fmnist_dist.checkpoint.writer import CutOffError, RunWriter
from fmnist_dist.errors import DataDamagedError, ExitCode, FencedError, UsageError
from fmnist_dist.filenames import METRICS

WHY = "the loss of step 24 is nan"


def run_at(*steps: int) -> tuple[MemoryStorage, RunWriter]:
    """Return a run with checkpoints at these steps."""
    storage = MemoryStorage()
    writer, _, _ = start(storage)
    for step in steps:
        assert writer.save(snapshot(step))
    return storage, writer


def chosen(writer: RunWriter) -> int:
    return step_of(writer.choose(report=lambda _: None))


def line(storage: MemoryStorage) -> list[int]:
    log = RunLog(storage)
    return [each.checkpoint.step for each in lineage.line(log, log.read().head)]


def stories(storage: MemoryStorage, **reached: int) -> tuple[AttemptStory, ...]:
    """Tell the attempts, `a1=23` being how far attempt 1 is known to have got."""
    hints = {int(name[1:]): Reached(first_step=0, last_step=step) for name, step in reached.items()}
    return read_history(RunLog(storage), hints).attempts


# What is chosen, and what may be saved.


def test_training_goes_on_from_the_cut_and_not_from_what_was_newer() -> None:
    storage, writer = run_at(10, 20, 30)
    assert writer.rollback(step=10, until=31, why=WHY)
    assert writer.head.passed_over == ((10, 31),)
    assert chosen(writer) == 10
    assert step_of(start(storage)[1]) == 10
    assert step_of(read_newest(storage, RunLog(storage))) == 10


def test_the_newest_checkpoint_is_that_of_the_highest_step_on_the_line() -> None:
    storage, writer = run_at(10, 20, 30)
    writer.rollback(step=10, until=20, why=WHY)
    chosen(writer)
    assert writer.head.newest_step == 10
    assert writer.save(snapshot(20))  # the step of a checkpoint that was cut off
    assert not writer.save(snapshot(20))
    assert writer.head.newest_step == 20
    assert step_of(read_newest(storage, RunLog(storage))) == 20


def test_the_line_leads_from_the_new_checkpoint_to_the_cut() -> None:
    storage, writer = run_at(10, 20, 30)
    writer.rollback(step=20, until=31, why=WHY)
    chosen(writer)
    writer.save(snapshot(40))
    assert line(storage) == [10, 20, 40]


@pytest.mark.parametrize("clean", [True, False], ids=["in the attempt", "in the next one"])
def test_a_rollback_to_the_beginning_is_no_damage(*, clean: bool) -> None:
    storage, writer = run_at(10, 20)
    writer.rollback(step=0, until=21, why=WHY)
    if clean:
        assert writer.choose(report=lambda _: None) is None
    else:
        writer, restored, _ = start(storage)
        assert restored is None
    assert writer.parent is None
    with pytest.raises(UsageError, match="there is: none yet"):
        read_newest(storage, RunLog(storage))
    assert line(storage) == []
    writer.save(snapshot(30))
    assert line(storage) == [30]


def test_a_rollback_to_the_beginning_is_none_even_where_a_record_before_it_is_damaged() -> None:
    storage, writer = run_at(10)
    writer.rollback(step=0, until=11, why=WHY)
    storage.objects[path_of(1)] = b"damaged"
    assert start(storage)[1] is None


def test_a_record_that_is_damaged_after_a_rollback_may_have_been_a_checkpoint() -> None:
    storage, writer = run_at(10)
    writer.rollback(step=0, until=11, why=WHY)
    chosen(writer)
    writer.save(snapshot(20))
    storage.objects[path_of(writer.head.index)] = b"damaged"
    with pytest.raises(DataDamagedError, match="none is valid any more"):
        start(storage)


def test_after_a_new_checkpoint_on_the_new_line_damage_is_damage_again() -> None:
    storage, writer = run_at(10)
    writer.rollback(step=0, until=11, why=WHY)
    chosen(writer)
    writer.save(snapshot(20))
    newest = lineage.commit(RunLog(storage), writer.head.checkpoints[-1].index)
    storage.objects[f"{newest.checkpoint.folder}/{METRICS}"] = b"damaged"
    with pytest.raises(DataDamagedError, match="none is valid any more"):
        start(storage)


def test_a_damaged_cut_point_falls_back_further() -> None:
    storage, writer = run_at(10, 20, 30)
    writer.rollback(step=20, until=31, why=WHY)
    cut = lineage.commit(RunLog(storage), writer.head.checkpoints[-1].index)
    storage.objects[f"{cut.checkpoint.folder}/{METRICS}"] = b"damaged"
    assert step_of(start(storage)[1]) == 10


def test_a_rollback_to_what_is_not_there_is_refused() -> None:
    storage, writer = run_at(10, 20)
    writer.retire(keep_last=1, keep_every=None)
    before = dict(storage.objects)
    with pytest.raises(DataDamagedError, match="no checkpoint up to step 15 is left") as caught:
        writer.rollback(step=15, until=21, why=WHY)
    assert caught.value.exit_code == ExitCode.DATA_DAMAGED == 65
    assert storage.objects == before
    assert writer.rollback(step=25, until=26, why=WHY)  # to the newest up to there
    assert chosen(writer) == 20


def test_a_rollback_whose_answer_was_lost_cuts_once() -> None:
    class Mute(MemoryStorage):
        mute = False

        def create(self, path: str, data: bytes) -> None:
            super().create(path, data)
            if self.mute:
                self.mute = False
                raise StorageError("no answer")

    storage = Mute()
    writer, _, _ = start(storage)
    for step in (10, 20):
        writer.save(snapshot(step))
    storage.mute = True
    with pytest.raises(StorageError):
        writer.rollback(step=10, until=21, why=WHY)
    assert not writer.rollback(step=10, until=21, why=WHY)
    assert chosen(writer) == 10
    assert len(read_history(RunLog(storage), {}).rollbacks) == 1


def test_a_fenced_rollback_changes_nothing() -> None:
    storage, writer = run_at(10, 20)
    start(storage)
    before = dict(storage.objects)
    with pytest.raises(FencedError):
        writer.rollback(step=10, until=21, why=WHY)
    assert storage.objects == before


# Ranks that do not know of the cut.


def two_ranks_at(*steps: int) -> tuple[MemoryStorage, Rank, Rank]:
    storage = MemoryStorage()
    writer, restored, _ = start(storage)
    first = Rank.after(writer, restored)
    for step in steps:
        first.train(step - first.step)
        assert first.save()
    return storage, first, first.follower(storage)


def test_a_state_from_beyond_the_cut_is_neither_saved_nor_finished_nor_its_folder_kept() -> None:
    storage, first, second = two_ranks_at(1, 2)
    second.train(3)
    first.writer.rollback(step=1, until=2, why=WHY)
    before = dict(storage.objects)
    with pytest.raises(CutOffError, match="was rolled back to step 1") as caught:
        second.save()
    assert caught.value.exit_code == ExitCode.TRANSIENT == 75  # a restart goes on
    with pytest.raises(CutOffError):
        second.writer.finish(step=5, reason="epochs", metrics={})
    assert storage.objects == before
    assert second.writer.head.passed_over == ((1, 2),)  # what it was refused for


def test_nothing_is_saved_between_a_rollback_and_the_choice_of_what_to_go_on_from() -> None:
    _, first, _ = two_ranks_at(1, 2)
    first.train(1)
    first.writer.rollback(step=1, until=2, why=WHY)
    with pytest.raises(CutOffError):
        first.save()
    first.go_on()
    first.train(1)
    assert first.save()


def test_of_two_ranks_that_roll_back_one_does_and_the_other_goes_on_from_there() -> None:
    storage, first, second = two_ranks_at(1, 2, 3)
    assert first.writer.rollback(step=2, until=4, why=WHY)
    assert not second.writer.rollback(step=1, until=5, why=WHY)
    for rank in (first, second):
        rank.go_on()
        assert (rank.step, rank.passed_over) == (2, ((2, 4),))
    assert second.writer.rollback(step=1, until=5, why=WHY)  # it was asked, and knows now
    assert len(read_history(RunLog(storage), {}).rollbacks) == 2


def test_a_rank_that_joins_after_the_cut_saves_if_it_says_so() -> None:
    storage, first, _ = two_ranks_at(1, 2)
    first.writer.rollback(step=1, until=2, why=WHY)
    first.go_on()
    first.train(3)
    told, untold = (first.follower(storage, tells_cut=tells) for tells in (True, False))
    with pytest.raises(CutOffError):
        untold.save()
    assert told.save()
    # A parent from beyond the cut says as much.
    first.go_on()
    first.train(1)
    assert first.follower(storage, tells_cut=False).save()


def test_a_rollback_of_an_earlier_attempt_is_known_to_every_rank() -> None:
    storage, first, _ = two_ranks_at(1, 2)
    first.writer.rollback(step=1, until=2, why=WHY)
    writer, restored, _ = start(storage)
    second = Rank.after(writer, restored).follower(storage, tells_cut=False)
    second.train(3)
    assert second.save()


def test_rows_are_those_of_the_steps_that_were_not_passed_over() -> None:
    storage, rank, _ = two_ranks_at(2, 4, 6)
    rank.writer.rollback(step=4, until=7, why=WHY)
    rank.go_on()
    rank.train(5)
    rank.save()
    log = RunLog(storage)
    head = log.read().head
    rows = list(rows_of_the_line(log, head, storage.objects))
    assert rows == [1, 2, 3, 4, 8, 9] == expected_rows(head)
    assert learned_by_the_newest(log, head, storage.objects) == rows


# What becomes of what was cut off.


def test_what_was_cut_off_is_retired_with_the_next_retention_and_keeps_its_metrics() -> None:
    storage, writer = run_at(10, 20, 30)
    folders = [
        lineage.commit(RunLog(storage), each.index).checkpoint.folder
        for each in writer.head.checkpoints
    ]
    writer.rollback(step=10, until=31, why=WHY)
    assert [storage.list(folder) for folder in folders] == [sorted(files_of(0))] * 3
    assert writer.retire(keep_last=5, keep_every=None) == [20, 30]
    assert [storage.list(folder) for folder in folders] == [
        sorted(files_of(0)),
        [METRICS],
        [METRICS],
    ]
    assert writer.head.cut_off == ()
    assert writer.retire(keep_last=5, keep_every=None) == []


def test_what_was_cut_off_is_no_orphan_and_goes_with_the_next_attempts_retention() -> None:
    storage, writer = run_at(10, 20)
    writer.rollback(step=10, until=21, why=WHY)
    folders = storage.list("checkpoints")
    again, restored, swept = start(storage)
    assert (step_of(restored), swept.orphans) == (10, ())
    prune(storage, RunLog(storage), again.head)
    assert storage.list("checkpoints") == folders
    again.save(snapshot(30))
    assert again.retire(keep_last=2, keep_every=None) == [20]
    assert verify(storage, RunLog(storage)).damage == ()


def test_retention_on_an_older_look_does_not_take_the_cut_point() -> None:
    storage, writer = run_at(10, 20)
    other = RunWriter.follow(storage, RunLog(storage), attempt=1, parent=None)
    writer.rollback(step=10, until=21, why=WHY)
    assert other.retire(keep_last=1, keep_every=None) == []  # it would have taken 10
    assert other.retire(keep_last=1, keep_every=None) == [20]
    assert chosen(writer) == 10


def test_an_override_from_beyond_the_cut_holds_from_its_step_on() -> None:
    storage, writer = run_at(10, 20)
    writer.override(step=20, settings={"lr": 0.1})
    writer.rollback(step=10, until=21, why=WHY)
    found = lineage.overrides(RunLog(storage), writer.head)
    assert [(each.step, each.settings) for each in found] == [(20, {"lr": 0.1})]


def test_a_finished_run_that_is_rolled_back_is_not_finished() -> None:
    storage, writer = run_at(10, 20)
    writer.finish(step=20, reason="epochs", metrics={})
    writer.rollback(step=10, until=21, why=WHY)
    assert writer.head.finished_step is None
    history = read_history(RunLog(storage), {})
    assert (history.status, history.attempts[-1].ended) == ("running", None)
    assert fold(writer.head, index=9, body=Finish(step=20, reason="x", metrics={})).finished_step


# Steps that are passed over.


ranges = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 8)).map(lambda each: (each[0], sum(each))),
    max_size=8,
)


@given(ranges)
def test_passed_over_steps_are_the_union_as_rising_ranges(wanted: list[tuple[int, int]]) -> None:
    def cut(head: Head, each: tuple[int, int]) -> Head:
        return fold(head, index=head.index + 1, body=Rollback(step=each[0], until=each[1], why=""))

    found = reduce(cut, wanted, fold(Head(), index=0, body=attempt())).passed_over
    assert steps_of(found) == steps_of(wanted)
    assert all(first < until for first, until in found)
    assert all(a[1] < b[0] for a, b in pairwise(found))


def steps_of(wanted: Iterable[tuple[int, int]]) -> set[int]:
    return {step for first, until in wanted for step in range(first, until)}


# What is told of it.


def test_what_a_rollback_cut_off_counts_as_lost_for_nobody() -> None:
    storage, _ = run_at(10, 20)
    again, _, _ = start(storage)  # at 20
    again.rollback(step=10, until=24, why=WHY)
    again.heal(step=24, rank=0, reason="killed", seconds=0.1, lost_steps=0)
    chosen(again)
    again.save(snapshot(30))
    start(storage)
    found = stories(storage, a1=23, a2=33)
    assert [(each.first_step, each.last_step, each.lost_steps) for each in found] == [
        (0, 23, 3),
        (20, 33, 3),
        (30, None, None),
    ]


def test_an_attempt_that_was_killed_after_its_rollback_lost_what_it_learned_since() -> None:
    storage, writer = run_at(10, 20)
    writer.rollback(step=10, until=24, why=WHY)
    start(storage)
    # Of the steps from 10 to 26 the first 14 were passed over, and will be again.
    assert stories(storage, a1=26)[0].lost_steps == 2
    assert stories(storage, a1=23)[0].lost_steps == 0  # it had not gone on yet
    assert stories(storage)[0].lost_steps is None


def test_what_was_saved_beyond_the_cut_is_not_where_an_attempt_got_to() -> None:
    storage, writer = run_at(10, 20)
    writer.rollback(step=10, until=10, why=WHY)
    start(storage)
    assert (stories(storage)[0].last_step, stories(storage)[0].lost_steps) == (None, None)
    told = stories(storage, a1=13)[0]
    assert (told.last_step, told.lost_steps) == (13, 3)


def test_rollbacks_are_told_in_their_order() -> None:
    storage, writer = run_at(10, 20)
    for step in (20, 10):
        writer.rollback(step=step, until=25, why=f"to {step}")
        chosen(writer)
    assert [each.why for each in read_history(RunLog(storage), {}).rollbacks] == ["to 20", "to 10"]


def test_a_new_attempt_that_rolls_back_before_it_chooses_goes_on_from_the_cut() -> None:
    storage, _ = run_at(10, 20)
    writer = begin(storage)
    assert writer.rollback(step=10, until=21, why=WHY)
    assert chosen(writer) == 10
    assert writer.save(snapshot(30))
    assert line(storage) == [10, 30]
