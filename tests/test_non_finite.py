"""A loss that is no number: the run stops, skips the step, or rolls back, and always alike."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import Ended, SmallRun, small_run
from jobs import ledger
from run_files import bodies, model_sha256

from fmnist_dist.checkpoint.record import Rollback
from fmnist_dist.errors import ExitCode

FLAGS = ("--max-steps", "8", "--save-every-steps", "2")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[SmallRun]:
    with small_run(tmp_path) as run:
        yield run


def without_loss(run: SmallRun, what: str, when: str) -> Ended:
    ended = run.launch(
        *FLAGS, "--on-non-finite", what, environ={"FMNIST_DIST_FAULTS": f"forward:nan:{when}"}
    )
    assert ended.saying("fault: nan at forward")
    return ended


def test_stop_ends_with_70_and_names_the_step(run: SmallRun) -> None:
    ended = without_loss(run, "stop", "4")
    assert ended.code == ExitCode.NO_PROGRESS
    assert "the loss of step 4 is nan" in ended.errors[0]


def test_skip_goes_on_and_two_runs_end_with_the_same_bits(run: SmallRun) -> None:
    one, other = run, run.beside("other")
    for each in (one, other):
        ended = without_loss(each, "skip", "4")
        assert ended.code == 0
        assert ended.saying("the loss of step 4 is nan: skipped")
    assert model_sha256(one.root) == model_sha256(other.root)
    assert run.beside("whole").launch(*FLAGS).code == 0
    assert model_sha256(one.root) != model_sha256(run.beside("whole").root)
    proof = ledger(one.root)
    assert proof.returncode == 0, proof.stdout + proof.stderr


def test_rollback_cuts_the_line_and_two_runs_end_with_the_same_bits(run: SmallRun) -> None:
    one, other = run, run.beside("other")
    for each in (one, other):
        ended = without_loss(each, "rollback", "4")
        assert ended.code == 0, ended.lines
        (cut,) = bodies(each.root, Rollback)
        assert (cut.step, cut.until) == (2, 4)
    assert model_sha256(one.root) == model_sha256(other.root)
    proof = ledger(one.root)
    assert proof.returncode == 0, proof.stdout + proof.stderr


@pytest.mark.parametrize("what", ["skip", "rollback"])
def test_a_loss_that_stays_away_ends_with_70(what: str, run: SmallRun) -> None:
    ended = run.launch(
        *("--max-steps", "30", "--epochs", "10", "--save-every-steps", "2"),
        *("--on-non-finite", what),
        environ={"FMNIST_DIST_FAULTS": "forward:nan:4+"},
    )
    assert ended.code == ExitCode.NO_PROGRESS, ended.lines
