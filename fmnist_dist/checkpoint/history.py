"""What happened in a run, told from its log: attempts, heals, checkpoints, overrides, lost work."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fmnist_dist.checkpoint.adoption import ADOPTED
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.hint import Reached
from fmnist_dist.checkpoint.lineage import Commit
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import (
    Attempt,
    Checkpoint,
    DamagedRecordError,
    Finish,
    Heal,
    Override,
    Record,
    Rollback,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStory:
    """One attempt as far as anybody can know it; None is what nobody can."""

    attempt: int
    owner: str
    world_size: int
    started_at: str
    first_step: int | None
    last_step: int | None  # that is known to be done; without a hint it may have got further
    lost_steps: int | None  # done, not durable, and so done again by the next attempt
    ended: str | None  # finished | drained | lost | superseded (by another launch)


@dataclass(frozen=True, slots=True, kw_only=True)
class HealStory:
    """One loss of a worker that the attempt went on after; see `Heal`."""

    attempt: int
    step: int
    rank: int
    reason: str
    seconds: float
    lost_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    head: Head
    status: str  # new | running | finished
    attempts: tuple[AttemptStory, ...]
    heals: tuple[HealStory, ...]
    rollbacks: tuple[Rollback, ...]
    retained: tuple[Commit, ...]
    config: dict[str, Any]  # the run's own, before overrides
    overrides: tuple[dict[str, Any], ...]
    num_samples: int | None  # of the training set; None before the first attempt
    finish: Finish | None  # None unless the run is finished
    damaged: tuple[int, ...]  # indices of records

    @property
    def newest(self) -> Commit | None:
        """The newest retained checkpoint; None too where its record is damaged."""
        found = self.retained[-1] if self.retained else None
        return found if found and found.checkpoint.step == self.head.newest_step else None

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric: of the run's end, else of the newest checkpoint."""
        if self.finish is not None:
            return self.finish.metrics
        return self.newest.checkpoint.metrics if self.newest else {}


@dataclass(slots=True)
class _Facts:
    """What the log tells of one attempt besides its own record."""

    first_step: int | None = None
    last_step: int | None = None  # newest checkpoint of its own
    ended: str | None = None
    began: bool = False  # it has saved or rolled back: its first step is settled


def read_history(log: RunLog, hints: Mapping[int, Reached]) -> History:
    """Return the story of a run; reads each record of the log once.

    Damaged records are left out and named. Raises `DataDamagedError` where none is intact.
    """
    head = log.read().head
    records: dict[int, Record] = {}
    damaged: list[int] = []
    for index in range(head.index + 1):
        try:
            records[index] = log.record(index)
        except DamagedRecordError:
            damaged.append(index)
    starts = [(each, each.body) for each in records.values() if isinstance(each.body, Attempt)]
    finishes = [each.body for each in records.values() if isinstance(each.body, Finish)]
    finished = head.finished_step is not None
    return History(
        head=head,
        status="new" if head.attempt == 0 else "finished" if finished else "running",
        attempts=tuple(_stories(starts, _facts(records.values()), hints)),
        heals=tuple(
            HealStory(attempt=each.attempt, **dataclasses.asdict(each.body))
            for each in records.values()
            if isinstance(each.body, Heal)
        ),
        rollbacks=tuple(each.body for each in records.values() if isinstance(each.body, Rollback)),
        retained=tuple(
            Commit(index=i, attempt=r.attempt, written_at=r.written_at, checkpoint=r.body)
            for i in (each.index for each in head.checkpoints)
            if (r := records.get(i)) is not None and isinstance(r.body, Checkpoint)
        ),
        config=starts[-1][1].config if starts else {},
        overrides=tuple(
            {"step": r.body.step, "settings": r.body.settings}
            for i in head.overrides
            if (r := records.get(i)) is not None and isinstance(r.body, Override)
        ),
        num_samples=starts[-1][1].num_samples if starts else None,
        finish=finishes[-1] if finished and finishes else None,
        damaged=tuple(damaged),
    )


def _facts(records: Iterable[Record]) -> dict[int, _Facts]:
    facts: dict[int, _Facts] = {}
    for record in records:
        mine = facts.setdefault(record.attempt, _Facts())
        if isinstance(record.body, Checkpoint) and record.body.reason == ADOPTED:
            mine.first_step = record.body.step  # an earlier attempt had got there
        elif isinstance(record.body, Checkpoint):
            mine.last_step = record.body.step
            mine.ended = "drained" if record.body.reason == "drain" else None
            mine.began = True
        elif isinstance(record.body, Rollback):
            # What is cut off was durable: no interruption has lost it, and nobody does it again.
            mine.last_step = None
            mine.ended = None
            mine.began = True
        elif not mine.began:
            # Until its first save it goes on from what is newest, less what it puts in quarantine.
            mine.first_step = record.head.newest_step or 0
        if isinstance(record.body, Finish):
            mine.ended = "finished"
    return facts


def _stories(
    starts: list[tuple[Record, Attempt]],
    facts: Mapping[int, _Facts],
    hints: Mapping[int, Reached],
) -> list[AttemptStory]:
    stories: list[AttemptStory] = []
    following: AttemptStory | None = None
    passed_over: tuple[tuple[int, int], ...] = ()  # as the following attempt found it
    for record, attempt in reversed(starts):
        known, hint = facts[record.attempt], hints.get(record.attempt)
        last = max(hint.last_step, known.last_step or 0) if hint else known.last_step
        is_last_certain = hint is not None or known.ended is not None
        ended, lost = known.ended, 0 if known.ended else None
        if following is not None:
            same = following.owner == attempt.owner
            ended = ended or ("lost" if same else "superseded")
            if is_last_certain and last is not None and following.first_step is not None:
                lost = _steps(following.first_step, last)
                lost -= sum(
                    _steps(max(following.first_step, first), min(last, until))
                    for first, until in passed_over
                )
        following = AttemptStory(
            attempt=record.attempt,
            owner=attempt.owner,
            world_size=attempt.world_size,
            started_at=record.written_at,
            first_step=known.first_step,
            last_step=last,
            lost_steps=lost,
            ended=ended,
        )
        passed_over = record.head.passed_over
        stories.append(following)
    return stories[::-1]


def _steps(first: int, until: int) -> int:
    return max(0, until - first)
