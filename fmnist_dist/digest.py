"""What was gathered of an epoch, as a sum that has no order: the sample ledger's entries."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fmnist_dist import keys

_WRAP = 1 << 64

Lanes = tuple[int, int]  # sums of `keys.identity_table` rows, each modulo 2**64, as signed integers


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochDigest:
    """The samples of one epoch that were gathered so far."""

    epoch: int
    count: int
    digest: Lanes


def add(
    ledger: Sequence[EpochDigest], *, epoch: int, count: int, digest: Lanes
) -> tuple[EpochDigest, ...]:
    """Return the ledger with one step's samples added to its epoch: the last one, or a new one."""
    if ledger and ledger[-1].epoch == epoch:
        last = ledger[-1]
        summed = (_signed(last.digest[0] + digest[0]), _signed(last.digest[1] + digest[1]))
        return (*ledger[:-1], replace(last, count=last.count + count, digest=summed))
    return (*ledger, EpochDigest(epoch=epoch, count=count, digest=digest))


def of_all(num_samples: int) -> Lanes:
    """Return the digest of every sample exactly once."""
    sums = keys.identity_table(num_samples).sum(axis=0)  # int64 wraps, as it does in every step
    return int(sums[0]), int(sums[1])


def _signed(value: int) -> int:
    value %= _WRAP
    return value - _WRAP if value >= _WRAP // 2 else value
