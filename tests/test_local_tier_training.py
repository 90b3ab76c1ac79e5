"""The local tier under whole trainings: killed, gone, full, and the same bits after all of it."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import SmallRun, in_child, number_of, operations, owned_by, small_run
from jobs import Job, alive, files_of_newest, ledger, show, wait_for, wait_for_step
from run_files import assert_sound, bodies, checkpoints
from running import running

from fmnist_dist.checkpoint.record import Attempt, Quarantine
from fmnist_dist.errors import ExitCode

FLAGS = ("--save-every-steps=2", "--max-steps=6", "--dropout=0.2")
KILLED_AT = 4  # the step whose copy is whole, and whose upload has not begun


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SmallRun, Path, Path]]:
    """A run of the launch "first", killed between a copy and its commit, and how it should end.

    Returns the run, a backup of its folder and its tier, and an undisturbed run.
    """
    folder = tmp_path_factory.mktemp("killed")
    with small_run(folder) as run:
        assert run.beside("undisturbed").launch(*FLAGS).code == 0
        tier = folder / "tier"
        flags = [*FLAGS, f"--local-tier={tier}"]
        at = number_of(operations(run, *FLAGS), rf"link .*/checkpoints/{KILLED_AT:09d}-")
        died = in_child(run, *flags, TEST_OWNER="first", FMNIST_DIST_FAULTS=f"disk:kill:{at}")
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert f"fault: kill at storage operation {at} (link " in died.stderr
        backup = folder / "backup"
        shutil.copytree(run.root, backup / "run")
        shutil.copytree(tier, backup / "tier")
        yield run, backup, folder / "undisturbed"


def go_on(killed: tuple[SmallRun, Path, Path], *, owner: str | None) -> list[str]:
    """Go on from where the run was killed, to the end; return what was said."""
    run, _, undisturbed = killed
    tier = run.root.with_name("tier")
    with owned_by(owner):
        ended = run.launch(*FLAGS, f"--local-tier={tier}")
    assert ended.code == 0, ended.lines
    assert files_of_newest(run.root) == files_of_newest(undisturbed)
    assert ledger(run.root).returncode == 0
    assert_sound(run.root)
    assert bodies(run.root, Quarantine) == []
    assert list(tier.iterdir()) == []  # it is finished
    return list(ended.lines)


@pytest.fixture(autouse=True)
def as_it_was_killed(request: pytest.FixtureRequest) -> None:
    """Put a killed run and its tier back to where they were."""
    if "killed" not in request.fixturenames:
        return
    run, backup, _ = request.getfixturevalue("killed")
    for name in ("run", "tier"):
        shutil.rmtree(run.root.with_name(name), ignore_errors=True)
        shutil.copytree(backup / name, run.root.with_name(name))


def test_the_same_launch_goes_on_from_the_copy_that_was_not_committed(
    killed: tuple[SmallRun, Path, Path],
) -> None:
    assert [each.step for each in checkpoints(killed[0].root)] == [2]
    lines = go_on(killed, owner="first")
    (line,) = [each for each in lines if "committed what only the local tier had" in each]
    assert f"step={KILLED_AT}" in line
    (resumed,) = [each for each in lines if " resumed " in each]
    assert f'checkpoint="step {KILLED_AT}"' in resumed
    assert "lost_steps=0" in resumed
    assert "files_from_local_tier=4" in resumed
    story = show(killed[0].root)
    assert [each["first_step"] for each in story["attempts"]] == [0, KILLED_AT]
    assert [each.step for each in checkpoints(killed[0].root)] == [2, 4, 6]


def test_another_launch_goes_on_from_what_is_committed(
    killed: tuple[SmallRun, Path, Path],
) -> None:
    lines = go_on(killed, owner=None)
    (resumed,) = [each for each in lines if " resumed " in each]
    assert 'checkpoint="step 2"' in resumed
    assert len({each.owner for each in bodies(killed[0].root, Attempt)}) == 2


def test_the_same_launch_without_its_disk_goes_on_from_what_is_committed(
    killed: tuple[SmallRun, Path, Path],
) -> None:
    shutil.rmtree(killed[0].root.with_name("tier"))
    lines = go_on(killed, owner="first")
    (resumed,) = [each for each in lines if " resumed " in each]
    assert 'checkpoint="step 2"' in resumed
    assert "files_from_local_tier=0" in resumed


def test_a_damaged_copy_costs_what_was_not_committed_and_no_quarantine(
    killed: tuple[SmallRun, Path, Path],
) -> None:
    (model,) = (
        killed[0].root.with_name("tier").glob(f"*/checkpoints/{KILLED_AT:09d}-*/model.safetensors")
    )
    data = bytearray(model.read_bytes())
    data[100] ^= 1
    model.write_bytes(data)
    lines = go_on(killed, owner="first")
    assert len([each for each in lines if "a local copy is not used" in each]) == 1
    (resumed,) = [each for each in lines if " resumed " in each]
    assert 'checkpoint="step 2"' in resumed


def test_a_full_local_disk_and_one_that_is_read_only_cost_a_warning(
    killed: tuple[SmallRun, Path, Path], small_disk: Path
) -> None:
    _, _, undisturbed = killed
    run = killed[0].beside("full")
    tier = f"--local-tier={small_disk / 'tier'}"
    with pytest.raises(OSError, match="No space left on device"):
        (small_disk / "ballast").write_bytes(b"x" * 1_000_000)
    ended = run.launch(*FLAGS[:1], "--max-steps=3", FLAGS[2], tier)
    assert ended.code == 0, ended.lines
    (line,) = [each for each in ended.lines if " warning: " in each]
    assert "not copied to the local tier, the run goes on without" in line
    assert "No space left on device" in line

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ended = run.launch(*FLAGS, tier)
    assert ended.code == 0, ended.lines
    assert any("Read-only file system" in each for each in ended.lines)
    assert files_of_newest(run.root) == files_of_newest(undisturbed)
    assert_sound(run.root)


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (lambda run: run.with_name("file") / "in", ExitCode.INCOMPATIBLE, "file is a file; expec"),
        (lambda run: run, ExitCode.USAGE, "is in --run-dir"),
        (lambda run: run / "tier", ExitCode.USAGE, "expected a folder elsewhere"),
    ],
)
def test_a_tier_that_cannot_be_one_is_refused_in_one_line(
    tmp_path: Path, make: object, code: ExitCode, words: str
) -> None:
    with small_run(tmp_path) as run:
        run.root.with_name("file").write_text("somebody's notes")
        tier = make(run.root)
        ended = run.launch(*FLAGS, f"--local-tier={tier}")
        assert ended.code == code
        (line,) = ended.errors
        assert f"--local-tier {tier}: " in line
        assert words in line
        assert not run.root.exists()


def test_a_restart_goes_on_from_a_copy_that_was_made_while_storage_was_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All workers are killed at once; their agent, which names the launch, starts them again."""
    monkeypatch.setenv("TRAIN_SMALL_LIMITS", "SAVE_RETRY_SECONDS=0.2")
    root, tier = tmp_path / "run", tmp_path / "tier"
    flags = ["--batch-size=64", "--save-every-steps=4", "--device=cpu", "--eval-every-epochs=99"]
    flags += ["--epochs=999", f"--local-tier={tier}"]

    def newest_copy() -> int:
        names = [path.name for path in tier.glob("*/copies/*.json")]
        return max((int(name[:9]) for name in names), default=0)

    with running(Job(root, flags, workers=2, max_restarts=3, module="train_small")) as job:
        wait_for(lambda: (root / "log").is_dir() and checkpoints(root), "a checkpoint")
        away = (root / "tmp").rename(root / "tmp.away")
        (root / "tmp").write_text("nothing can be written any more")
        wait_for(lambda: "save failed, training goes on" in job.text(), "a failed save")
        committed = checkpoints(root)[-1].step
        wait_for(lambda: newest_copy() > committed + 8, "copies of later steps")
        wait_for(lambda: f"newest_checkpoint={committed} newest_local_copy=" in job.text(), "word")
        pids = job.keeper_pids()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(map(alive, pids)), "the keepers to be dead")
        copy = newest_copy()
        assert checkpoints(root)[-1].step == committed
        (root / "tmp").unlink()
        away.rename(root / "tmp")
        wait_for_step(job, copy + 1, attempt=1)
        assert job.text().count("committed what only the local tier had") == 1
    one, other = bodies(root, Attempt)
    assert one.owner == other.owner
    assert show(root)["attempts"][1]["first_step"] == copy
    assert_sound(root)
