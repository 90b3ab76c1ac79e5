"""A power cut after any storage operation: what was acknowledged is still there, whole."""

from pathlib import Path

import pytest
from run_builders import files_of, snapshot, start, step_of
from volatile_disk import Careless, Stopped, VolatileDisk

from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.errors import DataDamagedError

NEVER = 1000  # an operation that is not reached


def train(base: Path, disk: VolatileDisk, *, saves: int = 3) -> int:
    """Be a launch until it is stopped; return the newest acknowledged step."""
    acknowledged = 0
    try:
        writer, restored, _ = start(LocalStorage(base / "runs" / "run", disk=disk))
        step = acknowledged = step_of(restored)
        for _ in range(saves):
            step += 10
            writer.save(snapshot(step))
            acknowledged = step
            writer.retire(keep_last=2, keep_every=None)
    except Stopped:
        pass
    return acknowledged


def found_after(disk: VolatileDisk, target: Path, *, names_too: bool) -> int:
    """Cut the power and return the step at which the next launch goes on."""
    disk.power_cut(target, names_too=names_too)
    _, restored, _ = start(LocalStorage(target / "runs" / "run", disk=Careless()))
    if restored is not None:
        assert restored.files == files_of(step_of(restored))
    return step_of(restored)


def new_disk(folder: Path) -> VolatileDisk:
    folder.mkdir()
    return VolatileDisk(folder)


@pytest.mark.parametrize("names_too", [False, True])
def test_a_power_cut_after_any_operation_loses_nothing_acknowledged(
    tmp_path: Path, *, names_too: bool
) -> None:
    for stop_at in range(NEVER):
        disk = new_disk(base := tmp_path / str(stop_at))
        disk.restart(stop_at=stop_at)
        acknowledged = train(base, disk)
        found = found_after(disk, tmp_path / f"{stop_at}-after", names_too=names_too)
        assert found in {acknowledged, acknowledged + 10}
        if disk.operations < stop_at:
            break
    assert acknowledged == 30
    assert stop_at > 80


def kill_then_cut(tmp_path: Path, stop_at: int) -> bool:
    """Kill one launch, let the next one work, and cut the power; False if nothing was killed."""
    disk = new_disk(base := tmp_path / str(stop_at))
    disk.restart(stop_at=stop_at)
    train(base, disk)
    killed = disk.operations == stop_at
    disk.restart(stop_at=None)
    acknowledged = train(base, disk, saves=1)
    assert found_after(disk, tmp_path / f"{stop_at}-after", names_too=False) == acknowledged > 0
    return killed


def test_a_launch_makes_durable_what_a_killed_one_had_only_begun(tmp_path: Path) -> None:
    """A folder that is there may be one that no power cut would leave there."""
    stop_at = 0
    while kill_then_cut(tmp_path, stop_at):
        stop_at += 1
    assert stop_at > 80


@pytest.mark.parametrize("forgotten", ["sync", "sync_folder"])
def test_the_cut_finds_a_storage_that_does_not_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    monkeypatch.setattr(VolatileDisk, forgotten, lambda *_: None)
    disk = new_disk(tmp_path / "base")
    assert train(tmp_path / "base", disk) == 30
    with pytest.raises((AssertionError, DataDamagedError)):
        assert found_after(disk, tmp_path / "after", names_too=forgotten == "sync") == 30


def test_the_cut_finds_a_storage_that_trusts_folders_that_it_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trusting(storage: LocalStorage, folder: Path) -> None:
        if not folder.is_dir():
            trusting(storage, folder.parent)
            storage._disk.make_folder(folder)
            storage._disk.sync_folder(folder.parent)

    monkeypatch.setattr(LocalStorage, "_make_folders", trusting)
    with pytest.raises(AssertionError):
        test_a_launch_makes_durable_what_a_killed_one_had_only_begun(tmp_path)


def test_the_volatile_disk_does_what_a_disk_does(tmp_path: Path) -> None:
    disk = new_disk(tmp_path / "base")
    assert train(tmp_path / "base", disk) == 30
    train(tmp_path / "base", disk)
    disk.power_cut(tmp_path / "all", names_too=True)

    def tree(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    assert tree(tmp_path / "all") == tree(tmp_path / "base")
