"""Copies of a run's checkpoints on this node's own disk: durable sooner, and nearer to restore.

    DIR/<run>/checkpoints/<step>-<attempt>-<nonce>/…   the files, as in the run
    DIR/<run>/copies/<step>-<attempt>-<nonce>.json     the record that a commit of them would append

1. Files first, then the record, each durable: without an intact record there is no copy.
2. The record is the one that its writer would have appended to the log as it knew it. So it says
   who wrote the copy (owner and attempt) and which head it is relative to: see `adoption`.
3. Nothing here is the truth of the run. What is damaged is removed and told; a disk that fails or
   does not answer is told, and the run goes on without it.

`<run>` follows from the run's URL and the nonce of its first record: a run that was deleted and
begun anew under the same URL never sees what the former one has left.
"""

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fmnist_dist import limits
from fmnist_dist.checkpoint.adoption import refusal
from fmnist_dist.checkpoint.folder import give_back, write_file, write_files
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import (
    Body,
    Checkpoint,
    DamagedRecordError,
    Record,
    decode,
    encode,
)
from fmnist_dist.checkpoint.restore import DamagedCheckpointError, read_file
from fmnist_dist.checkpoint.storage import (
    TEMPORARY_FOLDER,
    MissingError,
    Storage,
    StorageError,
)
from fmnist_dist.checkpoint.sweep import CHECKPOINTS, step_and_attempt
from fmnist_dist.errors import IncompatibleError

COPIES = "copies"
NO_COMMIT = (0, 0)  # step and attempt of the newest checkpoint, where a run has none
_AHEAD = 2  # copies that no commit has caught up with: the one under way, and the newest

_T = TypeVar("_T")


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


class LocalTier:
    """One run's copies in a folder of this node. Nothing but bugs is raised.

    `run` is the run's URL, `warn` is told what fails, once until it works again.
    """

    def __init__(
        self,
        directory: Path,
        *,
        run: str,
        log: RunLog,
        warn: Callable[[str], None],
        make: Callable[[Path], Storage] = lambda root: LocalStorage(root, single_writer=True),
    ) -> None:
        # Names are fresh, so a file system without hard links will do (`single_writer`).
        self._directory = directory
        self._run = run
        self._log = log
        self._warn = warn
        self._make = make
        self._root = directory
        self._storage: Storage | None = None
        self._told: set[str] = set()  # what fails, until it works again
        self._is_off = False  # a disk that does not answer is not asked again
        self._newest: tuple[Copy, str] | None = None  # that this process has made, and its place
        self._committed: tuple[int, int] | None = None  # step and attempt; None: nobody has said

    @property
    def newest_step(self) -> int | None:
        """The step of the newest copy that this process has made."""
        return self._newest[0].checkpoint.step if self._newest else None

    def keep(self, record: Record, files: Mapping[str, bytes]) -> str | None:
        """Make a copy durable; return where it lies, as host:folder, and None where that failed.

        `record` is what a commit would append now. What is saved again, because its commit failed,
        is not copied again.
        """
        copy = Copy(record=record)
        if self._newest is not None and _same(self._newest[0], copy):
            return self._newest[1]

        def write(storage: Storage) -> bool:
            write_files(storage, copy.folder, files)
            try:
                write_file(storage, _record_path(copy.folder), encode(record))
            except StorageError:
                give_back(storage, copy.folder)
                raise
            return True

        if not self._try("not copied to the local tier", write, otherwise=False):
            return None
        self._newest = copy, f"{socket.gethostname()}:{self._root / copy.folder}"
        if self._committed is not None:
            self.tidy(committed=self._committed, attempt=record.attempt)
        return self._newest[1]

    def offers(self, head: Head, *, owner: str) -> list[Copy]:
        """Return the copies from which the attempt after `head` may go on, the newest first.

        Raises `StorageError` where the run's log cannot be read: to begin without them would lose
        them.
        """
        self._open()
        return [
            copy
            for copy in self._copies()
            if refusal(copy.record, head, self._since(copy, head), owner=owner) is None
        ]

    def read_whole(self, copy: Copy) -> dict[str, bytes] | None:
        """Return the verified files of a copy, None (and no copy any more) where one is damaged."""
        files = self._read(copy, sorted(copy.checkpoint.files))
        if len(files) == len(copy.checkpoint.files):
            return files
        self.remove(copy.folder)
        return None

    def files_of(self, checkpoint: Checkpoint) -> dict[str, bytes]:
        """Return those files of a committed checkpoint that lie here whole."""
        found: dict[str, bytes] = {}
        for copy in self._copies():
            if copy.checkpoint.files == checkpoint.files:
                found |= self._read(copy, sorted(checkpoint.files.keys() - found.keys()))
        return found

    def tidy(self, *, committed: tuple[int, int], attempt: int) -> None:
        """Keep what the newest checkpoint and a later commit of this attempt need, and no more."""
        self._committed = committed

        def remove(storage: Storage) -> None:
            names = {
                *storage.list(CHECKPOINTS),
                *(Path(each).stem for each in storage.list(COPIES)),
            }
            for name in to_remove(names, committed=committed, attempt=attempt):
                _remove(storage, f"{CHECKPOINTS}/{name}")

        self._try("old local copies were not deleted", remove, otherwise=None)

    def sweep(self, *, committed: tuple[int, int], attempt: int) -> None:
        """Do what `tidy` does, and remove what killed writers have left behind."""

        def remove(storage: Storage) -> None:
            for name in storage.list(TEMPORARY_FOLDER):
                storage.delete(f"{TEMPORARY_FOLDER}/{name}")

        self._try("the local tier was not swept", remove, otherwise=None)
        self.tidy(committed=committed, attempt=attempt)

    def remove(self, folder: str) -> None:
        """Delete one copy."""
        self._try(
            "a local copy was not deleted", lambda storage: _remove(storage, folder), otherwise=None
        )

    def clear(self) -> None:
        """Delete all copies of the run: it is finished."""
        self._try(
            "local copies were not deleted",
            lambda storage: storage.delete_folder(""),
            otherwise=None,
        )
        self._newest = None

    def _copies(self) -> list[Copy]:
        """Return all copies, the newest steps first."""

        def look(storage: Storage) -> list[Copy]:
            found = (_copy(storage, name) for name in storage.list(COPIES))
            return [each for each in found if each is not None]

        nothing: list[Copy] = []
        found = self._try("the local tier cannot be read", look, otherwise=nothing)
        return sorted(found, key=lambda each: each.checkpoint.step, reverse=True)

    def _since(self, copy: Copy, head: Head) -> Iterable[Body | None]:
        for index in range(copy.record.index, head.index + 1):
            try:
                yield self._log.record(index).body
            except DamagedRecordError:
                yield None

    def _read(self, copy: Copy, names: Iterable[str]) -> dict[str, bytes]:
        """Return the named files that are whole; remove and report the others."""

        def read(storage: Storage) -> dict[str, bytes]:
            files: dict[str, bytes] = {}
            for name in names:
                try:
                    files[name] = read_file(storage, copy.checkpoint, name)
                except DamagedCheckpointError as error:
                    self._warn(f"a local copy is not used: {error}")
                    storage.delete(f"{copy.folder}/{name}")
            return files

        return self._try("the local tier cannot be read", read, otherwise={})

    def _try(self, what: str, action: Callable[[Storage], _T], *, otherwise: _T) -> _T:
        """Do something on the local disk, within a limit; tell what fails, and return `otherwise`.

        In a thread of its own: a dead disk does not answer at all, and the upload must not wait
        for it. That thread is left behind, and the disk is not asked again.
        """
        results: list[_T] = []
        errors: list[BaseException] = []

        def act(storage: Storage) -> None:
            try:
                results.append(action(storage))
            except BaseException as error:  # noqa: BLE001 - raised below, or told
                errors.append(error)

        try:
            storage = self._open()
            if storage is None or self._is_off:
                return otherwise
            thread = threading.Thread(target=act, args=(storage,), name="fmnist-tier", daemon=True)
            thread.start()
            thread.join(limits.LOCAL_TIER_SECONDS)
            if thread.is_alive():
                self._is_off = True
                errors.append(StorageError(f"no answer in {limits.LOCAL_TIER_SECONDS:g} s"))
            for error in errors:
                raise error
        except StorageError as error:
            if what not in self._told:
                self._warn(f"{what}, the run goes on without: {error}")
            self._told.add(what)
            return otherwise
        self._told.discard(what)
        return results[0]

    def _open(self) -> Storage | None:
        """Return the folder of the run, None where its name is lost.

        Raises `StorageError` from the run's log.
        """
        if self._storage is None and not self._is_off:
            try:
                nonce = self._log.record(0).nonce
            except DamagedRecordError as error:
                self._is_off = True
                self._warn(f"no local tier: it is named after a record that is damaged: {error}")
                return None
            name = hashlib.sha256(f"{self._run}\n{nonce}".encode()).hexdigest()[:16]
            self._root = self._directory.absolute() / name
            self._storage = self._make(self._root)
        return self._storage


def to_remove(names: Iterable[str], *, committed: tuple[int, int], attempt: int) -> list[str]:
    """Return the copies that are of no use any more, by name: a pure decision of `attempt`.

    `committed` is step and attempt of the newest checkpoint. Kept are its copy, what this attempt
    may still commit, and whatever belongs to a newer attempt, which has its own opinion.
    """
    doomed: list[str] = []
    ahead: list[tuple[int, str]] = []
    for name in sorted(names):
        parts = step_and_attempt(name)
        if parts is None or parts == committed or parts[1] > attempt:
            continue
        if parts[1] == attempt and parts[0] > committed[0]:
            ahead.append((parts[0], name))
        else:
            doomed.append(name)
    return doomed + [name for _, name in sorted(ahead, reverse=True)[_AHEAD:]]


def _same(one: Copy, other: Copy) -> bool:
    """Whether two copies are the same state, saved by the same attempt."""
    return (one.record.attempt, one.checkpoint.step, one.checkpoint.parent) == (
        other.record.attempt,
        other.checkpoint.step,
        other.checkpoint.parent,
    ) and one.checkpoint.files == other.checkpoint.files


def _record_path(folder: str) -> str:
    return f"{COPIES}/{folder.rpartition('/')[2]}.json"


def _copy(storage: Storage, name: str) -> Copy | None:
    """Return the copy whose record has this name; None for what is damaged, gone or foreign."""
    try:
        data = storage.read(f"{COPIES}/{name}")
        record = decode(data, index=json.loads(data)["index"])
    except (MissingError, DamagedRecordError, IncompatibleError, ValueError, TypeError, KeyError):
        return None
    body = record.body
    if not isinstance(body, Checkpoint) or _record_path(body.folder) != f"{COPIES}/{name}":
        return None
    return Copy(record=record)


def _remove(storage: Storage, folder: str) -> None:
    # The record first: what a kill leaves behind is then no copy.
    storage.delete(_record_path(folder))
    storage.delete_folder(folder)
