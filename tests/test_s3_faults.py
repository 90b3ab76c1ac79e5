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
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from faulty_proxy import Fault, FaultyProxy
from jobs import ROOT, wait_for
from plain_s3 import PlainStorage
from run_builders import begin, files_of, snapshot, start, step_of
from run_files import assert_sound, records
from seaweed import Seaweed, child_environ

from fmnist_dist import limits
from fmnist_dist.checkpoint import s3bucket, s3client
from fmnist_dist.checkpoint.deadline import within
from fmnist_dist.checkpoint.folder import write_file
from fmnist_dist.checkpoint.s3 import S3Storage
from fmnist_dist.checkpoint.storage import (
    AlreadyExistsError,
    MissingError,
    RefusedError,
    Storage,
    StorageError,
)
from fmnist_dist.errors import FencedError

PART = 5 * 2**20  # S3 takes no smaller one, but the last
SMALL = bytes(range(256)) * 16
LARGE = os.urandom(PART + 1000)
ALWAYS = float("inf")
# A fault that passes: long limits, and a stall is noticed soon. One that stays: short ones.
PATIENT = {
    "STORAGE_SECONDS": 60.0,
    "STORAGE_REQUEST_SECONDS": 2.0,
    "STORAGE_SILENCE_SECONDS": 1.0,
    "STORAGE_BYTES_PER_SECOND": 5e6,
}
HASTY = {
    "STORAGE_SECONDS": 2.0,
    "STORAGE_REQUEST_SECONDS": 2.0,  # so long an upload that fails may take to be aborted
    "STORAGE_SILENCE_SECONDS": 0.5,
    "STORAGE_BYTES_PER_SECOND": 2e7,
}
SESSIONS: list[Any] = []  # of botocore: what each loads takes longer than a test
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
    "short": Fault("short"),
}
STAYING = {"500", "late", "hanging"}  # each another way through the code
APPLIED = {"lost", "late", "truncated", "hanging", "short"}  # the server has heard of it


@pytest.fixture
def storage(proxied_url: str, monkeypatch: pytest.MonkeyPatch) -> S3Storage:
    """Return storage behind the proxy, with limits for a fault that passes."""
    shorten(monkeypatch, PATIENT)
    monkeypatch.setattr(s3client, "_preloaded", SESSIONS)
    s3client.preload()
    monkeypatch.setattr(s3bucket, "_PART_BYTES", PART)
    monkeypatch.setattr(s3bucket, "_WHOLE_BYTES", PART)
    storage = S3Storage(proxied_url)
    assert storage.list("nothing") == []  # what is slow the first time is done before any fault
    return storage


@pytest.fixture
def plain(seaweed: Seaweed, s3_url: str) -> PlainStorage:
    return PlainStorage(seaweed, s3_url)


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
    storage: S3Storage, s3_proxy: FaultyProxy, seaweed: Seaweed, plain: PlainStorage, kind: str
) -> None:
    armed = prepare(s3_proxy, plain, PASSING[kind], times=1)
    outcomes = all_at_once(storage)
    s3_proxy.settle()
    objects = seaweed.objects(plain.url)
    for verb, fault in zip(VERBS, armed, strict=True):
        assert fault.happened == 1, verb.name
        assert outcomes[verb.name] == verb.result, verb.name
        assert found(objects, verb.name) == verb.after, verb.name
    # Whoever begins again does not know what upload an answer that was lost had named.
    assert seaweed.uploads(plain.url) in ([], ["begin/x"] if kind in APPLIED else [])
    storage.delete_folder("begin")
    assert seaweed.uploads(plain.url) == []


@pytest.mark.parametrize(
    "kind",
    [
        "403",
        *(
            kind if kind in STAYING else pytest.param(kind, marks=pytest.mark.slow)
            for kind in PASSING
            if kind != "short"  # many answers have no body that it could shorten
        ),
    ],
)
def test_a_fault_that_stays_is_an_error_within_the_limit_and_leaves_nothing_torn(
    storage: S3Storage,
    s3_proxy: FaultyProxy,
    seaweed: Seaweed,
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
    objects = seaweed.objects(plain.url)
    for verb, met in zip(VERBS, armed, strict=True):
        outcome = outcomes[verb.name]
        there = found(objects, verb.name)
        assert met.happened > (kind != "403"), f"{verb.name} was not tried again"
        assert isinstance(outcome, StorageError), (verb.name, outcome)
        assert isinstance(outcome, RefusedError) == (kind == "403")
        assert re.fullmatch(
            rf"cannot (write|read|list|delete) {plain.url}/{verb.name}[^\n]*", str(outcome)
        )
        if kind in APPLIED:
            assert there in (verb.before, verb.after), verb.name
        else:
            assert there == verb.before, verb.name
    # An upload that fails is aborted; only one whose name nobody was told is left to a sweep.
    assert set(seaweed.uploads(plain.url)) <= ({"begin/x"} if kind in APPLIED else set())
    storage.delete_folder("begin")
    assert seaweed.uploads(plain.url) == []


@pytest.mark.parametrize("kind", ["lost", "late"])
def test_an_append_whose_answer_is_lost_is_found_to_be_ones_own(
    storage: S3Storage, s3_proxy: FaultyProxy, plain: PlainStorage, kind: str
) -> None:
    """And not taken for a rival's: then the next index would hold the same record once more."""
    with s3_proxy.during(Fault(kind, "PUT", "/log/")):
        writer = begin(storage)
    with s3_proxy.during(Fault(kind, "PUT", "/log/")):
        assert writer.save(snapshot(10))
    s3_proxy.settle()
    assert [record.kind.value for record in records(plain)] == ["attempt", "checkpoint"]
    assert_sound(plain)


def test_a_record_without_an_answer_may_stand_so_its_files_stay(
    storage: S3Storage, s3_proxy: FaultyProxy, plain: PlainStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = begin(storage)
    shorten(monkeypatch, HASTY)
    with s3_proxy.during(Fault("lost", "PUT", "/log/", times=ALWAYS)), pytest.raises(StorageError):
        writer.save(snapshot(10))
    shorten(monkeypatch, PATIENT)
    _, restored, swept = start(storage, "another")
    assert swept.orphans == ()
    assert restored is not None
    assert restored.files == files_of(10)
    assert_sound(plain)


def test_a_record_that_arrives_after_a_newer_attempt_is_refused_by_the_store(
    storage: S3Storage, s3_proxy: FaultyProxy, plain: PlainStorage
) -> None:
    """P4: what is under way when another launch takes over changes nothing when it comes."""
    writer = begin(storage)
    late = s3_proxy.add(Fault("late", "PUT", "/log/000000000001", times=1))
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(writer.save, snapshot(10))
        wait_for(lambda: late.happened, "a record under way")
        other, restored, _ = start(plain, "another", report=pytest.fail)
        assert restored is None
        with pytest.raises(FencedError, match="attempt 2 has taken this run over"):
            saving.result(60)
    s3_proxy.settle()
    assert [record.kind.value for record in records(plain)] == ["attempt", "attempt"]
    assert other.save(snapshot(10))
    assert len(plain.list("checkpoints")) == 1
    assert_sound(plain)


def test_files_that_arrive_after_the_save_was_given_up_are_swept_by_the_next_launch(
    storage: S3Storage, s3_proxy: FaultyProxy, plain: PlainStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = begin(storage)
    assert writer.save(snapshot(10))
    shorten(monkeypatch, HASTY)
    with s3_proxy.during(Fault("late", "PUT", "/optimizer", times=ALWAYS)) as late:
        with pytest.raises(StorageError, match="cannot write"):
            writer.save(snapshot(20))
        s3_proxy.settle()
    assert late.happened > 1
    shorten(monkeypatch, PATIENT)
    left = [name for name in plain.list("checkpoints") if name.startswith("000000020")]
    _, restored, swept = start(storage, "another", report=pytest.fail)
    assert step_of(restored) == 10
    assert [folder.rpartition("/")[2] for folder in swept.orphans] == left
    assert len(plain.list("checkpoints")) == 1
    assert_sound(plain)


def test_a_connection_that_stalls_leaves_a_drain_the_time_for_another(
    proxied_url: str, s3_proxy: FaultyProxy, plain: PlainStorage
) -> None:
    """With the limits as they are: a stall is noticed after ten seconds, and a drain has four."""
    plain.create("x", SMALL)
    storage = S3Storage(proxied_url)
    assert storage.list("nothing") == []
    with s3_proxy.during(Fault("stalled", "GET", "/x$")) as stalled, within(4.0):
        assert storage.read("x") == SMALL
    assert stalled.happened == 1


def test_a_connection_of_10_kb_per_second_brings_small_objects_whole_and_large_ones_not_at_all(
    storage: S3Storage,
    s3_proxy: FaultyProxy,
    seaweed: Seaweed,
    plain: PlainStorage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = s3_proxy.add(Fault("slow", times=ALWAYS, rate=10_000))
    write_file(storage, "small/x", SMALL)
    assert storage.read("small/x") == SMALL
    assert slow.happened >= 2
    shorten(monkeypatch, HASTY)
    with pytest.raises(StorageError, match="cannot write"):
        write_file(storage, "large/x", LARGE[:PART])
    s3_proxy.clear()
    s3_proxy.settle()
    assert seaweed.objects(plain.url) in (
        {"small/x": SMALL},
        {"small/x": SMALL, "large/x": LARGE[:PART]},
    )


@pytest.mark.parametrize("code", ["InternalError", "SlowDown"])
def test_an_error_in_an_answer_that_says_200_is_an_error(
    storage: S3Storage, s3_proxy: FaultyProxy, plain: PlainStorage, code: str
) -> None:
    """S3 begins its answer to a completion before it is done, and may fail then."""
    with s3_proxy.during(Fault("error", "POST", "uploadId", status=200, code=code)):
        write_file(storage, "large/x", LARGE)
    assert plain.read("large/x") == LARGE


def test_a_folder_of_which_one_object_cannot_be_deleted_is_not_said_to_be_deleted(
    storage: S3Storage, s3_proxy: FaultyProxy, plain: PlainStorage
) -> None:
    for name in ("x", "y"):
        storage.create(f"folder/{name}", SMALL)
    said = (
        b"<DeleteResult><Error><Key>folder/x</Key><Code>InternalError</Code></Error></DeleteResult>"
    )
    with (
        s3_proxy.during(Fault("error", "POST", "delete", status=200, body=said)),
        pytest.raises(StorageError, match="InternalError"),
    ):
        storage.delete_folder("folder")
    assert plain.list("folder") == ["x", "y"]


UPLOADING = """
import sys
from run_builders import begin, snapshot
from fmnist_dist.checkpoint import s3bucket
from fmnist_dist.checkpoint.place import Place
s3bucket._PART_BYTES = s3bucket._WHOLE_BYTES = 5 * 2**20
writer = begin(Place.of(sys.argv[1]).storage())
print("begun", flush=True)
writer.save(snapshot(10, {"model.safetensors": bytes(6 * 2**20)}))
"""


def test_an_upload_that_is_killed_half_way_is_removed_by_the_next_launch(
    storage: S3Storage, s3_proxy: FaultyProxy, seaweed: Seaweed, plain: PlainStorage
) -> None:
    stalled = s3_proxy.add(Fault("stalled", "PUT", "partNumber=2", times=ALWAYS))
    uploading = subprocess.Popen(
        [sys.executable, "-c", UPLOADING, plain.url],
        env=child_environ(s3_proxy.endpoint, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"),
    )
    with uploading:
        wait_for(lambda: stalled.happened and seaweed.uploads(plain.url), "half an upload")
        uploading.send_signal(signal.SIGKILL)
    s3_proxy.clear()
    s3_proxy.settle()
    assert len(seaweed.uploads(plain.url)) == 1
    assert plain.list("checkpoints") == []
    _, restored, swept = start(storage, "another")
    assert restored is None
    assert len(swept.orphans) == 1
    assert seaweed.uploads(plain.url) == []


def test_an_upload_that_cannot_even_be_aborted_is_removed_by_the_next_launch(
    storage: S3Storage,
    s3_proxy: FaultyProxy,
    seaweed: Seaweed,
    plain: PlainStorage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writer = begin(storage)
    shorten(monkeypatch, HASTY)
    with (
        s3_proxy.during(Fault("error", "PUT", "partNumber=2", times=ALWAYS)),
        s3_proxy.during(Fault("error", "DELETE|POST", "uploadId|delete", times=ALWAYS)),
        pytest.raises(StorageError, match="cannot write"),
    ):
        writer.save(snapshot(10, {"model.safetensors": LARGE}))
    assert len(seaweed.uploads(plain.url)) == 1
    shorten(monkeypatch, PATIENT)
    _, _, swept = start(storage, "another")
    assert len(swept.orphans) == 1
    assert seaweed.uploads(plain.url) == []


def test_a_server_that_is_killed_in_the_middle_of_a_save_and_comes_back_has_all_of_it(
    storage: S3Storage, s3_proxy: FaultyProxy, seaweed: Seaweed, plain: PlainStorage
) -> None:
    writer = begin(storage)
    held = s3_proxy.add(Fault("stalled", "PUT", "/optimizer", times=ALWAYS))
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(writer.save, snapshot(10))
        wait_for(lambda: held.happened, "a save under way")
        seaweed.kill()
        try:
            held.gone = True
            wait_for(lambda: s3_proxy.refused, "a request that nobody took")
        finally:
            seaweed.start()
        assert saving.result(60)
    assert_sound(plain)
    _, restored, swept = start(storage, "another", report=pytest.fail)
    assert restored is not None
    assert restored.files == files_of(10)
    assert swept.orphans == ()


@pytest.mark.parametrize("kind", ["stalled", "error"])
def test_whoever_has_less_time_than_an_operation_may_take_gets_its_error_in_that_time(
    storage: S3Storage, s3_proxy: FaultyProxy, kind: str
) -> None:
    storage.create("small/x", SMALL)
    for verb in (lambda: storage.read("small/x"), lambda: storage.create("large/x", LARGE)):
        fault = Fault(kind, "GET|PUT|POST", times=ALWAYS)
        began = time.monotonic()
        with s3_proxy.during(fault), within(0.5), within(60), pytest.raises(StorageError):
            verb()
        assert time.monotonic() - began < PATIENT["STORAGE_SECONDS"] / 4
    assert storage.read("small/x") == SMALL  # the limit was that of the block


def test_a_small_object_that_cannot_be_read_is_given_up_as_soon_as_a_small_one_should_be(
    storage: S3Storage, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the time that a whole range of a large one may take: a fence is read like this."""
    shorten(monkeypatch, {**HASTY, "STORAGE_BYTES_PER_SECOND": PART / 60})
    storage.create("small/x", SMALL)
    began = time.monotonic()
    with s3_proxy.during(Fault("error", "GET", times=ALWAYS)), pytest.raises(StorageError):
        storage.read("small/x")
    assert time.monotonic() - began < 30
