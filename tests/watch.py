"""What must hold after every single operation on a run's storage, checked as it happens."""

import hashlib

from interleave import StagedStorage, Violation

from fmnist_dist.checkpoint.fold import fold
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import Attempt, Checkpoint, Record
from fmnist_dist.filenames import METRICS


class Watch:
    """Folds the log by itself and compares; knows what was acknowledged to whom."""

    def __init__(self, storage: StagedStorage) -> None:
        self.head = Head()
        self.acknowledged = 0  # the newest step that some writer was told is durable
        self.owners: list[str] = []
        self._folders: dict[str, int] = {}  # of all checkpoints, with the index of their record
        self._storage = storage
        storage.created = self._created
        storage.deleted = self._deleted

    @property
    def folders(self) -> set[str]:
        return set(self._folders)

    def _created(self, path: str) -> None:
        if not path.startswith("log/"):
            return
        index = int(path.removeprefix("log/").removesuffix(".json"))
        record = RunLog(self._storage).record(index)
        _require(index == self.head.index + 1, f"record {index} follows {self.head.index}")
        if isinstance(record.body, Attempt):
            self._takes_over(record.body.owner)
        else:
            _require(
                record.attempt == self.head.attempt,
                f"attempt {record.attempt} appends although {self.head.attempt} stands",
            )
        if isinstance(record.body, Checkpoint):
            self._commits(record.body, record)
        self.head = fold(self.head, index=index, body=record.body)
        self._same_head(record)

    def _takes_over(self, owner: str) -> None:
        superseded = owner in self.owners and self.owners[-1] != owner
        _require(not superseded, f"{owner} takes the run over a second time")
        self.owners.append(owner)

    def _commits(self, body: Checkpoint, record: Record) -> None:
        writer = int(body.folder.split("-")[1])
        _require(writer == record.attempt, f"attempt {writer} commits after {record.attempt} began")
        newest = self.head.newest_step
        _require(newest is None or body.step > newest, f"step {body.step} after {newest}")
        _require(body.folder not in self._folders, f"{body.folder} is committed twice")
        for name, file in body.files.items():
            data = self._storage.objects.get(f"{body.folder}/{name}")
            whole = data is not None and hashlib.sha256(data).hexdigest() == file.sha256
            _require(whole, f"{body.folder} is committed without its {name}")
        self._folders[body.folder] = record.index

    def _same_head(self, record: Record) -> None:
        _require(record.head == self.head, f"record {record.index} carries another head")

    def _deleted(self, path: str) -> None:
        _require(not path.startswith("log/"), f"{path} is deleted")
        folder, _, name = path.rpartition("/")
        index = self._folders.get(folder)
        if index is None:
            return
        retained = {each.index for each in self.head.checkpoints}
        _require(index not in retained, f"{path} is deleted, and its checkpoint is retained")
        _require(name != METRICS, f"the metrics of {folder} are deleted")


def _require(holds: object, message: str) -> None:
    if not holds:
        raise Violation(message)
