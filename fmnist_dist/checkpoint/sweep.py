"""Deleting what nobody can choose any more: orphans of killed saves, retired tensors, temporaries.

A folder under `checkpoints/` exists as a checkpoint only through its record. Deleted are folders of
*older* attempts without a record (their writers are fenced: no record can come any more) and the
tensors of retired ones. A damaged record might be the one that names a folder, so it suspends the
sweep of all folders that it could name.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import Checkpoint, DamagedRecordError, Quarantine, Retire
from fmnist_dist.checkpoint.storage import TEMPORARY_FOLDER, Storage
from fmnist_dist.filenames import METRICS

CHECKPOINTS = "checkpoints"
_FOLDER = re.compile(r"(?P<step>\d{9})-(?P<attempt>\d{4,})-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What a sweep deleted, and why it left the rest, if it did."""

    orphans: tuple[str, ...] = ()
    suspended: str | None = None


@dataclass(slots=True)
class _Known:
    """What the records say of the folders."""

    committed: set[str]
    retired: set[str]
    quarantined: set[int]
    folders: dict[int, str]  # by the index of their record


def folder_name(*, step: int, attempt: int, nonce: str) -> str:
    return f"{CHECKPOINTS}/{step:09d}-{attempt:04d}-{nonce}"


def step_and_attempt(folder: str) -> tuple[int, int] | None:
    """Return what a folder's name tells, None for a name that is not ours."""
    match = _FOLDER.fullmatch(folder.rpartition("/")[2])
    return (int(match["step"]), int(match["attempt"])) if match else None


def sweep(storage: Storage, log: RunLog, head: Head) -> Swept:
    """Sweep after all attempts before the current one: what a new attempt does once, at its start.

    `head` is the one that the attempt folded when it was appended: a sweep from an older list
    could take a folder for an orphan whose record has come since.
    """
    storage.delete(*(f"{TEMPORARY_FOLDER}/{name}" for name in storage.list(TEMPORARY_FOLDER)))
    try:
        known = _known(log, head, after_attempt=head.swept)
    except DamagedRecordError as error:
        return Swept(suspended=str(error))
    for folder in sorted(known.retired):
        delete_tensors(storage, folder)
    orphans = _orphans(storage, known, attempts=range(head.swept + 1, head.attempt))
    for folder in orphans:
        storage.delete_folder(folder)
    return Swept(orphans=tuple(orphans))


def prune(storage: Storage, log: RunLog, head: Head) -> Swept:
    """Delete everything that no reader can choose, a quarantined checkpoint's tensors included.

    Needs no attempt of its own: nothing of the newest attempt is touched unless it has finished.
    """
    try:
        known = _known(log, head, after_attempt=0)
    except DamagedRecordError as error:
        return Swept(suspended=str(error))
    last = head.attempt if head.finished_step is not None else head.attempt - 1
    quarantined = {known.folders[index] for index in known.quarantined & known.folders.keys()}
    for folder in sorted(known.retired | quarantined):
        if _attempt_of(folder) <= last:
            # The line may lead through it, to checkpoints that were saved before it was damaged.
            delete_tensors(storage, folder)
    orphans = _orphans(storage, known, attempts=range(1, last + 1))
    for folder in orphans:
        storage.delete_folder(folder)
    return Swept(orphans=tuple(orphans))


def delete_tensors(storage: Storage, folder: str) -> None:
    """Delete all files of a checkpoint but its metrics, which the series still needs."""
    storage.delete(*(f"{folder}/{name}" for name in storage.list(folder) if name != METRICS))


def _known(log: RunLog, head: Head, *, after_attempt: int) -> _Known:
    known = _Known(set(), set(), set(), {})
    for index in range(head.index, -1, -1):
        record = log.record(index)
        if record.attempt <= after_attempt:
            break
        match record.body:
            case Checkpoint(folder=folder):
                known.committed.add(folder)
                known.folders[index] = folder
            case Retire(folders=folders):
                known.retired.update(folders)
            case Quarantine(checkpoint=checkpoint):
                known.quarantined.add(checkpoint)
            case _:
                pass
    return known


def _orphans(storage: Storage, known: _Known, *, attempts: Iterable[int]) -> list[str]:
    allowed = set(attempts)
    folders = (f"{CHECKPOINTS}/{name}" for name in storage.list(CHECKPOINTS))
    return [
        folder
        for folder in folders
        if folder not in known.committed and _attempt_of(folder) in allowed
    ]


def _attempt_of(folder: str) -> int:
    """Return the attempt in a folder's name, 0 (which is none) for a name that is not ours."""
    parts = step_and_attempt(folder)
    return parts[1] if parts else 0
