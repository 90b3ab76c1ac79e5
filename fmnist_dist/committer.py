"""Making a copy of the state durable, on whichever thread, and knowing what is."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import DamagedRecordError
from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.checkpoint.watch import AbandonedError, Watch
from fmnist_dist.checkpoint.writer import RunWriter, Snapshot
from fmnist_dist.config import Config
from fmnist_dist.flight import Copy
from fmnist_dist.handover.board import Board
from fmnist_dist.state import Durable
from fmnist_dist.telemetry.events import EventLog
from fmnist_dist.telemetry.progress import Progress

_events = EventLog("fmnist_dist.saves")


class Committer:
    """Commits copies with this rank's writer; for several threads.

    `write` returns the writer; it is asked once, when something is to be written or read.
    `retires` is for one rank, which reads every retained checkpoint once; `save` is
    `RunWriter.save`, perhaps with faults.
    """

    def __init__(
        self,
        write: Callable[[], RunWriter],
        log: RunLog,
        config: Config,
        progress: Progress,
        board: Board,
        *,
        retires: bool,
        save: Callable[[RunWriter, Snapshot, Watch], bool],
    ) -> None:
        self._write = write
        self._log = log
        self._config = config
        self._progress = progress
        self._board = board
        self._retires = retires
        self._save = save
        self._writer: RunWriter | None = None
        self._opening = threading.Lock()
        self.newest: Durable | None = None  # replaced as a whole: any thread may read it
        self.took = 0.0  # seconds of the last commit

    @property
    def writer(self) -> RunWriter:
        """This rank's writer. Raises `FencedError`, `StorageError`."""
        with self._opening:
            if self._writer is None:
                self._writer = self._write()
            return self._writer

    @property
    def newest_step(self) -> int | None:
        """The newest step that is known to be durable; nothing is asked for it."""
        return self._writer.head.newest_step if self._writer is not None else None

    @property
    def copied_step(self) -> int | None:
        """The step of the newest copy in a local tier, if there is one."""
        return self._writer.copied_step if self._writer is not None else None

    def has(self, step: int) -> bool:
        """Whether a state as new is known to be durable."""
        return self.newest_step is not None and step <= self.newest_step

    def commit(self, copy: Copy, watch: Watch) -> None:
        """Make a copy durable, unless one as new is. Raises what `RunWriter.save` does."""
        writer = self.writer
        saved = not self.has(copy.step) and self._commit(writer, copy, watch)
        self._board.saving = 0
        self.publish()
        if saved and self._retires:
            self._retire(writer, watch)

    def publish(self) -> None:
        """Look what is durable, for `newest`, which rank 0 tells all ranks with the next step."""
        head = self.writer.head
        retained = head.checkpoints[-1] if head.checkpoints else None
        if retained is None or (self.newest is not None and self.newest.index == retained.index):
            return
        try:
            found = lineage.commit(self._log, retained.index).checkpoint
        except (DamagedRecordError, StorageError):  # rows are saved twice rather than never
            return
        self.newest = Durable(
            index=retained.index,
            step=found.step,
            epoch=found.ledger[-1].epoch if found.ledger else 0,
            evaluated=found.evaluated,
        )

    def _commit(self, writer: RunWriter, copy: Copy, watch: Watch) -> bool:
        started = time.monotonic()
        snapshot = copy.snapshot()
        try:
            saved = self._save(writer, snapshot, watch)
        except StorageError:
            with suppress(StorageError):  # away for this, too
                writer.refresh()  # a newer attempt sweeps files under way: then it is fenced
                self.publish()  # only the answer may have been lost
            raise
        if saved:  # else another rank was faster
            self.took = time.monotonic() - started
            self._progress.saved(copy.step)
            _events.info(
                "saved",
                step=copy.step,
                reason=copy.reason,
                bytes=sum(map(len, snapshot.files.values())),
                seconds=round(self.took, 3),
            )
        return saved

    def _retire(self, writer: RunWriter, watch: Watch) -> None:
        try:
            writer.retire(
                keep_last=self._config.keep_last,
                keep_every=self._config.keep_every,
                watch=watch,
            )
        except AbandonedError:  # the next save does it
            return
        except StorageError as error:
            _events.warning("old checkpoints were not deleted", error=str(error))
