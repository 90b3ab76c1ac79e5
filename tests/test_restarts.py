"""torchrun's restarts: the trap of its shared store, and what is said where there are none.

The first on a disk, and on a real S3 server.
"""

import random
from pathlib import Path

import pytest
from in_process import small_run
from jobs import Job, files_of_newest, ledger, show, wait_for, wait_for_step
from run_files import Folder, assert_sound
from running import running

FLAGS = ["--batch-size=256", "--save-every-steps=5", "--max-steps=26", "--eval-every-epochs=99"]


def test_workers_killed_again_and_again_meet_again_under_plain_torchrun(
    root: Folder, tmp_path: Path
) -> None:
    """Stock workers hang here in most cases: they find dead addresses in the launcher's store."""
    job = Job(root, FLAGS, module="train_small", logs=tmp_path).start()
    for kill, step in enumerate((4, 12, 20)):
        wait_for_step(job, step, attempt=kill)
        job.kill_worker(kill % 2)
    text = job.finish()
    story = show(job.run)
    assert len(story["attempts"]) == 4
    assert len({each["owner"] for each in story["attempts"]}) == 1  # the launch, not its attempts
    assert [each["lost_steps"] for each in story["attempts"]] == [0, 0, 0, 0]  # survivors saved
    assert text.count(" resumed ") == 3


def test_a_launcher_without_restarts_is_warned_about(tmp_path: Path) -> None:
    with small_run(tmp_path) as run:
        none = run.launch("--max-steps=1", environ={"TORCHELASTIC_MAX_RESTARTS": "0"})
        some = run.launch("--max-steps=2", environ={"TORCHELASTIC_MAX_RESTARTS": "3"})
    assert len(none.saying("--max-restarts")) == 1
    assert some.saying("--max-restarts") == []


def test_agents_of_several_nodes_that_share_a_store_are_warned_about(tmp_path: Path) -> None:
    agents = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with small_run(tmp_path) as run:
        sharing = run.launch("--max-steps=1", environ=agents)
        own = run.launch("--max-steps=2", environ={**agents, "GROUP_WORLD_SIZE": "1"})
    assert len(sharing.saying("set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")) == 1
    assert own.saying("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_50_keepers_killed_one_after_another_cost_a_restart_each_and_no_step(
    tmp_path: Path,
) -> None:
    kills = 50
    flags = ["--batch-size=64", "--max-steps=1200", "--epochs=30", "--eval-every-epochs=29"]
    seed = random.randrange(2**32)
    print(f"kills drawn with seed {seed}")
    draw = random.Random(seed)
    undisturbed = Job(tmp_path / "undisturbed", flags, module="train_small").start()
    undisturbed.finish()
    job = Job(tmp_path / "run", flags, max_restarts=100, module="train_small")
    with running(job):
        for kill in range(kills):
            wait_for_step(job, 0, attempt=kill)
            first = show(job.run)["attempts"][-1]["first_step"]
            wait_for_step(job, first + draw.randrange(1, 8), attempt=kill)
            wait_for(lambda: len(job.trainer_pids()) == 2, "both trainers")
            job.kill_keeper(draw.randrange(2))
        text = job.finish()
    assert text.count(" resumed ") == kills
    attempts = show(job.run)["attempts"]
    assert [each["lost_steps"] for each in attempts] == [0] * (kills + 1)
    assert len({each["owner"] for each in attempts}) == 1  # one torchrun
    assert_sound(job.run)
    assert ledger(job.run).returncode == 0
    assert files_of_newest(job.run) == files_of_newest(undisturbed.run)
