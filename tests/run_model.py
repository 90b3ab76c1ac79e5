"""A model of a run beside its storage: it judges every operation as it happens."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from memory_storage import MemoryStorage

from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.record import (
    Attempt,
    Checkpoint,
    Finish,
    Heal,
    Quarantine,
    Retire,
    Rollback,
    decode,
)
from fmnist_dist.checkpoint.storage import AlreadyExistsError, StorageError
from fmnist_dist.filenames import METRICS


class Killed(BaseException):
    """The process died."""


@dataclass
class Trouble:
    """What happens to the operation before which `after` others went well.

    `killed` and `refused`: before it has happened; `died`, `applied` and `lost`: after it has;
    `meanwhile`: somebody else does something in between.
    """

    kind: str
    after: int
    meanwhile: Callable[[], None]
    struck: bool = False


@dataclass
class Model:
    """What a run should be, without any of the code that makes it so."""

    attempt: int = 0
    owners: list[str] = field(default_factory=list)
    line: dict[int, int] = field(default_factory=dict)  # step: index of the record; rising steps
    whole: dict[int, bool] = field(default_factory=dict)  # by index, of every checkpoint
    folders: dict[str, int] = field(default_factory=dict)
    cut_off: set[int] = field(default_factory=set)
    passed_over: set[int] = field(default_factory=set)
    cut: int | None = None
    committed: bool = False
    finished_step: int | None = None
    heals: int = 0
    records: int = 0

    @property
    def newest(self) -> int | None:
        """The newest step that can be read."""
        return max((step for step, index in self.line.items() if self.whole[index]), default=None)

    def is_superseded(self, owner: str) -> bool:
        return owner in self.owners and self.owners[-1] != owner

    def created(self, objects: dict[str, bytes], path: str) -> None:
        if not path.startswith("log/"):
            return
        index, newest = self.records, self.newest
        record = decode(objects[path], index=index)
        self.records += 1
        body = record.body
        if isinstance(body, Attempt):
            assert not self.is_superseded(body.owner), "a superseded owner comes back"
            self.owners.append(body.owner)
            self.attempt += 1
            self.finished_step = None
        assert record.attempt == self.attempt, "a fenced attempt appends"
        match body:
            case Checkpoint():
                self._commits(objects, index, body)
            case Quarantine():
                assert not self.whole[body.checkpoint], "a whole checkpoint is put in quarantine"
                self._leave({body.checkpoint})
            case Retire():
                self._leave(set(body.checkpoints))
                self.cut_off -= set(body.checkpoints)
            case Rollback():
                self._cuts(index, body)
            case Finish():
                self.finished_step = body.step
            case Heal():
                self.heals += 1
            case _:
                pass
        if not isinstance(body, Rollback):
            assert (self.newest or 0) >= (newest or 0), "the newest step goes back"
        self._compare(record.head)

    def deleted(self, path: str) -> None:
        assert not path.startswith("log/"), "a record is deleted"
        folder, _, name = path.rpartition("/")
        if folder in self.folders:
            assert self.folders[folder] not in self.line.values(), "what is retained is deleted"
            assert name != METRICS, "metrics are deleted"

    def _commits(self, objects: dict[str, bytes], index: int, body: Checkpoint) -> None:
        assert body.step > max(self.line, default=0), "a step that stands is committed again"
        assert body.folder not in self.folders, "a folder is committed twice"
        for name, file in body.files.items():
            data = objects.get(f"{body.folder}/{name}", b"")
            assert hashlib.sha256(data).hexdigest() == file.sha256, "committed without its files"
        self.folders[body.folder] = self.line[body.step] = index
        self.whole[index] = self.committed = True

    def _leave(self, indices: set[int]) -> None:
        self.line = {step: index for step, index in self.line.items() if index not in indices}

    def _cuts(self, index: int, body: Rollback) -> None:
        cut = {each for step, each in self.line.items() if step > body.step}
        self._leave(cut)
        assert self.line or body.step == 0, "a rollback leaves nothing to go on from"
        self.cut_off |= cut
        self.cut = index
        self.passed_over |= set(range(body.step, body.until))
        self.committed = self.committed and body.step > 0
        self.finished_step = None

    def _compare(self, head: Head) -> None:
        assert {each.step: each.index for each in head.checkpoints} == self.line
        assert [each.step for each in head.checkpoints] == sorted(self.line)
        passed = [step for first, until in head.passed_over for step in range(first, until)]
        assert passed == sorted(self.passed_over)
        assert (head.cut, set(head.cut_off)) == (self.cut, self.cut_off)
        assert (head.committed, head.finished_step) == (self.committed, self.finished_step)
        assert (head.index, head.attempt) == (self.records - 1, self.attempt)


class Network(MemoryStorage):
    """Storage with one trouble at a time; a folder is deleted object by object."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.trouble: Trouble | None = None
        self.originals: dict[str, bytes] = {}  # whatever was deleted or damaged since
        self._model = model

    def create(self, path: str, data: bytes) -> None:
        kind = self._strikes()
        super().create(path, data)
        self.originals[path] = data
        self._model.created(self.objects, path)
        if kind == "lost":
            raise AlreadyExistsError(path)
        _fail(kind)

    def read(self, path: str) -> bytes:
        _fail(self._strikes())
        return super().read(path)

    def list(self, folder: str) -> list[str]:
        _fail(self._strikes())
        return super().list(folder)

    def delete(self, *paths: str) -> None:
        for path in paths:
            kind = self._strikes()
            if path in self.objects:
                super().delete(path)
                self._model.deleted(path)
            _fail(kind)

    def delete_folder(self, folder: str) -> None:
        for name in self.list(folder):
            self.delete(f"{folder}/{name}")

    def _strikes(self) -> str | None:
        """Return what happens after the operation, None for nothing; raise what happens before."""
        trouble = self.trouble
        if trouble is None:
            return None
        if trouble.after:
            trouble.after -= 1
            return None
        self.trouble = None
        trouble.struck = True
        if trouble.kind == "killed":
            raise Killed
        if trouble.kind == "refused":
            raise StorageError("refused")
        if trouble.kind == "meanwhile":
            trouble.meanwhile()
            return None
        return trouble.kind


def _fail(kind: str | None) -> None:
    if kind == "died":
        raise Killed
    if kind is not None:
        raise StorageError("no answer")
