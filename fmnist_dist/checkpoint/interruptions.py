"""What a run's log tells of interruptions that lost work, and of the time that it was training.

An attempt ends well with a `finish` record, or with a checkpoint that was made because it ended: it
was asked to stop, or its survivors saved. Any other end has lost what was done since the newest
checkpoint. A heal is no end: the attempt goes on, and has lost next to nothing.

An attempt was training from its own record to its last one. What came after that is not known and
not counted: at most one interval, which is short beside the time between interruptions wherever it
was chosen well. The time between two attempts, when nothing ran, is not counted either. Times are
those of the records, from the clocks of those who wrote them; where they go backwards they count 0.
"""

from datetime import datetime
from itertools import islice

from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import Checkpoint, DamagedRecordError, Finish, Record
from fmnist_dist.interval import Evidence, Interval

# The newest only: a run may have moved to other machines, reading costs a request for each record,
# and sixteen tell the mean to a quarter, which moves the interval by an eighth.
_ATTEMPTS = 16
_LOOK_BACK = 4  # records after an attempt's last checkpoint: its retirement, a heal or two
_FAREWELLS = {"drain", "survivor", "finish"}


def read_evidence(log: RunLog, head: Head) -> Evidence:
    """Return what the newest attempts tell, the current one's time so far with them.

    Reads a few records of each. Raises `DataDamagedError` where no attempt is intact.
    """
    interruptions, seconds, last = 0, 0.0, head.index
    for start in islice(lineage.attempts(log, head), _ATTEMPTS):
        newest = _newest_records(log, first=start.index, last=last)
        if newest:
            seconds += max(0.0, _between(start.started_at, newest[0].written_at))
        if last != head.index:
            interruptions += not _ended_well(newest)
        last = start.index - 1
    return Evidence(interruptions=interruptions, seconds=seconds)


def last_interval(log: RunLog, head: Head) -> Interval | None:
    """Return the interval of the newest retained checkpoint that was chosen from measured saves."""
    for retained in reversed(head.checkpoints):
        try:
            found = lineage.commit(log, retained.index).checkpoint.interval
        except DamagedRecordError:
            continue
        if found is not None and found.cost is not None:
            return found
    return None


def _newest_records(log: RunLog, *, first: int, last: int) -> list[Record]:
    """Return an attempt's newest intact records, newest first, down to its last checkpoint."""
    found: list[Record] = []
    for index in range(last, max(first, last - _LOOK_BACK) - 1, -1):
        try:
            found.append(log.record(index))
        except DamagedRecordError:
            continue
        if isinstance(found[-1].body, Checkpoint):
            break
    return found


def _ended_well(newest: list[Record]) -> bool:
    return any(
        isinstance(each.body, Finish)
        or (isinstance(each.body, Checkpoint) and each.body.reason in _FAREWELLS)
        for each in newest
    )


def _between(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()
