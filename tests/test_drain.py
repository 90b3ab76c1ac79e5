"""A wish to stop: whenever it comes, the last finished step is durable, the next launch goes on.

Launches without torchrun, so that the exit code is the keeper's own. Each goes on with the run of
the one before: that is the proof that the one before has lost nothing. On a disk, and on a real S3
server.
"""

import os
import re
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
from alone import FLAGS, Alone
from jobs import Job, alive, is_pending, reached, show, stop, wait_for, wait_for_step
from run_files import Folder, assert_sound, checkpoints
from running import running

from fmnist_dist.errors import INTERRUPTED, ExitCode

COPY_AGE = 5  # steps: the keeper's copy is made as often as that costs next to nothing
LAST_STEP = 110  # not the end of an epoch: the final save is the only one
LONG = ("--epochs=500", "--eval-every-epochs=499")
SHARDS = 8  # calls of the point `data` in a step
HANG = {"FMNIST_DIST_FAULTS": f"data:hang:{4 * SHARDS}"}  # in the fourth step of a launch


def drained(job: Alone, number: int = signal.SIGTERM, *, to: int | None = None) -> float:
    """Send a signal, and see the launch end with its last step saved; return the seconds."""
    began = time.monotonic()
    os.kill(to or job.process.pid, number)
    return ended_drained(job, began)


def ended_drained(job: Alone, began: float, *, age: int = 0) -> float:
    """See it end with the last step saved, or one at most `age` steps older."""
    code, text = job.end()
    seconds = time.monotonic() - began
    assert code == ExitCode.DRAINED, (code, text[-5000:])
    attempt, last = reached(job.run)
    assert attempt == job.before + 1
    saved = checkpoints(job.run)[-1].step
    assert job.first_step() < saved <= last <= saved + age
    return seconds


def loads_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def assert_nothing_was_lost(run: Folder, *, but: tuple[int, ...] = ()) -> None:
    """Each attempt but those of some numbers was gone on from its last step."""
    assert_sound(run)
    lost = [each["lost_steps"] for each in show(run)["attempts"]]
    assert {n for place, n in enumerate(lost[:-1], start=1) if place not in but} == {0}, lost


def test_every_signal_at_any_time_stops_a_launch_and_the_next_one_goes_on(
    root: Folder, tmp_path: Path
) -> None:
    with Alone(root, *LONG, logs=tmp_path) as job:  # while it imports torch
        wait_for(lambda: loads_torch(job.process.pid), "torch to be imported")
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.process.wait(60) == ExitCode.DRAINED, job.text()
        assert "Traceback" not in job.text()
    assert reached(root) == (0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        with Alone(root, *LONG, logs=tmp_path) as job:
            job.await_steps(3)
            drained(job, number)
    with Alone(root, *LONG, logs=tmp_path) as job:
        job.await_steps(3)
        drained(job, to=job.trainer())
    # This one leaves at once: steps may be lost.
    with Alone(root, *LONG, logs=tmp_path, **HANG) as job:
        job.await_text("fault: hang at data")
        os.kill(job.process.pid, signal.SIGINT)
        wait_for(lambda: not is_pending(job.process.pid, signal.SIGINT), "the first SIGINT")
        os.kill(job.process.pid, signal.SIGINT)
        assert job.process.wait(60) == INTERRUPTED, job.text()
        assert "SIGINT: saving, then stopping; a second one stops at once" in job.text()
        assert job.text().count("interrupted: steps since the newest checkpoint are lost") == 1
    assert_nothing_was_lost(root)
    assert len(show(root)["attempts"]) == 5


@pytest.mark.slow
def test_a_drain_during_an_evaluation_or_a_save_loses_nothing(root: Folder, tmp_path: Path) -> None:
    for flags, point in (
        (("--epochs=500", "--eval-every-epochs=1"), "evaluate"),
        ((*LONG, "--save-every-steps=5"), "save"),
    ):
        with Alone(root, *flags, logs=tmp_path, FMNIST_DIST_FAULTS=f"{point}:slow=2:1") as job:
            job.await_text(f"fault: slow at {point}")
            assert drained(job) < 20
    slow = {"FMNIST_DIST_FAULTS": "save:slow=2:1"}
    with Alone(root, *LONG, f"--max-steps={LAST_STEP}", logs=tmp_path, **slow) as job:
        job.await_text("fault: slow at save")
        assert reached(root)[1] == LAST_STEP  # the final one
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.process.wait(60) == 0, job.text()  # it was at the end, and is
    assert checkpoints(root)[-1].step == LAST_STEP
    assert_nothing_was_lost(root)


def test_a_drain_does_not_need_the_main_thread_nor_the_trainer(
    root: Folder, tmp_path: Path
) -> None:
    with Alone(root, *LONG, "--drain-seconds=4", logs=tmp_path, **HANG) as job:
        job.await_text("fault: hang at data")
        began = time.monotonic()
        os.kill(job.process.pid, signal.SIGTERM)
        job.await_text("SIGTERM: saving, then stopping  limit_seconds=4")  # told at once
        job.await_text("others do not answer")  # the lookout's words: it is durable
        assert time.monotonic() - began < 4
        ended_drained(job, began)
    with Alone(root, *LONG, logs=tmp_path) as job:
        job.await_steps(COPY_AGE + 1)  # else the copy may be that of the beginning
        trainer = job.trainer()
        stop(trainer)  # so that it cannot end by itself, and the keeper's signal is seen waiting
        began = time.monotonic()
        os.kill(job.process.pid, signal.SIGTERM)
        wait_for(lambda: is_pending(trainer, signal.SIGTERM), "the keeper to drain")
        os.kill(trainer, signal.SIGKILL)
        wait_for(lambda: not alive(trainer), "the trainer to be dead")
        assert ended_drained(job, began, age=COPY_AGE) < 20
        assert "saved from the keeper's memory" in job.text()
    with Alone(root, *LONG, logs=tmp_path) as job:
        job.await_steps(1)
        drained(job)
    assert_nothing_was_lost(root, but=(2,))  # saved from the copy


def test_a_rank_is_drained_in_time_beside_one_that_is_stopped(root: Folder, tmp_path: Path) -> None:
    flags = [*FLAGS, *LONG, "--drain-seconds=6"]
    with running(Job(root, flags, max_restarts=0, module="train_small", logs=tmp_path)) as job:
        wait_for_step(job, 5)
        keeper = job.keeper_pids()[0]
        stop(job.trainer_pids()[1])
        began = time.monotonic()
        os.kill(keeper, signal.SIGTERM)
        wait_for(lambda: "others do not answer" in job.text(), "the state to be durable")
        assert time.monotonic() - began < 6
        wait_for(lambda: not alive(keeper), "the drained keeper to end")
        assert checkpoints(job.run)[-1].step == reached(job.run)[1] >= 5
    assert_sound(job.run)


@pytest.mark.parametrize(
    "whom",
    [
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("the agent", "all workers")),
        "every process",  # as the end of a container does
    ],
)
def test_a_signal_to_the_agent_to_all_workers_or_to_every_process_loses_nothing(
    whom: str, root: Folder, tmp_path: Path
) -> None:
    job = Job(root, [*FLAGS, *LONG], max_restarts=0, module="train_small", logs=tmp_path)
    with running(job):
        wait_for_step(job, 2)
        agent, workers = [job.process.pid], job.keeper_pids()
        assert len(workers) == 2
        everybody = [*agent, *workers, *job.trainer_pids()]
        chosen = {"the agent": agent, "all workers": workers}.get(whom, everybody)
        for pid in chosen:
            os.kill(pid, signal.SIGTERM)
        text = job.wait()
    assert job.process.returncode != 0  # it is not finished
    told = re.findall(r"asked to stop: step .* exit_code=143", text)  # torchrun quotes it
    assert len(told) == 1, text[-5000:]  # rank 0 tells
    assert "worker lost" not in text
    with Alone(root, *LONG, logs=tmp_path) as again:
        again.await_steps(1)
        drained(again)
    assert_nothing_was_lost(root)
    assert len(show(root)["attempts"]) == 2


def test_a_signal_while_the_ranks_heal_loses_nothing(root: Folder, tmp_path: Path) -> None:
    slow = {"FMNIST_DIST_FAULTS": "meeting:slow=2:2@1"}  # the successor's
    job = Job(root, [*FLAGS, *LONG], max_restarts=0, module="train_small", logs=tmp_path)
    with mock.patch.dict(os.environ, slow), running(job):
        wait_for_step(job, 3)
        job.kill_trainer(1)
        wait_for(lambda: "fault: slow at meeting, call 2, rank 1" in job.text(), "the healing")
        last = reached(root)[1]
        job.process.send_signal(signal.SIGTERM)
        text = job.wait()
    assert "worker lost, a new one takes its place" in text
    assert "exit_code=143" in text
    assert checkpoints(root)[-1].step == reached(root)[1] >= last >= 3
    assert_sound(root)
