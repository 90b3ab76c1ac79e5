"""The one who writes: an attempt's appends to the run log, its saves and its retention.

Everything that an attempt appends goes through `_append`, which is where it learns that it has
been fenced. A save is: files under a fresh name, durable; then the record. Only the record makes
the checkpoint exist.
"""

import contextlib
import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.head import Head, Retained
from fmnist_dist.checkpoint.lineage import Commit
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import (
    Attempt,
    Body,
    Checkpoint,
    DamagedRecordError,
    File,
    Finish,
    Override,
    Quarantine,
    Retire,
)
from fmnist_dist.checkpoint.restore import DamagedCheckpointError, Restored, read_checkpoint
from fmnist_dist.checkpoint.retention import to_retire
from fmnist_dist.checkpoint.storage import (
    AlreadyExistsError,
    MissingError,
    Storage,
    StorageError,
)
from fmnist_dist.checkpoint.sweep import CHECKPOINTS, Swept, delete_tensors, folder_name, sweep
from fmnist_dist.digest import EpochDigest
from fmnist_dist.errors import DataDamagedError, FencedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A state to save: its files, and what its record says of it."""

    step: int
    epoch: float
    reason: str
    files: Mapping[str, bytes]
    ledger: tuple[EpochDigest, ...]
    evaluated: bool
    metrics: Mapping[str, float]


class RunWriter:
    """An attempt that holds the run until a newer one stands in the log."""

    def __init__(
        self, storage: Storage, log: RunLog, head: Head, *, damaged: tuple[int, ...] = ()
    ) -> None:
        self._storage = storage
        self._log = log
        self._verified: set[int] = set()
        self._parent: int | None = None
        self._swept = head.swept
        self._damaged = damaged  # records at the log's end, as this attempt found it
        self.head = head
        self.attempt = head.attempt

    @staticmethod
    def begin(
        storage: Storage, log: RunLog, *, owner: str, make: Callable[[Head], Attempt]
    ) -> "RunWriter":
        """Take the run over: append an attempt, whatever the log has become meanwhile.

        `make` returns the attempt for a head, or raises where run and launch do not fit. Raises
        `FencedError` for an owner that another one has superseded: it never comes back, so two
        launches on one run do not take it from each other for ever.
        """

        def decide(head: Head) -> Attempt:
            if head.owner not in {None, owner} and _has_owned(log, head, owner):
                raise FencedError(
                    f"another launch has taken this run over (attempt {head.attempt}): stop this "
                    "one; if it is this one that should go on, stop the other and start again"
                )
            return make(head)

        found = log.read()
        head = log.append(found.head, decide=decide)
        return RunWriter(storage, log, head, damaged=found.damaged)

    def choose(self, *, report: Callable[[str], None]) -> Restored | None:
        """Return the newest valid checkpoint, putting damaged ones in quarantine.

        None for a run that has never committed one. Raises `DataDamagedError` where none is left.
        """
        for index in self._damaged:
            report(f"record {index} of the run log is damaged: what it told is lost")
        while self.head.checkpoints:
            newest = self.head.checkpoints[-1]
            try:
                restored = read_checkpoint(self._storage, self._log, newest)
            except DamagedCheckpointError as error:
                self.quarantine(newest, why=str(error))
                report(f"the checkpoint of step {newest.step} is unusable: {error}")
                continue
            self._verified.add(newest.index)
            self._parent = newest.index
            return restored
        if self.head.committed or self._may_have_lost_one():
            raise DataDamagedError(
                "this run has committed checkpoints and none is valid any more: restore the run "
                "folder from a copy, or start a new run with another --run-dir"
            )
        return None

    def sweep(self) -> Swept:
        """Delete what earlier attempts left behind; see `checkpoint.sweep`."""
        swept = sweep(self._storage, self._log, self.head)
        if swept.suspended is None:
            self._swept = self.attempt - 1
        return swept

    def save(self, snapshot: Snapshot) -> bool:
        """Make a state durable; False if one as new already stands in the log.

        Raises `FencedError`, or `StorageError`: then the former checkpoint is as good as before.
        """
        folder = folder_name(step=snapshot.step, attempt=self.attempt, nonce=secrets.token_hex(8))
        self._write_files(folder, snapshot.files)
        body = Checkpoint(
            step=snapshot.step,
            epoch=snapshot.epoch,
            reason=snapshot.reason,
            folder=folder,
            files={
                name: File(size=len(data), sha256=hashlib.sha256(data).hexdigest())
                for name, data in snapshot.files.items()
            },
            parent=self._parent,
            ledger=snapshot.ledger,
            evaluated=snapshot.evaluated,
            metrics=dict(snapshot.metrics),
            swept=self._swept,
        )
        try:
            saved = self._append(lambda head: None if _is_old(head, body.step) else body)
        except FencedError:
            # Refused for certain, so nobody will ever look for this folder, and the newer attempt
            # may have swept already. (After a StorageError the record may stand: hands off.)
            self._give_back(folder)
            raise
        if not saved:
            self._give_back(folder)
        self._parent = self.head.checkpoints[-1].index
        return saved

    def retire(self, *, keep_last: int, keep_every: int | None) -> list[int]:
        """Retire what retention lets go, and delete its tensors; return the steps.

        Counts only checkpoints that were read back whole: a damaged one keeps nothing alive.
        """
        for retained in self.head.checkpoints:
            self._verify(retained)
        gone: list[Commit] = []
        for each in to_retire(self.head.checkpoints, keep_last=keep_last, keep_every=keep_every):
            try:
                gone.append(lineage.commit(self._log, each.index))
            except DamagedRecordError as error:  # since it was verified
                self.quarantine(each, why=str(error))
        if not gone:
            return []
        folders = tuple(each.checkpoint.folder for each in gone)
        indices = tuple(each.index for each in gone)
        self._append(lambda _: Retire(checkpoints=indices, folders=folders))
        for folder in folders:
            delete_tensors(self._storage, folder)
        return [each.checkpoint.step for each in gone]

    def override(self, *, step: int, settings: dict[str, Any]) -> None:
        """Record that `settings` hold from `step` on, before that step runs."""
        self._append(lambda _: Override(step=step, settings=settings))

    def quarantine(self, retained: Retained, *, why: str) -> None:
        """Record that a checkpoint must never be chosen again."""
        body = Quarantine(checkpoint=retained.index, step=retained.step, why=why)
        self._append(lambda head: body if retained in head.checkpoints else None)

    def finish(self, *, step: int, reason: str, metrics: Mapping[str, float]) -> None:
        """Record that the run is complete, once."""
        body = Finish(step=step, reason=reason, metrics=dict(metrics))
        self._append(lambda head: None if head.finished_step == step else body)

    def _append(self, decide: Callable[[Head], Body | None]) -> bool:
        """Append unless `decide` drops it. Raises `FencedError` once a newer attempt stands."""
        appended = False

        def unless_fenced(head: Head) -> Body | None:
            nonlocal appended
            if head.attempt != self.attempt:
                raise FencedError(
                    f"attempt {head.attempt} has taken this run over: attempt {self.attempt} stops "
                    "here and has changed nothing since"
                )
            body = decide(head)
            appended = body is not None
            return body

        # Folding first lets a fenced writer, and one with nothing to add, find out without a put.
        self.head = self._log.append(self._log.advance(self.head), decide=unless_fenced)
        return appended

    def _write_files(self, folder: str, files: Mapping[str, bytes]) -> None:
        try:
            for name, data in files.items():
                self._write_file(f"{folder}/{name}", data)
        except StorageError:
            # No record was tried yet, so nobody can have seen this folder.
            self._give_back(folder)
            raise

    def _write_file(self, path: str, data: bytes) -> None:
        try:
            self._storage.create(path, data)
        except AlreadyExistsError as error:
            # The folder's name is fresh, so it is our own: the answer was lost (NFS repeats a
            # `link` of which it lost the reply, object stores a put).
            try:
                own = self._storage.read(path) == data
            except MissingError:  # a newer attempt has swept it meanwhile
                own = False
            if not own:
                raise StorageError(f"{path}: wrote it, and reads back something else") from error

    def _give_back(self, folder: str) -> None:
        """Delete a folder that no record names; what cannot be deleted now, a sweep finds."""
        with contextlib.suppress(StorageError):
            self._storage.delete_folder(folder)

    def _may_have_lost_one(self) -> bool:
        """Whether a damaged record may be the only one that told of a checkpoint."""
        return bool(self._storage.list(CHECKPOINTS)) and any(
            not self._log.is_intact(index) for index in range(self.head.index)
        )

    def _verify(self, retained: Retained) -> None:
        if retained.index in self._verified:
            return
        try:
            read_checkpoint(self._storage, self._log, retained)
        except DamagedCheckpointError as error:
            self.quarantine(retained, why=str(error))
        else:
            self._verified.add(retained.index)


def _has_owned(log: RunLog, head: Head, owner: str) -> bool:
    return any(start.attempt.owner == owner for start in lineage.attempts(log, head))


def _is_old(head: Head, step: int) -> bool:
    return head.newest_step is not None and step <= head.newest_step
