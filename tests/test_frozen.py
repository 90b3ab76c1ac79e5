"""P4: an attempt that was frozen (SIGSTOP), replaced and continued can neither commit nor delete.

At every storage operation, in a world of one without a keeper, and with all processes of a launch.
Its replacement is itself in the middle of an operation when the frozen one goes on.
"""

import dataclasses
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from alone import FLAGS, Alone
from frozen_child import Frozen, Server, serving, state
from in_process import (
    Ended,
    SmallRun,
    in_child,
    number_of,
    operations,
    small_run,
)
from jobs import Job, alive, files_of_newest, wait_for
from run_builders import files_of
from run_files import assert_sound, bodies, kinds, log_of, model_sha256, records, saved_bytes
from running import running

from fmnist_dist.checkpoint import disk
from fmnist_dist.checkpoint.folder import write_files
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.record import Attempt, Checkpoint, Retire
from fmnist_dist.checkpoint.storage import TEMPORARY_FOLDER
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.errors import ExitCode

EVERY_STEP = ("--save-every-steps=1", "--keep-last=1", "--eval-every-epochs=99")
SHORT, LONG = "--max-steps=4", "--max-steps=6"  # of the frozen launch; of its replacement
TAIL = 18  # storage operations of a launch after its second save: to retire, delete and finish


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRun]:
    with small_run(tmp_path_factory.mktemp("frozen")) as run:
        yield run


@pytest.fixture(scope="module")
def server(runs: SmallRun) -> Iterator[Server]:
    with serving(runs.data.parent) as server:
        yield server


@pytest.fixture(scope="module")
def planted(runs: SmallRun) -> SmallRun:
    """Return a run whose only attempt was killed: there is every kind of thing to sweep."""
    run = runs.beside("planted")
    flags = (*EVERY_STEP, SHORT)
    # It has retired the checkpoint of step 1, and deleted none of its tensors yet.
    number = number_of(operations(run, *flags), "unlink .*checkpoints/")
    killed = in_child(run, *flags, FMNIST_DIST_FAULTS=f"disk:kill:{number}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    write_files(LocalStorage(run.root), "checkpoints/000000003-0001-00000000000000aa", files_of(3))
    (run.root / TEMPORARY_FOLDER / "model.safetensors.00").write_bytes(b"half")
    assert kinds(run.root) == ["attempt", "checkpoint", "checkpoint", "retire"]
    return run


@pytest.fixture(scope="module")
def undisturbed(runs: SmallRun) -> str:
    run = runs.beside("undisturbed")
    assert run.launch(*EVERY_STEP, LONG).code == 0
    return model_sha256(run.root)


def replace(run: SmallRun, frozen: Frozen, *, thaw_at: int) -> Ended:
    """Launch another one; in its operation `thaw_at` after its second save the frozen goes on."""
    saves, left = 0, thaw_at

    class Watched(disk.FaultyDisk):
        def _point(self, name: str, path: Path) -> None:
            nonlocal left
            left -= saves >= 2
            if left < 0 and frozen.code is None:
                frozen.thaw()

    def told(text: str) -> None:
        nonlocal saves
        saves += " saved  step=" in text

    with mock.patch.object(disk, "FaultyDisk", Watched):
        return run.launch(
            *EVERY_STEP, LONG, environ={disk.FAULTS_VARIABLE: "disk:full:0"}, told=told
        )


def assert_one_writer(run: SmallRun, frozen: Frozen, ended: Ended, *, new: int) -> str:
    """Check who could write, and return the frozen launch's place in its protocol.

    `new` is the number of records of the run that it found.
    """
    told = Path(f"{run.root}.err").read_text()
    last = saved_bytes(run.root)
    numbers = [each.attempt for each in records(run.root)]
    assert numbers == sorted(numbers), "an attempt has appended after a newer one"
    assert len({each.owner for each in bodies(run.root, Attempt)}) == numbers[-1]
    if len(frozen.stood) == new:
        # It had not begun: no launch has replaced it, it comes as the newer one. Roles change.
        assert (frozen.code, ended.code) == (0, ExitCode.FENCED), told
        retired = tuple(name for each in bodies(run.root, Retire) for name in each.folders)
        gone = frozen.after.keys() - last.keys()
        assert all(name.startswith(retired) for name in gone), gone
        assert last.items() <= frozen.after.items()
        return "before"
    assert frozen.after == frozen.before  # nothing is there besides, nothing is gone
    assert ended.code == 0, ended.lines
    if "finish" in frozen.stood:
        assert frozen.code == 0, told
        return "after"
    assert frozen.code == ExitCode.FENCED, told
    assert f"attempt {numbers[-1]} has taken this run over: attempt {numbers[-1] - 1} " in told
    assert "exit_code=76" in told
    return "within"


def freeze_at(
    server: Server, found: SmallRun, run: SmallRun, operation: int, undisturbed: str
) -> str:
    """Freeze a launch on a copy of the run `found`, replace it, let it go on; return its place."""
    if found.root.exists():
        shutil.copytree(found.root, run.root)
    new = len(kinds(run.root)) if found.root.exists() else 0
    frozen = Frozen.at(server, run, operation, *EVERY_STEP, SHORT)
    ended = replace(run, frozen, thaw_at=operation * 7 % TAIL)
    place = assert_one_writer(run, frozen, ended, new=new)
    if place == "before":
        assert run.launch(*EVERY_STEP, LONG).code == 0
    assert model_sha256(run.root) == undisturbed
    assert_sound(run.root)
    committed = {each.folder for each in bodies(run.root, Checkpoint)}
    assert {
        f"checkpoints/{path.name}" for path in (run.root / "checkpoints").iterdir()
    } == committed
    assert list((run.root / TEMPORARY_FOLDER).iterdir()) == []
    shutil.rmtree(run.root)
    return place


def freeze_everywhere(
    server: Server, found: SmallRun, folder: Path, undisturbed: str, *, every: int
) -> None:
    names = operations(found, *EVERY_STEP, SHORT)
    places = [
        freeze_at(
            server,
            found,
            SmallRun(root=folder / f"frozen-{number}", data=found.data),
            number,
            undisturbed,
        )
        for number in range(0, len(names), every)
    ]
    print(f"{len(places)} of {len(names)} operations: { {p: places.count(p) for p in places} }")
    assert places == sorted(places, key=["before", "within", "after"].index)
    assert places.count("within") > 2 * places.count("before") > 0
    stopped_in = {name.split()[0] for name in names[::every]}
    assert stopped_in >= {"open_new", "write", "sync", "link", "unlink", "sync_folder"}


@pytest.mark.parametrize("scene", ["a killed run", "no run"])
def test_a_frozen_launch_that_was_replaced_neither_commits_nor_deletes(
    server: Server, planted: SmallRun, tmp_path: Path, undisturbed: str, scene: str
) -> None:
    found, every = (planted, 7) if scene == "a killed run" else (planted.beside("none"), 17)
    freeze_everywhere(server, found, tmp_path, undisturbed, every=every)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scene", ["a killed run", "no run"])
def test_a_launch_that_was_frozen_at_any_operation_neither_commits_nor_deletes(
    server: Server, planted: SmallRun, tmp_path: Path, undisturbed: str, scene: str
) -> None:
    found = planted if scene == "a killed run" else planted.beside("none")
    freeze_everywhere(server, found, tmp_path, undisturbed, every=1)


def test_these_tests_find_a_frozen_launch_that_is_not_fenced(
    runs: SmallRun, planted: SmallRun, tmp_path: Path, undisturbed: str
) -> None:
    run = SmallRun(root=tmp_path / "run", data=runs.data)
    saving = number_of(operations(planted, *EVERY_STEP, SHORT), "link .*optimizer")
    with serving(runs.data.parent, "unfenced") as server, pytest.raises(AssertionError):
        freeze_at(server, planted, run, saving, undisturbed)
    assert kinds(run.root).count("finish") == 2


LAUNCHED = ("--save-every-steps=5", "--keep-last=1")
FOREVER, LAST_STEP = "--max-steps=1000000", "--max-steps=25"
# In which call of a fault point, by rank 0, all processes are stopped: about step 10.
CALLS = {"save": 2, "data": 40, "forward": 10, "collective": 10, "update": 10}


def stop(pids: list[int]) -> list[int]:
    """SIGSTOP processes, parents first; return them, seen stopped."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: {state(pid) for pid in pids} == {"T"}, "the stops")
    return pids


def proceed(pids: list[int]) -> None:
    assert {state(pid) for pid in pids} == {"T"}
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def family(pid: int) -> list[int]:
    """Return a process and all that it has started, parents first."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(each) for task in tasks for each in (task / "children").read_text().split()]
    return [pid, *(each for child in children if alive(child) for each in family(child))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    run = tmp_path_factory.mktemp("trained") / "run"
    code, text = Alone(run, *LAUNCHED, LAST_STEP).end()
    assert code == 0, text
    return files_of_newest(run)


def freeze_a_launch(root: Path, point: str, trained: dict[str, str]) -> None:
    """Freeze agent, keepers and trainers at a point of a step, and have the run taken over."""
    slow = {"FMNIST_DIST_FAULTS": f"{point}:slow=3:{CALLS[point]}@0"}
    flags = [*FLAGS, *LAUNCHED, FOREVER]
    with (
        mock.patch.dict(os.environ, slow),
        running(Job(root, flags, max_restarts=3, module="train_small")) as first,
    ):
        wait_for(lambda: f"fault: slow at {point}" in first.text(), "the fault")
        frozen = stop(family(first.process.pid))
        # The agent; a keeper, a trainer and perhaps a spare of each rank.
        assert 5 <= len(frozen) <= 7
        with Alone(root, *LAUNCHED, LAST_STEP) as second:
            second.await_text(" saved  step=")
            wait_for(lambda: records(root)[-1].attempt == 2, "another checkpoint")
            proceed(frozen)
            text = first.wait()
            code, said = second.end()
    assert code == 0, said
    assert first.process.returncode != 0
    fenced = [line for line in text.splitlines() if "has taken this run over" in line]
    assert 1 <= len(fenced) <= 2, text  # rank 0 where it saves, rank 1 where it would for it
    assert all("attempt 2 has taken this run over: attempt 1 stops here" in each for each in fenced)
    assert all("exit_code=76" in each for each in fenced)
    assert "restart worker group" not in text
    numbers = [each.attempt for each in records(root)]
    assert numbers == sorted(numbers)
    assert files_of_newest(root) == trained
    assert_sound(root)


@pytest.mark.slow
def test_a_launch_that_was_frozen_in_a_save_and_replaced_ends_as_fenced(
    tmp_path: Path, trained: dict[str, str]
) -> None:
    freeze_a_launch(tmp_path / "run", "save", trained)


@pytest.mark.slow
@pytest.mark.parametrize("point", [each for each in CALLS if each != "save"])
def test_a_launch_that_was_frozen_in_a_step_and_replaced_ends_as_fenced(
    point: str, tmp_path: Path, trained: dict[str, str]
) -> None:
    freeze_a_launch(tmp_path / "run", point, trained)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Alone]:
    """Give a lone keeper and its trainer, after a checkpoint."""
    with Alone(tmp_path / "run", *LAUNCHED, FOREVER) as job:
        job.await_text(" saved  step=")
        yield job


def replace_by_hand(root: Path) -> RunWriter:
    """Do what another launch does first: take the run over, choose a checkpoint, and sweep."""
    another = dataclasses.replace(bodies(root, Attempt)[-1], owner="another")

    def make(_: Head) -> Attempt:
        return another

    writer = RunWriter.begin(LocalStorage(root), log_of(root), owner="another", make=make)
    assert writer.choose(report=pytest.fail) is not None
    assert writer.sweep().suspended is None
    return writer


def assert_ends_as_fenced(job: Alone, writer: RunWriter, stood: dict[str, bytes]) -> str:
    """See the launch end with 76, having changed nothing; return what it said."""
    code, text = job.end()
    assert code == ExitCode.FENCED, text[-3000:]
    assert "attempt 2 has taken this run over: attempt 1 stops here" in text
    assert saved_bytes(job.run) == stood
    assert writer.refresh().attempt == 2  # it has the run still
    return text


def test_a_frozen_keeper_tells_that_its_trainer_was_fenced(job: Alone) -> None:
    trainer = job.trainer()
    keeper = stop([job.process.pid])
    writer, stood = replace_by_hand(job.run), saved_bytes(job.run)
    wait_for(lambda: not alive(trainer), "the trainer to be fenced, with nobody to see it")
    proceed(keeper)
    assert_ends_as_fenced(job, writer, stood)


@pytest.mark.parametrize("first", ["keeper", pytest.param("trainer", marks=pytest.mark.slow)])
def test_keeper_and_trainer_that_were_frozen_are_fenced_whoever_goes_on_first(
    job: Alone, first: str
) -> None:
    trainer, keeper = [job.trainer()], [job.process.pid]
    stop([*keeper, *trainer])
    writer, stood = replace_by_hand(job.run), saved_bytes(job.run)
    if first == "trainer":
        proceed(trainer)
        wait_for(lambda: not alive(trainer[0]), "the trainer to be fenced")
    proceed(keeper)
    text = assert_ends_as_fenced(job, writer, stood)
    # The keeper finds a stopped trainer, and lets it go on to print its stacks before it kills it.
    assert ("worker stuck" in text) == (first == "keeper")


@pytest.fixture
def bereft(job: Alone) -> Alone:
    """Give a keeper that was frozen before its trainer was killed."""
    trainer = job.trainer()
    stop([job.process.pid])
    os.kill(trainer, signal.SIGKILL)
    wait_for(lambda: not alive(trainer), "the trainer to be dead")
    return job


@pytest.mark.slow
def test_a_frozen_keeper_replaces_a_killed_trainer_by_one_that_is_fenced(bereft: Alone) -> None:
    writer, stood = replace_by_hand(bereft.run), saved_bytes(bereft.run)
    proceed([bereft.process.pid])
    text = assert_ends_as_fenced(bereft, writer, stood)
    assert "worker lost, a new one takes its place" in text


def test_a_frozen_keeper_that_is_to_save_for_a_killed_trainer_is_fenced(bereft: Alone) -> None:
    writer, stood = replace_by_hand(bereft.run), saved_bytes(bereft.run)
    os.kill(bereft.process.pid, signal.SIGTERM)
    proceed([bereft.process.pid])
    assert_ends_as_fenced(bereft, writer, stood)
