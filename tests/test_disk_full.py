"""A disk that is full in the middle of a save costs that save and nothing else."""

import contextlib
import os
from pathlib import Path

import pytest
from conftest import TMPFS_BYTES
from run_builders import begin, files_of, snapshot, start, step_of

from fmnist_dist.checkpoint.disk import Disk, FaultyDisk, disk_from
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.restore import read_newest
from fmnist_dist.checkpoint.storage import TEMPORARY_FOLDER, StorageError
from fmnist_dist.checkpoint.verify import verify
from fmnist_dist.checkpoint.writer import RunWriter

FOREVER = 100_000


@pytest.fixture(autouse=True)
def without_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncs are most of the time, and matter in `test_power_cut` only."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def saved_once(run: Path) -> tuple[LocalStorage, RunWriter]:
    storage = LocalStorage(run)
    writer = begin(storage)
    assert writer.save(snapshot(10))
    return storage, writer


def assert_whole(run: Path, *, newest: int) -> None:
    """Check that readers find `newest`, and the next start too, with nothing left behind."""
    storage = LocalStorage(run)
    found = read_newest(storage, RunLog(storage))
    assert (step_of(found), found.files) == (newest, files_of(newest))
    _, restored, swept = start(storage)
    assert step_of(restored) == newest
    assert swept.suspended is None
    assert storage.list(TEMPORARY_FOLDER) == []
    log = RunLog(storage)
    findings = verify(storage, log)
    assert findings.damage == ()
    assert len(storage.list("checkpoints")) == len(log.read().head.checkpoints)


@pytest.mark.parametrize("times", [1, 2, 3, FOREVER])
def test_a_disk_that_is_full_at_any_operation_of_a_save_costs_that_save_at_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], times: int
) -> None:
    failures = 0
    for operation in range(FOREVER):
        run = tmp_path / str(operation)
        storage, writer = saved_once(run)
        storage._disk = disk = disk_from(f"disk:full:{operation}:{times}")
        assert isinstance(disk, FaultyDisk)
        saved = None
        try:
            saved = writer.save(snapshot(20))
        except StorageError as error:
            assert "No space left on device" in str(error)  # noqa: PT017 - it may succeed as well
            failures += 1
        newest = step_of(read_newest(LocalStorage(run), RunLog(LocalStorage(run))))
        assert newest in ({20} if saved else {10, 20})  # an error may hide that the record stands
        if disk.operations <= operation:
            break  # the save is over before the disk is full
        assert f"fault: full at storage operation {operation} " in capsys.readouterr().err

        storage._disk = Disk()  # somebody has made room
        assert writer.save(snapshot(30))
        assert_whole(run, newest=30)
    assert failures > 20


def test_a_disk_that_is_full_at_any_operation_of_a_retirement_keeps_what_is_retained(
    tmp_path: Path,
) -> None:
    for operation in range(FOREVER):
        run = tmp_path / str(operation)
        storage, writer = saved_once(run)
        writer.save(snapshot(20))
        storage._disk = disk = FaultyDisk(action="full", at=operation)
        with contextlib.suppress(StorageError):
            writer.retire(keep_last=1, keep_every=None)
        reached = disk.operations > operation
        storage._disk = Disk()
        writer.save(snapshot(30))
        writer.retire(keep_last=1, keep_every=None)
        findings = verify(storage, RunLog(storage))
        assert (findings.damage, findings.valid_steps) == ((), (30,))
        _, restored, _ = start(storage)
        assert step_of(restored) == 30
        if not reached:
            break
    assert operation > 5


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(TMPFS_BYTES):
            file.write(b"x" * 4096)


def test_a_really_full_disk_costs_no_checkpoint(small_disk: Path) -> None:
    run = small_disk / "run"
    storage, writer = saved_once(run)
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left on device"):
        fill(ballast)

    for _ in range(5):
        with pytest.raises(StorageError, match="No space left on device"):
            writer.save(snapshot(20, {"model.safetensors": b"m" * 50_000}))
        assert storage.list(TEMPORARY_FOLDER) == []
        found = read_newest(storage, RunLog(storage))
        assert found.files == files_of(10)

    ballast.unlink()
    assert writer.save(snapshot(30))
    assert_whole(run, newest=30)
