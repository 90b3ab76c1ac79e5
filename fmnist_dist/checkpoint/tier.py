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
import socket
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from fmnist_dist.checkpoint.adoption import refusal
from fmnist_dist.checkpoint.besteffort import BestEffort
from fmnist_dist.checkpoint.folder import write_file, write_files
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.localcopy import (
    COPIES,
    Copy,
    is_same,
    read_copy,
    record_path,
    remove_copy,
    to_remove,
)
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import (
    Body,
    Checkpoint,
    DamagedRecordError,
    Record,
    encode,
)
from fmnist_dist.checkpoint.restore import DamagedCheckpointError, read_file
from fmnist_dist.checkpoint.storage import (
    TEMPORARY_FOLDER,
    Storage,
    StorageError,
)
from fmnist_dist.checkpoint.sweep import CHECKPOINTS

_NOT_COPIED = "not copied to the local tier"
_NOT_DELETED = "old copies in the local tier were not deleted"
_NOT_READ = "the local tier cannot be read"

_T = TypeVar("_T")


class LocalTier:
    """One run's copies in a folder of this node; the disk's own errors are told, never raised.

    `run` is the run's URL. `warn` is told what fails.
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
        self._root = directory.absolute()
        self._run = run
        self._log = log
        self._warn = warn
        self._effort = BestEffort(warn)
        self._make = make
        self._storage: Storage | None = None
        self._is_lost = False  # what it is named after
        self._newest: tuple[Copy, str] | None = None  # that this process has made, and its place
        self._committed: tuple[int, int] | None = None  # step and attempt; None: nobody has said

    @property
    def newest_step(self) -> int | None:
        """The step of the newest copy that this process has made."""
        return self._newest[0].checkpoint.step if self._newest else None

    def keep(
        self,
        record: Record,
        files: Mapping[str, bytes | memoryview],
        *,
        confirm: Callable[[], None] = lambda: None,
    ) -> str | None:
        """Make a copy durable; return where it lies, as host:folder, and None where that failed.

        `record` is what a commit would append now. `confirm` is called before it is written, and
        may raise. What is saved again, because its commit failed, is not copied again.
        """
        copy = Copy(record=record)
        if self._newest is not None and is_same(self._newest[0], copy) and self._has_newest():
            confirm()
            return self._newest[1]

        def write(storage: Storage) -> bool:
            write_files(storage, copy.folder, files)
            return True

        def complete(storage: Storage) -> bool:
            write_file(storage, record_path(copy.folder), encode(record))
            return True

        is_written = self._try(_NOT_COPIED, write, otherwise=False)
        try:
            confirm()
        except BaseException:
            self._remove(copy.folder)
            raise
        if not is_written or not self._try(_NOT_COPIED, complete, otherwise=False):
            self._remove(copy.folder)
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
        self._remove(copy.folder)
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
        self._tidy(partial(to_remove, committed=committed, attempt=attempt))

    def sweep(self, *, committed: tuple[int, int], attempt: int) -> None:
        """Keep the newest checkpoint's copy alone: this attempt goes on from there.

        What killed writers have left is removed, and what this one has copied before a rollback.
        """
        self._committed = committed

        def remove(storage: Storage) -> None:
            names = storage.list(TEMPORARY_FOLDER)
            storage.delete(*(f"{TEMPORARY_FOLDER}/{name}" for name in names))

        self._try(_NOT_DELETED, remove, otherwise=None)
        self._tidy(partial(to_remove, committed=committed, attempt=attempt, ahead=0))

    def _tidy(self, useless: Callable[[Iterable[str]], list[str]]) -> None:
        def remove(storage: Storage) -> None:
            names = {*storage.list(CHECKPOINTS)}
            names |= {name.removesuffix(".json") for name in storage.list(COPIES)}
            for name in useless(names):
                remove_copy(storage, f"{CHECKPOINTS}/{name}")

        self._try(_NOT_DELETED, remove, otherwise=None)

    def clear(self) -> None:
        """Delete all copies of the run: it is finished."""
        self._try(_NOT_DELETED, lambda storage: storage.delete_folder(""), otherwise=None)
        self._newest = None

    def _has_newest(self) -> bool:
        """Whether nobody has cleaned up the disk since."""
        if self._newest is None:
            return False
        name = Path(record_path(self._newest[0].folder)).name
        return (
            self._try(_NOT_READ, lambda storage: read_copy(storage, name), otherwise=None)
            is not None
        )

    def _copies(self) -> list[Copy]:
        """Return all copies, the newest steps first."""

        def look(storage: Storage) -> list[Copy]:
            found = (read_copy(storage, name) for name in storage.list(COPIES))
            return [each for each in found if each is not None]

        nothing: list[Copy] = []
        found = self._try(_NOT_READ, look, otherwise=nothing)
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

        return self._try(_NOT_READ, read, otherwise={})

    def _remove(self, folder: str) -> None:
        self._try(_NOT_DELETED, lambda storage: remove_copy(storage, folder), otherwise=None)

    def _try(self, failed: str, action: Callable[[Storage], _T], *, otherwise: _T) -> _T:
        try:
            storage = self._open()
        except StorageError as error:  # the run's storage: it matters more elsewhere
            self._warn(f"{failed}: the run's log cannot be read: {error}")
            return otherwise
        if storage is None:
            return otherwise
        return self._effort.do(failed, lambda: action(storage), otherwise=otherwise)

    def _open(self) -> Storage | None:
        """Return the folder of the run, None where its name is lost.

        Raises `StorageError` from the run's log.
        """
        if self._storage is None and not self._is_lost:
            try:
                nonce = self._log.record(0).nonce
            except DamagedRecordError as error:
                self._is_lost = True
                self._warn(f"no local tier: it is named after a record that is damaged: {error}")
                return None
            self._root /= hashlib.sha256(f"{self._run}\n{nonce}".encode()).hexdigest()[:16]
            self._storage = self._make(self._root)
        return self._storage
