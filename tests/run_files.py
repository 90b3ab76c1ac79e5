"""What lies in a run folder: its records as bodies, its bytes, and whether all of it is whole."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from s3_path import S3Path

from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.place import Place
from fmnist_dist.checkpoint.record import Checkpoint, Record
from fmnist_dist.checkpoint.storage import Storage
from fmnist_dist.checkpoint.verify import verify

B = TypeVar("B")
Folder = Path | S3Path  # of a run
Root = Folder | Storage  # of a run: its folder, or the storage that holds it


def storage_of(root: Root) -> Storage:
    """Return a run's storage to look into; that of one on S3 is not the one under test."""
    match root:
        case Path():
            return LocalStorage(root)
        case S3Path():
            return root.storage()
    return root


def opened(root: Folder) -> Storage:
    """Return a run's storage as a launch opens it."""
    return Place.of(str(root)).storage()


def log_of(root: Root) -> RunLog:
    return RunLog(storage_of(root))


def records(root: Root) -> list[Record]:
    log = log_of(root)
    return [log.record(index) for index in range(log.read().head.index + 1)]


def kinds(root: Root) -> list[str]:
    return [record.kind.value for record in records(root)]


def bodies(root: Root, kind: type[B]) -> list[B]:
    return [each.body for each in records(root) if isinstance(each.body, kind)]


def checkpoints(root: Root) -> list[Checkpoint]:
    """Return every checkpoint that was ever committed, retired ones too."""
    return bodies(root, Checkpoint)


def model_sha256(root: Root) -> str:
    """Return the digest of the newest checkpoint's weights."""
    return checkpoints(root)[-1].files["model.safetensors"].sha256


def assert_sound(root: Root) -> None:
    """Every byte that the run retains is what was saved."""
    findings = verify(storage_of(root), log_of(root))
    assert findings.damage == ()
    assert findings.records > 0


def saved_bytes(root: Folder) -> dict[str, bytes]:
    """Return every file of the log and the checkpoints."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in ("log", "checkpoints")
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }


def rewrite(path: Folder, **changed: object) -> bytes:
    """Return the record at `path` with other fields and the checksum that fits them."""
    fields = {**json.loads(path.read_bytes()), **changed}
    del fields["sha256"]
    fields["sha256"] = hashlib.sha256(_canonical(fields)).hexdigest()
    return _canonical(fields)


def _canonical(fields: Mapping[str, object]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")


def fields_of(line: str) -> dict[str, str]:
    """Return the `key=value` fields of a log line."""
    return dict(re.findall(r"(\w+)=(\"[^\"]*\"|\S+)", line))
