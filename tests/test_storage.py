"""What every storage must keep: whole objects, put-if-absent, names in folders."""

import errno
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from memory_storage import MemoryStorage

from fmnist_dist.checkpoint import s3bucket
from fmnist_dist.checkpoint.disk import Disk, FaultyDisk, disk_from
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.place import Place
from fmnist_dist.checkpoint.storage import (
    TEMPORARY_FOLDER,
    AlreadyExistsError,
    MissingError,
    Storage,
    StorageError,
)
from fmnist_dist.errors import ExitCode, IncompatibleError

RACERS = 8
Make = Callable[[Path], Storage]


class WithoutLinks(Disk):
    """A file system without hard links, as FAT and many FUSE ones are."""

    def __init__(self, number: int = errno.EPERM) -> None:
        self._number = number

    def link(self, source: Path, target: Path) -> None:
        raise OSError(self._number, os.strerror(self._number), str(target))


class Recorded(Disk):
    """Notes the operations; writes little at a time, as a disk may."""

    def __init__(self) -> None:
        self.operations: list[str] = []

    def open_new(self, path: Path) -> int:
        self.operations.append("open")
        return super().open_new(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        self.operations.append("write")
        return super().write(descriptor, data[:1000])

    def sync(self, descriptor: int) -> None:
        self.operations.append("sync")
        super().sync(descriptor)

    def link(self, source: Path, target: Path) -> None:
        self.operations.append("link")
        super().link(source, target)

    def sync_folder(self, path: Path) -> None:
        self.operations.append(f"sync {path.name}")
        super().sync_folder(path)


def single_writer(root: Path) -> Storage:
    return LocalStorage(root, single_writer=True, disk=WithoutLinks())


KINDS = ("local", "single-writer", "model", "memory", "s3", "s3-single-writer")


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    folder = tmp_path / "runs" / "run"
    match request.param:
        case "local":
            return LocalStorage(folder)
        case "single-writer":
            return single_writer(folder)
        case "model":
            return MemoryStorage()
        case "memory":
            return Place.of(f"memory://{folder}").storage()
        case _:
            url = request.getfixturevalue("s3_url")
            return Place.of(url).storage(single_writer="single" in request.param)


class TestContract:
    """The five verbs, for every storage."""

    @pytest.mark.parametrize(
        "data", [b"", b"x", bytes(range(256)) * 1000, memoryview(b"view"), b"part" * 10**7]
    )
    def test_an_object_reads_back_as_it_was_created(
        self, storage: Storage, data: bytes | memoryview
    ) -> None:
        storage.create("a/b/name.json", data)
        assert storage.read("a/b/name.json") == data

    def test_a_second_create_is_refused_and_changes_nothing(self, storage: Storage) -> None:
        storage.create("log/0", b"first")
        with pytest.raises(AlreadyExistsError):
            storage.create("log/0", b"second")
        assert storage.read("log/0") == b"first"

    @pytest.mark.parametrize("path", ["log/0", "log/0/x", "nothing/at/all"])
    def test_what_is_not_there_is_missing(self, storage: Storage, path: str) -> None:
        with pytest.raises(MissingError):
            storage.read(path)
        storage.create("log/1", b"")
        with pytest.raises(MissingError):
            storage.read(path)

    def test_a_list_is_sorted_fresh_and_of_one_folder(self, storage: Storage) -> None:
        assert storage.list("log") == []
        for name in ("10", "9", "sub/x", "1"):
            storage.create(f"log/{name}", b"")
        storage.create("logs/other", b"")
        assert storage.list("log") == ["1", "10", "9", "sub"]
        assert storage.list("log/sub") == ["x"]
        storage.delete("log/10")
        assert storage.list("log") == ["1", "9", "sub"]

    def test_deleting_twice_is_no_error(self, storage: Storage) -> None:
        storage.create("log/0", b"")
        storage.create("log/1", b"kept")
        for _ in range(2):
            storage.delete("log/0")
        storage.delete("no/such")
        assert storage.list("log") == ["1"]

    def test_a_deleted_folder_is_gone_with_all_it_held_and_nothing_else(
        self, storage: Storage
    ) -> None:
        for path in ("c/a/x", "c/a/y", "c/a/deep/er/z", "c/ab/x"):
            storage.create(path, b"")
        for _ in range(2):
            storage.delete_folder("c/a")
        assert storage.list("c") == ["ab"]
        assert storage.list("c/ab") == ["x"]
        storage.create("c/a/x", b"again")
        assert storage.read("c/a/x") == b"again"

    def test_nothing_else_appears_in_the_folder_of_an_object(self, storage: Storage) -> None:
        storage.create("log/0", b"")
        with pytest.raises(AlreadyExistsError):
            storage.create("log/0", b"")
        assert storage.list("log") == ["0"]
        assert storage.list(TEMPORARY_FOLDER) == []


@pytest.mark.parametrize(
    "storage",
    # SeaweedFS 4 lets puts of one name wait for each other, each a second longer than the one
    # before, whoever the client is: slow with eight. `test_races.py` has two launches at once.
    ["local", "model", "memory", pytest.param("s3", marks=[pytest.mark.slow])],
    indirect=True,
)
@pytest.mark.timeout(900)
def test_of_many_threads_exactly_one_creates_an_object(storage: Storage) -> None:
    won: list[tuple[int, str]] = []
    failed: list[Exception] = []
    together = threading.Barrier(RACERS)

    def race(racer: int) -> None:
        try:
            for number in range(30):
                together.wait(120)
                try:
                    storage.create(f"log/{number}", b"%d" % racer)
                except AlreadyExistsError:
                    continue
                won.append((racer, f"log/{number}"))
        except Exception as error:  # noqa: BLE001 - told by the main thread
            failed.append(error)
            together.abort()  # or the others would wait for this one

    threads = [threading.Thread(target=race, args=(each,)) for each in range(RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert Counter(path for _, path in won) == {f"log/{number}": 1 for number in range(30)}
    assert all(storage.read(path) == b"%d" % racer for racer, path in won)


RACER = """
import sys
from fmnist_dist.checkpoint.place import Place
from fmnist_dist.checkpoint.storage import AlreadyExistsError
storage, racer = Place.of(sys.argv[1]).storage(), sys.argv[2]
storage.list("log")  # what is slow the first time
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    try:
        storage.create(f"log/{number}", racer.encode() * 5000)
    except AlreadyExistsError:
        continue
    print(number, flush=True)
"""


def test_of_many_processes_exactly_one_creates_an_object(tmp_path: Path) -> None:
    race_of_processes(str(tmp_path / "run"), RACERS)


def test_of_many_processes_exactly_one_creates_an_object_on_s3(s3_url: str) -> None:
    race_of_processes(s3_url, 3)  # each imports s3fs


def race_of_processes(url: str, number: int) -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, url, str(each)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
        for each in range(number)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = [racer.communicate()[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * number
    assert Counter(name for each in won for name in each) == {str(n): 1 for n in range(100)}
    storage = Place.of(url).storage()
    for racer_number, names in enumerate(won):
        for name in names:
            assert storage.read(f"log/{name}") == b"%d" % racer_number * 5000
    assert storage.list(TEMPORARY_FOLDER) == []


def test_a_reader_sees_an_object_whole_or_not_at_all(tmp_path: Path) -> None:
    run = tmp_path / "run"
    writer = LocalStorage(run, disk=Recorded())
    read_while_written(LocalStorage(run), writer, b"x" * 100_000, number=30)


def test_a_reader_sees_an_object_on_s3_whole_or_not_at_all(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3bucket, "_PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3bucket, "_WHOLE_BYTES", 5 * 2**20)
    for size in (5 * 2**20, 6 * 2**20):  # in one put, and in parts
        storage = Place.of(f"{s3_url}/{size}").storage()
        read_while_written(storage, storage, b"x" * size, number=3)


def read_while_written(reader: Storage, writer: Storage, data: bytes, *, number: int) -> None:
    thread = threading.Thread(
        target=lambda: [writer.create(f"log/{each}", data) for each in range(number)]
    )
    thread.start()
    missing = 0
    for each in range(number):
        while True:
            try:
                assert reader.read(f"log/{each}") == data
                break
            except MissingError:
                missing += 1
    thread.join()
    assert missing > number  # it really looked while objects were being written


def test_an_object_is_durable_before_it_has_its_name_and_the_name_before_create_returns(
    tmp_path: Path,
) -> None:
    (tmp_path / "run").mkdir()
    disk = Recorded()
    LocalStorage(tmp_path / "run", disk=disk).create("log/0", b"x" * 2500)
    made = disk.operations.index("open")
    assert disk.operations[made:] == [
        "open", "write", "write", "write", "sync", "link", "sync log"
    ]  # fmt: skip
    assert disk.operations[:made].count("sync run") == 2  # of `tmp` and `log`, which are new


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_a_file_system_without_hard_links_is_refused_with_what_to_do(
    tmp_path: Path, number: int
) -> None:
    storage = LocalStorage(tmp_path, disk=WithoutLinks(number))
    with pytest.raises(IncompatibleError, match=r"no hard links.*--single-writer") as caught:
        storage.create("log/0", b"")
    assert caught.value.exit_code == ExitCode.INCOMPATIBLE == 78
    assert storage.list("log") == []
    assert storage.list(TEMPORARY_FOLDER) == []


def test_a_link_that_fails_for_another_reason_is_tried_again_by_the_caller(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*log/0") as caught:
        LocalStorage(tmp_path, disk=WithoutLinks(errno.EIO)).create("log/0", b"")
    assert caught.value.exit_code == ExitCode.TRANSIENT == 75


def test_a_temporary_file_that_a_sweep_takes_away_is_written_again(tmp_path: Path) -> None:
    class Swept(Disk):
        times = 0

        def link(self, source: Path, target: Path) -> None:
            if self.times < 2:
                self.times += 1
                source.unlink()
            super().link(source, target)

    storage = LocalStorage(tmp_path, disk=Swept())
    storage.create("log/0", b"x")
    assert storage.read("log/0") == b"x"


def test_a_folder_that_somebody_still_writes_into_is_deleted_nevertheless(tmp_path: Path) -> None:
    class Zombie(Disk):
        written = False

        def remove_folder(self, path: Path) -> None:
            if not self.written:
                self.written = True
                (path / "late").write_bytes(b"")
            super().remove_folder(path)

    disk = Zombie()
    storage = LocalStorage(tmp_path, disk=disk)
    storage.create("checkpoints/a/x", b"")
    storage.delete_folder("checkpoints/a")
    assert disk.written
    assert storage.list("checkpoints") == []


def test_a_link_in_a_folder_is_deleted_and_what_it_leads_to_is_not(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "run")
    storage.create("checkpoints/a/x", b"")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "run/checkpoints/a/link").symlink_to(tmp_path / "precious")
    storage.delete_folder("checkpoints/a")
    assert storage.list("checkpoints") == []
    assert (tmp_path / "precious" / "file").exists()


@pytest.mark.parametrize("path", ["run", "run/log"])
def test_a_file_where_a_folder_should_be_is_said_in_one_line(tmp_path: Path, path: str) -> None:
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).touch()
    with pytest.raises(StorageError, match=r"^cannot write [^\n]*$"):
        LocalStorage(tmp_path / "run").create("log/0", b"")


FORBIDDEN = """
import os, sys
from pathlib import Path
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.storage import StorageError
if os.geteuid() == 0:  # root ignores modes
    os.setegid(65534)
    os.seteuid(65534)
storage = LocalStorage(Path(sys.argv[1]))
verbs = [
    lambda: storage.create("log/1", b""),
    lambda: storage.read("log/0"),
    lambda: storage.list("log"),
    lambda: storage.delete("log/0"),
    lambda: storage.delete_folder("log"),
]
for verb in verbs:
    try:
        verb()
    except StorageError as error:
        print(error)
"""


@pytest.mark.parametrize(("mode", "refused"), [(0o555, "write delete delete"), (0o000, None)])
def test_a_folder_that_may_not_be_used_is_said_in_one_line(
    tmp_path: Path, mode: int, refused: str | None
) -> None:
    run = tmp_path / "run"
    LocalStorage(run).create("log/0", b"")
    for folder in (run / "log", run / TEMPORARY_FOLDER, run):
        folder.chmod(mode)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)  # the way there is open
    try:
        told = subprocess.run(
            [sys.executable, "-c", FORBIDDEN, str(run)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)},
        ).stdout.splitlines()
    finally:
        run.chmod(0o755)
        for folder in (run / "log", run / TEMPORARY_FOLDER):
            folder.chmod(0o755)
    verbs = (refused or "write read list delete delete").split()
    assert len(told) == len(verbs)
    for line, verb in zip(told, verbs, strict=True):
        assert line.startswith(f"cannot {verb} {run}")
        assert line.endswith("Permission denied")
    assert (run / "log" / "0").exists()


@pytest.mark.parametrize("text", ["disk", "disk:kill", "disk:burn:1", "disk:kill:x", "net:kill:1"])
def test_a_fault_that_cannot_be_read_is_said(text: str) -> None:
    with pytest.raises(ValueError, match=f"{text}: expected disk:kill"):
        disk_from(text)


@pytest.mark.parametrize("text", [None, ""])
def test_a_disk_without_faults_counts_nothing(text: str | None) -> None:
    assert type(disk_from(text)) is Disk


def test_a_full_disk_is_full_as_often_as_it_was_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = disk_from("disk:full:3:2")
    assert isinstance(disk, FaultyDisk)
    for number in range(8):
        if number in {3, 4}:
            with pytest.raises(OSError, match="No space left on device"):
                disk.make_folder(tmp_path / str(number))
        else:
            disk.make_folder(tmp_path / str(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "5", "6", "7"]
    assert disk.operations == 8
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in told] == [
        "fault: full at storage operation 3",
        "fault: full at storage operation 4",
    ]
