"""The run log's protocol under every interleaving and every lost answer, within bounds.

Each scene is explored completely; each mistake that a review found, or that somebody might make
again, is put back and must be found: so the checks can fail.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from interleave import Stage, StagedStorage, Violation, explore
from ranks import Rank, expected_rows, learned_by_the_newest, rows_of_the_line
from run_builders import begin, files_of, snapshot, start, step_of
from watch import Watch

from fmnist_dist.checkpoint import fold, folder, restore, writer
from fmnist_dist.checkpoint import sweep as sweeping
from fmnist_dist.checkpoint.folder import write_files
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.storage import AlreadyExistsError, Storage, StorageError
from fmnist_dist.checkpoint.writer import CutOffError, RunWriter, Snapshot
from fmnist_dist.errors import DataDamagedError, FencedError
from fmnist_dist.filenames import METRICS, MODEL

Check = Callable[[], None]
NETWORK = ("applied", "lost", "refused")
TRIES = 4  # of a save: more than the faults of one execution


def small(step: int) -> Snapshot:
    files = files_of(step)
    return snapshot(step, {MODEL: files[MODEL], METRICS: files[METRICS]})


def launched(watch: Watch, storage: Storage, owner: str) -> tuple[RunWriter, int]:
    """Start as a launch does, again and again while storage fails."""
    for _ in range(TRIES):
        acknowledged = watch.acknowledged
        with contextlib.suppress(StorageError):
            mine, restored, _ = start(storage, owner)
            step = step_of(restored)
            if step < acknowledged:
                raise Violation(f"{owner} starts at {step}, and {acknowledged} was acknowledged")
            return mine, step
    raise Violation("more faults than an execution may have")


def save(watch: Watch, mine: RunWriter, step: int, *, keep_last: int = 1) -> None:
    """Save until the state is durable, as the end of a run does, then retire."""
    for _ in range(TRIES):
        with contextlib.suppress(StorageError):
            mine.save(small(step))
            watch.acknowledged = max(watch.acknowledged, step)
            break
    with contextlib.suppress(StorageError):
        mine.retire(keep_last=keep_last, keep_every=None)


def train(watch: Watch, storage: Storage, owner: str, *, saves: int) -> None:
    """Be a launch until the end or until fenced."""
    with contextlib.suppress(FencedError):
        mine, step = launched(watch, storage, owner)
        for _ in range(saves):
            step += 10
            save(watch, mine, step)


def next_start(watch: Watch, stage: Stage, *, clean: bool = True) -> Check:
    """Return the check that the next launch finds everything, and leaves no orphan behind."""

    def check() -> None:
        _, step = launched(watch, stage.storage, "a")
        assert step >= watch.acknowledged
        if clean:
            found = {f"checkpoints/{name}" for name in stage.storage.list("checkpoints")}
            assert found <= watch.folders, "orphans are left"

    return check


def alone(stage: Stage) -> Check:
    """One launch on a network that loses answers."""
    watch = Watch(stage.storage)
    stage.options = NETWORK
    stage.actor("A", lambda: train(watch, stage.storage, "a", saves=3))
    return next_start(watch, stage)


def killed_and_again(stage: Stage) -> Check:
    """A launch that dies before any of its puts, or whose put arrives after its death."""
    watch = Watch(stage.storage)
    stage.options = ("killed", "late", "applied")
    stage.actor("A", lambda: train(watch, stage.storage, "a", saves=2))
    return next_start(watch, stage, clean=False)


def sweep_against_a_slow_save(stage: Stage) -> Check:
    """An attempt that was declared dead goes on saving while the next one starts and sweeps."""
    watch = Watch(stage.storage)
    slow = begin(stage.storage, "a")
    save(watch, slow, 10)

    def dead() -> None:
        with contextlib.suppress(FencedError):
            save(watch, slow, 20)

    stage.actor("dead", dead)
    stage.actor("next", lambda: train(watch, stage.storage, "a", saves=1))
    return next_start(watch, stage, clean=False)


def duel(stage: Stage) -> Check:
    """Two launches of two owners, each started again once when it is fenced."""
    watch = Watch(stage.storage)
    for owner in ("a", "b"):

        def twice(owner: str = owner) -> None:
            train(watch, stage.storage, owner, saves=1)
            train(watch, stage.storage, owner, saves=1)

        stage.actor(owner, twice)

    def check() -> None:
        assert watch.owners[0] == watch.owners[-1] or len(set(watch.owners)) == 2
        assert watch.acknowledged > 0

    return check


def race(stage: Stage) -> Check:
    """Two attempts of one owner start at once, on a log that exists."""
    watch = Watch(stage.storage)
    save(watch, begin(stage.storage, "a"), 10)
    stage.actor("A", lambda: train(watch, stage.storage, "a", saves=1))
    stage.actor("B", lambda: train(watch, stage.storage, "a", saves=1))
    return next_start(watch, stage, clean=False)


def prune_of_a_live_run(stage: Stage) -> Check:
    """`runs prune` beside a run that saves and retires."""
    watch = Watch(stage.storage)
    old = begin(stage.storage, "a")
    save(watch, old, 10)
    folder = "checkpoints/000000020-0001-00000000000000ff"
    write_files(stage.storage, folder, files_of(20))  # killed then
    live, step = launched(watch, stage.storage, "a")

    def prune() -> None:
        log = RunLog(stage.storage)
        sweeping.prune(stage.storage, log, log.read().head)

    stage.actor("live", lambda: save(watch, live, step + 10))
    stage.actor("prune", prune)
    return next_start(watch, stage)


def reader_against_retention(stage: Stage) -> Check:
    """`evaluate` beside a run that keeps only its newest checkpoint."""
    watch = Watch(stage.storage)
    live = begin(stage.storage, "a")
    save(watch, live, 10)

    def saves() -> None:
        for step in (20, 30):
            save(watch, live, step)

    def read() -> None:
        acknowledged = watch.acknowledged
        found = restore.read_newest(stage.storage, RunLog(stage.storage))
        assert step_of(found) >= acknowledged
        assert found.files == dict(small(step_of(found)).files)

    stage.actor("reader", read)
    stage.actor("live", saves)
    return next_start(watch, stage)


class LineWatch(Watch):
    """Also: the rows of the line are what its newest weights have learned, at every moment."""

    def __init__(self, storage: StagedStorage) -> None:
        super().__init__(storage)
        storage.created = self._created_on_the_line
        self._objects = storage.objects
        self._log = RunLog(storage)

    def _created_on_the_line(self, path: str) -> None:
        self._created(path)
        if not path.startswith("log/"):
            return
        learned = learned_by_the_newest(self._log, self.head, self._objects)
        rows = list(rows_of_the_line(self._log, self.head, self._objects))
        if not rows == learned == expected_rows(self.head):
            raise Violation(f"the line has rows {rows}, and its weights learned {learned}")
        if self.head.committed and not self.head.checkpoints:
            raise Violation("no checkpoint is left")


def rank_of(storage: Storage, *steps: int) -> Rank:
    """Return the rank that began an attempt and has saved at `steps`."""
    mine, restored, _ = start(storage, "a")
    rank = Rank.after(mine, restored)
    for step in steps:
        rank.train(step - rank.step)
        assert rank.save()
    return rank


def make_durable(watch: Watch, rank: Rank) -> None:
    """Save until the state, or a newer one, is durable, as every rank does."""
    for _ in range(TRIES):
        with contextlib.suppress(StorageError):
            if not rank.save() and (rank.writer.head.newest_step or 0) < rank.step:
                raise Violation(f"step {rank.step} was dropped, and none as new stands")
            watch.acknowledged = max(watch.acknowledged, rank.step)
            return


def two_ranks(stage: Stage) -> Check:
    """Two ranks of one attempt save the same and other steps, each since its own parent."""
    watch = LineWatch(stage.storage)
    stage.options = NETWORK
    first = rank_of(stage.storage, 1)
    second = first.follower(stage.storage)

    def saves(rank: Rank, *, steps: tuple[int, ...]) -> None:
        for more in steps:
            rank.train(more)
            make_durable(watch, rank)

    stage.actor("first", lambda: saves(first, steps=(1, 2)))
    stage.actor("second", lambda: saves(second, steps=(2, 1)))
    return next_start(watch, stage)


def rollback_against_a_slow_rank(stage: Stage) -> Check:
    """A rank goes on with what another one has just cut off, until it is told."""
    watch = LineWatch(stage.storage)
    first = rank_of(stage.storage, 1, 2)
    second = first.follower(stage.storage)

    def rolls_back() -> None:
        assert first.writer.rollback(step=1, until=4, why="loss")
        first.go_on()
        first.train(4)
        make_durable(watch, first)

    def goes_on() -> None:
        second.train(1)
        try:
            second.save()
        except CutOffError:
            second.go_on()
            second.train(4)
            make_durable(watch, second)
        second.writer.retire(keep_last=3, keep_every=None)

    stage.actor("first", rolls_back)
    stage.actor("second", goes_on)
    return next_start(watch, stage)


def rollback_against_retention(stage: Stage) -> Check:
    """One rank retires what another one rolls back to."""
    watch = LineWatch(stage.storage)
    first = rank_of(stage.storage, 1, 2)
    second = first.follower(stage.storage)

    def rolls_back() -> None:
        with contextlib.suppress(DataDamagedError):  # retention came first
            first.writer.rollback(step=1, until=2, why="loss")

    stage.actor("first", rolls_back)
    stage.actor("second", lambda: second.writer.retire(keep_last=1, keep_every=None))
    return next_start(watch, stage)


Scene = Callable[[Stage], Check]
SCENES: list[tuple[Scene, int, int]] = [  # with the most preemptions and faults in one execution
    (alone, 0, 2),
    (killed_and_again, 0, 1),
    (sweep_against_a_slow_save, 2, 0),
    (duel, 1, 0),
    (race, 2, 0),
    (prune_of_a_live_run, 3, 0),
    (reader_against_retention, 2, 0),
    (two_ranks, 2, 0),
    (two_ranks, 1, 1),
    (rollback_against_a_slow_rank, 2, 0),
    (rollback_against_retention, 2, 0),
]
DEEPER: list[tuple[Scene, int, int]] = [
    (alone, 0, 3),
    (killed_and_again, 0, 2),
    (sweep_against_a_slow_save, 3, 0),
    (duel, 2, 0),
    (race, 3, 0),
    (prune_of_a_live_run, 4, 0),
    (reader_against_retention, 3, 0),
    (two_ranks, 3, 0),
    (two_ranks, 2, 1),
    (rollback_against_a_slow_rank, 3, 0),
    (rollback_against_retention, 3, 0),
]


@pytest.mark.parametrize(
    ("scene", "preemptions", "faults"), SCENES, ids=[scene.__name__ for scene, *_ in SCENES]
)
def test_every_interleaving_keeps_every_promise(
    scene: Scene, preemptions: int, faults: int
) -> None:
    assert explore(scene, preemptions=preemptions, faults=faults) > 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scene", "preemptions", "faults"), DEEPER, ids=[scene.__name__ for scene, *_ in DEEPER]
)
def test_every_interleaving_with_more_preemptions_and_faults_keeps_every_promise(
    scene: Scene, preemptions: int, faults: int
) -> None:
    explore(scene, preemptions=preemptions, faults=faults, executions_max=300_000)


def takes_its_own_lost_answer_for_a_rivals(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunLog, "_is", lambda *_: False)


def takes_every_lost_answer_for_its_own(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunLog, "_is", lambda *_: True)


def takes_a_lost_answer_of_a_file_for_a_bug(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folder, "write_file", lambda storage, *args: storage.create(*args))


def sweeps_from_an_older_list(patch: pytest.MonkeyPatch) -> None:
    begin_right = RunWriter.begin

    def begin_wrong(storage: Storage, log: RunLog, **kwargs: Any) -> RunWriter:
        before = log.read().head
        mine = begin_right(storage, log, **kwargs)
        mine.old = dataclasses.replace(before, attempt=mine.attempt)  # type: ignore[attr-defined]
        return mine

    def sweep_wrong(mine: RunWriter) -> sweeping.Swept:
        return sweeping.sweep(mine._storage, mine._log, mine.old)  # type: ignore[attr-defined]

    patch.setattr(RunWriter, "begin", staticmethod(begin_wrong))
    patch.setattr(RunWriter, "sweep", sweep_wrong)


def sweeps_newer_attempts(patch: pytest.MonkeyPatch) -> None:
    orphans = sweeping._orphans

    def wrong(storage: Storage, known: Any, *, attempts: range) -> list[str]:
        return orphans(storage, known, attempts=range(attempts.start, attempts.stop + 9))

    patch.setattr(sweeping, "_orphans", wrong)


def checks_no_fence(patch: pytest.MonkeyPatch) -> None:
    def wrong(mine: RunWriter, decide: Callable[[Any], Any]) -> bool:
        appended = False

        def noting(head: Any) -> Any:
            nonlocal appended
            body = decide(head)
            appended = body is not None
            return body

        mine.head = mine._log.append(mine._log.advance(mine.head), decide=noting)
        return appended

    patch.setattr(RunWriter, "_append", wrong)


def checks_the_fence_before_the_race_only(patch: pytest.MonkeyPatch) -> None:
    def wrong(mine: RunWriter, decide: Callable[[Any], Any]) -> bool:
        head = mine._log.advance(mine.head)
        if head.attempt != mine.attempt:
            raise FencedError("checked once")
        mine.head = mine._log.append(head, decide=decide)
        return True

    patch.setattr(RunWriter, "_append", wrong)


def deletes_a_folder_without_an_answer(patch: pytest.MonkeyPatch) -> None:
    save_right = RunWriter.save

    def wrong(mine: RunWriter, state: Snapshot) -> bool:
        try:
            return save_right(mine, state)
        except StorageError:
            newest = mine._storage.list("checkpoints")[-1:]
            for name in newest:
                mine._storage.delete_folder(f"checkpoints/{name}")
            raise

    patch.setattr(RunWriter, "save", wrong)


def commits_before_its_files_are_written(patch: pytest.MonkeyPatch) -> None:
    write_right = writer.write_files

    def wrong(storage: Storage, folder: str, files: dict[str, bytes], **more: Any) -> None:
        write_right(storage, folder, dict(list(files.items())[1:]), **more)

    patch.setattr(writer, "write_files", wrong)


def appends_a_step_that_stands(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(writer, "_is_old", lambda *_: False)


def lets_a_superseded_owner_come_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fold, "_superseded", lambda *_, **__: ())


def prunes_the_newest_attempt(patch: pytest.MonkeyPatch) -> None:
    prune_right = sweeping.prune

    def wrong(storage: Storage, log: RunLog, head: Any) -> sweeping.Swept:
        return prune_right(storage, log, dataclasses.replace(head, finished_step=1))

    patch.setattr(sweeping, "prune", wrong)


def deletes_before_it_retires(patch: pytest.MonkeyPatch) -> None:
    retire_right = RunWriter.retire

    def wrong(mine: RunWriter, *, keep_last: int, keep_every: int | None) -> list[int]:
        for each in mine.head.checkpoints[:-keep_last]:
            record = mine._log.record(each.index)
            sweeping.delete_tensors(mine._storage, record.body.folder)  # type: ignore[union-attr]
        return retire_right(mine, keep_last=keep_last, keep_every=keep_every)

    patch.setattr(RunWriter, "retire", wrong)


def takes_what_retention_deleted_for_damage(patch: pytest.MonkeyPatch) -> None:
    def wrong(storage: Storage, log: RunLog) -> restore.Restored:
        newest = log.read().head.checkpoints[-1]
        try:
            return restore.read_checkpoint(storage, log, newest)
        except restore.DamagedCheckpointError as error:
            raise DataDamagedError(str(error)) from error

    patch.setattr(restore, "read_newest", wrong)


def chooses_before_it_takes_over(patch: pytest.MonkeyPatch) -> None:
    begin_right = RunWriter.begin

    def wrong(storage: Storage, log: RunLog, **kwargs: Any) -> RunWriter:
        before = log.read().head.checkpoints
        mine = begin_right(storage, log, **kwargs)
        mine.head = dataclasses.replace(mine.head, checkpoints=before)
        return mine

    patch.setattr(RunWriter, "begin", staticmethod(wrong))


def guesses_its_parent_from_the_head(patch: pytest.MonkeyPatch) -> None:
    save_right = RunWriter.save

    def wrong(mine: RunWriter, state: Snapshot) -> bool:
        saved = save_right(mine, state)
        mine.parent = mine.head.checkpoints[-1].index
        return saved

    patch.setattr(RunWriter, "save", wrong)


def saves_what_was_cut_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunWriter, "_check_cut", lambda *_: None)


def decides_once(patch: pytest.MonkeyPatch, deed: str) -> None:
    """Take the decision on the head that the writer had, and append it to whatever stands."""
    append_right = RunWriter._append
    deed_right = getattr(RunWriter, deed)

    def append_wrong(mine: RunWriter, decide: Callable[[Any], Any]) -> bool:
        decision = decide(mine.head)
        return append_right(mine, lambda _: decision)

    def wrong(mine: RunWriter, **arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(mine, "_append", lambda decide: append_wrong(mine, decide))
            return deed_right(mine, **arguments)

    patch.setattr(RunWriter, deed, wrong)


def retires_what_it_decided_before(patch: pytest.MonkeyPatch) -> None:
    decides_once(patch, "retire")


def rolls_back_to_what_was_there_before(patch: pytest.MonkeyPatch) -> None:
    decides_once(patch, "rollback")


MISTAKES: list[tuple[Callable[[pytest.MonkeyPatch], None], Scene, int, int, str]] = [
    (takes_its_own_lost_answer_for_a_rivals, alone, 0, 1, "is retained"),
    (takes_every_lost_answer_for_its_own, race, 1, 0, "none is valid|another head"),
    (takes_a_lost_answer_of_a_file_for_a_bug, alone, 0, 1, "checkpoints/"),
    (sweeps_from_an_older_list, sweep_against_a_slow_save, 1, 0, "is retained"),
    (sweeps_newer_attempts, race, 2, 0, "is committed without its|is retained"),
    (checks_no_fence, sweep_against_a_slow_save, 1, 0, "attempt 1 commits"),
    (checks_the_fence_before_the_race_only, race, 2, 0, "attempt 2 commits"),
    (deletes_a_folder_without_an_answer, alone, 0, 1, "is retained"),
    (commits_before_its_files_are_written, alone, 0, 0, "is committed without its"),
    (appends_a_step_that_stands, alone, 0, 1, r"step (\d0) after \1"),
    (lets_a_superseded_owner_come_back, duel, 1, 0, "takes the run over a second time"),
    (prunes_the_newest_attempt, prune_of_a_live_run, 1, 0, "is committed without its"),
    (deletes_before_it_retires, alone, 0, 0, "is retained"),
    (takes_what_retention_deleted_for_damage, reader_against_retention, 1, 0, "is missing"),
    (chooses_before_it_takes_over, sweep_against_a_slow_save, 1, 0, "starts at|another head"),
    (guesses_its_parent_from_the_head, two_ranks, 1, 0, "the line has rows"),
    (saves_what_was_cut_off, rollback_against_a_slow_rank, 1, 0, "the line has rows"),
    (retires_what_it_decided_before, rollback_against_retention, 1, 0, "no checkpoint is left"),
    (rolls_back_to_what_was_there_before, rollback_against_retention, 1, 0, "no checkpoint is"),
]


@pytest.mark.parametrize(
    ("mistake", "scene", "preemptions", "faults", "found"),
    MISTAKES,
    ids=[mistake.__name__ for mistake, *_ in MISTAKES],
)
def test_the_exploration_finds_a_launch_that(
    monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[[pytest.MonkeyPatch], None],
    scene: Scene,
    preemptions: int,
    faults: int,
    found: str,
) -> None:
    mistake(monkeypatch)
    with pytest.raises((Violation, AlreadyExistsError, DataDamagedError), match=found):
        explore(scene, preemptions=preemptions, faults=faults)
