"""Whoever is left when a rank or a step fails: its state is whole, and is saved once.

The first on a disk, and on a real S3 server.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jobs import Job, reached, show, wait_for, wait_for_step
from run_files import Folder, assert_sound, checkpoints, log_of
from running import running
from step_child import small_dataset

from fmnist_dist.data.feed import TrainingFeed
from fmnist_dist.data.split import Batch
from fmnist_dist.distributed import reduce, world
from fmnist_dist.distributed.reduce import GradientTree, Layout
from fmnist_dist.distributed.step import ShardedStep, Wishes
from fmnist_dist.distributed.world import World
from fmnist_dist.models.cnn import Cnn
from fmnist_dist.plan import Plan, Settings, Step
from fmnist_dist.state import TrainState

SHARDS = 8
NUM_SAMPLES = 61
LAST_STEP = 55  # before the first epoch's end: no checkpoint is due on the way
RESTART_SECONDS = 25


def test_survivors_of_a_lost_keeper_save_its_last_step_once(root: Folder, tmp_path: Path) -> None:
    flags = ["--batch-size=64", f"--max-steps={LAST_STEP}", "--eval-every-epochs=99"]
    job = Job(root, flags, max_restarts=3, module="train_small", logs=tmp_path)
    with running(job):
        wait_for_step(job, 5)
        job.kill_keeper(1)
        began = time.monotonic()
        wait_for(lambda: reached(job.run)[0] == 2, "the second attempt")
        assert time.monotonic() - began < RESTART_SECONDS
        text = job.finish()
    assert text.count(" resumed ") == 1
    survived, final = (each.step for each in checkpoints(job.run))
    assert 5 <= survived < final == LAST_STEP
    assert [each["lost_steps"] for each in show(job.run)["attempts"]] == [0, 0]
    retained = log_of(job.run).read().head.checkpoints
    assert len(list((job.run / "checkpoints").iterdir())) == len(retained)
    assert_sound(job.run)


@pytest.fixture(scope="module")
def alone() -> Iterator[World]:
    with world.alone(torch.device("cpu")) as joined:
        yield joined


class Training:
    """A small training with BatchNorm and dropout."""

    def __init__(self, joined: World) -> None:
        torch.manual_seed(1)
        settings = Settings(
            epochs=5,
            batch_size=24,
            lr=0.1,
            schedule="cosine",
            weight_decay=1e-3,
            label_smoothing=0.1,
            ema=0.9,
            augment="crop-flip",
        )
        model = Cnn(image_shape=(1, 28, 28), num_classes=10, dropout=0.3, widths=(4, 8))
        model.to(memory_format=torch.channels_last)
        self.state = TrainState(model, optimizer="sgd", settings=settings)
        self.plan = Plan(settings, num_samples=NUM_SAMPLES)
        self.feed = TrainingFeed(small_dataset(NUM_SAMPLES), seed=5, device=torch.device("cpu"))
        self._world = joined
        self.renew()

    def renew(self) -> None:
        self.step = ShardedStep(
            self.state, self._world, logical_shards=SHARDS, precision="fp32", seed=5
        )

    def advance(self, *, fails_at: int | None = None) -> None:
        """Do the next step; its gather raises OSError at one of its shards."""
        calls = 0

        def gather(step: Step, start: int, stop_at: int) -> Batch:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise OSError("as a disk that is gone")
            return self.feed(step, start, stop_at)

        step = self.plan.at(self.state.step)
        self.state.advance(step, self.step(step, gather, wishes=Wishes()).result)


@pytest.mark.parametrize("fails_at", [2, SHARDS])
def test_a_step_that_fails_half_way_leaves_no_trace(alone: World, fails_at: int) -> None:
    digests = []
    undisturbed = Training(alone)
    for _ in range(4):
        undisturbed.advance()
        digests.append(undisturbed.state.digest())
    undisturbed.step.close()
    assert len(set(digests)) == 4

    disturbed = Training(alone)
    disturbed.advance()
    with pytest.raises(OSError, match="a disk that is gone"):
        disturbed.advance(fails_at=fails_at)
    assert disturbed.state.digest() == digests[0]
    disturbed.step.close()
    disturbed.renew()
    for digest in digests[1:]:
        disturbed.advance()
        assert disturbed.state.digest() == digest
    disturbed.step.close()


def test_a_bucket_whose_collective_failed_is_not_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: torch.futures.Future[object] = torch.futures.Future()
    failed.set_exception(RuntimeError("Connection closed by peer"))  # type: ignore[arg-type]
    work = SimpleNamespace(get_future=lambda: failed)
    monkeypatch.setattr(reduce, "_all_gather", lambda *_, **__: work)
    weight = torch.nn.Parameter(torch.ones(3))
    tree = GradientTree([weight], Layout(world_size=2, logical_shards=2))
    tree.begin([0])
    tree.ready()
    bucket = SimpleNamespace(parameters=lambda: [weight], buffer=lambda: torch.ones(3))
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        tree.hook(None, bucket).wait()  # type: ignore[arg-type]
