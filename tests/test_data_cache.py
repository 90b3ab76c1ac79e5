"""The cache is fetched once per machine, used only if every bit is right, and never needed."""

import logging
from pathlib import Path

import filelock
import pytest
from published import Fetch, as_bytes, data_files, never, small_files, write_folder

from fmnist_dist.data import cache
from fmnist_dist.data.files import read_folder
from fmnist_dist.errors import TransientError

FILES = small_files()
TABLE = data_files(FILES)
IMAGES = "train-images-idx3-ubyte"


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_the_second_load_comes_from_the_cache(tmp_path: Path) -> None:
    fetch = Fetch()
    cold = cache.load(TABLE, folder=tmp_path, fetch=fetch)
    warm = cache.load(TABLE, folder=tmp_path, fetch=never)
    assert fetch.count == 1
    assert as_bytes(cold) == as_bytes(warm) == FILES


def test_the_cache_is_a_folder_that_data_dir_accepts(tmp_path: Path) -> None:
    cache.load(TABLE, folder=tmp_path, fetch=Fetch())
    assert as_bytes(read_folder(tmp_path, TABLE)) == FILES


def test_a_write_to_loaded_data_stays_in_this_process(tmp_path: Path) -> None:
    cache.load(TABLE, folder=tmp_path, fetch=Fetch())[IMAGES][:] = 0
    assert as_bytes(cache.load(TABLE, folder=tmp_path, fetch=never)) == FILES


def test_loaded_data_is_mapped_and_not_read(tmp_path: Path) -> None:
    contents = cache.load(TABLE, folder=tmp_path, fetch=Fetch())
    maps = Path("/proc/self/maps").read_text()
    assert [name for name in contents if str(tmp_path / name) not in maps] == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["first bit", "last bit", "truncated", "empty", "longer"])
def test_a_damaged_cache_is_rebuilt_with_a_warning(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = FILES[name]
    bad = {
        "first bit": bytes([good[0] ^ 0x80]) + good[1:],
        "last bit": good[:-1] + bytes([good[-1] ^ 1]),
        "truncated": good[:-1],
        "empty": b"",
        "longer": good + b"\0",
    }
    cache.load(TABLE, folder=tmp_path, fetch=Fetch())
    (tmp_path / name).write_bytes(bad[damage])
    fetch = Fetch()
    assert as_bytes(cache.load(TABLE, folder=tmp_path, fetch=fetch)) == FILES
    assert fetch.count == 1
    (warning,) = warnings_in(caplog)
    assert f"cache is rebuilt: {tmp_path / name} is damaged" in warning
    assert as_bytes(cache.load(TABLE, folder=tmp_path, fetch=never)) == FILES


def test_a_cache_that_lacks_a_file_is_completed(tmp_path: Path) -> None:
    cache.load(TABLE, folder=tmp_path, fetch=Fetch())
    (tmp_path / IMAGES).unlink()
    assert as_bytes(cache.load(TABLE, folder=tmp_path, fetch=Fetch())) == FILES
    assert as_bytes(cache.load(TABLE, folder=tmp_path, fetch=never)) == FILES


def test_a_lock_held_too_long_is_told_by_its_file(tmp_path: Path) -> None:
    with (
        filelock.FileLock(tmp_path / ".lock"),
        pytest.raises(TransientError, match=rf"{tmp_path}/\.lock for 0\.1 s"),
    ):
        cache.load(TABLE, folder=tmp_path, fetch=never, lock_seconds=0.1)


def test_a_whole_cache_needs_no_lock(tmp_path: Path) -> None:
    cache.load(TABLE, folder=tmp_path, fetch=Fetch())
    with filelock.FileLock(tmp_path / ".lock"):
        assert as_bytes(cache.load(TABLE, folder=tmp_path, fetch=never, lock_seconds=0.1)) == FILES


def test_where_no_cache_can_be_made_one_warning_is_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").write_text("a file, so that no folder can be made below it")
    contents = cache.load(TABLE, folder=tmp_path / "home" / "cache", fetch=Fetch())
    assert as_bytes(contents) == FILES
    (warning,) = warnings_in(caplog)
    assert warning.startswith("no cache")


def test_the_cache_follows_xdg_and_else_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    below = Path("fmnist_dist", "datasets", "small")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder_of("small") == tmp_path / "xdg" / below
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache.folder_of("small") == tmp_path / "home" / ".cache" / below


def test_a_user_without_a_home_goes_on_without_a_cache(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    contents = cache.load(TABLE, folder=cache.folder_of("small"), fetch=Fetch())
    assert as_bytes(contents) == FILES
    assert len(warnings_in(caplog)) == 1


def test_a_cache_on_a_read_only_disk_is_used(tmp_path: Path) -> None:
    write_folder(tmp_path, FILES)  # whole, and no lock file was ever made
    assert as_bytes(cache.load(TABLE, folder=tmp_path, fetch=never)) == FILES
    assert not (tmp_path / ".lock").exists()
