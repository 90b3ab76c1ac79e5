"""Every fault of a network and of a store, at every request that S3 storage makes.

Each verb is done once per fault: where the fault passes, it succeeds; where it stays, it ends with
`StorageError` within its limit. Either way no reader sees half an object, and none is taken for
data. The limits are short here: a stall costs a second instead of many.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from faulty_proxy import Fault, FaultyProxy
from jobs import ROOT
from plain_s3 import PlainStorage
from run_builders import begin, files_of, snapshot, start, step_of
from run_files import assert_sound, records
from seaweed import Seaweed, child_environ, s3_environ

from fmnist_dist import limits
from fmnist_dist.checkpoint import s3bucket
from fmnist_dist.checkpoint.folder import write_file
from fmnist_dist.checkpoint.s3 import S3Storage
from fmnist_dist.checkpoint.storage import (
    AlreadyExistsError,
    MissingError,
    RefusedError,
    Storage,
    StorageError,
)

PART = 5 * 2**20
SMALL = bytes(range(256)) * 16
LARGE = os.urandom(2 * PART + 1000)
ALWAYS = float("inf")
# A fault that passes: long limits, and a stall is noticed soon. One that stays: short ones.
PATIENT = {"STORAGE_SECONDS": 60.0, "STORAGE_REQUEST_SECONDS": 2.0, "STORAGE_SILENCE_SECONDS": 1.0}
HASTY = {"STORAGE_SECONDS": 1.5, "STORAGE_REQUEST_SECONDS": 0.7, "STORAGE_SILENCE_SECONDS": 0.5}
QUICK = {"STORAGE_PAUSE_SECONDS": 0.01, "STORAGE_LONGEST_PAUSE_SECONDS": 0.1}


@dataclass(frozen=True)
class Verb:
    """A verb in a folder of its own, and the request of it that a fault meets."""

    name: str
    do: Callable[[Storage, str], object]
    method: str
    target: str  # of the request; `FOLDER` is the folder, as it stands in a path or a query
    before: Mapping[str, bytes]  # in the folder
    result: object  # of the verb
    after: Mapping[str, bytes]  # in the folder
    skip: int = 0


def _write(data: bytes) -> Callable[[Storage, str], object]:
    return lambda storage, folder: write_file(storage, f"{folder}/x", data)


def _verbs() -> list[Verb]:
    small, large, none = {"x": SMALL}, {"x": LARGE}, dict[str, bytes]()
    two = {"x": SMALL, "deep/y": SMALL}
    return [
        Verb("create", _write(SMALL), "PUT", "FOLDER/x$", none, None, small),
        Verb("begin", _write(LARGE), "POST", r"FOLDER/x\?uploads", none, None, large),
        Verb("part", _write(LARGE), "PUT", "FOLDER/x.*partNumber=2", none, None, large),
        Verb("complete", _write(LARGE), "POST", r"FOLDER/x\?uploadId", none, None, large),
        Verb("read", lambda s, f: s.read(f"{f}/x"), "GET", "FOLDER/x$", small, SMALL, small),
        Verb("ranges", lambda s, f: s.read(f"{f}/x"), "GET", "FOLDER/x$", large, LARGE, large, 1),
        Verb("list", lambda s, f: s.list(f), "GET", "prefix=.*FOLDER", two, ["deep", "x"], two),
        Verb("delete", lambda s, f: s.delete(f"{f}/x"), "DELETE", "FOLDER/x$", small, None, none),
        Verb("folder", lambda s, f: s.delete_folder(f), "POST", r"\?delete$", two, None, none),
    ]


VERBS = _verbs()
READING = {"read", "ranges", "list"}
PASSING = {
    "500": Fault("error", status=500),
    "503": Fault("error", status=503, code="SlowDown"),
    "409": Fault("error", status=409, code="ConditionalRequestConflict"),
    "proxy": Fault("error", status=502, body=b"<html>Bad Gateway</html>"),
    "cut": Fault("cut"),
    "lost": Fault("lost"),
    "late": Fault("late"),
    "stalled": Fault("stalled"),
    "truncated": Fault("truncated"),
    "hanging": Fault("hanging"),
}
APPLIED = {"lost", "late", "truncated", "hanging"}  # the server has heard of it


@pytest.fixture
def storage(s3_proxy: FaultyProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> S3Storage:
    """Return storage behind the proxy, with limits for a fault that passes."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, text in s3_environ(s3_proxy.endpoint).items():
        monkeypatch.setenv(name, text)
    shorten(monkeypatch, PATIENT)
    monkeypatch.setattr(s3bucket, "_PART_BYTES", PART)
    monkeypatch.setattr(s3bucket, "_WHOLE_BYTES", PART)
    return S3Storage(s3_url)


@pytest.fixture
def plain(s3: Seaweed, s3_url: str) -> PlainStorage:
    return PlainStorage(s3, s3_url)


def shorten(monkeypatch: pytest.MonkeyPatch, seconds: Mapping[str, float]) -> None:
    for name, limit in {**seconds, **QUICK}.items():
        assert hasattr(limits, name)
        monkeypatch.setattr(limits, name, limit)


def prepare(proxy: FaultyProxy, plain: PlainStorage, fault: Fault, *, times: float) -> list[Fault]:
    """Lay what the verbs find, and arm a fault for each; return the faults, in their order."""
    armed = []
    for verb in VERBS:
        for name, data in verb.before.items():
            plain.create(f"{verb.name}/{name}", data)
        target = verb.target.replace("FOLDER", verb.name)
        made = Fault(**{**vars_of(fault), "method": verb.method, "target": target})
        made.times, made.skip = times, verb.skip
        armed.append(proxy.add(made))
    return armed


def vars_of(fault: Fault) -> dict[str, object]:
    return {"kind": fault.kind, "status": fault.status, "code": fault.code, "body": fault.body}


def all_at_once(storage: Storage) -> dict[str, object]:
    """Do every verb, each on a thread; return by its name what it returned or raised."""

    def outcome(verb: Verb) -> object:
        began = time.monotonic()
        try:
            return verb.do(storage, verb.name)
        except (StorageError, AlreadyExistsError, MissingError) as error:
            return error
        finally:
            print(f"{verb.name}: {time.monotonic() - began:.1f} s")

    with ThreadPoolExecutor(len(VERBS)) as pool:
        return dict(zip([verb.name for verb in VERBS], pool.map(outcome, VERBS), strict=True))


def found(objects: Mapping[str, bytes], folder: str) -> dict[str, bytes]:
    return {
        path.removeprefix(f"{folder}/"): data
        for path, data in objects.items()
        if path.startswith(f"{folder}/")
    }


@pytest.mark.parametrize("kind", PASSING)
def test_a_fault_that_passes_is_overcome_by_every_verb(
    storage: S3Storage, s3_proxy: FaultyProxy, s3: Seaweed, plain: PlainStorage, kind: str
) -> None:
    armed = prepare(s3_proxy, plain, PASSING[kind], times=1)
    outcomes = all_at_once(storage)
    s3_proxy.settle()
    objects = s3.objects(plain.url)
    for verb, fault in zip(VERBS, armed, strict=True):
        assert fault.happened == 1, verb.name
        assert outcomes[verb.name] == verb.result, verb.name
        assert found(objects, verb.name) == verb.after, verb.name
    # Whoever begins again does not know what upload an answer that was lost had named.
    assert s3.uploads(plain.url) in ([], ["begin/x"] if kind in APPLIED else [])
    storage.delete_folder("begin")
    assert s3.uploads(plain.url) == []


@pytest.mark.parametrize("kind", [*PASSING, "403"])
def test_a_fault_that_stays_is_an_error_within_the_limit_and_leaves_nothing_torn(
    storage: S3Storage,
    s3_proxy: FaultyProxy,
    s3: Seaweed,
    plain: PlainStorage,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    shorten(monkeypatch, HASTY)
    fault = PASSING.get(kind) or Fault("error", status=403, code="AccessDenied")
    armed = prepare(s3_proxy, plain, fault, times=ALWAYS)
    outcomes = all_at_once(storage)
    s3_proxy.clear()
    s3_proxy.settle()
    objects = s3.objects(plain.url)
    for verb, met in zip(VERBS, armed, strict=True):
        outcome = outcomes[verb.name]
        there = found(objects, verb.name)
        assert met.happened > (kind != "403"), f"{verb.name} was not tried again"
        if kind == "truncated" and not _has_body(verb):
            assert outcome is None, verb.name
            continue
        assert isinstance(outcome, StorageError), (verb.name, outcome)
        assert isinstance(outcome, RefusedError) == (kind == "403")
        assert re.fullmatch(
            rf"cannot (write|read|list|delete) {plain.url}/{verb.name}[^\n]*", str(outcome)
        )
        if kind in APPLIED:
            assert there in (verb.before, verb.after), verb.name
        else:
            assert there == verb.before, verb.name
    storage.delete_folder("begin")
    storage.delete_folder("part")
    storage.delete_folder("complete")
    assert s3.uploads(plain.url) == []


def _has_body(verb: Verb) -> bool:
    """Whether the answer has one that can be cut off."""
    return verb.name not in {"create", "part", "delete"}
