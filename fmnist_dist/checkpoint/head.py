"""The head of the run log: what all records so far amount to, small whatever the log's age.

Every record carries the head as it stands after it, so a reader needs the newest record only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """A checkpoint on the line that may be chosen: its step and the index of its record."""

    step: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    index: int = -1  # of the newest record; -1: the log is empty
    attempt: int = 0  # the current attempt's number, from 1
    attempt_index: int | None = None  # of its record
    previous_attempt_index: int | None = None
    owner: str | None = None
    superseded: tuple[str, ...] = ()  # owners before it, the last ones, newest last
    same_bits: bool = True
    checkpoints: tuple[Retained, ...] = ()  # rising steps
    committed: bool = False  # some checkpoint was ever committed, since the newest cut at step 0
    overrides: tuple[int, ...] = ()  # indices of their records
    wanted: dict[str, Any] = field(default_factory=dict)  # asked for, no override stands yet
    swept: int = 0  # orphans of attempts up to this one are gone
    finished_step: int | None = None
    cut: int | None = None  # index of the newest rollback's record
    cut_off: tuple[int, ...] = ()  # checkpoints that rollbacks took off the line, not yet retired
    passed_over: tuple[tuple[int, int], ...] = ()  # steps [from, until), disjoint and rising

    @property
    def newest_step(self) -> int | None:
        return self.checkpoints[-1].step if self.checkpoints else None

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "Head":
        """Return the head that a record carries; an older one says less."""
        values = {"cut_off": (), "passed_over": (), "superseded": (), **fields}
        values["superseded"] = tuple(values["superseded"])
        values["checkpoints"] = tuple(Retained(**each) for each in values["checkpoints"])
        values["overrides"] = tuple(values["overrides"])
        values["cut_off"] = tuple(values["cut_off"])
        values["passed_over"] = tuple((first, until) for first, until in values["passed_over"])
        return Head(**values)
