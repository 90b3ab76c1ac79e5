"""Walks through the run log: attempts backwards, and checkpoints along the line that led here."""

from collections.abc import Iterator
from dataclasses import dataclass

from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import (
    Attempt,
    Checkpoint,
    DamagedRecordError,
    Override,
    Record,
    path_of,
)
from fmnist_dist.errors import DataDamagedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A checkpoint with the index of its record and the attempt that wrote it."""

    index: int
    attempt: int
    written_at: str
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """An attempt with its number and time."""

    index: int
    number: int
    started_at: str
    attempt: Attempt


def attempts(log: RunLog, head: Head) -> Iterator[Start]:
    """Yield the attempts from the newest to the first, passing over damaged records.

    Raises `DataDamagedError` where none is intact: the settings of the run are unknown, and a run
    without attempts would look like a new one.
    """
    index = head.attempt_index
    lost = index is not None
    while index is not None:
        record = _intact(log, index)
        if record is None:
            index = _attempt_before(log, index)
            continue
        assert isinstance(record.body, Attempt)
        lost = False
        yield Start(
            index=index,
            number=record.attempt,
            started_at=record.written_at,
            attempt=record.body,
        )
        index = record.head.previous_attempt_index
    if lost:
        raise DataDamagedError(
            f"no attempt's record is intact, and with them the run's settings are lost: restore "
            f"{path_of(head.attempt_index or 0)} from a copy, or start a new run with another "
            "--run-dir"
        )


def commit(log: RunLog, index: int) -> Commit:
    """Return the checkpoint whose record stands at `index`. Raises `DamagedRecordError`."""
    record = log.record(index)
    if not isinstance(record.body, Checkpoint):
        raise DamagedRecordError(f"record {index} is no checkpoint")
    return Commit(
        index=index,
        attempt=record.attempt,
        written_at=record.written_at,
        checkpoint=record.body,
    )


def line(log: RunLog, head: Head) -> list[Commit]:
    """Return the checkpoints that led to the newest one, oldest first, retired ones included.

    Raises `DataDamagedError` where a record on the line is damaged: what lies behind it is unknown.
    """
    commits: list[Commit] = []
    index = head.checkpoints[-1].index if head.checkpoints else None
    while index is not None:
        try:
            commits.append(commit(log, index))
        except DamagedRecordError as error:
            raise DataDamagedError(f"the line of checkpoints is broken at {error}") from error
        index = commits[-1].checkpoint.parent
    return commits[::-1]


def overrides(log: RunLog, head: Head) -> list[Override]:
    """Return the run's overrides in the order in which they were made.

    Raises `DataDamagedError` when one is damaged: the settings of the steps after it are unknown.
    """
    found: list[Override] = []
    for index in head.overrides:
        try:
            body = log.record(index).body
        except DamagedRecordError as error:
            raise DataDamagedError(
                f"a change of settings is damaged: {error}; restore that file from a copy, or "
                "start a new run with another --run-dir"
            ) from error
        assert isinstance(body, Override)
        found.append(body)
    return found


def _intact(log: RunLog, index: int) -> Record | None:
    try:
        return log.record(index)
    except DamagedRecordError:
        return None


def _attempt_before(log: RunLog, index: int) -> int | None:
    """Return the attempt that was current before the damaged record at `index`."""
    for before in range(index - 1, -1, -1):
        record = _intact(log, before)
        if record is not None:
            return record.head.attempt_index
    return None
