"""What would end in the same way for ever ends with 70; what somebody kills does not.

What checkpoints and attempts have a part in, on a disk, and on a real S3 server.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from alone import Alone
from in_process import SmallRun, clean_environ, in_child, small_run
from jobs import ROOT, Job, alive, reached, show, wait_for, wait_for_step
from on_s3 import disk_only
from run_files import Folder, assert_sound, bodies, checkpoints, model_sha256
from running import running

from fmnist_dist.checkpoint.failure import ATTEMPTS, note_failure, repeated_failure
from fmnist_dist.checkpoint.hint import ProgressHint
from fmnist_dist.checkpoint.record import Attempt, Quarantine
from fmnist_dist.distributed.roster import Roster
from fmnist_dist.errors import ExitCode
from fmnist_dist.keeper.deaths import ANY_DEATHS, RESTORE_DEATHS, SAME_STEP_DEATHS

KEPT = {"FMNIST_DIST_NO_KEEPER": "false"}
FLAGS = ("--max-steps", "12", "--save-every-steps", "3")


@pytest.fixture
def run(tmp_path: Path, root: Folder) -> Iterator[SmallRun]:
    with small_run(tmp_path, root) as run:
        yield run


@pytest.mark.parametrize("how", ["exit", "segv"])
def test_the_same_crash_at_the_same_step_ends_with_70_and_the_state_before_is_saved(
    how: str, run: SmallRun
) -> None:
    ended = in_child(run, *FLAGS, **KEPT, FMNIST_DIST_FAULTS=f"forward:{how}:6+")
    assert ended.returncode == ExitCode.NO_PROGRESS, ended.stderr
    assert ended.stderr.count(f"fault: {how} at forward") >= SAME_STEP_DEATHS
    (verdict,) = [line for line in ended.stderr.splitlines() if "no progress: " in line]
    cause = "RuntimeError: fault: exit at forward" if how == "exit" else "killed by SIGSEGV"
    for words in (f"{SAME_STEP_DEATHS} times after step", cause, "exit_code=70"):
        assert words in verdict
    assert 3 <= checkpoints(run.root)[-1].step <= 5
    assert_sound(run.root)
    # Whoever mends the cause goes on from there, to the same bits.
    again = run.launch(*FLAGS)
    assert again.code == 0, again.lines
    whole = run.beside("whole")
    assert whole.launch(*FLAGS).code == 0
    assert model_sha256(run.root) == model_sha256(whole.root)


def test_a_checkpoint_that_crashes_all_ranks_is_taken_out_of_use(
    root: Folder, tmp_path: Path
) -> None:
    """One rank that can restore it would send its state to the others."""
    flags = ["--batch-size=64", "--eval-every-epochs=99", "--save-every-steps=4"]
    small = {"module": "train_small", "logs": tmp_path}
    Job(root, [*flags, "--max-steps=8"], **small).start().finish()
    faults = {"FMNIST_DIST_FAULTS": f"restore:segv:1x{RESTORE_DEATHS}"}
    with mock.patch.dict(os.environ, faults):
        job = Job(root, [*flags, "--max-steps=12"], **small).start()
    text = job.finish()
    assert text.count("fault: segv at restore") >= RESTORE_DEATHS
    (quarantined,) = bodies(root, Quarantine)
    assert quarantined.step == 8
    assert 'checkpoint="step 4"' in text
    assert show(root)["step"] == 12
    assert_sound(root)


@pytest.mark.slow
def test_a_worker_that_is_killed_more_often_than_crashes_are_forgiven_is_still_replaced(
    tmp_path: Path,
) -> None:
    """Each kill comes after some progress: they never add up."""
    job = Alone(tmp_path / "run", "--max-steps=60", "--eval-every-epochs=99")
    try:
        for _ in range(ANY_DEATHS + 2):
            here = reached(job.run)[1]
            wait_for(lambda: reached(job.run)[1] > here + 1, "progress")  # noqa: B023 - called here
            trainer = job.trainer()
            os.kill(trainer, signal.SIGKILL)
            wait_for(lambda: not alive(trainer), "its death")  # noqa: B023 - called here
        code, text = job.end()
    finally:
        job.process.kill()
    assert code == 0, text
    assert len(show(job.run)["heals"]) == ANY_DEATHS + 2


# Where there is no keeper, or where it is the keeper that fails.


@contextmanager
def one_owner() -> Iterator[None]:
    """Make all launches restarts of one launch, as an agent's are."""
    place = replace(Roster.alone(), agents=("the-owner",))
    with mock.patch.object(Roster, "alone", return_value=place):
        yield


def failing(when: str) -> dict[str, str]:
    return {"FMNIST_DIST_FAULTS": f"forward:exit:{when}"}


@one_owner()
def test_attempts_that_fail_alike_at_one_step_end_with_70_and_append_nothing(
    run: SmallRun,
) -> None:
    assert run.launch(*FLAGS, environ=failing("6")).code == ExitCode.BUG  # after 5, goes on from 4
    for _ in range(ATTEMPTS - 1):
        assert run.launch(*FLAGS, environ=failing("2")).code == ExitCode.BUG
    appended = len(bodies(run.root, Attempt))
    assert appended == ATTEMPTS
    ended = run.launch(*FLAGS)
    assert ended.code == ExitCode.NO_PROGRESS
    (line,) = ended.errors
    for words in (
        "the last 3 attempts of this launch ended after step 5",
        "RuntimeError: fault: exit at forward",
    ):
        assert words in line
    assert len(bodies(run.root, Attempt)) == appended


def test_a_user_who_launches_again_is_not_refused(run: SmallRun) -> None:
    with one_owner():
        for _ in range(ATTEMPTS):
            assert run.launch(*FLAGS, environ=failing("1")).code == ExitCode.BUG
        assert run.launch(*FLAGS).code == ExitCode.NO_PROGRESS
    ended = run.launch(*FLAGS)
    assert ended.code == 0, ended.lines


@one_owner()
def test_attempts_that_each_get_further_are_never_refused(run: SmallRun) -> None:
    for _ in range(2 * ATTEMPTS):
        # An epoch is over and saved, and the step after it fails.
        assert run.launch("--max-steps", "30", environ=failing("5")).code == ExitCode.BUG
    assert checkpoints(run.root)[-1].step == 4 * 2 * ATTEMPTS
    assert run.launch("--max-steps", "30").code == 0


def noted(root: Path, *failures: tuple[int, str] | None) -> object:
    """Return the verdict on attempts that have ended so, the newest last; None: no word."""
    for number, failure in enumerate(failures, start=1):
        if failure is not None:
            step, why = failure
            note_failure(root, attempt=number, step=step, error=ValueError(why))
    return repeated_failure(root, range(len(failures), 0, -1))


def test_three_alike_are_a_repetition_and_whatever_differs_is_none(tmp_path: Path) -> None:
    same, else_where, other = (5, "broken"), (6, "broken"), (5, "torn")
    assert noted(tmp_path / "a") is None
    assert noted(tmp_path / "b", same, same) is None
    found = noted(tmp_path / "c", other, same, same, same)
    assert "ValueError: broken" in str(found)
    assert noted(tmp_path / "d", same, same, else_where) is None
    assert noted(tmp_path / "e", same, else_where, same) is None
    assert noted(tmp_path / "f", same, other, same) is None


def test_kills_between_failures_hide_nothing_and_count_for_nothing(tmp_path: Path) -> None:
    same = (5, "broken")
    assert noted(tmp_path / "a", same, None, same, None, None, same, None) is not None
    assert noted(tmp_path / "b", same, None, None, None, same) is None
    # A killed attempt that had got further was progress.
    ProgressHint(tmp_path / "c", attempt=2, first_step=0).reached(6)
    assert noted(tmp_path / "c", same, None, same, same) is None


def test_a_note_that_was_cut_off_is_none_and_the_first_rank_to_fail_says_why(
    tmp_path: Path,
) -> None:
    same = (5, "broken")
    assert noted(tmp_path, same, same, same) is not None
    note_failure(tmp_path, attempt=2, step=5, error=ValueError("another rank's"))
    assert noted(tmp_path, same, same, same) is not None
    note = tmp_path / "000002.failed"
    note.write_bytes(note.read_bytes()[:9])
    assert noted(tmp_path, same, same, same) is None


@disk_only
def test_a_keeper_that_fails_leaves_word_too(run: SmallRun) -> None:
    code = (
        "import os, sys; from pathlib import Path; import in_process\n"
        "from fmnist_dist.keeper.keep import Keeper\n"
        "look = Keeper._look\n"
        "def fail(self, *args):\n"
        "    if self.board.step >= 1: raise ValueError('the keeper is broken')\n"
        "    look(self, *args)\n"
        "Keeper._look = fail\n"
        "root, data, *flags = sys.argv[1:]\n"
        "with in_process.small_run(Path(data).parent):\n"
        "    run = in_process.SmallRun(root=Path(root), data=Path(data))\n"
        "    ended = run.launch(*flags, environ=dict(os.environ), told=sys.__stderr__.write)\n"
        "sys.exit(ended.code)\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ended = subprocess.run(
        [sys.executable, "-c", code, str(run.root), str(run.data), "--max-steps=100000"],
        env={**clean_environ(), "PYTHONPATH": path, **KEPT},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == ExitCode.BUG, ended.stderr
    note = (run.root / "progress" / "000001.failed").read_text()
    assert "ValueError: the keeper is broken" in note


@pytest.mark.slow
def test_torchrun_does_not_restart_workers_without_keepers_for_ever(tmp_path: Path) -> None:
    flags = ["--batch-size=64", "--no-keeper", "--max-steps=20"]
    with (
        mock.patch.dict(os.environ, {"FMNIST_DIST_FAULTS": "forward:exit:1+@1"}),
        running(Job(tmp_path / "run", flags, max_restarts=50, module="train_small")) as job,
    ):
        text = job.wait()
    assert job.process.returncode != 0
    assert text.count("fault: exit at forward, call 1, rank 1") == ATTEMPTS
    assert "the last 3 attempts of this launch ended after step 0" in text
    assert "exit_code=70" in text


def test_without_keepers_the_workers_train_themselves_and_say_so(tmp_path: Path) -> None:
    flags = ["--batch-size=64", "--no-keeper", "--max-steps=8", "--eval-every-epochs=99"]
    with running(Job(tmp_path / "run", flags, module="train_small")) as job:
        wait_for_step(job, 2)
        assert len(job.keeper_pids()) == 2
        assert job.trainer_pids() == []
        text = job.finish()
    assert "keeper=no" in text
