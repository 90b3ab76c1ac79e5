"""The watchdog: a trainer that is stuck is found, its stacks are printed, and it is replaced."""

import os
from pathlib import Path
from unittest import mock

import pytest
from alone import FLAGS, Alone
from jobs import Job, files_of_newest, show, wait_for
from running import running

STEPS = "--max-steps=12"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    code, text = Alone(run, STEPS).end()
    assert code == 0, text
    return files_of_newest(run)


@pytest.mark.parametrize("how", ["hang", "spin", "stop"])
def test_a_stuck_trainer_is_found_shown_and_replaced(
    how: str, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    fault = f"data:{how}:41"
    job = Alone(tmp_path / "run", STEPS, "--step-timeout=3", FMNIST_DIST_FAULTS=fault)
    code, text = job.end()
    assert code == 0, text
    assert f"fault: {how} at data" in text
    assert "worker stuck: the stacks of its threads follow" in text
    assert "faults.py" in text  # where it was
    if how != "stop":  # that one goes on to print its stacks, and may be done before it is killed
        assert show(job.run)["heals"][0]["lost_steps"] <= 5  # alone: its copy may be some steps old
    assert files_of_newest(job.run) == undisturbed


def test_of_ranks_that_wait_for_each_other_only_the_one_that_hangs_is_replaced(
    undisturbed: dict[str, str], tmp_path: Path
) -> None:
    faults = {"FMNIST_DIST_FAULTS": "data:hang:21@1,collective:hang:9@0"}
    flags = [*FLAGS, STEPS, "--step-timeout=3"]
    with (
        mock.patch.dict(os.environ, faults),
        running(Job(tmp_path / "run", flags, module="train_small")) as job,
    ):
        keepers = wait_for(lambda: len(job.keeper_pids()) == 2 and job.keeper_pids(), "keepers")
        wait_for(lambda: job.text().count("a new one takes its place") == 2, "two replacements")
        assert job.keeper_pids() == keepers
        text = job.finish()
    assert "fault: hang at data, call 21, rank 1" in text
    assert "fault: hang at collective, call 9, rank 0" in text
    story = show(job.run)
    assert [(each["rank"], each["lost_steps"]) for each in story["heals"]] == [(1, 0), (0, 0)]
    assert len(story["attempts"]) == 1
    assert files_of_newest(job.run) == undisturbed
