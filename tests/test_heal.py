"""A lost trainer is replaced in place: nothing restarts, no step is lost, no bit differs.

On a disk, and on a real S3 server; what storage has no part in, and hundreds of kills, on a disk.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from alone import FLAGS, Alone
from in_process import clean_environ, in_child, small_run
from jobs import (
    ROOT,
    Job,
    alive,
    files_of_newest,
    free_port,
    ledger,
    reached,
    show,
    wait_for,
    wait_for_step,
)
from launcherless import Launcherless
from run_files import Folder, assert_sound, bodies, checkpoints, records
from running import running

from fmnist_dist import limits
from fmnist_dist.checkpoint.record import Finish
from fmnist_dist.errors import ExitCode, PeerLostError
from fmnist_dist.trainer import Trainer

STEPS = 70  # of 64 images: an epoch is 63, so one evaluation lies on the way
MIDDLE = 30
END = f"--max-steps={STEPS}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that nobody disturbed, in a world of one."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    code, text = Alone(run, END, f"--save-every-steps={MIDDLE}", "--keep-last=9").end()
    assert code == 0, text
    return run


@pytest.fixture(scope="module")
def undisturbed(whole: Path) -> dict[str, str]:
    return files_of_newest(whole)


def as_it_was(run: Path, copy: Folder, *, step: int) -> Folder:
    """Copy a run as it was when the checkpoint of a step had just been committed."""
    if isinstance(copy, Path):
        shutil.copytree(run, copy)
    else:
        copy.upload(run)
    (last,) = [r.index for r in records(run) if getattr(r.body, "step", None) == step]
    for path in (copy / "log").iterdir():
        if int(path.stem) > last:
            path.unlink()
    assert show(copy)["step"] == step
    return copy


def job_of(run: Folder, *flags: str, workers: int = 2, logs: Path | None = None) -> Job:
    return Job(run, [*FLAGS, *flags], workers=workers, module="train_small", logs=logs)


def faulty_job(
    run: Folder, faults: str, *flags: str, logs: Path | None = None
) -> tuple[str, list[int]]:
    """Run a job with faults to its end, each proved; return its output and first keepers."""
    with (
        mock.patch.dict(os.environ, {"FMNIST_DIST_FAULTS": faults}),
        running(job_of(run, *flags, logs=logs)) as job,
    ):
        keepers = wait_for(lambda: both(job.keeper_pids()), "keepers")
        text = job.finish()
    for fault in faults.split(","):
        point, action, *_ = fault.split(":")
        rank = fault.partition("@")[2]
        assert f"fault: {action} at {point}" in text, f"{fault} did not happen:\n{text}"
        said = [line for line in text.splitlines() if f"fault: {action} at {point}" in line]
        assert all(line.endswith(f"rank {rank}") for line in said)
    return text, keepers


def both(pids: list[int]) -> list[int]:
    return pids if len(pids) == 2 else []


class Killer:
    """Kills trainers of a running job, and waits for what must come after."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.dead: list[int] = []
        wait_for_step(job, 2)
        self.keepers = job.keeper_pids()
        assert len(self.keepers) == job.workers

    def trainers(self) -> list[int]:
        """Return the trainers of all ranks, once all are there."""

        def all_there() -> list[int]:
            assert self.job.process.poll() is None, self.job.text()[-5000:]
            pids = self.job.trainer_pids()
            return pids if len(pids) == self.job.workers else []

        return wait_for(all_there, "trainers")

    def kill(self, ranks: list[int]) -> None:
        """Kill the trainers of these ranks at once."""
        trainers = self.trainers()
        chosen = [trainers[rank] for rank in ranks]
        for pid in chosen:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(map(alive, chosen)), "their deaths")
        assert not set(chosen) & set(self.dead), "a trainer was killed twice"
        self.dead += chosen

    def await_progress(self, steps: int = 1) -> None:
        before = reached(self.job.run)[1]
        wait_for_step(self.job, before + steps)

    def assert_in_place(self) -> None:
        """Everything happened below the keepers that torchrun has started."""
        assert self.job.keeper_pids() == self.keepers


def assert_healed(run: Folder, *, kills: int) -> dict[str, Any]:
    """Return the story of a run in which nothing was restarted, and every loss is recorded."""
    story = show(run)
    assert len(story["attempts"]) == 1
    assert story["attempts"][0]["lost_steps"] == 0
    heals = story["heals"]
    # One that is killed before it has finished a step is part of its successor's heal.
    assert 0 < len(heals) <= kills
    assert {each["reason"] for each in heals} == {"killed by SIGKILL"}
    assert all(0 < each["seconds"] < 60 for each in heals)
    assert_sound(run)
    proof = ledger(run)
    assert proof.returncode == 0, proof.stdout + proof.stderr
    return story


def test_trainers_killed_one_by_one_together_and_while_they_heal_lose_no_bit(
    undisturbed: dict[str, str], root: Folder, tmp_path: Path
) -> None:
    with running(job_of(root, END, logs=tmp_path)) as job:
        killer = Killer(job)
        for rank in (0, 1, 1, 0):
            killer.kill([rank])
            killer.await_progress(2)
        # In the middle of healing: the successor as soon as it is there.
        for rank in (1, 1):
            killer.kill([rank])
        killer.await_progress(2)
        # Up to here one was left that held the state; from here on copies in keepers' memory are.
        one_left = reached(job.run)[1]
        killer.kill([0, 1])
        killer.await_progress(2)
        for ranks in ([0, 1], [1], [0]):
            killer.kill(ranks)
        killer.await_progress()
        killer.assert_in_place()
        job.finish()
    assert len(killer.dead) == 12
    story = assert_healed(job.run, kills=12)
    early = [each for each in story["heals"] if each["step"] + each["lost_steps"] < one_left]
    assert len(early) >= 5
    assert [each["lost_steps"] for each in early] == [0] * len(early)
    assert sum(each["lost_steps"] for each in story["heals"]) < 40
    assert {each["rank"] for each in story["heals"]} == {0, 1}
    assert files_of_newest(job.run) == undisturbed


AT_WORK = (
    "open:crash:1@0",
    "meeting:crash:1@1",
    "data:crash:1@1",  # of the first step
    "collective:crash:9@0",
    "update:crash:5@1",
    "forward:crash:9@0",
    "save:crash:2@0",
    "evaluate:crash:1@1",
    "finish:crash:1@0",
)


def test_trainers_that_die_at_any_work_are_replaced_and_no_bit_differs(
    undisturbed: dict[str, str], root: Folder, tmp_path: Path
) -> None:
    text, _ = faulty_job(root, ",".join(AT_WORK), END, "--save-every-steps=20", logs=tmp_path)
    assert text.count("worker lost, a new one takes its place") == len(AT_WORK)
    story = show(root)
    assert len(story["attempts"]) == 1
    assert [each["lost_steps"] for each in story["heals"]] == [0] * len(story["heals"])
    steps = [each.step for each in checkpoints(root)]
    # The one of step 40 died with its trainer, and was made anew from the state of then.
    assert 40 <= steps[1] < 50, steps
    assert steps[0] >= 20
    assert steps[-1] == STEPS
    assert [each.step for each in bodies(root, Finish)] == [STEPS]
    assert files_of_newest(root) == undisturbed
    assert_sound(root)


def test_trainers_that_die_while_they_restore_and_in_the_middle_of_a_save_lose_no_bit(
    whole: Path, root: Folder, tmp_path: Path
) -> None:
    run = as_it_was(whole, root, step=MIDDLE)
    # Past the first few dozen, operations are those of saves.
    in_a_save, said = "disk:kill:60", "kill at storage operation 60"
    if not isinstance(root, Path):  # as it begins: `test_s3_crash_points` has its requests
        in_a_save, said = "save:crash:4@0", "crash at save, call 4, rank 0"
    faults = f"restore:crash:1@0,restore:crash:1@1,{in_a_save}"
    with (
        mock.patch.dict(os.environ, {"FMNIST_DIST_FAULTS": faults}),
        running(job_of(run, END, "--save-every-steps=3", logs=tmp_path)) as job,
    ):
        keepers = wait_for(lambda: both(job.keeper_pids()), "keepers")
        wait_for_step(job, MIDDLE + 6, attempt=1)
        assert job.keeper_pids() == keepers
        text = job.finish()
    assert "fault: crash at restore, call 1, rank " in text
    assert f"fault: {said}" in text
    assert len({each["owner"] for each in show(run)["attempts"]}) == 2
    assert files_of_newest(run) == files_of_newest(whole)
    assert_sound(run)
    proof = ledger(run)
    assert proof.returncode == 0, proof.stdout + proof.stderr


def test_once_the_run_is_finished_a_keeper_exits_0_however_its_trainer_ends(
    root: Folder, tmp_path: Path
) -> None:
    with small_run(tmp_path, root) as run:
        faults = {"FMNIST_DIST_FAULTS": "finish:crash:1", "FMNIST_DIST_NO_KEEPER": "false"}
        ended = in_child(run, "--max-steps=8", **faults)
        assert "fault: crash at finish, call 1, rank 0" in ended.stderr
        assert ended.returncode == ExitCode.FINISHED, ended.stderr
        assert [each.step for each in bodies(run.root, Finish)] == [8]
        again = run.beside("again")
        assert again.launch("--max-steps=8").code == 0
        assert files_of_newest(run.root) == files_of_newest(again.root)


def test_a_bit_that_flips_in_one_ranks_memory_is_found_and_never_saved(tmp_path: Path) -> None:
    end = "--max-steps=8"
    code, text = Alone(tmp_path / "undisturbed", end).end()
    assert code == 0, text
    run = tmp_path / "run"
    text, _ = faulty_job(run, "update:corrupt:5@1", end, "--save-every-steps=2")
    assert "the ranks hold different states" in text, text
    # Of the states before it flipped, the newest that was saved: a save runs beside steps.
    assert re.search(r'resumed  checkpoint=("step [1-4]"|none) ', text), text
    # It flips at the fifth update of each process: for one that went on from step 3 once more.
    assert 2 <= len(show(run)["attempts"]) <= 3
    assert files_of_newest(run) == files_of_newest(tmp_path / "undisturbed")


@pytest.fixture
def launcherless(tmp_path: Path) -> Iterator[Launcherless]:
    job = Launcherless(tmp_path / "run", "--max-steps=1000", "--eval-every-epochs=99")
    try:
        yield job
    finally:
        job.end()


def test_ranks_that_lose_the_launchers_store_save_and_end(launcherless: Launcherless) -> None:
    job = launcherless
    wait_for(lambda: reached(job.run)[1] >= 5 or job.processes[0].poll() is not None, "step 5")
    os.kill(wait_for(job.store, "the store"), signal.SIGKILL)
    # Nobody looks at the store while all goes well: a lost trainer has to be replaced for that.
    children = Path(f"/proc/{job.processes[1].pid}/task/{job.processes[1].pid}/children")
    for pid in map(int, children.read_text().split()):
        os.kill(pid, signal.SIGKILL)
    codes = [process.wait(120) for process in job.processes]
    text = job.text()
    assert "the launcher's store is gone" in text
    assert "Traceback" not in text
    assert set(codes) <= {ExitCode.TRANSIENT, ExitCode.PEER_LOST}, text
    assert checkpoints(job.run)[-1].step == reached(job.run)[1]


_JOINS = """
import sys, torch, torch.distributed as dist
from fmnist_dist.distributed import world
from fmnist_dist.distributed.roster import Roster
from fmnist_dist.errors import PeerLostError
rank, port = map(int, sys.argv[1:])
host = "127.0.0.1"
names = {"agents": ("agent",), "nonce": "nonce", "prefix": "prefix"}
roster = Roster(rank=rank, size=2, local_rank=rank, address=(host, port), **names)
server = dist.TCPStore(host, port, is_master=rank == 0, wait_for_workers=False)
cpu = torch.device("cpu")
def fail():
    raise PeerLostError("the other rank has died")
if rank == 0:
    for generation in range(3):
        try:
            store = roster.connect()
            with world.join(roster, store, device=cpu, generation=generation, check=fail):
                sys.exit("a group without a second rank")
        except PeerLostError as error:
            print(error, flush=True)
with world.join(roster, roster.connect(), device=cpu, generation=3):
    total = torch.ones(1)
    dist.all_reduce(total)
    print("together", total.item(), flush=True)
    dist.barrier()
"""


def test_a_rank_whose_groups_could_not_be_built_meets_one_that_has_tried_none() -> None:
    """torch numbers the groups of a process, and ranks with other numbers never find each other."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _JOINS, str(rank), port],
            env={**clean_environ(), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], texts
    assert texts[0].count("the other rank has died") == 3
    assert all("together 2.0" in text for text in texts)


def test_generations_that_fail_for_ever_are_given_up(tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise PeerLostError("another rank is gone")

    with (
        small_run(tmp_path) as run,
        mock.patch.object(Trainer, "_join", fail),
        mock.patch.object(limits, "REGROUP_SECONDS", 0.3),
    ):
        ended = run.launch("--max-steps=4")
    assert ended.code == ExitCode.TRANSIENT
    assert "no step in 0.3 s: another rank is gone" in ended.errors[0]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [2, 4])
def test_200_kills_are_healed_in_place(workers: int, tmp_path: Path) -> None:
    kills, end = 200, ("--max-steps=1600", "--epochs=30", "--eval-every-epochs=29")
    seed = random.randrange(2**32)
    print(f"kills drawn with seed {seed}")
    draw = random.Random(seed)
    code, text = Alone(tmp_path / "undisturbed", *end).end()
    assert code == 0, text
    with running(job_of(tmp_path / "run", *end, workers=workers)) as job:
        killer = Killer(job)
        while len(killer.dead) < kills:
            killer.kill(draw.sample(range(workers), draw.choice([1, 1, 1, workers - 1])))
            if draw.random() < 0.8:
                killer.await_progress(draw.randrange(1, 4))
            else:
                killer.kill([draw.randrange(workers)])  # once more, in the middle of healing
                killer.await_progress()
        killer.assert_in_place()
        job.finish()
    assert_healed(job.run, kills=len(killer.dead))
    assert files_of_newest(job.run) == files_of_newest(tmp_path / "undisturbed")
