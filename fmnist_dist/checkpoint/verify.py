"""Re-reading every byte that a run retains: records, checkpoints, and the metrics of the line.

Writes nothing, so it may run beside a training: a checkpoint that retention takes away while it is
read is no damage. A checkpoint in quarantine is not retained: it is named, and not read.
"""

from dataclasses import dataclass, field

from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.head import Head, Retained
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import Checkpoint, DamagedRecordError, Quarantine
from fmnist_dist.checkpoint.restore import DamagedCheckpointError, read_file
from fmnist_dist.checkpoint.storage import Storage
from fmnist_dist.errors import DataDamagedError
from fmnist_dist.filenames import METRICS


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was read, and each damage in one line."""

    records: int
    checkpoints: int
    files: int
    bytes: int
    valid_steps: tuple[int, ...]  # of retained checkpoints that are whole, rising
    quarantined: tuple[str, ...]  # what was found damaged before, and is never used again
    damage: tuple[str, ...]


@dataclass(slots=True)
class _Reading:
    storage: Storage
    files: int = 0
    bytes: int = 0
    damage: list[str] = field(default_factory=list)

    def problems(self, checkpoint: Checkpoint, names: list[str]) -> list[str]:
        """Read files of a checkpoint; return what is wrong with them."""
        found: list[str] = []
        for name in names:
            self.files += 1
            self.bytes += checkpoint.files[name].size
            try:
                read_file(self.storage, checkpoint, name)
            except DamagedCheckpointError as error:
                found.append(str(error))
        return found


def verify(storage: Storage, log: RunLog) -> Findings:
    """Read and compare everything. Raises `DataDamagedError` where no record is intact."""
    head = log.read().head
    reading = _Reading(storage)
    quarantined = _read_records(log, head, reading)
    valid = [each.step for each in head.checkpoints if _is_whole(log, each, reading)]
    _read_metrics(log, head, reading)
    return Findings(
        records=head.index + 1,
        checkpoints=len(head.checkpoints),
        files=reading.files,
        bytes=reading.bytes,
        valid_steps=tuple(valid),
        quarantined=tuple(quarantined),
        damage=tuple(reading.damage),
    )


def _read_records(log: RunLog, head: Head, reading: _Reading) -> list[str]:
    quarantined: list[str] = []
    for index in range(head.index + 1):
        try:
            body = log.record(index).body
        except DamagedRecordError as error:
            reading.damage.append(str(error))
            continue
        if isinstance(body, Quarantine):
            quarantined.append(f"step {body.step} is in quarantine: {body.why}")
    return quarantined


def _is_whole(log: RunLog, retained: Retained, reading: _Reading) -> bool:
    try:
        found = lineage.commit(log, retained.index).checkpoint
    except DamagedRecordError:
        return False  # among the damaged records already
    problems = reading.problems(found, sorted(found.files))
    if problems and retained in log.read().head.checkpoints:
        reading.damage += problems
    return not problems


def _read_metrics(log: RunLog, head: Head, reading: _Reading) -> None:
    """Read the metrics of checkpoints that led to the newest one and were retired since."""
    try:
        line = lineage.line(log, head)
    except DataDamagedError as error:
        reading.damage.append(str(error))
        return
    retained = {each.index for each in head.checkpoints}
    for each in line:
        if each.index not in retained and METRICS in each.checkpoint.files:
            reading.damage += reading.problems(each.checkpoint, [METRICS])
