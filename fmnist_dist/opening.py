"""Opening a run: rank 0 takes it over, all other ranks are told where training goes on."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType

from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.disk import Disk
from fmnist_dist.checkpoint.failure import ATTEMPTS, note_failure, repeated_failure
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.hint import forget, read_hints
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.place import Place
from fmnist_dist.checkpoint.probe import probe
from fmnist_dist.checkpoint.record import DamagedRecordError
from fmnist_dist.checkpoint.restore import Restored
from fmnist_dist.checkpoint.storage import RefusedError, Storage
from fmnist_dist.checkpoint.tier import LocalTier
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.distributed.fingerprint import fingerprint
from fmnist_dist.distributed.share import broadcast
from fmnist_dist.distributed.world import World
from fmnist_dist.errors import (
    FmnistDistError,
    IncompatibleError,
    NoProgressError,
    PeerFailedError,
    PeerLostError,
    UsageError,
)
from fmnist_dist.handover.board import Board
from fmnist_dist.settings import Launch
from fmnist_dist.takeover import Resumption, owner_of, read_terms, take_over
from fmnist_dist.telemetry.events import EventLog

_events = EventLog("fmnist_dist.opening")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The run as this rank has it open."""

    log: RunLog
    write: Callable[[], RunWriter]  # this rank's writer, made when it is asked for
    resumption: Resumption
    files: Mapping[
        str, bytes | memoryview
    ]  # of the checkpoint to go on from; empty: from the initial weights


def open_place(url: str) -> Place:
    """Return where the run that `url` names is, or can be, with what its storage needs loaded.

    Makes no connection and no thread: a keeper calls it. Raises `IncompatibleError`, `UsageError`.
    """
    place = Place.of(url)
    folder = place.folder
    if folder is None:
        place.preload()
        return place
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
    return place


def check_tier(directory: Path, place: Place) -> None:
    """Refuse a local tier that cannot be one. Raises `IncompatibleError`, `UsageError`.

    A disk that has become read-only is no mistake of the user: the run goes on without it.
    """
    wanted = directory.resolve()
    run: Path | None = place.folder
    if run is not None and wanted.is_relative_to(run.resolve()):
        raise UsageError(
            f"--local-tier {directory}: is in --run-dir {place}; expected a folder elsewhere, on a "
            "disk of this node"
        )
    existing = next(each for each in (wanted, *wanted.parents) if _exists(each))
    if not existing.is_dir():
        raise IncompatibleError(
            f"--local-tier {directory}: {existing} is a file; expected a folder or a new name"
        )
    is_read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
    if not is_read_only and not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise IncompatibleError(
            f"--local-tier {directory}: {existing} cannot be read and written by this user (uid "
            f"{os.getuid()}); change its permissions, or take another folder"
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # inside a folder that this user may not enter (Python 3.11)
        return False


def open_run(
    launch: Launch,
    joined: World,
    place: Place,
    *,
    disk: Disk,
    agents: Sequence[str],
    num_samples: int,
    known: str | None,
    suspect: int | None,
) -> Run | None:
    """Take the run over on rank 0 and tell the others; None when nothing is left to do.

    Where some rank holds the state already, `known` is what rank 0 told then: the attempt goes on,
    and no file is read. `suspect` is the record of a checkpoint that must not be chosen.
    A storage that refuses this user is one that does not fit: nothing of this launch would ever be
    saved there. (Once training goes on it is one that is away.)
    """
    if not joined.is_main:
        storage = place.storage(single_writer=launch.config.single_writer)
        text = joined.hear("resumption")
        if text.startswith("failed "):
            raise PeerFailedError(int(text.removeprefix("failed ")))
        if text == "done":
            return None
        resumption = Resumption.from_json(text)
        with _refusals_final(place):
            _check_shared(RunLog(storage), place, resumption, joined)
        names = json.loads(joined.hear("files"))
        received = {name: broadcast(joined, None, source=0, key=f"file/{name}") for name in names}
        # With the connection that has just been used: a drain may not have the time to make one.
        return follow_run(launch, place, resumption, agents=agents, storage=storage, files=received)
    storage = place.storage(single_writer=launch.config.single_writer, disk=disk)
    if known is not None:
        joined.tell("resumption", known)
        joined.tell("files", "[]")
        return follow_run(
            launch, place, Resumption.from_json(known), agents=agents, storage=storage
        )
    try:
        log = RunLog(storage)
        with _refusals_final(place):
            taken = _take_over(
                launch,
                joined,
                storage,
                log,
                place,
                agents=agents,
                num_samples=num_samples,
                suspect=suspect,
            )
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
    if not writer.head.committed:
        _check_seen(joined, place)
    files = restored.files if restored else {}
    recorded = restored.commit.checkpoint.files if restored else {}  # and just verified
    joined.tell("files", json.dumps(list(files)))
    for name, data in files.items():
        broadcast(joined, data, source=0, key=f"file/{name}", digest=recorded[name].sha256)
    return Run(log=log, write=lambda: writer, resumption=resumption, files=files)


@contextmanager
def _refusals_final(place: Place) -> Iterator[None]:
    """Turn a storage's refusal of this user, `RefusedError`, into an `IncompatibleError`."""
    try:
        yield
    except RefusedError as error:
        raise IncompatibleError(f"--run-dir {place}: {error}") from error


def follow_run(
    launch: Launch,
    place: Place,
    resumption: Resumption,
    *,
    agents: Sequence[str],
    storage: Storage | None = None,
    files: Mapping[str, bytes | memoryview] = MappingProxyType({}),
) -> Run:
    """Return the run of an attempt that another process of this launch has begun."""
    used = storage or place.storage(single_writer=launch.config.single_writer)
    log = RunLog(used)

    def follow() -> RunWriter:
        return RunWriter.follow(
            used,
            log,
            attempt=resumption.attempt,
            parent=resumption.parent,
            kin=agents,
            tier=_tier(launch, place, log),
        )

    return Run(log=log, write=follow, resumption=resumption, files=files)


def _take_over(
    launch: Launch,
    joined: World,
    storage: Storage,
    log: RunLog,
    place: Place,
    *,
    agents: Sequence[str],
    num_samples: int,
    suspect: int | None,
) -> tuple[RunWriter, Resumption, Restored | None] | None:
    if place.folder is None:
        probe(storage, shown=str(place))
    head = log.read().head
    terms = read_terms(log, head, launch, num_samples=num_samples)
    if terms.done:
        return None
    owner = owner_of(head, agents)
    if place.folder is None and head.index < 0:
        forget(place.notes)  # of another run that was there, under this name
    _refuse_repetition(log, head, place, owner=owner)

    def lost_steps(attempt: int, step: int) -> int | None:
        reached = read_hints(place.notes).get(attempt)
        return None if reached is None else max(0, reached.last_step - step)

    return take_over(
        storage,
        log,
        launch,
        terms,
        owner=owner,
        agents=agents,
        world_size=joined.size,
        num_samples=num_samples,
        fingerprint=fingerprint(joined.device),
        lost_steps=lost_steps,
        suspect=suspect,
        tier=_tier(launch, place, log),
    )


def _tier(launch: Launch, place: Place, log: RunLog) -> LocalTier | None:
    """Return where this node keeps copies of the run, if it does."""
    directory = launch.config.local_tier
    if directory is None:
        return None
    return LocalTier(directory, run=str(place), log=log, warn=_events.warning)


def _refuse_repetition(log: RunLog, head: Head, place: Place, *, owner: str) -> None:
    """Raise `NoProgressError` where this launch has ended at one step, with one error, for long.

    A launch that a user starts has another owner: it counts anew.
    """
    mine = takewhile(lambda each: each.attempt.owner == owner, lineage.attempts(log, head))
    if failure := repeated_failure(place.notes, (each.number for each in mine)):
        raise NoProgressError(
            f"no progress: the last {ATTEMPTS} attempts of this launch ended after step "
            f"{failure.step} with {failure.error}; another one would too, so change what this "
            "names and launch again"
        )


@contextmanager
def noting_failures(place: Place, board: Board) -> Iterator[None]:
    """Leave word, for later attempts, of an error that nobody foresaw and that ends this one."""
    try:
        yield
    except FmnistDistError:
        raise
    except Exception as error:
        told = board.resumption
        if told is not None:  # else there is no attempt yet
            resumption = Resumption.from_json(told)
            step = max(board.step, resumption.step)
            note_failure(place.notes, attempt=resumption.attempt, step=step, error=error)
        raise


def _check_shared(log: RunLog, place: Place, resumption: Resumption, joined: World) -> None:
    """Refuse a run folder that is private to this node: it would be another run."""
    try:
        sees = log.record(resumption.attempt_index).nonce == resumption.nonce
    except DamagedRecordError:
        sees = False
    joined.tell(f"sees/{joined.rank}", "yes" if sees else "no")
    if sees:
        return
    raise IncompatibleError(
        f"--run-dir {place}: this node does not see what rank 0 wrote there; all nodes need the "
        "same folder (a network file system or object storage)"
    )


def _check_seen(joined: World, place: Place) -> None:
    """Refuse to begin a run that another node does not see: it may be this folder that is private.

    This rank would go on alone, with a second run next to the one that was meant. Where something
    has been saved there is no doubt: the other node is wrong, says so, and is left behind.
    """
    for rank in range(1, joined.size):
        if _answer(joined, f"sees/{rank}") != "yes":
            raise IncompatibleError(
                f"--run-dir {place}: rank {rank} does not see what this node has written there, "
                "and the run is new: all nodes need the same folder (a network file system or "
                "object storage)"
            )


def _answer(joined: World, key: str) -> str:
    """Return what a rank has told, also where it has left since."""
    try:
        return joined.hear(key)
    except PeerLostError:
        if not joined.store.check([key]):
            raise
        return joined.store.get(key).decode()
