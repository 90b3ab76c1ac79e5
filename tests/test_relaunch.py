"""Claims about a run that is launched again: what it goes on with, and what may change.

A setting may change while a run goes on: the run's log then says from which step on, before that
step runs, and no kill and no old command line takes it back.

On a disk, and on a real S3 server; kills and a full disk at an operation are those of a disk.
"""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import SmallRun, in_child, launch, number_of, operations, small_run
from on_s3 import disk_only
from run_files import (
    Folder,
    assert_sound,
    bodies,
    checkpoints,
    fields_of,
    kinds,
    log_of,
    model_sha256,
    saved_bytes,
)

from fmnist_dist.agreement import settings_of, wanted_changes
from fmnist_dist.checkpoint.record import Attempt, Finish, Override
from fmnist_dist.config import Config, to_json
from fmnist_dist.errors import ExitCode

CONSTANT = ("--schedule", "constant", "--save-every-steps", "2")


@pytest.fixture
def run(tmp_path: Path, root: Folder) -> Iterator[SmallRun]:
    with small_run(tmp_path, root) as run:
        yield run


def rates(root: Folder) -> dict[int, float]:
    """Return the learning rate of each step of the committed line, as the metrics have it."""
    rows = [
        json.loads(line)
        for each in checkpoints(root)
        for line in (root / each.folder / "metrics.jsonl").read_text().splitlines()
    ]
    return {row["step"]: row["lr"] for row in rows if "lr" in row}


def overrides(root: Folder) -> list[tuple[int, dict[str, Any]]]:
    return [(each.step, each.settings) for each in bodies(root, Override)]


def test_a_changed_setting_is_recorded_with_its_step_before_that_step_runs(run: SmallRun) -> None:
    assert run.launch("--max-steps", "3", *CONSTANT, "--lr", "0.1").code == 0
    ended = run.launch("--max-steps", "6", *CONSTANT, "--lr", "0.05")
    assert ended.code == 0
    assert ended.saying("settings changed  step=3 lr=0.05")
    assert overrides(run.root) == [(3, {"lr": 0.05})]
    assert rates(run.root) == {1: 0.1, 2: 0.1, 3: 0.1, 4: 0.05, 5: 0.05, 6: 0.05}
    assert kinds(run.root)[4:7] == ["attempt", "override", "checkpoint"]
    assert_sound(run.root)


def test_a_setting_that_nobody_repeats_stays_changed(run: SmallRun) -> None:
    assert run.launch("--max-steps", "2", *CONSTANT, "--lr", "0.1").code == 0
    assert run.launch("--max-steps", "4", *CONSTANT, "--lr", "0.05").code == 0
    assert run.launch("--max-steps", "6", *CONSTANT).code == 0
    assert overrides(run.root) == [(2, {"lr": 0.05})]
    assert rates(run.root)[6] == 0.05


def test_an_old_command_line_undoes_nothing_that_was_changed_meanwhile(run: SmallRun) -> None:
    """A rescheduled pod still carries the --lr with which it was started weeks ago."""
    old = (*CONSTANT, "--lr", "0.1")
    assert run.launch("--max-steps", "2", *old).code == 0
    log = log_of(run.root)
    log.append(log.read().head, decide=lambda _: Override(step=2, settings={"lr": 0.05}))
    assert run.launch("--max-steps", "4", *old).code == 0
    assert overrides(run.root) == [(2, {"lr": 0.05})]
    assert rates(run.root)[4] == 0.05
    # A word that was not said before is a new one.
    assert run.launch("--max-steps", "6", *CONSTANT, "--lr", "0.2").code == 0
    assert rates(run.root)[6] == 0.2


@disk_only
def test_a_kill_between_the_attempt_and_its_override_does_not_lose_it(run: SmallRun) -> None:
    assert run.launch("--max-steps", "2", *CONSTANT, "--lr", "0.1").code == 0
    changed = ("--max-steps", "4", *CONSTANT, "--lr", "0.05")
    number = number_of(operations(run, *changed), "open_new", after="sync_folder .*/log")
    child = in_child(run, *changed, FMNIST_DIST_FAULTS=f"disk:kill:{number}")
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert f"fault: kill at storage operation {number} (open_new " in child.stderr
    assert kinds(run.root)[3:] == ["attempt"]
    assert bodies(run.root, Attempt)[-1].wanted == {"lr": 0.05}
    # To this launch the value is nothing new: the killed one had been given the same.
    assert run.launch(*changed).code == 0
    assert overrides(run.root) == [(2, {"lr": 0.05})]
    assert rates(run.root) == {1: 0.1, 2: 0.1, 3: 0.05, 4: 0.05}


@disk_only
def test_an_override_that_could_not_be_recorded_is_made_by_a_launch_that_does_not_ask_for_it(
    run: SmallRun,
) -> None:
    assert run.launch("--max-steps", "2", *CONSTANT, "--lr", "0.1").code == 0
    changed = ("--max-steps", "4", *CONSTANT, "--lr", "0.05")
    number = number_of(operations(run, *changed), "open_new", after="sync_folder .*/log")
    faults = {"FMNIST_DIST_FAULTS": f"disk:full:{number}:1000000"}
    assert run.launch(*changed, environ=faults).code == ExitCode.TRANSIENT
    assert rates(run.root) == {1: 0.1, 2: 0.1}  # no step ran before its override was durable
    assert run.launch("--max-steps", "4", *CONSTANT).code == 0
    assert rates(run.root) == {1: 0.1, 2: 0.1, 3: 0.05, 4: 0.05}


def test_another_batch_size_at_an_epochs_boundary_is_an_override(run: SmallRun) -> None:
    assert run.launch("--epochs", "1").code == 0
    ended = run.launch("--epochs", "2", "--batch-size", "16")
    assert ended.code == 0, ended.errors
    assert overrides(run.root) == [(4, {"batch_size": 16, "epochs": 2})]
    newest = checkpoints(run.root)[-1]
    assert (newest.step, newest.epoch) == (4 + 2, 2.0)
    assert [(each.epoch, each.count) for each in newest.ledger] == [(0, 30), (1, 30)]
    assert_sound(run.root)


def test_the_same_command_on_a_finished_run_says_so_and_appends_nothing(run: SmallRun) -> None:
    for flags in (("--max-steps", "3"), ("--epochs", "1")):
        first = run.launch(*flags)
        assert first.code == 0
        assert f" finished  run={run.root}" in first.lines[-1]  # the verdict is the last line
        assert len(first.saying(" progress ")) == 1
        before = saved_bytes(run.root)
        ended = run.launch(*flags)
        assert ended.code == 0
        (line,) = ended.lines
        assert f"already finished  run={run.root} to_train_on=" in line
        assert saved_bytes(run.root) == before


def test_more_steps_on_a_finished_run_lead_where_an_undisturbed_one_stands(run: SmallRun) -> None:
    assert run.launch("--max-steps", "3").code == 0
    ended = run.launch("--max-steps", "6")
    assert ended.saying('resumed  checkpoint="step 3" attempt=2 lost_steps=0')
    assert fields_of(ended.saying("progress  ")[0])["checkpoint"] == "3"  # of step 4
    assert overrides(run.root) == []  # where to stop shapes nothing
    other = run.beside("undisturbed")
    assert other.launch("--max-steps", "6").code == 0
    assert model_sha256(run.root) == model_sha256(other.root)
    assert [each.step for each in bodies(run.root, Finish)] == [3, 6]


def test_more_epochs_on_a_finished_run_are_a_new_leg_of_the_schedule(run: SmallRun) -> None:
    assert run.launch("--epochs", "1").code == 0
    assert run.launch("--epochs", "3").code == 0
    assert overrides(run.root) == [(4, {"epochs": 3})]
    assert [each.step for each in bodies(run.root, Finish)] == [4, 12]
    lr = rates(run.root)
    assert sorted(lr) == [*range(1, 13)]
    assert lr[4] < lr[5] < max(lr.values())  # it had come down, and rises once more
    assert max(lr[step] for step in range(5, 13)) == pytest.approx(max(lr.values()))
    assert [(each.epoch, each.count) for each in checkpoints(run.root)[-1].ledger][-1] == (2, 30)


def test_what_belongs_to_one_launch_is_not_remembered(run: SmallRun) -> None:
    assert run.launch("--max-steps", "2", "--keep-last", "1", "--epochs", "1").code == 0
    ended = launch("--run-dir", str(run.root), "--data-dir", str(run.data))
    assert ended.code == 0
    assert ended.saying("from_step=2 to_step=4")
    assert len(log_of(run.root).read().head.checkpoints) == 2


def rule(**given: dict[str, Any]) -> dict[str, Any]:
    """Ask the rule about settings that were the defaults when the run began."""
    known = {"previous_explicit": {}, "pending": {}, "explicit": {}, **given}
    config = Config()
    return wanted_changes(base=to_json(config), current=settings_of(config), **known)


def test_only_what_a_launch_says_anew_is_wanted() -> None:
    assert rule() == {}
    assert rule(explicit={"lr": 9.0}) == {"lr": 9.0}
    assert rule(explicit={"lr": 9.0}, previous_explicit={"lr": 9.0}) == {}
    assert rule(explicit={"lr": 9.0}, previous_explicit={"lr": 8.0}) == {"lr": 9.0}
    assert rule(explicit={"lr": Config().lr}, previous_explicit={"lr": 8.0}) == {}  # it holds


def test_what_a_killed_launch_wanted_is_wanted_until_another_word() -> None:
    assert rule(pending={"lr": 9.0}) == {"lr": 9.0}
    assert rule(pending={"lr": 9.0}, explicit={"lr": 9.0}, previous_explicit={"lr": 9.0}) == {
        "lr": 9.0
    }
    assert rule(pending={"lr": 9.0}, explicit={"lr": 7.0}, previous_explicit={"lr": 9.0}) == {
        "lr": 7.0
    }
    assert rule(pending={"lr": 9.0}, explicit={"ema": 0.5}) == {"ema": 0.5, "lr": 9.0}


def test_an_attempts_record_holds_only_the_settings_of_the_run(run: SmallRun) -> None:
    """Else a setting of launches that a later version drops would close every run to it."""
    assert run.launch("--max-steps", "2").code == 0
    assert run.launch("--max-steps", "4").code == 0
    first, second = bodies(run.root, Attempt)
    assert first.config == second.config
    assert "keep_last" not in second.config
