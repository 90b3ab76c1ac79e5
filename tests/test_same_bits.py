"""P1: final weights have the same bits, whatever was killed and however many workers there were.

On a disk, and on a real S3 server; hundreds of steps on a disk.
"""

import random
from pathlib import Path

import pytest
from jobs import Job, files_of_newest, ledger, show, wait_for_step
from run_files import Folder

# 4,000 images in batches of 256 are 16 steps an epoch; the last one is smaller.
SMALL = "train_small"
SHORT = ["--batch-size=256", "--save-every-steps=4", "--dropout=0.2"]
SHORT_END = "--max-steps=34"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    Job(run, [*SHORT, SHORT_END], module=SMALL).start().finish()
    return run


def assert_same(run: Folder, reference: Path) -> None:
    one, other = show(run), show(reference)
    assert one["status"] == other["status"] == "finished"
    assert one["step"] == other["step"]
    assert one["checkpoints"][-1]["model_sha256"] == other["checkpoints"][-1]["model_sha256"]
    # The averaged weights and the optimizer's memory too, not only what is evaluated now.
    assert files_of_newest(run) == files_of_newest(reference)
    assert one["metrics"] == other["metrics"]
    proof = ledger(run)
    assert proof.returncode == 0, proof.stdout + proof.stderr


def kill_and_restart(
    run: Folder, flags: list[str], kills: list[tuple[str, int]], *, module: str, logs: Path
) -> tuple[list[int], list[str]]:
    """Kill `rank 0`, `rank 1` or `all` once the given step is done; return dead pids and output."""
    job = Job(run, flags, module=module, logs=logs).start()
    dead: list[int] = []
    texts: list[str] = []
    for attempt, (what, step) in enumerate(kills):
        # A step that is repeated counts only in the attempt that has begun since the last kill.
        wait_for_step(job, step, attempt=attempt)
        if what == "all":
            dead += job.kill_all()
            texts.append(job.text())
            job = Job(run, flags, module=module, logs=logs).start()
        else:
            dead.append(job.kill_worker(int(what.removeprefix("rank "))))
    texts.append(job.finish())
    return dead, texts


def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(
    undisturbed: Path, root: Folder, tmp_path: Path
) -> None:
    kills = [("rank 1", 6), ("all", 15), ("rank 0", 23)]
    dead, texts = kill_and_restart(root, [*SHORT, SHORT_END], kills, module=SMALL, logs=tmp_path)
    assert len(dead) == 6  # two keepers, and an agent's two with their trainers
    story = show(root)
    assert len(story["attempts"]) == 4
    # Who lost a keeper had survivors that saved; who lost its agent had none.
    lost = [each["lost_steps"] for each in story["attempts"]]
    assert [lost[0], lost[2], lost[3]] == [0, 0, 0]
    assert 0 <= lost[1] <= 4
    assert "resumed" in texts[-1]
    assert_same(root, undisturbed)


@pytest.mark.slow
def test_a_run_that_shrinks_and_grows_ends_with_the_same_bits(
    undisturbed: Path, root: Folder, tmp_path: Path
) -> None:
    for workers, max_steps in ((1, 9), (4, 22), (3, 34)):
        flags = [*SHORT, f"--max-steps={max_steps}"]
        Job(root, flags, workers=workers, module=SMALL, logs=tmp_path).start().finish()
        assert show(root)["step"] == max_steps
    assert [each["world_size"] for each in show(root)["attempts"]] == [1, 4, 3]
    assert_same(root, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("fmnist_dist.train", ["--batch-size=512"]),
        # Without bf16 instructions a CPU does 200 images a second: epochs of 4,000.
        (SMALL, ["--batch-size=64", "--precision=bf16"]),
    ],
    ids=["fp32", "bf16"],
)
def test_300_steps_with_10_random_kills_or_other_world_sizes(
    module: str, flags: list[str], tmp_path: Path
) -> None:
    flags = [*flags, "--save-every-steps=20", "--dropout=0.2"]
    to_the_end = [*flags, "--max-steps=300"]
    reference, killed, resized = (tmp_path / name for name in ("reference", "killed", "resized"))
    Job(reference, to_the_end, module=module).start().finish()

    seed = random.randrange(2**32)
    print(f"kills drawn with seed {seed}")
    draw = random.Random(seed)
    steps = sorted(draw.sample(range(5, 290), 10))
    kills = [(draw.choice(["rank 0", "rank 1", "all"]), step) for step in steps]
    print(kills)
    dead, _ = kill_and_restart(killed, to_the_end, kills, module=module, logs=tmp_path)
    assert len(dead) >= 10
    assert len(show(killed)["attempts"]) == 11
    assert_same(killed, reference)

    for workers, max_steps in ((1, 75), (3, 150), (4, 225), (2, 300)):
        job = Job(resized, [*flags, f"--max-steps={max_steps}"], workers=workers, module=module)
        job.start().finish()
    assert_same(resized, reference)
