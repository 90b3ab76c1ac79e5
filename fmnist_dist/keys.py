"""Every random choice of the job, as a pure function of integers: no generator has a state to save.

Keys come from SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, "Fast splittable pseudorandom number
generators"), written out here in NumPy's 64-bit arithmetic. Its bits are ours: a new release of
torch or NumPy may change what their generators draw (NEP 19), and a run that resumes after such an
upgrade must still see the rest of the epoch in the order in which it began it.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_GAMMA = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits: SplitMix64's increment
_MASK = (1 << 64) - 1


class Stream(IntEnum):
    """What a key is for: two streams never share one. The numbers belong to a run's identity."""

    ORDER = 1
    AUGMENT = 2
    DROPOUT = 3
    IDENTITY = 4
    INIT = 5


def key(stream: Stream, *parts: int) -> int:
    """Return one key in [0, 2**64) for a stream and non-negative integers below 2**64."""
    # Mixed before the first part meets it: streams and parts are small numbers, and (1, 0) would
    # be (2, 1) otherwise.
    value = _mix_int(int(stream))
    for part in parts:
        value = _mix_int(((value + _GAMMA) & _MASK) ^ part)
    return _mix_int((value + _GAMMA) & _MASK)


def keys(stream: Stream, *parts: int, ids: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Return one key for each id, uint64, in the shape of `ids`: independent of batch and rank."""
    values = ids.astype(np.uint64) * np.uint64(_GAMMA) + np.uint64(key(stream, *parts))
    return _mix_array(values)


def identity_table(num_samples: int) -> NDArray[np.int64]:
    """Return two 64-bit hashes of each sample's number, int64 [num_samples, 2].

    Summed (modulo 2**64) over the samples that were gathered they make the ledger's digest, a
    multiset hash (Clarke et al., ASIACRYPT 2003, MSet-Add-Hash): it tells whether each sample was
    there exactly once, whatever the order, and can be added up across shards, ranks and steps.
    """
    ids = np.arange(num_samples)
    lanes = [keys(Stream.IDENTITY, lane, ids=ids) for lane in (0, 1)]
    return np.stack(lanes, axis=1).view(np.int64)


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
