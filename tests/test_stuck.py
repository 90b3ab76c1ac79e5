"""The watchdog: a trainer that is stuck is found, its stacks are printed, and it is replaced."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from alone import FLAGS, Alone, files_of_undisturbed
from forked import status_of
from jobs import Job, files_of_newest, show, wait_for
from running import running

from fmnist_dist import limits
from fmnist_dist.distributed import stop
from fmnist_dist.errors import ExitCode
from fmnist_dist.handover.board import Board, Section
from fmnist_dist.handover.kept import KeptCopy
from fmnist_dist.handover.slots import Slot, Slots
from fmnist_dist.lookout import Lookout

STEPS = "--max-steps=12"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return files_of_undisturbed(tmp_path_factory.mktemp("undisturbed"), STEPS)


@pytest.mark.parametrize(
    "how", ["stop", *(pytest.param(each, marks=pytest.mark.slow) for each in ("spin", "hang"))]
)
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


def in_a_group_that_does_not_end(
    slots: Slots | None, where: Section = Section.COLLECTIVE, *, finished: bool = False
) -> None:
    """Be a trainer whose main thread stays in the group of a generation that has failed."""
    board, kept = Board.create(), KeptCopy(slots, warn=pytest.fail)
    board.finished = finished
    deaf: Any = SimpleNamespace(break_off=lambda: None)
    with stop.listen() as request:
        lookout = Lookout(board, request, drain_seconds=20)
        lookout.secure_with(lambda _: "step 7 is saved")
        lookout.hand_over_with(lambda: kept.keep_now(7, lambda: [b"state"]))
        with lookout.running():
            if where is Section.COLLECTIVE:
                with lookout.watching(deaf, lambda: True):
                    board.enter(where)
                    time.sleep(60)
            board.enter(where)  # nothing is watched while a group is taken down
            time.sleep(60)


@pytest.mark.parametrize("where", [Section.COLLECTIVE, Section.LEAVE])
def test_a_worker_that_gloo_does_not_let_go_leaves_its_state_and_ends(
    where: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen at W = 4 on busy cores: all connections were closed, and the collective went on."""
    monkeypatch.setattr(limits, "LEAVE_SECONDS", 0.2)
    slots = Slots.create()
    status = status_of(lambda: in_a_group_that_does_not_end(slots, where))
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert slots.newest() == Slot(step=7, data=b"state")
    slots.close()


def test_without_a_keeper_such_a_worker_saves_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LEAVE_SECONDS", 0.2)
    status = status_of(lambda: in_a_group_that_does_not_end(None))
    assert os.waitstatus_to_exitcode(status) == ExitCode.PEER_LOST


def test_a_group_that_does_not_end_does_not_keep_a_finished_run_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "LEAVE_SECONDS", 0.2)
    status = status_of(lambda: in_a_group_that_does_not_end(None, Section.LEAVE, finished=True))
    assert os.waitstatus_to_exitcode(status) == ExitCode.FINISHED


def test_a_drain_has_the_time_that_is_left_until_the_keeper_kills() -> None:
    board = Board.create()
    with stop.woken_by_signals() as (readable, _):
        request = stop.StopRequest(readable)
        lookout = Lookout(board, request, drain_seconds=20)
        assert lookout.drain_seconds_left() == 20  # another rank was asked, and this one was not
        request.since = time.monotonic() - 10  # the step at hand took so long
        assert 8 < lookout.drain_seconds_left() <= 10 - limits.KILL_SECONDS
        board.drain_deadline = time.monotonic() + 3  # of the trainer before this one
        assert 1 < lookout.drain_seconds_left() <= 3 - limits.KILL_SECONDS
        board.drain_deadline = time.monotonic()
        assert lookout.drain_seconds_left() == 0


def in_a_group_that_is_broken_off(act: Callable[[Board, list[float]], None]) -> int:
    """Act as the main thread of a trainer whose generation has failed; return the wait status.

    `act` gets the board, and a list of the times at which the group was broken off.
    """

    def main() -> None:
        board, seen = Board.create(), []
        deaf: Any = SimpleNamespace(break_off=lambda: seen.append(time.monotonic()))
        with stop.listen() as request:
            lookout = Lookout(board, request, drain_seconds=20)
            with lookout.running(), lookout.watching(deaf, lambda: True):
                act(board, seen)
        assert seen

    return status_of(main)


def test_a_broken_group_is_left_wherever_the_main_thread_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may be about to enter a collective; it is not ended, since it may as well be at work."""
    monkeypatch.setattr(limits, "LEAVE_SECONDS", 0.2)

    def computes(board: Board, seen: list[float]) -> None:
        board.enter(Section.COMPUTE)
        wait_for(lambda: len(seen) > 5, "looks well after the limit")

    assert in_a_group_that_is_broken_off(computes) == 0


def test_a_collective_that_ends_in_time_costs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LEAVE_SECONDS", 1.0)

    def ends(board: Board, seen: list[float]) -> None:
        board.enter(Section.COLLECTIVE)
        wait_for(lambda: seen, "the break")
        board.enter(Section.MEETING)
        time.sleep(1.5)

    assert in_a_group_that_is_broken_off(ends) == 0
