"""The order in which an epoch takes its samples: a pure function, the same for every world size."""

import numpy as np
from numpy.typing import NDArray

from fmnist_dist import keys


def epoch_order(*, seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """Return all sample ids, int64 [num_samples], each once, in the order of this epoch.

    Sorting by key, and not a library's shuffle: its bits then follow from arithmetic alone. The
    sort is stable, so even two equal keys (about 1e-10 an epoch) leave nothing open.
    """
    sort_keys = keys.keys(keys.Stream.ORDER, seed, epoch, ids=np.arange(num_samples))
    return np.argsort(sort_keys, kind="stable").astype(np.int64)
