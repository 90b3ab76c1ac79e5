"""A loss that is no number: the run stops, skips the step, or rolls back, and always alike.

On a disk, and on a real S3 server; a kill at an operation is that of a disk.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import (
    NUM_SAMPLES,
    Ended,
    SmallRun,
    in_child,
    number_of,
    operations,
    small_run,
)
from jobs import ledger, show
from on_s3 import disk_only
from run_files import Folder, assert_sound, bodies, checkpoints, kinds, log_of, model_sha256

from fmnist_dist import runs
from fmnist_dist.checkpoint.record import Finish, Quarantine, Rollback
from fmnist_dist.errors import ExitCode
from fmnist_dist.loop import SKIPS_IN_A_ROW

SAVES = ("--save-every-steps", "2", "--keep-last", "9")
FLAGS = ("--max-steps", "8", *SAVES)
LONG = ("--epochs", "10", "--eval-every-epochs", "99", *SAVES)
DIVERGES = ("--schedule", "constant", "--lr", "1e30")


@pytest.fixture
def run(tmp_path: Path, root: Folder) -> Iterator[SmallRun]:
    with small_run(tmp_path, root) as run:
        yield run


def without_loss(run: SmallRun, what: str, when: str, flags: tuple[str, ...] = FLAGS) -> Ended:
    """Launch a run whose loss is no number at these calls of the step."""
    ended = run.launch(
        *flags, "--on-non-finite", what, environ={"FMNIST_DIST_FAULTS": f"forward:nan:{when}"}
    )
    assert ended.saying("fault: nan at forward")
    return ended


def rows(root: Folder) -> list[dict[str, Any]]:
    """Return the metric rows of all checkpoints, refusing what is no JSON, as NaN is none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the metrics")

    return [
        json.loads(line, parse_constant=refuse)
        for each in checkpoints(root)
        for line in (root / each.folder / "metrics.jsonl").read_text().splitlines()
    ]


def readable(root: Folder, out: Path) -> dict[str, Any]:
    """Return what `runs show --json` says; the run's other commands have to work as well."""
    proof = ledger(root)
    assert proof.returncode == 0, proof.stdout + proof.stderr
    assert_sound(root)
    with pytest.MonkeyPatch.context() as patch:
        for command in (["show", str(root)], ["export", str(root), str(out)]):
            patch.setattr("sys.argv", ["fmnist_dist.runs", *command])
            assert runs.main() == 0
    return show(root)


def test_stop_ends_with_70_and_names_the_step_and_what_it_goes_on_from(run: SmallRun) -> None:
    ended = without_loss(run, "stop", "4")
    assert ended.code == ExitCode.NO_PROGRESS
    (line,) = ended.errors
    for words in (
        "the loss of step 4 is nan",
        "lower --lr",
        "checkpoint of step 2",
        "exit_code=70",
    ):
        assert words in line
    assert "finish" not in kinds(run.root)
    # Nothing of the step was committed: without the fault the run is one that never had it.
    assert run.launch(*FLAGS).code == 0
    whole = run.beside("whole")
    assert whole.launch(*FLAGS).code == 0
    assert model_sha256(run.root) == model_sha256(whole.root)


def test_stop_before_any_checkpoint_starts_again_from_the_initial_weights(run: SmallRun) -> None:
    """The only checkpoints are of the weights that diverged: they must not close the run."""
    ended = run.launch("--max-steps", "8", "--save-every-steps", "1", *DIVERGES)
    assert ended.code == ExitCode.NO_PROGRESS
    assert "it goes on from the beginning" in ended.errors[0]
    assert bodies(run.root, Quarantine)
    again = run.launch(*FLAGS, "--schedule", "constant", "--lr", "0.1")
    assert again.code == 0, again.lines
    whole = run.beside("whole")
    assert whole.launch(*FLAGS, "--schedule", "constant", "--lr", "0.1").code == 0
    assert model_sha256(run.root) == model_sha256(whole.root)


def test_skip_goes_on_and_two_runs_end_with_the_same_bits(run: SmallRun, tmp_path: Path) -> None:
    one, other, whole = run, run.beside("other"), run.beside("whole")
    for each in (one, other):
        ended = without_loss(each, "skip", "4")
        assert ended.code == 0
        assert len(ended.saying("the loss of step 4 is nan: skipped")) == 1
    assert model_sha256(one.root) == model_sha256(other.root)
    assert whole.launch(*FLAGS).code == 0
    assert model_sha256(one.root) != model_sha256(whole.root)
    (passed,) = [row for row in rows(one.root) if "passed_over" in row]
    assert (passed["step"], passed["samples"]) == (4, NUM_SAMPLES % 8)
    assert "train_loss" not in passed
    story = readable(one.root, tmp_path / "export")
    assert (story["status"], story["step"]) == ("finished", 8)


@pytest.mark.parametrize("stops_at", [4, 5, 6])
def test_a_skipped_step_stays_skipped_wherever_the_run_is_interrupted(
    stops_at: int, run: SmallRun
) -> None:
    """Steps 4 and 5 have no loss; the run ends in between, or after them, and is launched again."""
    undisturbed = run.beside("undisturbed")
    assert without_loss(undisturbed, "skip", "4x2").code == 0
    first = ("--max-steps", str(stops_at), *SAVES)
    assert without_loss(run, "skip", "4x2", first).code == 0
    if stops_at == 4:
        assert without_loss(run, "skip", "1").code == 0
    else:
        assert run.launch(*FLAGS, "--on-non-finite", "skip").code == 0
    assert model_sha256(run.root) == model_sha256(undisturbed.root)
    assert bodies(run.root, Finish)[-1].metrics == bodies(undisturbed.root, Finish)[-1].metrics


def test_steps_without_a_loss_are_counted_across_launches(run: SmallRun) -> None:
    """Else a run that is interrupted would go on where an undisturbed one has stopped."""
    whole = run.beside("whole")
    ended = without_loss(whole, "skip", "4+", ("--max-steps", "30", *LONG))
    assert ended.code == ExitCode.NO_PROGRESS
    last = 4 + SKIPS_IN_A_ROW
    assert f"the loss of step {last} is nan" in ended.errors[0]

    assert without_loss(run, "skip", "4+", ("--max-steps", "9", *LONG)).code == 0
    ended = without_loss(run, "skip", "1+", ("--max-steps", "30", *LONG))
    assert ended.code == ExitCode.NO_PROGRESS
    assert f"the loss of step {last} is nan" in ended.errors[0]
    assert len(ended.saying(": skipped")) == last - 1 - 9


def test_a_step_with_a_loss_begins_the_count_of_skipped_ones_anew(run: SmallRun) -> None:
    flags = ("--max-steps", "26", *LONG)
    faults = "forward:nan:4x10,forward:nan:15x10"
    ended = run.launch(*flags, "--on-non-finite", "skip", environ={"FMNIST_DIST_FAULTS": faults})
    assert ended.code == 0, ended.lines
    assert len(ended.saying(": skipped")) == 20
    assert log_of(run.root).read().head.finished_step == 26


def test_weights_that_are_broken_are_not_gone_on_from_however_many_steps_were_skipped(
    run: SmallRun,
) -> None:
    """The checkpoints of skipped steps hold the weights of before: broken ones here."""
    good = (*LONG, "--schedule", "constant", "--lr", "0.1")
    assert run.launch("--max-steps", "4", *good).code == 0
    diverges = (*LONG, *DIVERGES, "--on-non-finite", "skip")
    ended = run.launch("--max-steps", "30", *diverges)
    assert ended.code == ExitCode.NO_PROGRESS
    assert len(ended.saying(": skipped")) == SKIPS_IN_A_ROW
    assert "it goes on from the checkpoint of step 4" in ended.errors[0]
    assert len(bodies(run.root, Quarantine)) > 1
    again = run.launch("--max-steps", "12", *good)
    assert again.code == 0, again.lines
    assert again.saying('checkpoint="step 4"')
    assert "passed_over" not in rows(run.root)[-1]


def test_rollback_cuts_the_line_and_two_runs_end_with_the_same_bits(
    run: SmallRun, tmp_path: Path
) -> None:
    one, other = run, run.beside("other")
    for each in (one, other):
        ended = without_loss(each, "rollback", "4")
        assert ended.code == 0, ended.lines
        assert len(ended.saying("rolled back")) == 1
        (cut,) = bodies(each.root, Rollback)
        assert (cut.step, cut.until) == (2, 4)
        assert "the loss of step 4 is nan" in cut.why
    assert model_sha256(one.root) == model_sha256(other.root)
    # What is passed over is consumed: the ledger proves that every sample came once.
    passed = [row["step"] for row in rows(one.root) if "passed_over" in row]
    assert passed == [3, 4]
    story = readable(one.root, tmp_path / "export")
    assert (story["status"], story["step"]) == ("finished", 8)


def test_a_rollback_is_in_the_log_for_whoever_goes_on(run: SmallRun) -> None:
    undisturbed = run.beside("undisturbed")
    assert without_loss(undisturbed, "rollback", "4").code == 0
    ended = without_loss(run, "rollback", "4", ("--max-steps", "5", *SAVES))
    assert ended.code == 0
    assert run.launch(*FLAGS, "--on-non-finite", "rollback").code == 0
    assert model_sha256(run.root) == model_sha256(undisturbed.root)


def test_a_rollback_to_the_beginning_needs_no_checkpoint(run: SmallRun, tmp_path: Path) -> None:
    ended = without_loss(run, "rollback", "2")
    assert ended.code == 0, ended.lines
    (cut,) = bodies(run.root, Rollback)
    assert (cut.step, cut.until) == (0, 2)
    readable(run.root, tmp_path / "export")


def test_a_loss_that_stays_away_is_rolled_back_once_for_each_checkpoint_and_then_ends_with_70(
    run: SmallRun,
) -> None:
    ended = without_loss(run, "rollback", "6+", ("--max-steps", "30", *LONG))
    assert ended.code == ExitCode.NO_PROGRESS, ended.lines
    assert "there is nothing left to go back to: lower --lr and start a new run" in ended.errors[-1]
    cuts = [(each.step, each.until) for each in bodies(run.root, Rollback)]
    assert cuts == [(4, 6), (2, 7), (0, 8)]
    assert "finish" not in kinds(run.root)


@disk_only
def test_a_process_that_is_killed_at_any_moment_of_a_rollback_ends_with_the_same_bits(
    run: SmallRun,
) -> None:
    undisturbed = run.beside("undisturbed")
    assert without_loss(undisturbed, "rollback", "4").code == 0
    for moment in ("link .*/log", "sync_folder .*/log"):
        disturbed = run.beside(f"killed-{moment[:4]}")
        flags = (*FLAGS, "--on-non-finite", "rollback")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FMNIST_DIST_FAULTS", "forward:nan:4")
            names = operations(disturbed, *flags)
        number = number_of(names, moment, after="log/000000000003")
        child: subprocess.CompletedProcess[str] = in_child(
            disturbed, *flags, FMNIST_DIST_FAULTS=f"forward:nan:4,disk:kill:{number}"
        )
        assert f"fault: kill at storage operation {number}" in child.stderr
        stands = bool(bodies(disturbed.root, Rollback))
        # Where the rollback does not stand, the step is computed again, and has no loss again.
        when = None if stands else "forward:nan:2"
        environ = {} if when is None else {"FMNIST_DIST_FAULTS": when}
        assert disturbed.launch(*flags, environ=environ).code == 0
        assert [each.step for each in bodies(disturbed.root, Rollback)] == [2]
        assert model_sha256(disturbed.root) == model_sha256(undisturbed.root)
