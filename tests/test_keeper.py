"""A keeper and its trainer in a world of one: healed, drained, found stuck, given up on."""

import os
import signal
from pathlib import Path

import pytest
from alone import Alone
from jobs import alive, files_of_newest, reached, show, wait_for
from run_files import checkpoints

STEPS = "--max-steps=12"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    code, text = Alone(run, STEPS).end()
    assert code == 0, text
    return files_of_newest(run)


def await_step(job: Alone, step: int) -> None:
    wait_for(lambda: reached(job.run)[1] >= step or job.process.poll() is not None, f"step {step}")
    assert job.process.poll() is None, job.text()


@pytest.mark.parametrize("fault", ["open:crash:1", "data:crash:41", "evaluate:crash:1"])
def test_a_trainer_that_dies_at_work_is_replaced_and_no_bit_differs(
    fault: str, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    code, text = Alone(tmp_path / "run", STEPS, FMNIST_DIST_FAULTS=fault).end()
    assert code == 0, text
    assert f"fault: crash at {fault.split(':', maxsplit=1)[0]}" in text
    assert text.count("worker lost, a new one takes its place") == 1
    assert files_of_newest(tmp_path / "run") == undisturbed


def test_trainers_killed_again_and_again_lose_nothing_and_are_in_the_log(
    undisturbed: dict[str, str], tmp_path: Path
) -> None:
    job = Alone(tmp_path / "run", STEPS)
    dead = []
    for step in (2, 5, 8):
        await_step(job, step)
        dead.append(job.trainer())
        os.kill(dead[-1], signal.SIGKILL)
        wait_for(lambda: not alive(dead[-1]), "its death")
    code, text = job.end()
    assert code == 0, text
    assert len(set(dead)) == 3
    story = show(job.run)
    assert [each["reason"] for each in story["heals"]] == ["killed by SIGKILL"] * 3
    assert len(story["attempts"]) == 1
    assert files_of_newest(job.run) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_keeper_saves_the_last_step_and_ends_with_143(
    number: signal.Signals, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    job = Alone(tmp_path / "run", "--max-steps=1000")
    await_step(job, 3)
    os.kill(job.process.pid, number)
    code, text = job.end()
    assert code == 143, text
    assert reached(job.run)[1] == checkpoints(job.run)[-1].step


def test_a_signal_to_the_trainer_itself_drains_as_well(tmp_path: Path) -> None:
    job = Alone(tmp_path / "run", "--max-steps=1000")
    await_step(job, 3)
    os.kill(job.trainer(), signal.SIGTERM)
    code, text = job.end()
    assert code == 143, text
    assert reached(job.run)[1] == checkpoints(job.run)[-1].step


def test_a_trainer_whose_main_thread_hangs_saves_within_its_time(tmp_path: Path) -> None:
    job = Alone(
        tmp_path / "run",
        "--max-steps=1000",
        "--drain-seconds=4",
        "--step-timeout=100",
        FMNIST_DIST_FAULTS="data:hang:41",
    )
    job.await_text("fault: hang at data")
    os.kill(job.process.pid, signal.SIGTERM)
    code, text = job.end()
    assert code == 143, text
    assert "others do not answer: step 5 is saved" in text
    assert checkpoints(job.run)[-1].step == 5


def test_a_stopped_trainer_that_cannot_drain_is_saved_from_the_keepers_memory(
    tmp_path: Path,
) -> None:
    job = Alone(tmp_path / "run", "--max-steps=1000", "--drain-seconds=3", "--step-timeout=100")
    await_step(job, 3)
    os.kill(job.trainer(), signal.SIGSTOP)
    os.kill(job.process.pid, signal.SIGTERM)
    code, text = job.end()
    assert code == 143, text
    assert "saved from the keeper's memory" in text
    assert reached(job.run)[1] - checkpoints(job.run)[-1].step <= 5  # its copy's age


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    job = Alone(
        tmp_path / "run",
        "--max-steps=1000",
        "--step-timeout=100",
        FMNIST_DIST_FAULTS="data:hang:41",
    )
    job.await_text("fault: hang at data")
    trainer = job.trainer()
    os.kill(job.process.pid, signal.SIGINT)
    os.kill(job.process.pid, signal.SIGINT)
    code, text = job.end()
    # Signals of one number that come together are one signal: then the second is still to come.
    assert code in {130, 143}, text
    assert not alive(trainer)


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


@pytest.mark.parametrize("how", ["exit", "segv"])
def test_a_trainer_that_crashes_at_the_same_step_again_and_again_is_given_up(
    how: str, tmp_path: Path
) -> None:
    job = Alone(tmp_path / "run", STEPS, FMNIST_DIST_FAULTS=f"forward:{how}:6+")
    code, text = job.end()
    assert code == 70, text
    assert f"fault: {how} at forward" in text
    assert "no progress: 3 times after step" in text
    assert 1 <= checkpoints(job.run)[-1].step <= 5  # saved; its last copy may be some steps old


def test_a_checkpoint_that_crashes_whoever_restores_it_is_not_used_any_more(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    assert Alone(run, "--max-steps=6", "--save-every-steps=3").end()[0] == 0
    job = Alone(run, STEPS, FMNIST_DIST_FAULTS="restore:segv:1x3")
    code, text = job.end()
    assert code == 0, text
    assert text.count("fault: segv at restore") == 3
    assert "a checkpoint is not used any more  step=6" in text
    assert 'checkpoint="step 3"' in text


def test_ranks_that_hold_other_bits_are_refused(tmp_path: Path) -> None:
    """One rank alone cannot differ; that it can be told from the others is `share`'s promise."""
    from fmnist_dist.distributed.share import refuse_different
    from fmnist_dist.errors import TransientError

    refuse_different({0: "a", 1: "a"}, step=3)
    with pytest.raises(TransientError, match=r"after step 3 \(rank 1 unlike"):
        refuse_different({0: "a", 1: "b", 2: "a"}, step=3)


def test_without_a_keeper_the_process_itself_trains(tmp_path: Path) -> None:
    job = Alone(tmp_path / "run", STEPS, "--no-keeper")
    code, text = job.end()
    assert code == 0, text
    assert "keeper=no" in text
