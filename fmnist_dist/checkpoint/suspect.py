"""Where a failed proof of the sample ledger points: the first steps that can have been wrong.

The proof itself knows no plan. Only when it has failed is the plan asked what each checkpoint's
sums *should* have been; the first one that differs names the steps since the checkpoint before it,
and the metric rows of these steps may name one.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmnist_dist import keys
from fmnist_dist.checkpoint.lineage import Commit
from fmnist_dist.checkpoint.record import Checkpoint
from fmnist_dist.checkpoint.restore import DamagedCheckpointError, read_file
from fmnist_dist.checkpoint.storage import Storage
from fmnist_dist.digest import EpochDigest
from fmnist_dist.filenames import METRICS
from fmnist_dist.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """The first wrong step is one of these, counted as in the metrics: from 1, both included."""

    first_step: int
    last_step: int
    why: str


def locate(
    storage: Storage,
    line: Sequence[Commit],
    *,
    epoch: int,
    plan: Plan,
    order: NDArray[np.int64],
) -> Suspect | None:
    """Return where epoch `epoch` went wrong first; None where every checkpoint's sums are right.

    `order` is the epoch's planned order of samples, int64 [num_samples].
    """
    sums = np.cumsum(keys.identity_table(len(order))[order], axis=0)  # int64 wraps, as the ledger
    right_until = 0  # steps done at the newest checkpoint before any fault
    for commit in line:
        checkpoint = commit.checkpoint
        planned = _planned_count(plan, checkpoint.step, epoch=epoch)
        if planned > 0 and not _is_right(checkpoint.ledger, epoch, planned, sums):
            return _narrowed(storage, checkpoint, plan, epoch, after=right_until)
        if planned == len(order):
            return None
        right_until = checkpoint.step
    return None


def _planned_count(plan: Plan, step: int, *, epoch: int) -> int:
    """Return how many samples of the epoch are consumed once `step` steps are done."""
    point = plan.point(step)
    if point.epoch == epoch:
        return point.position
    return plan.num_samples if point.epoch > epoch else 0


def _is_right(
    ledger: Iterable[EpochDigest], epoch: int, planned: int, sums: NDArray[np.int64]
) -> bool:
    digest = (int(sums[planned - 1, 0]), int(sums[planned - 1, 1]))
    return EpochDigest(epoch=epoch, count=planned, digest=digest) in ledger


def _narrowed(
    storage: Storage, checkpoint: Checkpoint, plan: Plan, epoch: int, *, after: int
) -> Suspect:
    steps = [s for s in range(after + 1, checkpoint.step + 1) if plan.at(s - 1).epoch == epoch]
    sizes = {step: plan.at(step - 1).size for step in steps}
    rows = list(_training_rows(storage, checkpoint, epoch=epoch))
    if rows:
        for step in steps:
            found = [row["samples"] for row in rows if row["step"] == step]
            if found != [sizes[step]]:
                why = f"it took {' + '.join(map(str, found)) or 'no'} samples, not {sizes[step]}"
                return Suspect(first_step=step, last_step=step, why=why)
    why = "it took other samples than planned" if rows else "its metric rows cannot be read"
    return Suspect(first_step=steps[0], last_step=steps[-1], why=why)


def _training_rows(
    storage: Storage, checkpoint: Checkpoint, *, epoch: int
) -> Iterator[dict[str, Any]]:
    if METRICS not in checkpoint.files:
        return
    try:
        text = read_file(storage, checkpoint, METRICS).decode()
    except DamagedCheckpointError:
        return
    for row in map(json.loads, text.splitlines()):
        if "samples" in row and row["epoch"] == epoch:
            yield row
