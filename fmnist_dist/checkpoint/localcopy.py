"""One copy in a local tier: its record, its files, and how long it is of use.

The record is the one that its writer would have appended to the log as it knew it. It is written
last and deleted first: without it there is no copy.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from fmnist_dist.checkpoint.record import Checkpoint, DamagedRecordError, Record, decode
from fmnist_dist.checkpoint.storage import MissingError, Storage
from fmnist_dist.checkpoint.sweep import step_and_attempt
from fmnist_dist.errors import IncompatibleError

COPIES = "copies"
NO_COMMIT = (0, 0)  # step and attempt of the newest checkpoint, where a run has none
AHEAD = 2  # copies that no commit has caught up with: the one under way, and the newest


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A copy with an intact record; whether its bytes are whole is known once they are read."""

    record: Record

    @property
    def checkpoint(self) -> Checkpoint:
        assert isinstance(self.record.body, Checkpoint)
        return self.record.body

    @property
    def folder(self) -> str:
        return self.checkpoint.folder


def to_remove(
    names: Iterable[str], *, committed: tuple[int, int], attempt: int, ahead: int = AHEAD
) -> list[str]:
    """Return the copies that are of no use any more, by name: a pure decision of `attempt`.

    `committed` is step and attempt of the newest checkpoint. Kept are its copy, the newest `ahead`
    that this attempt may still commit, and whatever belongs to a newer attempt, which has its own
    opinion.
    """
    doomed: list[str] = []
    mine: list[tuple[int, str]] = []
    for name in sorted(names):
        parts = step_and_attempt(name)
        if parts is None or parts == committed or parts[1] > attempt:
            continue
        if parts[1] == attempt and parts[0] > committed[0]:
            mine.append((parts[0], name))
        else:
            doomed.append(name)
    return doomed + [name for _, name in sorted(mine, reverse=True)[ahead:]]


def is_same(one: Copy, other: Copy) -> bool:
    """Whether two copies are the same state, saved by the same attempt."""
    return (one.record.attempt, one.checkpoint.step, one.checkpoint.parent) == (
        other.record.attempt,
        other.checkpoint.step,
        other.checkpoint.parent,
    ) and one.checkpoint.files == other.checkpoint.files


def record_path(folder: str) -> str:
    return f"{COPIES}/{folder.rpartition('/')[2]}.json"


def read_copy(storage: Storage, name: str) -> Copy | None:
    """Return the copy whose record has this name; None for what is damaged, gone or foreign."""
    try:
        data = storage.read(f"{COPIES}/{name}")
        record = decode(data, index=json.loads(data)["index"])
    except (MissingError, DamagedRecordError, IncompatibleError, ValueError, TypeError, KeyError):
        return None
    body = record.body
    if not isinstance(body, Checkpoint) or record_path(body.folder) != f"{COPIES}/{name}":
        return None
    return Copy(record=record)


def remove_copy(storage: Storage, folder: str) -> None:
    storage.delete(record_path(folder))
    storage.delete_folder(folder)
