"""The run log: an append-only sequence of records, the truth of a run.

Protocol, as table formats on object stores do it:

1. Every record is created with put-if-absent at exactly head + 1 and never changed or deleted.
2. Whoever finds that index taken reads what stands there. Its own nonce: the answer of its own
   put was lost, and the append has succeeded. Anything else is folded into the head, and the
   writer *decides again* on the new head: it may have been fenced, or have nothing to add.
3. A damaged record occupies its index for good: nobody appends there, nobody repairs it.
4. The newest record is found by galloping probes, not by listing: the cost does not grow with the
   run's age. A removed record is a hole; probes look past holes shorter than `_HOLE`.

There is deliberately no lock, no lease and no clock.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from fmnist_dist.checkpoint.fold import fold
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.record import (
    Body,
    DamagedRecordError,
    Record,
    decode,
    encode,
    path_of,
)
from fmnist_dist.checkpoint.storage import AlreadyExistsError, MissingError, Storage, StorageError
from fmnist_dist.errors import DataDamagedError

_HOLE = 3  # an index is beyond the end when this many in a row are missing
_APPEND_TRIES = 1000  # lost races in a row before an append is given up


@dataclass(frozen=True, slots=True, kw_only=True)
class LogState:
    """The head and the indices of damaged records that were met while looking for it."""

    head: Head
    damaged: tuple[int, ...] = ()


class RunLog:
    """Reads and appends records of one run. Holds no state of its own: the storage is the truth."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def record(self, index: int) -> Record:
        """Return one record. Raises `DamagedRecordError` (also for a removed one)."""
        try:
            return decode(self._storage.read(path_of(index)), index=index)
        except MissingError as error:
            raise DamagedRecordError(f"{path_of(index)}: is missing") from error

    def is_begun(self) -> bool:
        """Whether there is a record, looking past a short hole."""
        return self._present(0)

    def is_intact(self, index: int) -> bool:
        try:
            self.record(index)
        except DamagedRecordError:
            return False
        return True

    def read(self) -> LogState:
        """Return the head as the newest intact record tells it.

        Raises `DataDamagedError` when there are records and none is intact.
        """
        newest = self._newest_index()
        damaged: list[int] = []
        for index in range(newest, -1, -1):
            try:
                head = self.record(index).head
            except DamagedRecordError:
                damaged.append(index)
                continue
            return LogState(head=replace(head, index=newest), damaged=tuple(sorted(damaged)))
        if damaged:
            raise DataDamagedError(
                f"all {len(damaged)} records of the run log are damaged: restore the run folder "
                "from a copy, or start a new run with another --run-dir"
            )
        return LogState(head=Head())

    def append(self, head: Head, *, decide: Callable[[Head], Body | None]) -> Head:
        """Append what `decide` makes of the head, deciding again whenever the log has moved.

        `decide` returns None when there is nothing (more) to add, or raises, e.g. `FencedError`.
        Returns the head after the append. Raises `StorageError`; the record may then stand or not.
        """
        for _ in range(_APPEND_TRIES):
            body = decide(head)
            if body is None:
                return head
            index = head.index + 1
            after = fold(head, index=index, body=body)
            record = Record(index=index, attempt=after.attempt, body=body, head=after)
            try:
                self._storage.create(path_of(index), encode(record))
            except AlreadyExistsError:
                if self._is(record):
                    return after
                head = self._advance(head)
            else:
                return after
        raise StorageError(f"lost {_APPEND_TRIES} races for an index of the run log in a row")

    def advance(self, head: Head) -> Head:
        """Fold every record after `head`: for a writer that wants to know before it appends."""
        while self._present(head.index + 1):
            head = self._advance(head)
        return head

    def _is(self, record: Record) -> bool:
        try:
            return self.record(record.index).nonce == record.nonce
        except DamagedRecordError:
            return False

    def _advance(self, head: Head) -> Head:
        index = head.index + 1
        try:
            record = self.record(index)
        except DamagedRecordError:
            return replace(head, index=index)  # it occupies its index
        after = fold(head, index=index, body=record.body)
        # A damaged record may have been an attempt. Who wrote after it tells: still fenced.
        return after if record.attempt <= after.attempt else record.head

    def _present(self, index: int) -> bool:
        """Whether the log reaches `index`, looking past short holes."""
        for probe in range(index, index + _HOLE):
            try:
                self._storage.read(path_of(probe))
            except MissingError:
                continue
            return True
        return False

    def _newest_index(self) -> int:
        if not self._present(0):
            return -1
        reached, stride = 0, 1
        while self._present(reached + stride):
            reached += stride
            stride *= 2
        beyond = reached + stride
        while beyond - reached > 1:
            middle = (reached + beyond) // 2
            if self._present(middle):
                reached = middle
            else:
                beyond = middle
        return reached
