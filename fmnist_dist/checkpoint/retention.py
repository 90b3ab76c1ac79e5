"""Which checkpoints may go: a pure decision."""

from collections.abc import Sequence

from fmnist_dist.checkpoint.head import Retained


def to_retire(
    checkpoints: Sequence[Retained], *, keep_last: int, keep_every: int | None
) -> list[Retained]:
    """Return what is neither among the last `keep_last` nor the first of its `keep_every` steps.

    `checkpoints` are the verified ones, by rising step. With `keep_every` N the first checkpoint
    in each window [k N, (k + 1) N), k >= 1, stays for good, whether or not one fell on k N exactly.
    """
    kept = {each.index for each in checkpoints[-keep_last:]}
    if keep_every is not None:
        first: dict[int, Retained] = {}
        for each in checkpoints:
            first.setdefault(each.step // keep_every, each)
        kept |= {each.index for window, each in first.items() if window > 0}
    return [each for each in checkpoints if each.index not in kept]
