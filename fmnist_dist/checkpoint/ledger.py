"""The sample ledger: proof that every sample of an epoch was consumed exactly once.

Each step sums the identities (`keys.identity_table`) of the samples that were really gathered;
each checkpoint commits the sums of the epochs it touched. The proof compares them with the sum over
all samples. Nothing is recomputed from the plan, so a wrong order, a shifted shard or a gather that
took the wrong row shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fmnist_dist import digest
from fmnist_dist.checkpoint.lineage import Commit
from fmnist_dist.digest import EpochDigest


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochProof:
    """The verdict on one epoch of the committed line."""

    epoch: int
    consumed: int  # samples
    expected: int
    exactly_once: bool
    finished: bool  # an epoch that training has not left yet proves nothing


def prove(line: Sequence[Commit], *, num_samples: int, finished_epochs: int) -> list[EpochProof]:
    """Return the verdict on each epoch that the committed line touched, in order."""
    newest: dict[int, EpochDigest] = {}
    for commit in line:
        for entry in commit.checkpoint.ledger:
            newest[entry.epoch] = entry
    everything = digest.of_all(num_samples)
    return [
        EpochProof(
            epoch=epoch,
            consumed=newest[epoch].count if epoch in newest else 0,
            expected=num_samples,
            exactly_once=epoch in newest
            and newest[epoch].count == num_samples
            and newest[epoch].digest == everything,
            finished=epoch < finished_epochs,
        )
        for epoch in range(max([finished_epochs, *(epoch + 1 for epoch in newest)]))
    ]
