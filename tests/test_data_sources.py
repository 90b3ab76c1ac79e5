"""Each source hands out the pinned bits or says why not, and no source invents any."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from published import (
    Mirror,
    as_bytes,
    data_files,
    flipped,
    small_files,
    small_spec,
    write_folder,
)

from fmnist_dist import limits
from fmnist_dist.data import apt, sources
from fmnist_dist.data.dataset import FASHION_MNIST, load
from fmnist_dist.data.files import SourceUnavailableError, read_folder
from fmnist_dist.errors import DataDamagedError, TransientError, UsageError

FILES = small_files()
TABLE = data_files(FILES)
IMAGES = "train-images-idx3-ubyte"


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror(FILES).serve() as running:
        yield running


# --data-dir


def test_a_data_dir_may_mix_raw_and_gz_files(tmp_path: Path) -> None:
    names = list(FILES)
    write_folder(tmp_path, {name: FILES[name] for name in names[:2]})
    write_folder(tmp_path, {name: FILES[name] for name in names[2:]}, gz=True)
    assert as_bytes(sources.read_data_dir(tmp_path, TABLE)) == FILES


def test_a_data_dir_that_is_not_there_is_wrong_usage_and_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path / 'nowhere'} is not a folder.*t10k-labels"):
        sources.read_data_dir(tmp_path / "nowhere", TABLE)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_data_dir_lacks_is_wrong_usage_and_named(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, FILES)
    (tmp_path / name).unlink()
    with pytest.raises(UsageError, match=rf"{tmp_path} has neither {name} nor {name}\.gz"):
        sources.read_data_dir(tmp_path, TABLE)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("gz", [False, True])
def test_a_flipped_bit_in_data_dir_is_told_with_file_and_both_digests(
    tmp_path: Path, name: str, *, gz: bool
) -> None:
    damaged = flipped(FILES[name], at=len(FILES[name]) // 2)
    write_folder(tmp_path, FILES | {name: damaged}, gz=gz)
    path = tmp_path / (f"{name}.gz" if gz else name)
    (found,), (expected,) = data_files({name: damaged}), data_files({name: FILES[name]})
    with pytest.raises(DataDamagedError) as caught:
        sources.read_data_dir(tmp_path, TABLE)
    for part in (str(path), found.sha256, expected.sha256, "--data-dir"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 2000])
def test_a_gz_file_that_ends_early_is_told_as_damaged(tmp_path: Path, keep: int) -> None:
    write_folder(tmp_path, FILES, gz=True)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataDamagedError, match=f"{path} is damaged"):
        sources.read_data_dir(tmp_path, TABLE)


def test_a_bad_data_dir_is_never_replaced_by_another_source(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = small_spec(sources.Origin(files=TABLE, mirror=mirror.url))
    assert len(load("small", spec, data_dir=None).train.labels) == 30  # all else is fine
    num_requests = len(mirror.requests)
    write_folder(tmp_path / "bad", FILES | {IMAGES: flipped(FILES[IMAGES], at=99)})
    with pytest.raises(DataDamagedError):
        load("small", spec, data_dir=tmp_path / "bad")
    assert len(mirror.requests) == num_requests


# the Debian package


def test_the_debian_package_holds_the_pinned_files(tmp_path: Path) -> None:
    skip_without_debian(tmp_path)
    origin = FASHION_MNIST.origin
    assert origin.package
    assert origin.system_folder
    contents = apt.download(origin.package, origin.files, folder=origin.system_folder)
    assert {name: content.size for name, content in contents.items()} == {
        "train-images-idx3-ubyte": 47040016,
        "train-labels-idx1-ubyte": 60008,
        "t10k-images-idx3-ubyte": 7840016,
        "t10k-labels-idx1-ubyte": 10008,
    }


def test_the_debian_package_is_found_where_the_system_has_no_lists(tmp_path: Path) -> None:
    skip_without_debian(tmp_path / "probe")
    archive = apt.download_archive("dataset-fashion-mnist", tmp_path, private_lists=True)
    assert archive.read_bytes().startswith(b"!<arch>\ndebian-binary")


def test_a_system_without_apt_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceUnavailableError, match="no apt-get"):
        apt.download("some-package", TABLE, folder=Path("/usr/share/some"))


def test_an_apt_that_hangs_is_ended_with_its_helpers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper_pid = tmp_path / "pid"
    for tool in ("apt-get", "dpkg-deb"):
        path = tmp_path / tool
        path.write_text(f"#!/bin/sh\nsleep 600 &\necho $! >> {helper_pid}\nwait\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(limits, "APT_SECONDS", 0.5)
    with pytest.raises(SourceUnavailableError, match="apt-get -q update did not end within"):
        apt.download("some-package", TABLE, folder=Path("/usr/share/some"))
    pids = [int(line) for line in helper_pid.read_text().split()]
    assert len(pids) == 2
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def skip_without_debian(scratch: Path) -> None:
    """Ask apt itself, in our own words, whether the archive can be reached from here."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    options = [f"-oDir::State={scratch}/state", f"-oDir::Cache={scratch}/cache"]
    options += ["-oAPT::Sandbox::User=root", "-oAcquire::http::Timeout=5"]
    try:
        for words in (["update", "--error-on=any"], ["show", "dataset-fashion-mnist"]):
            command = ["apt-get" if words[0] == "update" else "apt-cache", *options, *words]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no Debian archive with dataset-fashion-mnist from here: {error}")


# all together


def test_the_first_source_that_has_the_data_is_the_last_one_asked(
    tmp_path: Path, mirror: Mirror
) -> None:
    folder = write_folder(tmp_path, FILES, gz=True)
    origin = sources.Origin(files=TABLE, system_folder=folder, mirror=mirror.url)
    assert as_bytes(sources.fetch("Small", origin)) == FILES
    assert mirror.requests == []


def test_a_damaged_source_is_passed_over(tmp_path: Path, mirror: Mirror) -> None:
    folder = write_folder(tmp_path, FILES | {IMAGES: flipped(FILES[IMAGES], at=99)})
    origin = sources.Origin(files=TABLE, system_folder=folder, mirror=mirror.url)
    assert as_bytes(sources.fetch("Small", origin)) == FILES
    assert len(mirror.requests) == 4


def test_without_any_source_one_line_says_why_for_each_and_what_to_do(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    del mirror.answers[f"/{IMAGES}.gz"]
    monkeypatch.setenv("PATH", str(tmp_path))
    origin = sources.Origin(
        files=TABLE, system_folder=tmp_path / "none", package="some", mirror=mirror.url
    )
    with pytest.raises(TransientError) as caught:
        sources.fetch("Small", origin)
    message = str(caught.value)
    assert "\n" not in message
    parts = ["(1) folder", "is not a folder", "(2) package some: there is no apt-get here"]
    parts += [f"(3) web {mirror.url}", "HTTP status 404", "--data-dir", *FILES]
    assert [part for part in parts if part not in message] == []


def test_the_pinned_digests_are_those_of_the_published_data_set() -> None:
    folder = FASHION_MNIST.origin.system_folder
    assert folder
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: dataset-fashion-mnist is not installed")
    assert len(read_folder(folder, FASHION_MNIST.origin.files)) == 4
    begins = [file.sha256[:16] for file in FASHION_MNIST.origin.files]
    assert begins == [
        "c59f468a2f672dc8",
        "bad3541b69d91243",
        "5b4141f0afbad91e",
        "0402a96d92fd2663",
    ]
