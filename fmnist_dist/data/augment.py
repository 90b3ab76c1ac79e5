"""What augmentation does to each sample in an epoch: a pure function of (seed, epoch, sample id).

Drawn for the whole epoch at once and looked up by sample id, so that rank, batch, order of calls
and restarts change nothing. Which tensor operations carry it out is `split.py`'s business.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmnist_dist import keys
from fmnist_dist.errors import UsageError

_FIELD_BITS = 24  # of a key for each offset: at 5 offsets the bias is below 1e-6
_FIELD_MASK = (1 << _FIELD_BITS) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The ranges to draw from."""

    padding: int  # pixels of black at each side, before a crop back to the old size
    flip: bool  # left to right, with probability 1/2


# By the names of --augment; None leaves the images alone.
POLICIES: dict[str, Policy | None] = {
    "none": None,
    "flip": Policy(padding=0, flip=True),
    "crop-flip": Policy(padding=2, flip=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What was drawn for each sample, by sample id."""

    padding: int
    dy: NDArray[np.int64]  # [N], first row of the crop in the padded image, 0 … 2 * padding
    dx: NDArray[np.int64]  # [N], first column
    flip: NDArray[np.bool_]  # [N]


def policy_of(name: str) -> Policy | None:
    """Look up what `--augment` names; None for `none`, `UsageError` for an unknown name."""
    if name not in POLICIES:
        raise UsageError(f"--augment: found {name!r}, expected one of {', '.join(POLICIES)}")
    return POLICIES[name]


def padding_of(name: str) -> int:
    """Return the padding in pixels that `Split` needs for `--augment name`."""
    policy = policy_of(name)
    return 0 if policy is None else policy.padding


def draw(name: str, *, seed: int, epoch: int, num_samples: int) -> Choices | None:
    """Draw an epoch of `--augment name` for samples 0 … num_samples - 1; None if it is `none`."""
    policy = policy_of(name)
    if policy is None:
        return None
    bits = keys.keys(keys.Stream.AUGMENT, seed, epoch, ids=np.arange(num_samples))
    num_offsets = 2 * policy.padding + 1
    return Choices(
        padding=policy.padding,
        dy=_below(num_offsets, bits),
        dx=_below(num_offsets, bits >> np.uint64(_FIELD_BITS)),
        flip=(bits >> np.uint64(63)).astype(np.bool_) & policy.flip,
    )


def _below(limit: int, bits: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Scale the lowest bits to 0 … limit - 1."""
    scaled = (bits & np.uint64(_FIELD_MASK)) * np.uint64(limit) >> np.uint64(_FIELD_BITS)
    return scaled.astype(np.int64)
