"""Reading checkpoints back: every byte is compared with its record before anybody uses it."""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fmnist_dist.checkpoint.head import Retained
from fmnist_dist.checkpoint.lineage import Commit, commit
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import Checkpoint, DamagedRecordError
from fmnist_dist.checkpoint.storage import MissingError, Storage
from fmnist_dist.errors import DataDamagedError, UsageError


class DamagedCheckpointError(Exception):
    """A checkpoint's record or one of its files is not what was saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A checkpoint and the verified bytes of its files."""

    commit: Commit
    files: dict[str, bytes]
    nearby: int = 0  # how many of the files were read from local copies


def read_file(storage: Storage, checkpoint: Checkpoint, name: str) -> bytes:
    """Return one verified file. Raises `DamagedCheckpointError`."""
    data = _read(storage, checkpoint, name)
    _check(checkpoint, name, data)
    return data


def _read(storage: Storage, checkpoint: Checkpoint, name: str) -> bytes:
    path = f"{checkpoint.folder}/{name}"
    expected = checkpoint.files[name]
    try:
        data = storage.read(path)
    except MissingError as error:
        raise DamagedCheckpointError(f"{path} is missing") from error
    if len(data) != expected.size:
        raise DamagedCheckpointError(f"{path} has {len(data)} bytes, {expected.size} were saved")
    return data


def _check(checkpoint: Checkpoint, name: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != checkpoint.files[name].sha256:
        raise DamagedCheckpointError(
            f"{checkpoint.folder}/{name} is damaged: its SHA-256 is not the one that was saved"
        )


def read_checkpoint(
    storage: Storage,
    log: RunLog,
    retained: Retained,
    *,
    nearby: Callable[[Checkpoint], Mapping[str, bytes]] = lambda _: {},
) -> Restored:
    """Return a retained checkpoint, whole and verified. Raises `DamagedCheckpointError`.

    `nearby` returns those of its files that were found, and verified, in a place that is nearer.
    """
    found = _commit(log, retained)
    checkpoint = found.checkpoint
    near = nearby(checkpoint)
    # The largest first: its checksum is computed while the others are read.
    names = sorted(
        checkpoint.files.keys() - near.keys(), key=lambda name: (-checkpoint.files[name].size, name)
    )
    far: dict[str, bytes] = {}
    with ThreadPoolExecutor(max_workers=1) as checking:
        checks = []
        for name in names:
            far[name] = data = _read(storage, checkpoint, name)
            checks.append(checking.submit(_check, checkpoint, name, data))
        for check in checks:
            check.result()
    return Restored(commit=found, files={**near, **far}, nearby=len(near))


def check_checkpoint(
    storage: Storage, log: RunLog, retained: Retained, *, go_on: Callable[[], None]
) -> None:
    """Read a retained checkpoint back, one file after the other, and keep none of them.

    `go_on` is called before each, and may raise. Raises `DamagedCheckpointError`.
    """
    found = _commit(log, retained)
    for name in sorted(found.checkpoint.files):
        go_on()
        read_file(storage, found.checkpoint, name)


def read_newest(storage: Storage, log: RunLog, *, step: int | None = None) -> Restored:
    """Return the newest valid checkpoint (or the one of `step`) for a reader that writes nothing.

    Retention may delete a checkpoint while it is read: what is missing counts as damage only if
    the head, read again, still retains it. Raises `UsageError` where there is no such checkpoint,
    `DataDamagedError` where none is valid.
    """
    damage: dict[int, str] = {}
    while True:
        head = log.read().head
        wanted = [each for each in head.checkpoints if step is None or each.step == step]
        left = [each for each in wanted if each.index not in damage]
        if not left and (damage or (step is None and head.committed)):
            why = "; ".join(damage.values()) or "all were put in quarantine, see `runs verify`"
            raise DataDamagedError(f"no valid checkpoint is left: {why}")
        if not left:
            steps = ", ".join(str(each.step) for each in head.checkpoints) or "none yet"
            of = "" if step is None else f" of step {step}"
            raise UsageError(f"no checkpoint{of} in this run; there is: {steps}")
        try:
            return read_checkpoint(storage, log, left[-1])
        except DamagedCheckpointError as error:
            if left[-1] in log.read().head.checkpoints:
                damage[left[-1].index] = str(error)


def _commit(log: RunLog, retained: Retained) -> Commit:
    try:
        return commit(log, retained.index)
    except DamagedRecordError as error:
        raise DamagedCheckpointError(str(error)) from error
