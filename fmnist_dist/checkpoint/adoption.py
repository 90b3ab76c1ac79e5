"""Who may go on from a local copy that was never committed: a pure decision.

A copy in a local tier is a save whose commit is still under way, or never came. Only a restart of
the launch that wrote it may make it the run's, and only while the log says nothing else:

1. The newest attempt wrote it, and belongs to the same owner as the one that begins now.
2. It was there before the attempt that begins now was appended. So was every decision below: they
   are made on the very head that the attempt follows (`RunWriter.begin`). What an attempt writes
   after that, because it was stopped and does not know yet, is no candidate; for the attempts
   after that one its number is too old (1).
3. Nothing as new is committed, and the line that it continues still stands: since the head that
   its writer knew nothing was cut, put in quarantine, or changed for steps that it has taken.

Another owner never asks: it may be the same command on the same disk, but nobody can say that its
user did not start it to get rid of just these steps.
"""

from collections.abc import Iterable

from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.record import (
    Attempt,
    Body,
    Checkpoint,
    Finish,
    Heal,
    Override,
    Quarantine,
    Record,
    Retire,
    Rollback,
)

ADOPTED = "local-tier"  # the reason of a checkpoint that is such a copy


def refusal(copy: Record, head: Head, since: Iterable[Body | None], *, owner: str) -> str | None:
    """Return why the next attempt must not go on from `copy`; None where it may.

    `copy` is the record that its writer would have appended, `head` the log's before the next
    attempt, which `owner` begins. `since` are the bodies from `copy.index` up to `head`, None for
    each that is damaged; they are asked for only where all else fits.
    """
    assert isinstance(copy.body, Checkpoint)
    step = copy.body.step
    if not copy.head.owner == head.owner == owner:
        return "another launch wrote it"
    if copy.attempt != head.attempt:
        return f"attempt {copy.attempt} wrote it, and attempt {head.attempt} has begun since"
    if head.newest_step is not None and head.newest_step >= step:
        return f"step {head.newest_step} is committed"
    for body in since:
        if (why := _changed_by(body, step)) is not None:
            return f"{why} since"
    return None


def _changed_by(body: Body | None, step: int) -> str | None:
    """Return what a later record does to the line that a copy of `step` continues, if anything."""
    match body:
        case None:
            return "a record that is damaged was appended"
        case Attempt():
            return "another attempt has begun"
        case Rollback():
            return "the run was rolled back"
        case Quarantine():
            return f"the checkpoint of step {body.step} was put in quarantine"
        case Override() if body.step < step:
            return f"settings were changed from step {body.step} on"
        case Override() | Checkpoint() | Retire() | Finish() | Heal():
            return None
