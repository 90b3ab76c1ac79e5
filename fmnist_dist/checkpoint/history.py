"""What happened in a run, told from its log: attempts, checkpoints, overrides, lost work."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.hint import Reached
from fmnist_dist.checkpoint.lineage import Commit, Start
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import Checkpoint, DamagedRecordError, Finish


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStory:
    """One attempt as far as anybody can know it; None is what nobody can."""

    attempt: int
    owner: str
    world_size: int
    started_at: str
    first_step: int | None
    last_step: int | None
    lost_steps: int | None
    ended: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    head: Head
    status: str  # new | running | finished
    attempts: tuple[AttemptStory, ...]
    retained: tuple[Commit, ...]
    config: dict[str, Any]  # the run's own, before overrides
    overrides: tuple[dict[str, Any], ...]
    damaged: tuple[int, ...]  # indices of records


@dataclass(slots=True)
class _Facts:
    """What the log tells of one attempt besides its own record."""

    first_step: int | None = None
    last_step: int | None = None
    ended: str | None = None


def read_history(log: RunLog, hints: Mapping[int, Reached]) -> History:
    """Return the story of a run; reads the whole log."""
    state = log.read()
    head = state.head
    starts = list(lineage.attempts(log, head))[::-1]
    facts, damaged = _facts(log, head)
    stories = _stories(starts, facts, hints)
    retained = []
    for each in head.checkpoints:
        try:
            retained.append(lineage.commit(log, each.index))
        except DamagedRecordError:
            damaged.add(each.index)
    status = "new" if not starts else "running" if head.finished_step is None else "finished"
    return History(
        head=head,
        status=status,
        attempts=tuple(stories),
        retained=tuple(retained),
        config=starts[-1].attempt.config if starts else {},
        overrides=tuple(
            {"step": each.step, "settings": each.settings} for each in lineage.overrides(log, head)
        ),
        damaged=tuple(sorted(damaged)),
    )


def _facts(log: RunLog, head: Head) -> tuple[dict[int, _Facts], set[int]]:
    facts: dict[int, _Facts] = {}
    damaged: set[int] = set()
    steps: dict[int, int] = {}  # of checkpoints, by the index of their record
    for index in range(head.index + 1):
        try:
            record = log.record(index)
        except DamagedRecordError:
            damaged.add(index)
            continue
        mine = facts.setdefault(record.attempt, _Facts())
        if isinstance(record.body, Checkpoint):
            steps[index] = record.body.step
            if mine.first_step is None:
                parent = record.body.parent
                mine.first_step = 0 if parent is None else steps.get(parent)
            mine.last_step = record.body.step
            mine.ended = "drained" if record.body.reason == "drain" else None
        elif isinstance(record.body, Finish):
            mine.ended = "finished"
    return facts, damaged


def _stories(
    starts: list[Start],
    facts: Mapping[int, _Facts],
    hints: Mapping[int, Reached],
) -> list[AttemptStory]:
    stories: list[AttemptStory] = []
    following: tuple[Start, int | None] | None = None
    for start in reversed(starts):
        known = facts.get(start.number, _Facts())
        hint = hints.get(start.number)
        first = hint.first_step if hint else known.first_step
        last = max(hint.last_step, known.last_step or 0) if hint else None
        if known.ended is not None:
            last = known.last_step if last is None else last
        ended = known.ended
        lost = 0 if ended is not None else None
        if following is not None and ended is None:
            after, resumed_at = following
            ended = "lost" if after.attempt.owner == start.attempt.owner else "superseded"
            if last is not None and resumed_at is not None:
                lost = max(0, last - resumed_at)
        stories.append(
            AttemptStory(
                attempt=start.number,
                owner=start.attempt.owner,
                world_size=start.attempt.world_size,
                started_at=start.started_at,
                first_step=first,
                last_step=last,
                lost_steps=lost,
                ended=ended,
            )
        )
        following = (start, first)
    return stories[::-1]
