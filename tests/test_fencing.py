"""P4, one writer: an attempt that another launch has superseded stops, and does not come back.

On a disk, and on a real S3 server.
"""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from in_process import SmallRun, launch, small_run
from jobs import Job, alive, reached, wait_for, wait_for_step
from run_files import Folder, assert_sound, bodies, checkpoints, kinds, log_of, opened, saved_bytes
from running import running

from fmnist_dist.checkpoint.record import Attempt, Finish
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.distributed import roster
from fmnist_dist.errors import ExitCode

FOREVER = "--max-steps=1000000"
FLAGS = ["--batch-size=64", "--save-every-steps=2", "--eval-every-epochs=99", "--device=cpu"]


@pytest.fixture
def run(tmp_path: Path, root: Folder) -> Iterator[SmallRun]:
    with small_run(tmp_path, root) as run:
        yield run


def take_over(root: Folder) -> None:
    """Append what a launch by another owner appends first."""
    log = log_of(root)
    another = replace(bodies(root, Attempt)[-1], owner="another")
    RunWriter.begin(opened(root), log, owner="another", make=lambda _: another)


def test_a_superseded_attempt_stops_at_its_next_commit_and_leaves_nothing(run: SmallRun) -> None:
    seen: dict[str, bytes] = {}

    def told(text: str) -> None:
        if " saved  step=2 " in text:
            take_over(run.root)
            seen.update(saved_bytes(run.root))

    ended = run.launch("--max-steps", "8", "--save-every-steps", "2", told=told)
    assert ended.code == ExitCode.FENCED
    (line,) = ended.errors
    assert "attempt 2 has taken this run over: attempt 1 stops here and has changed nothing" in line
    assert len(seen) == 7  # two attempts, a checkpoint's record and its four files
    assert saved_bytes(run.root) == seen
    assert_sound(run.root)


def test_an_owner_that_was_superseded_never_takes_the_run_back(run: SmallRun) -> None:
    """torchrun restarts a fenced worker under the same owner: two launches would duel for ever."""
    first = mock.patch.object(roster, "secrets", SimpleNamespace(token_hex=lambda _: "first"))
    with first:
        assert run.launch("--max-steps", "2").code == 0
    assert run.launch("--max-steps", "4").code == 0
    before = saved_bytes(run.root)
    with first:
        ended = run.launch("--max-steps", "6")
    assert ended.code == ExitCode.FENCED
    (line,) = ended.errors
    assert "another launch has taken this run over (attempt 2): stop this one; " in line
    assert saved_bytes(run.root) == before


def test_an_owner_that_nobody_superseded_comes_back(run: SmallRun) -> None:
    with mock.patch.object(roster, "secrets", SimpleNamespace(token_hex=lambda _: "first")):
        assert run.launch("--max-steps", "2").code == 0
        assert run.launch("--max-steps", "4").code == 0
    assert [each.owner for each in bodies(run.root, Attempt)] == ["first", "first"]


def test_a_second_launch_ends_the_first_which_does_not_come_back(
    root: Folder, tmp_path: Path
) -> None:
    job = Job(root, [*FLAGS, FOREVER], workers=2, max_restarts=3, logs=tmp_path)
    with running(job) as first:
        wait_for_step(first, 4)
        end = reached(root)[1] + 20
        second = launch("--run-dir", str(root), *FLAGS, f"--max-steps={end}")
        assert second.code == 0, second.lines
        with mock.patch("jobs.LIMIT_SECONDS", 15.0):
            text = first.wait()

    assert first.process.returncode != 0
    fenced = [line for line in text.splitlines() if "has taken this run over" in line]
    assert 1 <= len(fenced) <= 2, text  # rank 0 where it saves, rank 1 where it would for it
    assert "attempt 2 has taken this run over: attempt 1 stops here" in fenced[0]
    assert "exit_code=76" in fenced[0]
    # The first did not start again, neither to train nor to be told that it may not.
    assert "restart worker group" not in text
    attempts = bodies(root, Attempt)
    assert [each.world_size for each in attempts] == [2, 1]
    assert attempts[0].owner != attempts[1].owner
    # What the second did is all there is after it came.
    assert kinds(root).count("finish") == 1
    assert bodies(root, Finish)[0].step == checkpoints(root)[-1].step
    assert_sound(root)


def test_workers_do_not_outlive_their_agent(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with running(Job(root, [*FLAGS, FOREVER], workers=2)) as job:
        wait_for((root / "log").is_dir, "the first attempt")  # the ranks have met
        pids = job.worker_pids()
        assert len(pids) == 2
        assert all(map(alive, pids))
        os.kill(job.process.pid, signal.SIGKILL)
        assert job.process.wait(5) == -signal.SIGKILL
        with mock.patch("jobs.LIMIT_SECONDS", 5.0):
            wait_for(lambda: not any(map(alive, pids)), "the workers to follow")
