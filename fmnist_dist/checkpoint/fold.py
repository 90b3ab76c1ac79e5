"""Folding: how each record moves the head. A pure function, the heart of every decision."""

from dataclasses import replace
from typing import assert_never

from fmnist_dist.checkpoint.head import Head, Retained
from fmnist_dist.checkpoint.record import (
    Attempt,
    Body,
    Checkpoint,
    Finish,
    Override,
    Quarantine,
    Retire,
)


def fold(head: Head, *, index: int, body: Body) -> Head:
    """Return the head after the record `body` at `index`."""
    head = replace(head, index=index)
    match body:
        case Attempt():
            return replace(
                head,
                attempt=head.attempt + 1,
                attempt_index=index,
                previous_attempt_index=head.attempt_index,
                owner=body.owner,
                same_bits=head.same_bits and body.same_bits,
                wanted=body.wanted,
                finished_step=None,
            )
        case Checkpoint():
            retained = (*head.checkpoints, Retained(step=body.step, index=index))
            return replace(
                head,
                checkpoints=tuple(sorted(retained, key=lambda each: each.step)),
                committed=True,
                swept=max(head.swept, body.swept),
            )
        case Override():
            return replace(head, overrides=(*head.overrides, index), wanted={})
        case Quarantine():
            return _without(head, {body.checkpoint})
        case Retire():
            return _without(head, set(body.checkpoints))
        case Finish():
            return replace(head, finished_step=body.step)
        case _:
            assert_never(body)


def _without(head: Head, indices: set[int]) -> Head:
    kept = tuple(each for each in head.checkpoints if each.index not in indices)
    return replace(head, checkpoints=kept)
