"""The local tier: what its copies are good for, for whom, and what they must never do.

`test_local_tier_training.py` has the same for whole trainings.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from interleave import Stage, StagedStorage, Violation, explore
from memory_storage import MemoryStorage
from ranks import Rank, rows_of_the_line
from run_builders import attempt, begin, files_of, snapshot, start, step_of
from watch import Watch

from fmnist_dist import limits
from fmnist_dist.checkpoint import lineage, tier
from fmnist_dist.checkpoint.adoption import refusal
from fmnist_dist.checkpoint.disk import Disk
from fmnist_dist.checkpoint.fold import fold
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.localcopy import COPIES, to_remove
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import (
    Body,
    Checkpoint,
    File,
    Heal,
    Override,
    Quarantine,
    Record,
    Retire,
    Rollback,
    decode,
)
from fmnist_dist.checkpoint.storage import Storage, StorageError
from fmnist_dist.checkpoint.tier import LocalTier
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.errors import DataDamagedError, FencedError
from fmnist_dist.filenames import METRICS, MODEL


@pytest.fixture(autouse=True)
def without_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncs are most of the time; `test_storage` and `test_power_cut` have them."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Away(MemoryStorage):
    """The run's storage; while it is away, nothing can be written. It counts what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away = False
        self.files_read: list[str] = []

    def create(self, path: str, data: bytes) -> None:
        if self.is_away:
            raise StorageError("away")
        super().create(path, data)

    def read(self, path: str) -> bytes:
        if path.startswith("checkpoints/"):
            self.files_read.append(path)
        return super().read(path)


def tier_of(folder: Path, storage: Storage, told: list[str] | None = None) -> LocalTier:
    """Return the tier of a process that has just started."""
    warn = [].append if told is None else told.append
    return LocalTier(folder / "tier", run="s3://bucket/run", log=RunLog(storage), warn=warn)


def copied(folder: Path) -> list[int]:
    """Return the steps of which there are copies, with or without a record."""
    return sorted(int(path.name[:9]) for path in folder.glob("tier/*/checkpoints/*"))


def save_away(storage: Away, writer: RunWriter, step: int) -> None:
    """Save while storage is away: the copy is made, the commit fails."""
    storage.is_away = True
    with pytest.raises(StorageError):
        writer.save(snapshot(step))
    storage.is_away = False


def body_of(storage: Storage, step: int) -> Checkpoint:
    log = RunLog(storage)
    head = log.read().head
    (index,) = (each.index for each in head.checkpoints if each.step == step)
    return lineage.commit(log, index).checkpoint


# What a copy is


def test_a_save_is_on_the_local_disk_too_and_its_record_says_where(tmp_path: Path) -> None:
    storage = Away()
    writer, _, _ = start(storage, tier=tier_of(tmp_path, storage))
    assert writer.save(snapshot(10))
    (place,) = body_of(storage, 10).copies
    folder = Path(place.partition(":")[2])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files_of(10)
    assert (
        folder.relative_to(tmp_path / "tier").parts[1:] == Path(body_of(storage, 10).folder).parts
    )


def test_a_run_without_a_tier_writes_records_that_older_versions_read(tmp_path: Path) -> None:
    storage = Away()
    writer, _, _ = start(storage)
    writer.save(snapshot(10))
    assert "copies" not in json.loads(storage.objects["log/000000000001.json"])["body"]
    assert body_of(storage, 10).copies == ()


def test_the_copy_is_made_before_anything_is_uploaded(tmp_path: Path) -> None:
    storage = Away()
    writer, _, _ = start(storage, tier=tier_of(tmp_path, storage))
    save_away(storage, writer, 10)
    assert copied(tmp_path) == [10]
    assert storage.list("checkpoints") == []


def test_only_the_newest_committed_copy_and_two_newer_ones_are_kept(tmp_path: Path) -> None:
    storage = Away()
    writer, _, _ = start(storage, tier=tier_of(tmp_path, storage))
    for step in (10, 20):
        writer.save(snapshot(step))
    assert copied(tmp_path) == [20]
    for step in (30, 40, 50, 60):
        save_away(storage, writer, step)
    assert copied(tmp_path) == [20, 50, 60]
    writer.save(snapshot(70))
    assert copied(tmp_path) == [70]


def test_a_commit_that_is_tried_again_copies_once(tmp_path: Path) -> None:
    storage = Away()
    writer, _, _ = start(storage, tier=tier_of(tmp_path, storage))
    for _ in range(3):
        save_away(storage, writer, 10)
    assert copied(tmp_path) == [10]
    shutil.rmtree(tmp_path / "tier")  # somebody has cleaned up
    save_away(storage, writer, 10)
    writer.save(snapshot(10))
    storage.files_read.clear()
    _, restored, _ = start(storage, tier=tier_of(tmp_path, storage))
    assert restored is not None
    assert (restored.files, restored.nearby, storage.files_read) == (files_of(10), 3, [])


def test_a_finished_run_leaves_nothing_behind(tmp_path: Path) -> None:
    storage = Away()
    writer, _, _ = start(storage, tier=tier_of(tmp_path, storage))
    writer.save(snapshot(10))
    writer.finish(step=10, reason="epochs", metrics={})
    assert list((tmp_path / "tier").iterdir()) == []


@dataclass
class Confirms:
    """A watch that counts, and finds that the ranks hold different states."""

    differ: bool
    asked: int = 0

    def go_on(self) -> None:
        pass

    def confirm(self, files: Mapping[str, File]) -> None:
        self.asked += 1
        assert {name: file.size for name, file in files.items()} == {
            name: len(data) for name, data in files_of(10).items()
        }
        if self.differ:
            raise DataDamagedError("different")


@pytest.mark.parametrize("has_tier", [True, False])
def test_what_the_ranks_do_not_agree_on_is_not_copied_either(
    tmp_path: Path, *, has_tier: bool
) -> None:
    storage = Away()
    tier = tier_of(tmp_path, storage) if has_tier else None
    writer, _, _ = start(storage, tier=tier)
    watch = Confirms(differ=True)
    with pytest.raises(DataDamagedError):
        writer.save(snapshot(10), watch)
    assert watch.asked == 1
    assert (copied(tmp_path), storage.list("checkpoints")) == ([], [])
    for number in range(1, 3):
        watch = Confirms(differ=False)
        storage.is_away = number == 1
        with contextlib.suppress(StorageError):
            assert writer.save(snapshot(10), watch)
        assert watch.asked == (1 if has_tier or number == 2 else 0)


@given(
    names=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2))),
    committed=st.tuples(st.integers(0, 9), st.integers(0, 4)),
    mine=st.integers(1, 4),
)
def test_what_is_needed_is_never_removed_and_the_rest_always(
    names: list[tuple[int, int, int]], committed: tuple[int, int], mine: int
) -> None:
    named = {f"{step:09d}-{by:04d}-{nonce:016x}": (step, by) for step, by, nonce in names}
    doomed = to_remove([*named, "notes.txt"], committed=committed, attempt=mine)
    kept = {name: parts for name, parts in named.items() if name not in doomed}
    assert len(set(doomed)) == len(doomed)
    assert set(doomed) <= named.keys()
    ahead = [parts for parts in named.values() if parts[1] == mine and parts[0] > committed[0]]
    assert {parts for parts in kept.values() if parts == committed} == {committed} & set(
        named.values()
    )
    assert all(parts in kept.values() for parts in ahead if parts == max(ahead))
    assert all(name in kept for name, (_, by) in named.items() if by > mine)
    others = [parts for parts in kept.values() if parts != committed and parts[1] <= mine]
    assert len(others) <= 2
    assert all(step > committed[0] and by == mine for step, by in others)


# Restoring


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, Path.unlink])
@pytest.mark.parametrize("name", sorted(files_of(10)))
def test_a_damaged_local_file_is_removed_and_read_from_the_runs_storage(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    storage = Away()
    writer, _, _ = start(storage, tier=tier_of(tmp_path, storage))
    writer.save(snapshot(10))
    (path,) = tmp_path.glob(f"tier/*/checkpoints/*/{name}")
    damage(path)
    told: list[str] = []
    storage.files_read.clear()
    _, restored, _ = start(storage, tier=tier_of(tmp_path, storage, told))
    assert restored is not None
    assert (restored.files, restored.nearby) == (files_of(10), 2)
    assert storage.files_read == [f"{body_of(storage, 10).folder}/{name}"]
    assert not path.exists()
    (line,) = told
    assert name in line
    assert not any(isinstance(each, Quarantine) for each in bodies(storage))


def bodies(storage: Storage) -> list[Body]:
    log = RunLog(storage)
    return [log.record(index).body for index in range(log.read().head.index + 1)]


def test_damage_in_the_runs_storage_is_found_though_the_local_copy_was_whole(
    tmp_path: Path,
) -> None:
    storage = Away()
    writer, _, _ = start(storage, tier=tier_of(tmp_path, storage))
    writer.save(snapshot(10))
    storage.objects[f"{body_of(storage, 10).folder}/{MODEL}"] = b"something else"
    writer, restored, _ = start(storage, tier=tier_of(tmp_path, storage))
    assert step_of(restored) == 10  # the local copy is what was saved
    writer.save(snapshot(20))
    writer.retire(keep_last=2, keep_every=None)
    assert [each.step for each in RunLog(storage).read().head.checkpoints] == [20]


def test_a_run_that_was_deleted_and_begun_anew_never_sees_the_old_copies(tmp_path: Path) -> None:
    storage = Away()
    writer, _, _ = start(storage, tier=tier_of(tmp_path, storage))
    save_away(storage, writer, 10)
    storage.objects.clear()
    assert start(storage, tier=tier_of(tmp_path, storage))[1] is None
    writer, restored, _ = start(storage, tier=tier_of(tmp_path, storage))
    assert restored is None
    writer.save(snapshot(5))
    assert len(list((tmp_path / "tier").iterdir())) == 2


def test_a_copied_run_never_sees_the_copies_of_the_one_that_it_was_copied_from(
    tmp_path: Path,
) -> None:
    storage = Away()
    writer, _, _ = start(storage, tier=tier_of(tmp_path, storage))
    save_away(storage, writer, 10)
    another = LocalTier(
        tmp_path / "tier", run="s3://bucket/another", log=RunLog(storage), warn=[].append
    )
    assert start(storage, tier=another)[1] is None
    assert copied(tmp_path) == [10]


def test_a_lost_first_record_costs_the_tier_and_nothing_else(tmp_path: Path) -> None:
    storage = Away()
    start(storage)[0].save(snapshot(10))
    del storage.objects["log/000000000000.json"]
    told: list[str] = []
    writer, restored, _ = start(storage, tier=tier_of(tmp_path, storage, told))
    assert step_of(restored) == 10
    assert writer.save(snapshot(20))
    (line,) = told
    assert "no local tier" in line
    assert copied(tmp_path) == []


# Going on from what was never committed


def test_a_restart_of_the_same_launch_goes_on_from_the_copy_and_has_each_row_once(
    tmp_path: Path,
) -> None:
    storage = Away()
    writer, restored, _ = start(storage, tier=tier_of(tmp_path, storage))
    rank = Rank.after(writer, restored)
    rank.train(10)
    rank.save()
    rank.train(5)
    storage.is_away = True
    with pytest.raises(StorageError):
        rank.save()
    rank.train(7)
    with pytest.raises(StorageError):
        rank.save()
    storage.is_away = False

    writer, restored, _ = start(storage, tier=tier_of(tmp_path, storage))
    rank = Rank.after(writer, restored)
    assert (rank.step, rank.learned) == (22, list(range(1, 23)))
    assert body_of(storage, 22).parent == 1
    assert body_of(storage, 22).ledger == rank.snapshot().ledger
    assert copied(tmp_path) == [22]
    rank.train(8)
    rank.save()
    log = RunLog(storage)
    rows = list(rows_of_the_line(log, log.read().head, storage.objects))
    assert rows == list(range(1, 31))


def test_a_start_that_cannot_commit_the_copy_leaves_it_to_the_next_one(tmp_path: Path) -> None:
    storage = Away()
    writer, _, _ = start(storage, tier=tier_of(tmp_path, storage))
    save_away(storage, writer, 10)
    for _ in range(2):
        writer = begin(storage, tier=tier_of(tmp_path, storage))
        storage.is_away = True
        with pytest.raises(StorageError):
            writer.adopt()
        storage.is_away = False
    _, restored, _ = start(storage, tier=tier_of(tmp_path, storage))
    assert step_of(restored) == 10


def test_another_owner_ignores_the_copy_and_removes_it(tmp_path: Path) -> None:
    storage = Away()
    writer, _, _ = start(storage, "one", tier=tier_of(tmp_path, storage))
    writer.save(snapshot(10))
    save_away(storage, writer, 20)
    _, restored, _ = start(storage, "two", tier=tier_of(tmp_path, storage))
    assert step_of(restored) == 10
    assert copied(tmp_path) == [10]
    with pytest.raises(FencedError):
        begin(storage, "one", tier=tier_of(tmp_path, storage))


def test_without_its_local_disk_a_restart_goes_on_from_what_is_committed(tmp_path: Path) -> None:
    storage = Away()
    writer, _, _ = start(storage, tier=tier_of(tmp_path, storage))
    writer.save(snapshot(10))
    save_away(storage, writer, 20)
    _, restored, _ = start(storage, tier=tier_of(tmp_path / "another node", storage))
    assert step_of(restored) == 10


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, Path.unlink])
@pytest.mark.parametrize("name", ["*.json", MODEL, METRICS])
def test_a_damaged_copy_is_no_copy(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    storage = Away()
    writer, _, _ = start(storage, tier=tier_of(tmp_path, storage))
    writer.save(snapshot(10))
    save_away(storage, writer, 20)
    save_away(storage, writer, 30)
    damage(max(tmp_path.rglob(name), key=str))
    _, restored, _ = start(storage, tier=tier_of(tmp_path, storage))
    assert step_of(restored) == 20
    assert copied(tmp_path) == [20]


HEAD = fold(Head(), index=0, body=attempt())
HEAL = Heal(step=1, rank=0, reason="", seconds=1.0, lost_steps=0)
COPY_STEP = 20


def checkpoint(step: int) -> Checkpoint:
    mine = snapshot(step)
    return Checkpoint(
        step=step,
        epoch=mine.epoch,
        reason=mine.reason,
        folder=f"checkpoints/{step:09d}-0001-{step:016x}",
        files={},
        parent=None,
        ledger=mine.ledger,
        evaluated=False,
        metrics={},
        swept=0,
    )


@pytest.mark.parametrize(
    ("since", "owner", "why"),
    [
        ([], "owner", None),
        ([HEAL, checkpoint(15), Retire(checkpoints=(1,), folders=("x",))], "owner", None),
        ([Override(step=20, settings={})], "owner", None),
        ([], "another", "another launch wrote it"),
        ([attempt("another")], "another", "another launch wrote it"),
        ([attempt("another")], "owner", "another launch wrote it"),
        ([attempt("another"), attempt()], "owner", "attempt 1 wrote it, and attempt 3 has begun"),
        ([attempt()], "owner", "attempt 1 wrote it, and attempt 2 has begun since"),
        ([checkpoint(20)], "owner", "step 20 is committed"),
        ([checkpoint(21)], "owner", "step 21 is committed"),
        ([Rollback(step=0, until=30, why="")], "owner", "the run was rolled back since"),
        ([checkpoint(25), Rollback(step=0, until=30, why="")], "owner", "the run was rolled back"),
        ([Quarantine(checkpoint=1, step=5, why="")], "owner", "the checkpoint of step 5 was put"),
        ([Override(step=19, settings={})], "owner", "settings were changed from step 19 on since"),
        ([None], "owner", "a record that is damaged was appended since"),
    ],
)
def test_a_copy_serves_its_owner_while_head_has_not_passed_it(
    since: list[Body | None], owner: str, why: str | None
) -> None:
    body = checkpoint(COPY_STEP)
    after = fold(HEAD, index=1, body=body)
    copy = Record(index=1, attempt=1, body=body, head=after)
    head = HEAD
    for index, each in enumerate(since, start=1):
        head = fold(head, index=index, body=each) if each else replace(head, index=index)
    found = refusal(copy, head, since, owner=owner)
    assert (found is None) if why is None else (found is not None and found.startswith(why))


# Zombies


class Tiers:
    """One node's disk for all attempts of a scene, and what was copied onto it when."""

    def __init__(self, stage: Stage, watch: Watch) -> None:
        self._disk = StagedStorage(stage)
        self._disk.created = self._created
        self._stage = stage
        self._watch = watch
        self.too_late: set[str] = set()  # copies whose attempt had been superseded by then
        self.adopted = 0

    def tier(self) -> LocalTier:
        return LocalTier(
            Path("/tier"),
            run="run",
            log=RunLog(self._stage.storage),
            warn=self._refuse,
            make=lambda _: self._disk,
        )

    def start(self, owner: str) -> int:
        """Start as a launch does; return the step."""
        mine = begin(self._stage.storage, owner, tier=self.tier())
        offered = {copy.folder for copy in mine._offered}
        if offered & self.too_late:
            raise Violation(f"offered {offered & self.too_late}, written after it was fenced")
        if mine.adopt() is not None:
            self.adopted += 1
        restored = mine.choose(report=lambda _: None)
        mine.sweep()
        return step_of(restored)

    def _created(self, path: str) -> None:
        if path.startswith(COPIES):
            data = self._disk.objects[path]
            record = decode(data, index=json.loads(data)["index"])
            assert isinstance(record.body, Checkpoint)
            if self._watch.head.attempt != record.attempt:
                self.too_late.add(record.body.folder)

    @staticmethod
    def _refuse(line: str) -> None:
        raise Violation(line)


def zombie(stage: Stage, adopted: list[int]) -> Callable[[], None]:
    """An attempt is declared dead and goes on saving, while two more of its owner start."""
    watch = Watch(stage.storage)
    tiers = Tiers(stage, watch)
    slow = begin(stage.storage, "a", tier=tiers.tier())

    def stopped() -> None:
        with contextlib.suppress(FencedError):
            slow.save(snapshot(40, {MODEL: b"model"}))
            watch.acknowledged = 40

    def following() -> None:
        for _ in range(2):
            acknowledged = watch.acknowledged
            if tiers.start("a") < acknowledged:
                raise Violation(f"starts before {acknowledged}, which was acknowledged")

    stage.actor("stopped", stopped)
    stage.actor("next", following)

    def check() -> None:
        adopted.append(tiers.adopted)

    return check


def test_what_a_fenced_attempt_copies_is_never_adopted_in_any_interleaving() -> None:
    adopted: list[int] = []
    executions = explore(lambda stage: zombie(stage, adopted), preemptions=2)
    assert executions > 100
    assert sum(adopted) > 10  # what was copied in time, and not committed, is


def test_copies_that_are_looked_for_after_the_attempt_has_begun_would_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mistake: to begin first, as with checkpoints, and to look then."""
    real = RunWriter.begin

    def late(storage: Storage, log: RunLog, **named: object) -> RunWriter:
        before: list[Head] = []
        make = named.pop("make")

        def watched(head: Head) -> object:
            before.append(head)
            return make(head)

        writer = real(storage, log, make=watched, **named)
        if before[-1].attempt:
            writer._offered = named["tier"].offers(before[-1], owner=named["owner"])
        return writer

    monkeypatch.setattr(RunWriter, "begin", staticmethod(late))
    with pytest.raises(Violation, match="written after it was fenced"):
        explore(lambda stage: zombie(stage, []), preemptions=2)


def test_an_attempt_number_that_is_not_looked_at_would_let_a_zombies_copy_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mistake: the owner is the same, so why not."""

    def by_owner(copy: Record, head: Head, since: list[Body], *, owner: str) -> str | None:
        forged = replace(copy, attempt=head.attempt)
        later = [each for each in since if each is None or not hasattr(each, "owner")]
        return refusal(forged, head, later, owner=owner)

    monkeypatch.setattr(tier, "refusal", by_owner)
    with pytest.raises(Violation, match="written after it was fenced"):
        explore(lambda stage: zombie(stage, []), preemptions=2)


def test_a_stopped_attempt_that_wakes_up_removes_no_copy_of_the_next_one(tmp_path: Path) -> None:
    storage = Away()
    slow, _, _ = start(storage, tier=tier_of(tmp_path, storage))
    slow.save(snapshot(10))
    mine, _, _ = start(storage, tier=tier_of(tmp_path, storage))
    save_away(storage, mine, 20)
    with pytest.raises(FencedError):
        slow.save(snapshot(30))
    assert copied(tmp_path) == [10, 20, 30]
    mine.save(snapshot(25))
    assert copied(tmp_path) == [25]


# A local disk that fails


class Full(Disk):
    def __init__(self) -> None:
        self.is_full = False

    def write(self, descriptor: int, data: memoryview) -> int:
        if self.is_full:
            raise OSError(28, "No space left on device")
        return super().write(descriptor, data)


def test_a_full_local_disk_is_told_once_and_costs_no_commit(tmp_path: Path) -> None:
    storage, disk = Away(), Full()
    told: list[str] = []
    local = LocalTier(
        tmp_path / "tier",
        run="run",
        log=RunLog(storage),
        warn=told.append,
        make=lambda root: LocalStorage(root, disk=disk),
    )
    writer, _, _ = start(storage, tier=local)
    for step in (10, 20, 30):
        disk.is_full = step > 10
        assert writer.save(snapshot(step))
    (line,) = told
    assert "not copied to the local tier" in line
    assert "No space left on device" in line
    assert [len(body_of(storage, step).copies) for step in (10, 20, 30)] == [1, 0, 0]
    disk.is_full = False
    writer.save(snapshot(40))
    assert copied(tmp_path) == [40]
    assert len(told) == 1


def test_a_local_disk_that_does_not_answer_is_let_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = threading.Event()

    class Dead(Disk):
        def open_new(self, path: Path) -> int:
            back.wait()
            return super().open_new(path)

    monkeypatch.setattr(limits, "LOCAL_TIER_SECONDS", 0.1)
    storage = Away()
    told: list[str] = []
    local = LocalTier(
        tmp_path / "tier",
        run="run",
        log=RunLog(storage),
        warn=told.append,
        make=lambda root: LocalStorage(root, disk=Dead()),
    )
    writer, _, _ = start(storage, tier=local)
    try:
        for step in (10, 20):
            assert writer.save(snapshot(step))
        (line,) = told
        assert "no answer in 0.1 s" in line
    finally:
        back.set()
