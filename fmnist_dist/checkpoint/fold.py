"""Folding: how each record moves the head. A pure function, the heart of every decision."""

from collections.abc import Iterable
from dataclasses import replace
from typing import assert_never

from fmnist_dist.checkpoint.head import Head, Retained
from fmnist_dist.checkpoint.record import (
    Attempt,
    Body,
    Checkpoint,
    Finish,
    Heal,
    Override,
    Quarantine,
    Retire,
    Rollback,
)

OWNERS_REMEMBERED = 256  # of some 20 bytes in each record; a walk would grow with the run


def fold(head: Head, *, index: int, body: Body) -> Head:
    """Return the head after the record `body` at `index`."""
    head = replace(head, index=index)
    match body:
        case Attempt():
            head = replace(
                head,
                attempt=head.attempt + 1,
                attempt_index=index,
                previous_attempt_index=head.attempt_index,
                owner=body.owner,
                superseded=_superseded(head, by=body.owner),
                same_bits=head.same_bits and body.same_bits,
                wanted=body.wanted,
                finished_step=None,
            )
        case Checkpoint():
            retained = (*head.checkpoints, Retained(step=body.step, index=index))
            head = replace(
                head,
                checkpoints=tuple(sorted(retained, key=lambda each: each.step)),
                committed=True,
                swept=max(head.swept, body.swept),
            )
        case Override():
            head = replace(head, overrides=(*head.overrides, index), wanted={})
        case Quarantine():
            head = _without(head, {body.checkpoint})
        case Retire():
            head = _without(head, set(body.checkpoints))
        case Finish():
            head = replace(head, finished_step=body.step)
        case Heal():
            pass
        case Rollback():
            head = _cut(head, body)
        case _:
            assert_never(body)
    return head


def _superseded(head: Head, *, by: str) -> tuple[str, ...]:
    if head.owner is None or head.owner == by:
        return head.superseded
    return (*head.superseded, head.owner)[-OWNERS_REMEMBERED:]


def _without(head: Head, indices: set[int]) -> Head:
    kept = tuple(each for each in head.checkpoints if each.index not in indices)
    cut_off = tuple(each for each in head.cut_off if each not in indices)
    return replace(head, checkpoints=kept, cut_off=cut_off)


def _cut(head: Head, body: Rollback) -> Head:
    kept = tuple(each for each in head.checkpoints if each.step <= body.step)
    gone = (each.index for each in head.checkpoints if each.step > body.step)
    return replace(
        head,
        checkpoints=kept,
        committed=head.committed and body.step > 0,  # at 0 the initial weights are to be chosen
        finished_step=None,
        cut=head.index,
        cut_off=(*head.cut_off, *gone),
        passed_over=_united((*head.passed_over, (body.step, body.until))),
    )


def _united(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the same steps as disjoint, rising ranges that do not touch."""
    united: list[tuple[int, int]] = []
    for first, until in sorted(each for each in ranges if each[0] < each[1]):
        if united and first <= united[-1][1]:
            united[-1] = (united[-1][0], max(until, united[-1][1]))
        else:
            united.append((first, until))
    return tuple(united)
