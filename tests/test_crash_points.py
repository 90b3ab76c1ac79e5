"""A real SIGKILL at every single storage operation of a start, of saves and of retention."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_child import INTERVAL, KEEP_LAST, SAVES
from run_builders import begin, files_of, snapshot, start, step_of
from volatile_disk import Careless

from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.folder import write_files
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.storage import TEMPORARY_FOLDER
from fmnist_dist.checkpoint.verify import verify
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.filenames import METRICS

CHILD = Path(__file__).with_name("crash_child.py")
PLANTED_STEP = 40  # the newest checkpoint of the run that a child finds
NEVER = 10_000  # an operation that no child reaches


class Server:
    """Forks children that die; see `crash_child`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, CHILD, "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environ(),
        )

    def status(self, run: Path, faults: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{run} {faults}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def _environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose last attempt died untidily: a child has every kind of thing to sweep."""
    run = tmp_path_factory.mktemp("planted") / "run"
    storage = LocalStorage(run)
    writer = begin(storage)
    for step in range(INTERVAL, PLANTED_STEP + 1, INTERVAL):
        writer.save(snapshot(step))
        writer.retire(keep_last=3, keep_every=None)
    write_files(storage, "checkpoints/000000050-0001-00000000000000aa", files_of(50))
    (run / TEMPORARY_FOLDER / "model.safetensors.00").write_bytes(b"half")
    # Retired, and killed before its tensors were deleted.
    folder = lineage.commit(RunLog(storage), writer.head.checkpoints[0].index).checkpoint.folder
    kept = {name: (run / folder / name).read_bytes() for name in files_of(0)}
    writer.retire(keep_last=2, keep_every=None)
    for name, data in kept.items():
        (run / folder / name).write_bytes(data)
    return run


def copy_of(planted: Path, run: Path) -> Path:
    shutil.copytree(planted, run, copy_function=os.link)  # nobody changes a file in place
    return run


def assert_killed(run: Path, status: int, action: str, operation: int) -> str:
    """Check that the fault, and nothing else, ended the child; return the operation's name."""
    told = run.with_name(f"{run.name}.err").read_text()
    assert os.WIFSIGNALED(status), told
    assert os.WTERMSIG(status) == signal.SIGKILL
    found = re.fullmatch(rf"fault: {action} at storage operation {operation} \((\w+) .*\)\n", told)
    assert found is not None, told
    return found[1]


def acknowledged(run: Path) -> int:
    steps = re.findall(r"^saved (\d+)$", run.with_name(f"{run.name}.out").read_text(), re.MULTILINE)
    return max(map(int, steps), default=0)


def assert_next_start_is_whole(run: Path, *, least: int) -> RunWriter:
    """Start again: the newest acknowledged checkpoint or the one in flight, whole, nothing left."""
    storage, reports = LocalStorage(run, disk=Careless()), []
    writer, restored, swept = start(storage, report=reports.append)
    assert reports == []
    assert swept.suspended is None
    step = step_of(restored)
    assert step in {least, least + INTERVAL}
    assert restored is not None
    assert restored.files == files_of(step)
    assert storage.list(TEMPORARY_FOLDER) == []
    log = RunLog(storage)
    retained = {each.index for each in writer.head.checkpoints}
    tidy: dict[str, list[str]] = {}
    for index in range(writer.head.index + 1):
        record = log.record(index)
        if record.kind == "checkpoint":
            found = lineage.commit(log, index).checkpoint
            name = found.folder.removeprefix("checkpoints/")
            tidy[name] = sorted(found.files) if index in retained else [METRICS]
    assert {name: storage.list(f"checkpoints/{name}") for name in storage.list("checkpoints")} == (
        tidy
    )
    assert verify(storage, log).damage == ()
    return writer


def kill_everywhere(server: Server, planted: Path, folder: Path) -> dict[int, str]:
    """Kill a child at each operation until one finishes; return the operations' names."""
    names: dict[int, str] = {}
    for operation in range(NEVER):
        run = copy_of(planted, folder / f"kill-{operation}")
        status = server.status(run, f"disk:kill:{operation}")
        if status == 0:
            assert acknowledged(run) == PLANTED_STEP + SAVES * INTERVAL
            break
        names[operation] = assert_killed(run, status, "kill", operation)
        writer = assert_next_start_is_whole(run, least=acknowledged(run) or PLANTED_STEP)
        assert writer.save(snapshot((writer.head.newest_step or 0) + INTERVAL))
        shutil.rmtree(run)
    return names


def test_a_kill_at_any_storage_operation_loses_nothing_acknowledged(
    server: Server, planted: Path, tmp_path: Path
) -> None:
    names = kill_everywhere(server, planted, tmp_path)
    print(f"{len(names)} kills: {names}")
    # Every method of the disk that a run on a file system with hard links uses was killed.
    assert set(names.values()) == {
        "make_folder", "open_new", "write", "sync", "link", "unlink", "remove_folder", "sync_folder"
    }  # fmt: skip
    assert len(names) > 100
    for operation in (each for each, name in names.items() if name == "write"):
        run = copy_of(planted, tmp_path / f"tear-{operation}")
        status = server.status(run, f"disk:tear:{operation}")
        assert assert_killed(run, status, "tear", operation) == "write"
        torn = [path.stat().st_size for path in (run / TEMPORARY_FOLDER).iterdir()]
        assert any(torn)
        assert_next_start_is_whole(run, least=acknowledged(run) or PLANTED_STEP)


def test_a_kill_at_any_storage_operation_of_a_new_run_leaves_a_run_that_starts(
    server: Server, tmp_path: Path
) -> None:
    for operation in range(NEVER):
        run = tmp_path / f"runs/{operation}/run"
        run.parent.mkdir(parents=True)
        status = server.status(run, f"disk:kill:{operation}")
        if status == 0:
            break
        assert_killed(run, status, "kill", operation)
        done = acknowledged(run)
        _, restored, _ = start(LocalStorage(run, disk=Careless()))
        assert step_of(restored) in {done, done + INTERVAL}
    assert operation > 80


def chain_of_kills(server: Server, run: Path, seed: int, *, kills: int) -> None:
    """Kill a launch, and the one after it, and so on, each somewhere; then look."""
    place, done = random.Random(seed), 0
    for _ in range(kills):
        operation = place.randrange(80)
        status = server.status(run, f"disk:kill:{operation}")
        assert_killed(run, status, "kill", operation)
        done = max(done, acknowledged(run))
    _, restored, _ = start(LocalStorage(run, disk=Careless()))
    found = step_of(restored)
    assert found >= done
    assert found == 0 or (restored is not None and restored.files == files_of(found))
    if found:
        assert_next_start_is_whole(run, least=found)


def test_kills_one_after_another_lose_nothing_acknowledged(server: Server, tmp_path: Path) -> None:
    for seed in range(15):
        chain_of_kills(server, tmp_path / f"run-{seed}", seed, kills=4)


@pytest.mark.slow
def test_many_kills_one_after_another_lose_nothing_acknowledged(
    server: Server, tmp_path: Path
) -> None:
    for seed in range(1000, 1100):
        chain_of_kills(server, tmp_path / f"run-{seed}", seed, kills=8)


def kill_a_fresh_process(planted: Path, run: Path, operation: int) -> bool:
    """Kill a process that was not forked; return False if it finished before the operation."""
    copy_of(planted, run)
    command = [sys.executable, CHILD, "work", str(run), f"disk:kill:{operation}"]
    done = subprocess.run(command, capture_output=True, text=True, env=_environ(), check=False)
    if done.returncode == 0:
        return False
    assert done.returncode == -signal.SIGKILL
    assert f"fault: kill at storage operation {operation} " in done.stderr
    run.with_name(f"{run.name}.out").write_text(done.stdout)
    assert_next_start_is_whole(run, least=acknowledged(run) or PLANTED_STEP)
    return True


@pytest.mark.parametrize("operation", [3, 50, 101])
def test_a_kill_of_a_process_that_was_not_forked_is_no_different(
    planted: Path, tmp_path: Path, operation: int
) -> None:
    assert kill_a_fresh_process(planted, tmp_path / "run", operation)


@pytest.mark.slow
def test_a_kill_of_a_fresh_process_at_any_storage_operation_loses_nothing(
    planted: Path, tmp_path: Path
) -> None:
    kills = 0
    while kill_a_fresh_process(planted, tmp_path / f"run-{kills}", kills):
        kills += 1
    print(f"{kills} kills")
    assert kills > 100


def test_the_retention_that_is_killed_keeps_as_many_as_it_should(planted: Path) -> None:
    """A guard of the tests above: the planted run has what a child is meant to retire and sweep."""
    storage = LocalStorage(planted)
    assert len(RunLog(storage).read().head.checkpoints) == KEEP_LAST
    assert len(storage.list("checkpoints")) == PLANTED_STEP // INTERVAL + 1
    assert storage.list(TEMPORARY_FOLDER) != []
