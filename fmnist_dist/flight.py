"""A save under way: what of the state it holds, what may stop it, and what it is compared with."""

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fmnist_dist import limits
from fmnist_dist.checkpoint.record import File
from fmnist_dist.checkpoint.watch import AbandonedError
from fmnist_dist.checkpoint.writer import Snapshot
from fmnist_dist.digest import EpochDigest
from fmnist_dist.distributed.comparison import Comparison
from fmnist_dist.distributed.connection import StoreLostError
from fmnist_dist.distributed.share import refuse_different
from fmnist_dist.filenames import METRICS
from fmnist_dist.interval import Interval
from fmnist_dist.staging import Staging
from fmnist_dist.state import Row, TrainState
from fmnist_dist.telemetry.events import EventLog

_events = EventLog("fmnist_dist.saves")


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A state as it was at one step: its tensors in `staging`, all else by value."""

    step: int
    epoch: float
    reason: str
    staging: Staging
    rows: tuple[Row, ...]
    ledger: tuple[EpochDigest, ...]
    evaluated: bool
    metrics: Mapping[str, float]
    parent: int | None
    interval: Interval | None  # in force, if it was chosen by the program

    @staticmethod
    def of(
        state: TrainState,
        staging: Staging | None,
        *,
        reason: str,
        epochs_done: Callable[[int], float],
        interval: Interval | None = None,
    ) -> "Copy":
        """Copy a state, into other memory where this does not fit; commits wait meanwhile."""
        with state.still():
            tensors = state.tensors_by_file()
            if staging is None or not staging.fits(tensors):
                staging = Staging(tensors)
            staging.copy(tensors)
            return Copy(
                step=state.step,
                epoch=epochs_done(state.step),
                reason=reason,
                staging=staging,
                rows=state.rows(),
                ledger=state.ledger,
                evaluated=state.evaluated,
                metrics=dict(state.metrics),
                parent=state.parent,
                interval=interval,
            )

    def snapshot(self) -> Snapshot:
        """Return it as a checkpoint. Metrics last: see `checkpoint.sweep`."""
        rows = b"".join(row.line for row in self.rows)
        return Snapshot(
            step=self.step,
            epoch=self.epoch,
            reason=self.reason,
            files={**self.staging.files(), METRICS: rows},
            ledger=self.ledger,
            evaluated=self.evaluated,
            metrics=self.metrics,
            parent=self.parent,
            interval=self.interval,
        )


class Flight:
    """A `checkpoint.watch.Watch` over one save in the background."""

    def __init__(self, step: int, comparison: Comparison | None) -> None:
        self.step = step
        self.pause_seconds = 0.0  # that training stood still for the copy
        self.seconds = 0.0  # on the thread, once it is durable and older ones are retired
        self.digest: str | None = None  # of the copy, once it is known
        self._comparison = comparison
        self._abandoned = threading.Event()

    def abandon(self) -> None:
        """Have it end as soon as it can, unless its record is being appended."""
        self._abandoned.set()

    def go_on(self) -> None:
        if self._abandoned.is_set():
            raise AbandonedError(f"the save of step {self.step} was given up")

    def confirm(self, files: Mapping[str, File]) -> None:
        """Raise `DifferentStatesError` where other ranks have copied another state."""
        if self._comparison is None:
            return
        self.digest = digest_of(files, step=self.step)
        deadline = time.monotonic() + limits.COMPARE_SECONDS

        def pause() -> bool:
            self.go_on()
            time.sleep(limits.LAZY_POLL_SECONDS)
            return time.monotonic() < deadline

        try:
            found = self._comparison.gather(self.step, self.digest, pause=pause)
        except StoreLostError as error:
            _events.info("saved without a comparison", step=self.step, why=str(error))
            return
        if found is None:
            _events.info("saved without a comparison", step=self.step, why="a rank does not answer")
            return
        refuse_different(found, step=self.step)


def digest_of(files: Mapping[str, File], *, step: int) -> str:
    """Return the SHA-256, as hex, of a step and its tensors: equal on all healthy ranks."""
    digest = hashlib.sha256(str(step).encode())
    for name in sorted(files.keys() - {METRICS}):
        digest.update(f" {name} {files[name].sha256}".encode())
    return digest.hexdigest()
