"""Re-reading every byte that a run retains: records, checkpoints, and the metrics of the line."""

from dataclasses import dataclass

from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import Checkpoint, DamagedRecordError, Quarantine
from fmnist_dist.checkpoint.restore import DamagedCheckpointError, read_file
from fmnist_dist.checkpoint.storage import Storage
from fmnist_dist.filenames import METRICS


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was read, and each damage in one line."""

    records: int
    checkpoints: int
    files: int
    bytes: int
    valid_steps: tuple[int, ...]  # of retained checkpoints that are whole
    damage: tuple[str, ...]


def verify(storage: Storage, log: RunLog) -> Findings:
    """Read and compare everything. Raises `DataDamagedError` where no record is intact."""
    head = log.read().head
    damage = [*_bad_records(log, head.index)]
    files = size = 0
    valid = []
    retained = {each.index for each in head.checkpoints}
    for index in range(head.index + 1):
        try:
            found = lineage.commit(log, index).checkpoint
        except DamagedRecordError:
            continue
        names = sorted(found.files) if index in retained else [METRICS]
        bad = [
            problem
            for name in names
            if name in found.files and (problem := _problem(storage, found, name))
        ]
        files += len(names)
        size += sum(found.files[name].size for name in names if name in found.files)
        if index in retained and not bad:
            valid.append(found.step)
        damage += bad
    return Findings(
        records=head.index + 1,
        checkpoints=len(retained),
        files=files,
        bytes=size,
        valid_steps=tuple(valid),
        damage=tuple(damage),
    )


def _bad_records(log: RunLog, newest: int) -> list[str]:
    bad = []
    for index in range(newest + 1):
        try:
            body = log.record(index).body
        except DamagedRecordError as error:
            bad.append(str(error))
            continue
        if isinstance(body, Quarantine):
            bad.append(f"step {body.step} was put in quarantine: {body.why}")
    return bad


def _problem(storage: Storage, checkpoint: Checkpoint, name: str) -> str | None:
    try:
        read_file(storage, checkpoint, name)
    except DamagedCheckpointError as error:
        return str(error)
    return None
