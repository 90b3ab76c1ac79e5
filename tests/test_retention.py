"""Which checkpoints go, and what a save, a retirement and a sweep leave behind."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_storage import MemoryStorage
from on_s3 import every_storage  # noqa: F401 - once more, on a real server
from run_builders import begin, files_of, snapshot, start, step_of

from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.folder import write_files
from fmnist_dist.checkpoint.head import Retained
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.retention import to_retire
from fmnist_dist.checkpoint.storage import AlreadyExistsError, StorageError
from fmnist_dist.checkpoint.sweep import delete_tensors, prune, sweep
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.errors import ExitCode, FencedError
from fmnist_dist.filenames import METRICS


def checkpoints(*steps: int) -> list[Retained]:
    return [Retained(step=step, index=100 + step) for step in steps]


def retired(*steps: int, keep_last: int, keep_every: int | None = None) -> list[int]:
    gone = to_retire(checkpoints(*steps), keep_last=keep_last, keep_every=keep_every)
    return [each.step for each in gone]


def test_the_last_ones_stay() -> None:
    assert retired(1, 2, 3, 4, keep_last=2) == [1, 2]
    assert retired(1, 2, keep_last=2) == []
    assert retired(keep_last=2) == []


def test_the_first_of_each_window_stays_whether_or_not_it_falls_on_a_multiple() -> None:
    steps = (5, 10, 15, 20, 25, 31, 37, 50, 55)
    assert retired(*steps, keep_last=1, keep_every=10) == [5, 15, 25, 37]
    # Nothing of the first window, which would be the untrained end of the run.
    assert retired(1, 2, 3, keep_last=1, keep_every=10) == [1, 2]


steps_of_a_run = st.lists(st.integers(1, 500), unique=True, max_size=30).map(sorted)


@given(steps_of_a_run, st.integers(1, 5), st.none() | st.integers(1, 100))
def test_retention_never_lets_the_newest_go_and_repeats_itself(
    steps: list[int], keep_last: int, keep_every: int | None
) -> None:
    gone = retired(*steps, keep_last=keep_last, keep_every=keep_every)
    kept = [step for step in steps if step not in gone]
    assert kept[-keep_last:] == steps[-keep_last:]
    assert retired(*kept, keep_last=keep_last, keep_every=keep_every) == []
    if keep_every is not None:
        assert {step // keep_every for step in kept} - {0} == (
            {step // keep_every for step in steps} - {0}
        )


@given(steps_of_a_run, st.integers(1, 5), st.none() | st.integers(1, 100))
def test_retention_at_every_save_keeps_what_retention_at_the_end_would(
    steps: list[int], keep_last: int, keep_every: int | None
) -> None:
    kept: list[int] = []
    for step in steps:
        kept.append(step)
        gone = retired(*kept, keep_last=keep_last, keep_every=keep_every)
        kept = [each for each in kept if each not in gone]
    gone = retired(*steps, keep_last=keep_last, keep_every=keep_every)
    assert kept == [step for step in steps if step not in gone]


def test_a_retired_checkpoint_loses_its_tensors_and_keeps_its_metrics() -> None:
    storage = MemoryStorage()
    writer = begin(storage)
    for step in (10, 20, 30):
        writer.save(snapshot(step))
    assert writer.retire(keep_last=1, keep_every=None) == [10, 20]
    log = RunLog(storage)
    line = lineage.line(log, log.read().head)
    assert [each.checkpoint.step for each in line] == [10, 20, 30]
    assert [storage.list(each.checkpoint.folder) for each in line] == [
        [METRICS],
        [METRICS],
        sorted(files_of(0)),
    ]


def test_retention_before_it_is_due_writes_nothing() -> None:
    storage = MemoryStorage()
    writer = begin(storage)
    writer.save(snapshot(10))
    before = dict(storage.objects)
    assert writer.retire(keep_last=1, keep_every=None) == []
    assert storage.objects == before


def test_a_state_as_new_as_a_saved_one_is_not_saved_again() -> None:
    storage = MemoryStorage()
    writer = begin(storage)
    assert writer.save(snapshot(20))
    before = dict(storage.objects)
    for step in (20, 10):
        assert not writer.save(snapshot(step))
    assert storage.objects == before


def test_the_line_leads_from_each_checkpoint_to_the_one_it_was_trained_from() -> None:
    storage = MemoryStorage()
    writer = begin(storage)
    writer.save(snapshot(10))
    writer.save(snapshot(20))
    again, restored, _ = start(storage)
    assert step_of(restored) == 20
    again.save(snapshot(30))
    log = RunLog(storage)
    line = lineage.line(log, log.read().head)
    assert [(each.checkpoint.step, each.attempt) for each in line] == [(10, 1), (20, 1), (30, 2)]


def two_writers(storage: MemoryStorage, *steps: int) -> tuple[RunWriter, RunWriter]:
    """Return writers of two ranks of one attempt, which has saved at these steps."""
    first, _, _ = start(storage)
    for step in steps:
        assert first.save(snapshot(step))
    log = RunLog(storage)
    return first, RunWriter.follow(storage, log, attempt=first.attempt, parent=first.parent)


def test_a_parent_moves_with_a_save_of_its_own_and_with_no_other() -> None:
    storage = MemoryStorage()
    first, second = two_writers(storage, 10)
    assert first.parent == second.parent == 1
    assert first.save(snapshot(20))
    assert not second.save(snapshot(20))  # so its rows are still those since 10
    assert (first.parent, second.parent) == (2, 1)
    assert second.head.newest_step == 20
    assert second.save(snapshot(30))
    assert not first.save(snapshot(25))
    assert (first.parent, second.parent) == (2, 3)
    log = RunLog(storage)
    line = lineage.line(log, log.read().head)
    assert [each.checkpoint.step for each in line] == [10, 30]  # 20 holds nothing that 30 lacks


def test_a_save_without_an_answer_leaves_the_parent_although_it_may_stand() -> None:
    class Mute(MemoryStorage):
        def create(self, path: str, data: bytes) -> None:
            super().create(path, data)
            if path == "log/000000000001.json":
                raise StorageError("no answer")

    writer, _, _ = start(Mute())
    with pytest.raises(StorageError):
        writer.save(snapshot(10))
    assert not writer.save(snapshot(10))
    assert writer.parent is None
    assert writer.save(snapshot(20))
    assert writer.parent == 2


def test_a_writer_sees_what_others_of_its_attempt_did_without_appending() -> None:
    storage = MemoryStorage()
    first, second = two_writers(storage, 10)
    first.save(snapshot(20))
    first.finish(step=20, reason="epochs", metrics={})
    before = dict(storage.objects)
    assert second.refresh().newest_step == 20
    assert second.head.finished_step == 20
    second.finish(step=20, reason="epochs", metrics={})
    assert storage.objects == before


def test_retention_counts_only_what_still_stands_when_it_appends() -> None:
    storage = MemoryStorage()
    first, second = two_writers(storage, 10, 20)
    first.retire(keep_last=2, keep_every=None)  # has read both
    second.quarantine(second.head.checkpoints[-1], why="it leads to a loss that is no number")
    assert first.retire(keep_last=1, keep_every=None) == []
    assert step_of(start(storage)[1]) == 10


def test_a_checkpoint_that_came_while_retention_read_does_not_count_before_it_is_read() -> None:
    storage = MemoryStorage()
    first, second = two_writers(storage, 10, 20)
    second.save(snapshot(30))
    for index in (2, 3):
        folder = lineage.commit(RunLog(storage), index).checkpoint.folder
        storage.objects[f"{folder}/{METRICS}"] = b"damaged"
    assert first.retire(keep_last=1, keep_every=None) == []  # finds 20 damaged, and hears of 30
    assert first.retire(keep_last=1, keep_every=None) == []  # finds 30 damaged
    assert step_of(start(storage)[1]) == 10


def test_a_checkpoint_that_two_ranks_let_go_is_retired_once() -> None:
    storage = MemoryStorage()
    first, second = two_writers(storage, 10, 20)
    assert first.retire(keep_last=1, keep_every=None) == [10]
    before = dict(storage.objects)
    assert second.retire(keep_last=1, keep_every=None) == []
    assert storage.objects == before


def test_a_fenced_attempt_neither_saves_nor_deletes_anything() -> None:
    storage = MemoryStorage()
    old = begin(storage, "a")
    for step in (10, 20):
        old.save(snapshot(step))
    start(storage, "b")
    before = dict(storage.objects)
    for deed in (
        lambda: old.save(snapshot(30)),
        lambda: old.retire(keep_last=1, keep_every=None),
        lambda: old.override(step=20, settings={"lr": 1.0}),
        lambda: old.finish(step=20, reason="epochs", metrics={}),
        lambda: old.quarantine(old.head.checkpoints[0], why="x"),
        lambda: old.heal(step=20, rank=0, reason="killed", seconds=0.1, lost_steps=0),
        lambda: old.rollback(step=10, until=20, why="x"),
        old.refresh,
        lambda: RunWriter.follow(storage, old._log, attempt=old.attempt, parent=None),
    ):
        with pytest.raises(FencedError) as caught:
            deed()
        assert caught.value.exit_code == ExitCode.FENCED == 76
    assert storage.objects == before


def test_an_owner_that_was_superseded_is_fenced_at_once_and_the_other_is_not() -> None:
    storage = MemoryStorage()
    for owner in ("a", "a", "b", "b"):
        begin(storage, owner)
    before = dict(storage.objects)
    with pytest.raises(FencedError, match="another launch has taken this run over"):
        begin(storage, "a")
    assert storage.objects == before
    assert begin(storage, "b").attempt == 5


def test_a_fenced_save_that_cannot_tidy_up_is_fenced_nevertheless() -> None:
    class Stubborn(MemoryStorage):
        def delete_folder(self, folder: str) -> None:
            raise StorageError("away")

    storage = Stubborn()
    old = begin(storage)
    begin(storage)
    with pytest.raises(FencedError):
        old.save(snapshot(10))


def test_a_file_whose_answer_was_lost_is_not_written_twice_and_is_no_bug() -> None:
    class Forgetful(MemoryStorage):
        def create(self, path: str, data: bytes) -> None:
            super().create(path, data)
            raise AlreadyExistsError(path)

    storage = Forgetful()
    writer = begin(storage)
    assert writer.save(snapshot(10))
    assert storage.list("log") == ["000000000000.json", "000000000001.json"]


def test_a_file_that_reads_back_as_another_is_not_committed() -> None:
    class Wrong(MemoryStorage):
        def create(self, path: str, data: bytes) -> None:
            if path.startswith("checkpoints"):
                super().create(path, b"somebody else's")
                raise AlreadyExistsError(path)
            super().create(path, data)

    storage = Wrong()
    with pytest.raises(StorageError, match="reads back something else"):
        begin(storage).save(snapshot(10))
    assert storage.list("checkpoints") == []
    assert storage.list("log") == ["000000000000.json"]


def test_a_sweep_takes_orphans_of_older_attempts_and_nothing_else(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    old = begin(storage)
    old.save(snapshot(10))
    write_files(storage, "checkpoints/000000020-0001-00000000000000aa", files_of(20))
    kept = ("notes", "000000020-0001-zz", "000000020-0003-00000000000000aa", "x-000000020-0001-00")
    for name in kept:
        storage.create(f"checkpoints/{name}/file", b"")
    new = begin(storage)
    write_files(storage, "checkpoints/000000020-0002-00000000000000aa", files_of(20))
    assert new.sweep().orphans == ("checkpoints/000000020-0001-00000000000000aa",)
    committed = [name for name in storage.list("checkpoints") if name.startswith("000000010")]
    assert storage.list("checkpoints") == sorted(
        [*kept, *committed, "000000020-0002-00000000000000aa"]
    )


def test_what_was_swept_is_not_looked_through_again() -> None:
    storage = MemoryStorage()
    for attempt in range(1, 20):
        writer, _, _ = start(storage)
        writer.save(snapshot(10 * attempt))
        writer.retire(keep_last=1, keep_every=None)
    new = begin(storage)
    storage.reads = 0
    sweep(storage, RunLog(storage), new.head)
    assert storage.reads <= 6  # the records of two attempts, however long the log is


def test_what_a_retirement_left_to_delete_is_deleted_by_the_next_start() -> None:
    storage = MemoryStorage()
    old = begin(storage)
    for step in (10, 20):
        old.save(snapshot(step))
    folder = lineage.commit(RunLog(storage), 1).checkpoint.folder
    old.retire(keep_last=1, keep_every=None)
    for name, data in files_of(10).items():
        storage.objects[f"{folder}/{name}"] = data  # as if it was killed right after its record
    start(storage)
    assert storage.list(folder) == [METRICS]


def test_pruning_leaves_the_newest_attempt_alone_until_it_has_finished() -> None:
    storage = MemoryStorage()
    log = RunLog(storage)
    for orphan in ("aa", "bb"):
        writer = begin(storage)
        name = f"checkpoints/000000010-{writer.attempt:04d}-00000000000000{orphan}"
        write_files(storage, name, files_of(10))
    writer.save(snapshot(20))
    assert prune(storage, log, log.read().head).orphans == (
        "checkpoints/000000010-0001-00000000000000aa",
    )
    writer.finish(step=20, reason="epochs", metrics={})
    assert prune(storage, log, log.read().head).orphans == (
        "checkpoints/000000010-0002-00000000000000bb",
    )
    assert prune(storage, log, log.read().head).orphans == ()
    assert step_of(start(storage)[1]) == 20


def test_pruning_does_not_hurry_the_retention_of_a_live_attempt() -> None:
    storage = MemoryStorage()
    log = RunLog(storage)
    writer = begin(storage)
    for step in (10, 20):
        writer.save(snapshot(step))
    folder = lineage.commit(log, 1).checkpoint.folder
    writer.retire(keep_last=1, keep_every=None)
    storage.objects[f"{folder}/model.safetensors"] = b"not deleted yet"
    prune(storage, log, log.read().head)
    assert storage.list(folder) == [METRICS, "model.safetensors"]
    begin(storage)
    prune(storage, log, log.read().head)
    assert storage.list(folder) == [METRICS]


def test_deleting_tensors_twice_is_no_error() -> None:
    storage = MemoryStorage()
    for name, data in files_of(1).items():
        storage.create(f"checkpoints/a/{name}", data)
    for _ in range(2):
        delete_tensors(storage, "checkpoints/a")
        assert storage.list("checkpoints/a") == [METRICS]
    delete_tensors(storage, "checkpoints/none")


def test_finishing_twice_is_recorded_once() -> None:
    storage = MemoryStorage()
    writer = begin(storage)
    writer.save(snapshot(10))
    for _ in range(2):
        writer.finish(step=10, reason="epochs", metrics={"test_accuracy": 0.9})
    head = RunLog(storage).read().head
    assert (head.index, head.finished_step) == (2, 10)


def test_nothing_is_committed_once_the_run_is_finished_so_what_prune_finds_is_left_over() -> None:
    """Found by the state machine: a save that began before `finish` was pruned half-way."""
    storage = MemoryStorage()
    writer = begin(storage)
    assert writer.save(snapshot(1))
    writer.finish(step=1, reason="epochs", metrics={})
    assert not writer.save(snapshot(2))
    assert writer.refresh().newest_step == 1
    assert len(storage.list("checkpoints")) == 1
