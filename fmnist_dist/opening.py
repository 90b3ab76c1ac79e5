"""Opening a run: rank 0 takes it over, all other ranks are told where training goes on."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fsspec.core import url_to_fs

from fmnist_dist.checkpoint.disk import FAULTS_VARIABLE, Disk, disk_from
from fmnist_dist.checkpoint.hint import read_hints
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import DamagedRecordError
from fmnist_dist.checkpoint.restore import Restored
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.distributed.fingerprint import fingerprint
from fmnist_dist.distributed.share import share_files
from fmnist_dist.distributed.world import World
from fmnist_dist.errors import FmnistDistError, IncompatibleError, PeerFailedError, UsageError
from fmnist_dist.settings import Launch
from fmnist_dist.takeover import Resumption, read_terms, take_over
from fmnist_dist.telemetry.events import EventLog

_events = EventLog("fmnist_dist.opening")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The run's folder and what this rank holds of it; only rank 0 has a writer."""

    root: Path
    log: RunLog
    writer: RunWriter | None
    resumption: Resumption
    files: Mapping[str, bytes]  # of the checkpoint to go on from; empty: from the initial weights


def run_folder(url: str) -> Path:
    """Return the local folder that a run URL names."""
    _, path = url_to_fs(url)
    folder = Path(path)
    existing = next(each for each in (folder, *folder.parents) if _exists(each))
    if not existing.is_dir():
        raise IncompatibleError(
            f"--run-dir {url}: {existing} is a file; expected a folder or a new name"
        )
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise IncompatibleError(
            f"--run-dir {url}: {existing} cannot be read and written by this user (uid "
            f"{os.getuid()}); change its permissions, or take another folder"
        )
    return folder


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # inside a folder that this user may not enter (Python 3.11)
        return False


def open_run(
    launch: Launch, joined: World, root: Path, environ: Mapping[str, str], *, num_samples: int
) -> Run | None:
    """Take the run over on rank 0 and tell the others; None when nothing is left to do."""
    if not joined.is_main:
        log = RunLog(LocalStorage(root))
        text = joined.hear("resumption")
        if text.startswith("failed "):
            raise PeerFailedError(int(text.removeprefix("failed ")))
        if text == "done":
            return None
        resumption = Resumption.from_json(text)
        _check_shared(log, root, resumption)
        files = share_files(joined, None) if resumption.step else {}
        return Run(root=root, log=log, writer=None, resumption=resumption, files=files)
    try:
        storage = LocalStorage(root, single_writer=launch.config.single_writer, disk=_disk(environ))
        log = RunLog(storage)
        taken = _take_over(launch, joined, storage, log, root, num_samples=num_samples)
    except FmnistDistError as error:
        joined.tell("resumption", f"failed {int(error.exit_code)}")
        joined.await_heard("resumption")
        raise
    if taken is None:
        joined.tell("resumption", "done")
        joined.await_heard("resumption")
        return None
    writer, resumption, restored = taken
    joined.tell("resumption", resumption.to_json())
    files = share_files(joined, restored.files) if restored else {}
    return Run(root=root, log=log, writer=writer, resumption=resumption, files=files)


def _disk(environ: Mapping[str, str]) -> Disk:
    faults = environ.get(FAULTS_VARIABLE)
    if not faults:
        return Disk()
    try:
        disk = disk_from(faults)
    except ValueError as error:
        raise UsageError(str(error)) from error
    _events.warning("faults are armed", faults=faults)
    return disk


def _take_over(
    launch: Launch,
    joined: World,
    storage: LocalStorage,
    log: RunLog,
    root: Path,
    *,
    num_samples: int,
) -> tuple[RunWriter, Resumption, Restored | None] | None:
    terms = read_terms(log, log.read().head, launch, num_samples=num_samples)
    if terms.done:
        return None

    def lost_steps(attempt: int, step: int) -> int | None:
        reached = read_hints(root).get(attempt)
        return None if reached is None else max(0, reached.last_step - step)

    return take_over(
        storage,
        log,
        launch,
        terms,
        owner=joined.owner,
        world_size=joined.size,
        num_samples=num_samples,
        fingerprint=fingerprint(joined.device),
        lost_steps=lost_steps,
    )


def _check_shared(log: RunLog, root: Path, resumption: Resumption) -> None:
    """Refuse a run folder that is private to this node: it would be another run."""
    try:
        if log.record(resumption.attempt_index).nonce == resumption.nonce:
            return
    except DamagedRecordError:
        pass
    raise IncompatibleError(
        f"--run-dir {root}: this node does not see what rank 0 wrote there; all nodes need the "
        "same folder (a network file system or object storage)"
    )
