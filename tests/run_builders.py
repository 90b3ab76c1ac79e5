"""Small attempts, snapshots and starts for the tests of the run log; nothing here imports torch."""

from collections.abc import Callable, Mapping

from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import Attempt
from fmnist_dist.checkpoint.restore import Restored
from fmnist_dist.checkpoint.storage import Storage
from fmnist_dist.checkpoint.sweep import Swept
from fmnist_dist.checkpoint.tier import LocalTier
from fmnist_dist.checkpoint.writer import RunWriter, Snapshot
from fmnist_dist.digest import EpochDigest
from fmnist_dist.filenames import METRICS, MODEL, OPTIMIZER


def attempt(owner: str = "owner") -> Attempt:
    return Attempt(
        owner=owner,
        world_size=2,
        fingerprint={"torch": "2"},
        config={"lr": 0.4},
        explicit={},
        wanted={},
        num_samples=60,
        same_bits=True,
    )


def files_of(step: int) -> dict[str, bytes]:
    """Return a checkpoint's files, different for every step."""
    return {
        MODEL: b"model %06d" % step,
        OPTIMIZER: b"optimizer %06d" % step,
        METRICS: b'{"step": %d}\n' % step,
    }


def snapshot(step: int, files: Mapping[str, bytes] | None = None) -> Snapshot:
    return Snapshot(
        step=step,
        epoch=step / 10,
        reason="steps",
        files=files_of(step) if files is None else files,
        ledger=(EpochDigest(epoch=0, count=step, digest=(step, -step)),),
        evaluated=False,
        metrics={"train_loss": 1 / step},
    )


def begin(storage: Storage, owner: str = "owner", *, tier: LocalTier | None = None) -> RunWriter:
    def make(_: Head) -> Attempt:
        return attempt(owner)

    return RunWriter.begin(storage, RunLog(storage), owner=owner, make=make, tier=tier)


def start(
    storage: Storage,
    owner: str = "owner",
    *,
    report: Callable[[str], None] = lambda _: None,
    tier: LocalTier | None = None,
) -> tuple[RunWriter, Restored | None, Swept]:
    """Do what every launch does, in its order: take over, adopt, choose, sweep."""
    writer = begin(storage, owner, tier=tier)
    writer.adopt()
    restored = writer.choose(report=report)
    return writer, restored, writer.sweep()


def step_of(restored: Restored | None) -> int:
    return restored.commit.checkpoint.step if restored else 0
