"""The one who writes: an attempt's appends to the run log, its saves and its retention.

Everything that an attempt appends goes through `_append`, which is where it learns that it has
been fenced. A save is: files under a fresh name, durable; then the record. Only the record makes
the checkpoint exist.

Every rank of an attempt may have a writer. The log admits each step once, whoever comes first.
What a rank saves is relative to its own `parent`: the metric rows since then, and no others. So the
line through the parents has each row once, although it may lead past what other ranks have saved.
A rank whose state comes from beyond a cut is refused: see `CutOffError`.

A writer is for several threads: one may save while others append what is small. Only appends wait
for each other, never for files.

With a local tier a save is durable on this node's own disk first, where the next attempt of the
same launch may find what was never committed: see `adopt`. Committed means: by its record.
"""

import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from typing import Any

from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.adoption import ADOPTED
from fmnist_dist.checkpoint.fold import fold
from fmnist_dist.checkpoint.folder import describe, give_back, write_files
from fmnist_dist.checkpoint.head import Head, Retained
from fmnist_dist.checkpoint.lineage import Commit
from fmnist_dist.checkpoint.localcopy import NO_COMMIT, Copy
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import (
    Attempt,
    Body,
    Checkpoint,
    DamagedRecordError,
    File,
    Finish,
    Heal,
    Override,
    Quarantine,
    Record,
    Retire,
    Rollback,
)
from fmnist_dist.checkpoint.restore import (
    DamagedCheckpointError,
    Restored,
    check_checkpoint,
    read_checkpoint,
)
from fmnist_dist.checkpoint.retention import to_retire
from fmnist_dist.checkpoint.storage import Storage
from fmnist_dist.checkpoint.sweep import (
    CHECKPOINTS,
    Swept,
    delete_tensors,
    folder_name,
    step_and_attempt,
    sweep,
)
from fmnist_dist.checkpoint.tier import LocalTier
from fmnist_dist.checkpoint.watch import UNWATCHED, AbandonedError, Watch
from fmnist_dist.digest import EpochDigest
from fmnist_dist.errors import DataDamagedError, FencedError, OvertakenError, TransientError
from fmnist_dist.interval import Interval


class CutOffError(TransientError):
    """Another rank has rolled the run back, and this one's state was trained on regardless.

    Nothing of it may come onto the line. `RunWriter.choose` tells what to go on from instead.
    """


class TornCopyError(TransientError):
    """What was to be saved has changed while it was written."""


class Own(Enum):
    """The parent of a snapshot that leaves it to its writer."""

    OWN = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A state to save: its files, and what its record says of it."""

    step: int
    epoch: float
    reason: str
    files: Mapping[str, bytes | memoryview]
    ledger: tuple[EpochDigest, ...]
    evaluated: bool
    metrics: Mapping[str, float]
    parent: int | Own | None = Own.OWN  # what rows and ledger begin at
    interval: Interval | None = None


class RunWriter:
    """An attempt that holds the run until a newer one stands in the log.

    `head` is the log as this writer saw it last; `head.newest_step` is durable. `parent` is the
    record of the checkpoint that the next snapshot's rows and ledger are relative to, None for the
    run's beginning. It moves when a save of this writer's own was appended, and never otherwise.
    """

    def __init__(
        self,
        storage: Storage,
        log: RunLog,
        head: Head,
        *,
        damaged: tuple[int, ...] = (),
        kin: Collection[str] = (),
        tier: LocalTier | None = None,
        offered: Sequence[Copy] = (),
    ) -> None:
        self._storage = storage
        self._tier = tier
        self._offered = offered  # local copies that this attempt may go on from
        self._log = log
        self._verified: set[int] = set()
        self._swept = head.swept
        self._kin = kin  # the owners of attempts that are of the same launch
        self._damaged = damaged  # records at the log's end, as this attempt found it
        self._knows = head.attempt_index or 0  # rollbacks up to this record, the state comes after
        self._lock = threading.RLock()  # of an append
        self.head = head
        self.attempt = head.attempt
        self.parent: int | None = None

    @staticmethod
    def begin(
        storage: Storage,
        log: RunLog,
        *,
        owner: str,
        make: Callable[[Head], Attempt],
        kin: Collection[str] = (),
        tier: LocalTier | None = None,
    ) -> "RunWriter":
        """Take the run over: append an attempt, whatever the log has become meanwhile.

        `make` returns the attempt for a head, or raises where run and launch do not fit. Raises
        `FencedError` for an owner that another one has superseded: it never comes back, so two
        launches on one run do not take it from each other for ever. 256 owners later nobody
        remembers it.
        """
        offered: list[Copy] = []

        def decide(head: Head) -> Attempt:
            if owner in head.superseded:
                raise FencedError(
                    f"another launch has taken this run over (attempt {head.attempt}): stop this "
                    "one; if it is this one that should go on, stop the other and start again"
                )
            body = make(head)
            if tier is not None and head.attempt:
                # Before the append: what comes later, its writer was not allowed to write.
                offered[:] = tier.offers(head, owner=owner)
            return body

        found = log.read()
        head = log.append(found.head, decide=decide)
        return RunWriter(
            storage, log, head, damaged=found.damaged, kin=kin, tier=tier, offered=offered
        )

    @staticmethod
    def follow(
        storage: Storage,
        log: RunLog,
        *,
        attempt: int,
        parent: int | None,
        cut: int | None = None,
        kin: Collection[str] = (),
        tier: LocalTier | None = None,
    ) -> "RunWriter":
        """Return a writer of an attempt that another process of the same launch has begun.

        `parent` is that of the state to be saved. `cut` is the `Head.cut` that the state came
        after; it matters only where this very attempt has rolled back since it began, and then
        leaving it out gets `CutOffError`. Raises `FencedError` once a newer attempt stands.
        """
        found = log.read()
        writer = RunWriter(storage, log, found.head, damaged=found.damaged, kin=kin, tier=tier)
        writer.attempt = attempt
        writer._check_fence(found.head)
        writer.parent = parent
        writer._knows = max(writer._knows, cut or 0)
        return writer

    @property
    def copied_step(self) -> int | None:
        """The step of the newest copy that this writer has put into a local tier, if any."""
        return None if self._tier is None else self._tier.newest_step

    def refresh(self) -> Head:
        """Return the head as the log has it now. Raises `FencedError`."""
        self._append(lambda _: None)
        return self.head

    def adopt(self) -> int | None:
        """Commit the newest local copy that the attempt before this one could not, if any.

        Returns its step; `choose` finds it then. Its rows are relative to its own parent, so the
        line has each of them once. Raises `StorageError`: the copy is this attempt's then, and the
        next one's of the same owner.
        """
        for copy in self._offered:
            files = self._tier.read_whole(copy) if self._tier is not None else None
            if files is None:
                continue
            found = copy.checkpoint
            self._goes_on_from(found.parent)
            self.save(
                Snapshot(
                    step=found.step,
                    epoch=found.epoch,
                    reason=ADOPTED,
                    files=files,
                    ledger=found.ledger,
                    evaluated=found.evaluated,
                    metrics=found.metrics,
                    parent=found.parent,
                )
            )
            return found.step
        return None

    def choose(self, *, report: Callable[[str], None]) -> Restored | None:
        """Return the newest valid checkpoint of `head`, putting damaged ones in quarantine.

        None for the initial weights: the run has committed none, or none since it was rolled back
        to them. Raises `DataDamagedError` where none is left.
        """
        for index in self._damaged:
            report(f"record {index} of the run log is damaged: what it told is lost")
        while self.head.checkpoints:
            newest = self.head.checkpoints[-1]
            try:
                restored = read_checkpoint(
                    self._storage, self._log, newest, nearby=self._files_nearby
                )
            except DamagedCheckpointError as error:
                self.quarantine(newest, why=str(error))
                report(f"the checkpoint of step {newest.step} is unusable: {error}")
                continue
            if not restored.nearby:  # else the run's own files were not all read
                self._verified.add(newest.index)
            self._goes_on_from(newest.index)
            self._sweep_tier(step_and_attempt(restored.commit.checkpoint.folder) or NO_COMMIT)
            return restored
        if self.head.committed or self._may_have_lost_one():
            raise DataDamagedError(
                "this run has committed checkpoints and none is valid any more: restore the run "
                "folder from a copy, or start a new run with another --run-dir"
            )
        self._goes_on_from(None)
        self._sweep_tier(NO_COMMIT)
        return None

    def sweep(self) -> Swept:
        """Delete what earlier attempts left behind; see `checkpoint.sweep`."""
        swept = sweep(self._storage, self._log, self.head)
        if swept.suspended is None:
            self._swept = self.attempt - 1
        return swept

    def save(self, snapshot: Snapshot, watch: Watch = UNWATCHED) -> bool:
        """Make a state durable; False if one as new already stands in the log.

        Only after True do the next snapshot's rows begin anew: after False they are those of this
        one and what comes. Raises `FencedError`, `CutOffError`, what `watch` raises,
        `TornCopyError` for memory that has changed meanwhile, or `StorageError`: then the former
        checkpoint is as good as before.
        """
        if not isinstance(snapshot.parent, Own):
            self.parent = snapshot.parent
        parent = self.parent  # of this snapshot, whatever is saved beside it
        files = describe(snapshot.files, go_on=watch.go_on)
        folder = folder_name(step=snapshot.step, attempt=self.attempt, nonce=secrets.token_hex(8))
        body = Checkpoint(
            step=snapshot.step,
            epoch=snapshot.epoch,
            reason=snapshot.reason,
            folder=folder,
            files=files,
            parent=parent,
            ledger=snapshot.ledger,
            evaluated=snapshot.evaluated,
            metrics=dict(snapshot.metrics),
            swept=self._swept,
            interval=snapshot.interval,
        )
        body = self._copied(body, snapshot, watch)
        try:
            write_files(self._storage, folder, snapshot.files, go_on=watch.go_on)
            self._check_unchanged(snapshot, files, watch)
            if self._tier is None:
                watch.confirm(files)
        except Exception:
            # No record was tried yet, so nobody can have seen this folder.
            give_back(self._storage, folder)
            raise

        def unless_old(head: Head) -> Checkpoint | None:
            watch.go_on()
            self._check_cut(head)
            return None if _is_old(head, body.step) else body

        try:
            with self._lock:
                saved = self._append(unless_old)
                if saved:
                    self.parent = self.head.index
        except (FencedError, CutOffError, AbandonedError):
            # Refused for certain, so nobody will ever look for this folder, and the newer attempt
            # may have swept already. (After a StorageError the record may stand: hands off.)
            # The local copy stays: the attempt that has fenced this one may have been offered it.
            give_back(self._storage, folder)
            raise
        if not saved:
            give_back(self._storage, folder)
        elif self._tier is not None:
            self._tier.tidy(committed=(body.step, self.attempt), attempt=self.attempt)
        return saved

    def retire(
        self, *, keep_last: int, keep_every: int | None, watch: Watch = UNWATCHED
    ) -> list[int]:
        """Retire what retention lets go and what was cut off; delete the tensors, return the steps.

        Counts only checkpoints that were read back whole: a damaged one keeps nothing alive.
        Decides on the head that it appends to: other ranks retire, quarantine and roll back too.
        """
        for retained in self.head.checkpoints:
            self._verify(retained, watch)

        def due(head: Head) -> tuple[int, ...]:
            whole = [each for each in head.checkpoints if each.index in self._verified]
            let_go = to_retire(whole, keep_last=keep_last, keep_every=keep_every)
            return (*(each.index for each in let_go), *head.cut_off)

        known = self._intact_commits(due(self.head))
        gone: list[Commit] = []

        def decide(head: Head) -> Retire | None:
            indices = due(head)
            gone[:] = [known[index] for index in indices if index in known]
            if not gone:
                return None
            return Retire(
                checkpoints=tuple(each.index for each in gone),
                folders=tuple(each.checkpoint.folder for each in gone),
            )

        if known:
            self._append(decide)
        for each in gone:
            delete_tensors(self._storage, each.checkpoint.folder)
        return [each.checkpoint.step for each in gone]

    def override(self, *, step: int, settings: dict[str, Any]) -> None:
        """Record that `settings` hold from `step` on, before that step runs."""
        self._append(lambda _: Override(step=step, settings=settings))

    def quarantine(self, retained: Retained, *, why: str) -> None:
        """Record that a checkpoint must never be chosen again."""
        body = Quarantine(checkpoint=retained.index, step=retained.step, why=why)
        self._append(lambda head: body if retained in head.checkpoints else None)

    def heal(self, *, step: int, rank: int, reason: str, seconds: float, lost_steps: int) -> None:
        """Record that the attempt went on at `step` after it had lost the worker of `rank`."""
        body = Heal(step=step, rank=rank, reason=reason, seconds=seconds, lost_steps=lost_steps)
        self._append(lambda _: body)

    def rollback(self, *, step: int, until: int, why: str) -> bool:
        """Cut the line at `step` and pass over the steps from there to `until`; see `Rollback`.

        False if another rank has rolled back first. Either way `choose` tells what to go on from,
        and this writer saves nothing before it was asked. Raises `DataDamagedError` where no
        checkpoint up to `step` is left; step 0 needs none.
        """
        assert 0 <= step <= until, f"rollback to {step}, passing over up to {until}"

        def unless_cut(head: Head) -> Rollback | None:
            if self._is_cut_off(head):
                return None
            if step and not any(each.step <= step for each in head.checkpoints):
                raise DataDamagedError(f"no checkpoint up to step {step} is left to roll back to")
            return Rollback(step=step, until=until, why=why)

        return self._append(unless_cut)

    def finish(self, *, step: int, reason: str, metrics: Mapping[str, float]) -> None:
        """Record that the run is complete, once, whichever ranks do. Raises `CutOffError`."""
        body = Finish(step=step, reason=reason, metrics=dict(metrics))

        def unless_finished(head: Head) -> Finish | None:
            self._check_cut(head)
            return None if head.finished_step == step else body

        self._append(unless_finished)
        if self._tier is not None:
            self._tier.clear()

    def _copied(self, body: Checkpoint, snapshot: Snapshot, watch: Watch) -> Checkpoint:
        """Copy a state to the local tier, if there is one; return a body that says where it is."""
        if self._tier is None:
            return body
        head = self.head
        confirm = partial(watch.confirm, body.files)
        if head.attempt != self.attempt or self._is_cut_off(head) or _is_old(head, body.step):
            confirm()
            return body  # the append finds out why
        index = head.index + 1
        after = fold(head, index=index, body=body)
        record = Record(index=index, attempt=self.attempt, body=body, head=after)
        place = self._tier.keep(record, snapshot.files, confirm=confirm)
        return body if place is None else replace(body, copies=(place,))

    def _sweep_tier(self, committed: tuple[int, int]) -> None:
        if self._tier is not None:
            self._tier.sweep(committed=committed, attempt=self.attempt)

    def _files_nearby(self, checkpoint: Checkpoint) -> dict[str, bytes]:
        return {} if self._tier is None else self._tier.files_of(checkpoint)

    def _append(self, decide: Callable[[Head], Body | None]) -> bool:
        """Append unless `decide` drops it. Raises `FencedError` once a newer attempt stands."""
        appended = False

        def unless_fenced(head: Head) -> Body | None:
            nonlocal appended
            self.head = head  # also where it is refused: what was seen stays seen
            self._check_fence(head)
            body = decide(head)
            appended = body is not None
            return body

        # Folding first lets a fenced writer, and one with nothing to add, find out without a put.
        with self._lock:
            self.head = self._log.append(self._log.advance(self.head), decide=unless_fenced)
        return appended

    def _check_unchanged(self, snapshot: Snapshot, files: Mapping[str, File], watch: Watch) -> None:
        """Compare what was written with what was to be written, where it could have changed."""
        mutable = {n: data for n, data in snapshot.files.items() if isinstance(data, memoryview)}
        for name, found in describe(mutable, go_on=watch.go_on).items():
            if found != files[name]:
                raise TornCopyError(
                    f"the copy of the state of step {snapshot.step} changed while its {name} was "
                    "written: memory or a processor here is faulty; nothing of it is saved, a "
                    "restart goes on from the newest checkpoint"
                )

    def _check_fence(self, head: Head) -> None:
        if head.attempt != self.attempt:
            if head.owner in self._kin:
                raise OvertakenError(
                    f"this launch went on without this worker (attempt {head.attempt}): attempt "
                    f"{self.attempt} stops here and has changed nothing since; a restart joins it"
                )
            raise FencedError(
                f"attempt {head.attempt} has taken this run over: attempt {self.attempt} stops "
                "here and has changed nothing since"
            )

    def _check_cut(self, head: Head) -> None:
        if self._is_cut_off(head):
            raise CutOffError(
                f"the run was rolled back to step {head.newest_step or 0} and this process had "
                "trained on from what was cut off: its state is not saved, a restart goes on"
            )

    def _is_cut_off(self, head: Head) -> bool:
        # A parent from beyond the cut has come after it, and so has what was trained from there.
        return head.cut is not None and head.cut > max(self._knows, self.parent or 0)

    def _goes_on_from(self, index: int | None) -> None:
        self.parent = index
        self._knows = self.head.index

    def _may_have_lost_one(self) -> bool:
        """Whether a damaged record may be the only one that told of a checkpoint on the line."""
        # Whatever stood before a cut at step 0 is off the line.
        first = 0 if self.head.cut is None else self.head.cut + 1
        return bool(self._storage.list(CHECKPOINTS)) and any(
            not self._log.is_intact(index) for index in range(first, self.head.index)
        )

    def _intact_commits(self, indices: Iterable[int]) -> dict[int, Commit]:
        retained = {each.index: each for each in self.head.checkpoints}
        commits: dict[int, Commit] = {}
        for index in indices:
            try:
                commits[index] = lineage.commit(self._log, index)
            except DamagedRecordError as error:  # since it was verified
                if index in retained:
                    self.quarantine(retained[index], why=str(error))
        return commits

    def _verify(self, retained: Retained, watch: Watch) -> None:
        if retained.index in self._verified:
            return
        try:
            check_checkpoint(self._storage, self._log, retained, go_on=watch.go_on)
        except DamagedCheckpointError as error:
            self.quarantine(retained, why=str(error))
        else:
            self._verified.add(retained.index)


def _is_old(head: Head, step: int) -> bool:
    """Whether the log has no place for a checkpoint of this step any more.

    Once this attempt has finished nobody of it is further than its last checkpoint, and `prune`
    takes what it finds without a record for left over.
    """
    if head.finished_step is not None:
        return True
    return head.newest_step is not None and step <= head.newest_step
