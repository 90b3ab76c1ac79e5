"""One record of the run log: its kinds, its bodies, and its bytes with their checksum.

A record's bytes are canonical JSON (sorted keys, no spaces, one line) that carries the SHA-256 of
itself without that key. Whatever is not byte for byte what `encode` writes is damaged: a flipped
bit in a digit, a key or a space is found alike.
"""

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from fmnist_dist.checkpoint.head import Head
from fmnist_dist.digest import EpochDigest
from fmnist_dist.errors import IncompatibleError
from fmnist_dist.interval import Interval

FORMAT = 1

Json = Any  # what json.loads returns; every use is narrowed by a body's constructor


class DamagedRecordError(Exception):
    """The bytes are not what `encode` wrote."""


class Kind(StrEnum):
    ATTEMPT = "attempt"
    CHECKPOINT = "checkpoint"
    OVERRIDE = "override"
    QUARANTINE = "quarantine"
    RETIRE = "retire"
    FINISH = "finish"
    HEAL = "heal"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A launch took the run over. `config` is the run's own, before overrides."""

    owner: str
    world_size: int
    fingerprint: dict[str, str]
    config: dict[str, Json]
    explicit: dict[str, Json]  # what this launch's user wrote; the next launch is compared with it
    wanted: dict[str, Json]  # changes of settings that the next `override` record makes effective
    num_samples: int
    same_bits: bool  # false from the first attempt on whose fingerprint differs


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A state became durable. `parent` is the checkpoint from which training came to this one."""

    step: int
    epoch: float  # epochs done, e.g. 2.5
    reason: str
    folder: str
    files: dict[str, File]
    parent: int | None  # index of its record; None: from the initial weights
    ledger: tuple[EpochDigest, ...]  # every epoch touched since the parent, counted from its start
    evaluated: bool  # the evaluation due at this step, if any, is among the metric rows
    metrics: dict[str, float]  # the last value of each
    swept: int  # the writer has swept after every attempt up to this one
    copies: tuple[str, ...] = ()  # where it was copied to besides, as host:folder
    interval: Interval | None = None  # in force when it was made, if it was chosen by the program


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """From `step` on these settings hold. Durable before that step runs."""

    step: int
    settings: dict[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """A checkpoint was found damaged. It is never chosen again; its files stay for a look."""

    checkpoint: int  # index of its record
    step: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retire:
    """Checkpoints that may be deleted: newer verified ones stand. Their metrics stay."""

    checkpoints: tuple[int, ...]  # indices of their records
    folders: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The run is complete. `metrics` holds the last value of each, the final evaluation's too."""

    step: int
    reason: str
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heal:
    """A worker was lost or stuck, and the attempt went on with a fresh one in its place."""

    step: int  # where training went on
    rank: int  # whose worker it was
    reason: str
    seconds: float  # without training
    lost_steps: int  # that nobody who was left had done, and so were done again


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """The line is cut at `step`: no checkpoint beyond it is ever chosen again.

    Training goes on from the newest checkpoint up to `step`, for 0 from the initial weights, and
    passes over the steps from `step` to `until`: it consumes them without learning. Overrides
    stand, those from beyond the cut too: somebody asked for them from their step on.
    """

    step: int
    until: int  # exclusive; steps are counted over the whole run, from 0
    why: str


Body = Attempt | Checkpoint | Override | Quarantine | Retire | Finish | Heal | Rollback

_KINDS: dict[type[Body], Kind] = {
    Attempt: Kind.ATTEMPT,
    Checkpoint: Kind.CHECKPOINT,
    Override: Kind.OVERRIDE,
    Quarantine: Kind.QUARANTINE,
    Retire: Kind.RETIRE,
    Finish: Kind.FINISH,
    Heal: Kind.HEAL,
    Rollback: Kind.ROLLBACK,
}
_BODIES = {kind: body for body, kind in _KINDS.items()}


def _now() -> str:
    """Return the time as UTC ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A body with who wrote it when, and the head of the log as it stands after it."""

    index: int
    attempt: int
    body: Body
    head: Head
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))
    written_at: str = field(default_factory=_now)

    @property
    def kind(self) -> Kind:
        return _KINDS[type(self.body)]


def path_of(index: int) -> str:
    return f"log/{index:012d}.json"


def encode(record: Record) -> bytes:
    fields: dict[str, Json] = {
        "format": FORMAT,
        "index": record.index,
        "attempt": record.attempt,
        "kind": record.kind.value,
        "nonce": record.nonce,
        "written_at": record.written_at,
        "body": _fields(record.body),
        "head": dataclasses.asdict(record.head),
    }
    fields["sha256"] = hashlib.sha256(_canonical(fields)).hexdigest()
    return _canonical(fields)


def decode(data: bytes, *, index: int) -> Record:
    """Return the record that `encode` wrote at `index`.

    Raises `DamagedRecordError`, or `IncompatibleError` for an intact record of another version.
    """
    try:
        fields = json.loads(data)
        checksum = fields.pop("sha256")
        intact = checksum == hashlib.sha256(_canonical(fields)).hexdigest()
        intact = intact and data == _canonical({**fields, "sha256": checksum})
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise DamagedRecordError(f"{path_of(index)}: not a record ({error})") from error
    if not intact:
        raise DamagedRecordError(f"{path_of(index)}: its checksum does not fit its bytes")
    if fields["format"] > FORMAT:
        raise IncompatibleError(
            f"{path_of(index)} has format {fields['format']}, this version reads up to {FORMAT}: "
            "the run was continued by a newer fmnist_dist, install that one"
        )
    if fields["index"] != index:
        raise DamagedRecordError(f"{path_of(index)}: holds the record of index {fields['index']}")
    try:
        return Record(
            index=index,
            attempt=fields["attempt"],
            body=_body(Kind(fields["kind"]), fields["body"]),
            head=Head.from_json(fields["head"]),
            nonce=fields["nonce"],
            written_at=fields["written_at"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise IncompatibleError(
            f"{path_of(index)} is intact and holds what this version does not know ({error}): "
            "the run was continued by another fmnist_dist, install that one"
        ) from error


def _fields(body: Body) -> dict[str, Json]:
    fields = dataclasses.asdict(body)
    if isinstance(body, Checkpoint):
        # Named only where there are any: versions that do not know them read all other runs.
        for name in ("copies", "interval"):
            if not fields[name]:
                del fields[name]
    return fields


def _body(kind: Kind, fields: Mapping[str, Json]) -> Body:
    values = dict(fields)
    if kind is Kind.CHECKPOINT:
        values["files"] = {name: File(**file) for name, file in values["files"].items()}
        values["ledger"] = tuple(
            EpochDigest(epoch=e["epoch"], count=e["count"], digest=tuple(e["digest"]))
            for e in values["ledger"]
        )
        values["copies"] = tuple(values.get("copies", ()))
        if "interval" in values:
            values["interval"] = Interval(**values["interval"])
    if kind is Kind.RETIRE:
        values = {name: tuple(value) for name, value in values.items()}
    return _BODIES[kind](**values)


def _canonical(fields: Mapping[str, Json]) -> bytes:
    # allow_nan=False: NaN is no JSON, and a metric that is none must not enter the log unseen.
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")
