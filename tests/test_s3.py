"""Runs in an S3 bucket: what the server is asked, what its answers mean, what is left behind."""

import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientPayloadError
from botocore import exceptions as boto
from jobs import ROOT
from memory_storage import MemoryStorage
from seaweed import BUCKET, Seaweed

from fmnist_dist import limits
from fmnist_dist.checkpoint import s3bucket
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.place import Place
from fmnist_dist.checkpoint.probe import probe
from fmnist_dist.checkpoint.s3 import S3Storage
from fmnist_dist.checkpoint.s3client import S3Client
from fmnist_dist.checkpoint.s3errors import Meaning, line
from fmnist_dist.checkpoint.storage import (
    TEMPORARY_FOLDER,
    AlreadyExistsError,
    RefusedError,
    StorageError,
)
from fmnist_dist.checkpoint.sweep import CHECKPOINTS, delete_tensors, folder_name, prune, sweep
from fmnist_dist.errors import ExitCode, IncompatibleError, UsageError
from fmnist_dist.filenames import METRICS

MIB = 2**20
SECRET = "PLANTED/secret+key"


def answered(code: str, status: int) -> Exception:
    """Return what s3fs raises for a server's answer."""
    error = OSError("said by s3fs")
    error.__cause__ = boto.ClientError(
        {
            "Error": {"Code": code, "Message": f"{SECRET} is what you sent"},
            "ResponseMetadata": {"HTTPStatusCode": status},
        },
        "PutObject",
    )
    return error


class Short:
    """A body that ends before its time."""

    async def read(self, _amount: int) -> bytes:
        return b""

    def close(self) -> None:
        pass


class Counting(S3Client):
    """Counts the requests by their method, and fails those that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.methods: list[str] = []
        self.fails: dict[str, list[Exception]] = {}
        self.after: dict[str, list[Exception]] = {}  # the server has done it, and nobody hears
        self.short = 0  # answers that end early, and do not say so

    async def request(self, method: str, arguments: Any) -> dict[str, Any]:
        self.methods.append(method)
        if self.fails.get(method):
            raise self.fails[method].pop(0)
        answer = await super().request(method, arguments)
        if method == "get_object" and self.short:
            self.short -= 1
            answer["Body"].close()
            answer["Body"] = Short()
        if self.after.get(method):
            raise self.after[method].pop(0)
        return answer


@pytest.fixture
def client() -> Counting:
    return Counting()


@pytest.fixture
def storage(s3_url: str, client: Counting, monkeypatch: pytest.MonkeyPatch) -> S3Storage:
    """Return a storage whose objects above 10 MiB are uploaded in parts of 5 MiB."""
    monkeypatch.setattr(s3bucket, "_PART_BYTES", 5 * MIB)
    monkeypatch.setattr(s3bucket, "_WHOLE_BYTES", 10 * MIB)
    monkeypatch.setattr("fmnist_dist.checkpoint.s3.S3Client", lambda: client)
    return S3Storage(s3_url)


def unfinished(storage: S3Storage) -> list[str]:
    """Return the keys of all uploads under the run that are neither complete nor aborted."""

    async def ask() -> dict[str, Any]:
        wanted = {"Bucket": BUCKET, "Prefix": storage._prefix}
        return await storage._client.request("list_multipart_uploads", wanted)

    return [each["Key"] for each in storage._client.run(ask).get("Uploads", ())]


def begin_upload(storage: S3Storage, path: str) -> None:
    """Leave behind what a killed upload does."""

    async def ask() -> dict[str, Any]:
        where = {"Bucket": BUCKET, "Key": storage._prefix + path}
        begun = await storage._client.request("create_multipart_upload", where)
        part = {**where, "UploadId": begun["UploadId"], "PartNumber": 1, "Body": b"x" * 100}
        return await storage._client.request("upload_part", part)

    storage._client.run(ask)


class TestParts:
    """Large objects: uploaded in parts, seen whole or not at all."""

    def test_a_large_object_is_uploaded_in_parts_and_reads_back(
        self, storage: S3Storage, client: Counting
    ) -> None:
        data = secrets.token_bytes(12 * MIB + 1)
        storage.create("c/model", memoryview(data))
        assert client.methods.count("upload_part") == 3
        assert client.methods[-1] == "complete_multipart_upload"
        assert storage.read("c/model") == data
        assert client.methods.count("get_object") == 3  # no question for the size first
        assert unfinished(storage) == []

    def test_a_second_large_object_is_refused_and_leaves_nothing_behind(
        self, storage: S3Storage
    ) -> None:
        storage.create("c/model", b"first")
        with pytest.raises(AlreadyExistsError):
            storage.create("c/model", b"second" * 2 * MIB)
        assert storage.read("c/model") == b"first"
        assert unfinished(storage) == []

    def test_an_upload_that_fails_is_aborted_and_is_never_an_object(
        self, storage: S3Storage, client: Counting
    ) -> None:
        client.fails["upload_part"] = [answered("InvalidArgument", 400)]
        with pytest.raises(StorageError, match="InvalidArgument"):
            storage.create("c/model", b"x" * 11 * MIB)
        assert "abort_multipart_upload" in client.methods
        assert "complete_multipart_upload" not in client.methods
        assert unfinished(storage) == []
        assert storage.list("c") == []

    def test_a_part_that_is_refused_for_now_is_sent_again(
        self, storage: S3Storage, client: Counting
    ) -> None:
        data = secrets.token_bytes(11 * MIB)
        client.fails["upload_part"] = [answered("SlowDown", 503), ConnectionResetError()]
        storage.create("c/model", data)
        assert client.methods.count("upload_part") == 3 + 2
        assert storage.read("c/model") == data

    def test_a_lost_answer_to_the_last_request_is_settled_by_looking(
        self, storage: S3Storage, client: Counting
    ) -> None:
        data = secrets.token_bytes(11 * MIB)
        client.after["complete_multipart_upload"] = [ConnectionResetError()]
        with pytest.raises(AlreadyExistsError):  # the caller compares: it is its own
            storage.create("c/model", data)
        assert storage.read("c/model") == data

    def test_after_a_conflict_the_whole_upload_is_sent_again(
        self, storage: S3Storage, client: Counting
    ) -> None:
        data = secrets.token_bytes(11 * MIB)
        client.fails["complete_multipart_upload"] = [answered("ConditionalRequestConflict", 409)]
        storage.create("c/model", data)
        assert client.methods.count("create_multipart_upload") == 2
        assert storage.read("c/model") == data
        assert unfinished(storage) == []

    def test_a_range_that_is_cut_off_is_read_again(
        self, storage: S3Storage, client: Counting
    ) -> None:
        data = secrets.token_bytes(12 * MIB)
        storage.create("c/model", data)
        client.after["get_object"] = [ClientPayloadError(), ConnectionResetError()]
        assert storage.read("c/model") == data
        client.short = 2
        assert storage.read("c/model") == data
        assert client.short == 0


class TestPut:
    def test_a_lost_answer_to_a_put_ends_as_already_there(
        self, storage: S3Storage, client: Counting
    ) -> None:
        client.after["put_object"] = [ConnectionResetError()]
        with pytest.raises(AlreadyExistsError):
            storage.create("log/0", b"mine")
        assert client.methods == ["put_object", "put_object"]
        assert storage.read("log/0") == b"mine"

    def test_a_conflict_with_another_put_is_tried_again(
        self, storage: S3Storage, client: Counting
    ) -> None:
        client.fails["put_object"] = [answered("ConditionalRequestConflict", 409)]
        storage.create("log/0", b"mine")
        assert client.methods == ["put_object", "put_object"]

    def test_what_is_wrong_for_good_is_not_tried_again(
        self, storage: S3Storage, client: Counting
    ) -> None:
        client.fails["put_object"] = [answered("AccessDenied", 403)]
        with pytest.raises(RefusedError, match=r"cannot write s3://.*/log/0: .*s3:PutObject"):
            storage.create("log/0", b"mine")
        assert client.methods == ["put_object"]

    def test_a_store_without_the_condition_takes_a_single_writer(
        self, s3_url: str, client: Counting, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("fmnist_dist.checkpoint.s3.S3Client", lambda: client)
        storage = S3Storage(s3_url, single_writer=True)
        client.fails["put_object"] = [answered("NotImplemented", 501)]
        storage.create("log/0", b"first")
        assert client.methods == ["head_object", "put_object", "put_object"]
        with pytest.raises(AlreadyExistsError):
            storage.create("log/0", b"second")
        assert storage.read("log/0") == b"first"

    def test_without_that_promise_it_is_refused(self, storage: S3Storage, client: Counting) -> None:
        client.fails["put_object"] = [answered("NotImplemented", 501)]
        with pytest.raises(StorageError, match="cannot do that"):
            storage.create("log/0", b"first")
        assert client.methods == ["put_object"]


class TestSweep:
    """Leftovers are removed by the same rules as on a disk."""

    def test_a_killed_upload_of_an_older_attempt_is_removed_and_others_are_not(
        self, storage: S3Storage
    ) -> None:
        mine, old = (folder_name(step=1, attempt=attempt, nonce="0" * 16) for attempt in (2, 1))
        for path in (f"{old}/model", f"{mine}/model", "elsewhere/model"):
            begin_upload(storage, path)
        head = Head(attempt=2, swept=0)
        assert storage.list(CHECKPOINTS) == sorted(each.rpartition("/")[2] for each in (mine, old))
        assert sweep(storage, RunLog(storage), head).orphans == (old,)
        prefix = storage._prefix
        left = [f"{prefix}{mine}/model", f"{prefix}elsewhere/model"]
        assert sorted(unfinished(storage)) == left  # the server has an order of its own
        assert prune(storage, RunLog(storage), head).orphans == ()
        assert len(unfinished(storage)) == 2

    def test_two_sweepers_at_once_are_harmless(self, storage: S3Storage, s3_url: str) -> None:
        old = folder_name(step=1, attempt=1, nonce="0" * 16)
        storage.create(f"{old}/model", b"x")
        begin_upload(storage, f"{old}/optimizer")
        storage.create(f"{TEMPORARY_FOLDER}/probe", b"x")
        other = S3Storage(s3_url)
        seen = other.list(CHECKPOINTS)
        head = Head(attempt=2, swept=0)
        assert sweep(storage, RunLog(storage), head).orphans == (old,)
        assert [f"{CHECKPOINTS}/{name}" for name in seen] == [old]
        other.delete_folder(old)  # from a list that is no longer true
        other.delete(f"{TEMPORARY_FOLDER}/probe")
        assert storage.list("") == []

    def test_a_folder_of_many_objects_is_deleted_in_few_requests(
        self, storage: S3Storage, client: Counting
    ) -> None:
        for number in range(12):
            storage.create(f"c/{number}", b"")
        client.methods.clear()
        storage.delete_folder("c")
        assert client.methods.count("delete_objects") == 1
        assert "delete_object" not in client.methods
        assert storage.list("c") == []

    def test_what_is_retired_is_deleted_in_one_request_with_what_is_uploaded_to_its_place(
        self, storage: S3Storage, client: Counting
    ) -> None:
        old, new = (folder_name(step=step, attempt=1, nonce="0" * 16) for step in (1, 2))
        for name in ("model", "optimizer", METRICS):
            storage.create(f"{old}/{name}", b"x")
        for folder in (old, new):
            begin_upload(storage, f"{folder}/model")
        client.methods.clear()
        delete_tensors(storage, old)
        assert client.methods.count("delete_objects") == 1
        assert "delete_object" not in client.methods
        assert storage.list(old) == [METRICS]
        assert unfinished(storage) == [f"{storage._prefix}{new}/model"]


class Ignoring(MemoryStorage):
    """A store that takes no notice of the condition."""

    def create(self, path: str, data: bytes) -> None:
        self.objects[path] = bytes(data)


class TestProbe:
    def test_a_store_that_keeps_its_word_passes_and_nothing_is_left(
        self, storage: S3Storage
    ) -> None:
        probe(storage, shown="here")
        assert storage.list("") == []

    def test_a_store_that_ignores_the_condition_is_refused(self) -> None:
        storage = Ignoring()
        with pytest.raises(IncompatibleError, match=r"If-None-Match.*--single-writer") as caught:
            probe(storage, shown="s3://b/run")
        assert caught.value.exit_code == ExitCode.INCOMPATIBLE
        assert "s3://b/run" in str(caught.value)
        assert storage.objects == {}

    def test_a_sweep_between_the_two_puts_is_no_reason_to_refuse(self) -> None:
        class Swept(MemoryStorage):
            sweeps = 0

            def create(self, path: str, data: bytes) -> None:
                if self.sweeps < 2 and path in self.objects:
                    self.sweeps += 1
                    self.delete(path)
                super().create(path, data)

        storage = Swept()
        probe(storage, shown="here")
        assert storage.sweeps == 2

    def test_a_key_that_may_only_read_is_told_what_it_lacks(
        self, storage: S3Storage, client: Counting
    ) -> None:
        client.fails["put_object"] = [answered("AccessDenied", 403)]
        with pytest.raises(RefusedError, match="s3:PutObject"):
            probe(storage, shown="here")


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (answered("PreconditionFailed", 412), Meaning.TAKEN),
        (answered("ConditionalRequestConflict", 409), Meaning.CONFLICT),
        (answered("NoSuchKey", 404), Meaning.MISSING),
        (answered("NoSuchUpload", 404), Meaning.NO_UPLOAD),
        (answered("NoSuchBucket", 404), Meaning.REFUSED),
        (answered("SignatureDoesNotMatch", 403), Meaning.REFUSED),
        (answered("ExpiredToken", 400), Meaning.REFUSED),
        (answered("RequestTimeTooSkewed", 403), Meaning.REFUSED),
        (boto.NoCredentialsError(), Meaning.REFUSED),
        (boto.ProfileNotFound(profile="x"), Meaning.REFUSED),
        (answered("SlowDown", 503), Meaning.TRANSIENT),
        (answered("Unheard", 500), Meaning.TRANSIENT),
        (answered("RequestTimeout", 400), Meaning.TRANSIENT),
        (boto.EndpointConnectionError(endpoint_url=f"http://user:{SECRET}@x/y"), Meaning.TRANSIENT),
        (boto.ReadTimeoutError(endpoint_url="http://x"), Meaning.TRANSIENT),
        (ClientPayloadError(), Meaning.TRANSIENT),
        (TimeoutError(), Meaning.TRANSIENT),
        (ConnectionResetError(), Meaning.TRANSIENT),
        (answered("InvalidArgument", 400), Meaning.WRONG),
        (OSError("no room"), Meaning.WRONG),
    ],
    ids=lambda each: each.name if isinstance(each, Meaning) else None,
)
def test_every_answer_has_its_meaning_and_one_line_without_secrets(
    error: Exception, meaning: Meaning
) -> None:
    assert Meaning.of(error) is meaning
    told = line(error)
    assert "\n" not in told
    assert told
    assert "PLANTED" not in told


def test_credentials_that_were_refused_are_looked_up_again(
    storage: S3Storage, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with pytest.raises(RefusedError, match="SignatureDoesNotMatch") as caught:
        storage.create("log/0", b"")
    assert "PLANTED" not in str(caught.value)
    for name, value in seaweed.environ.items():
        monkeypatch.setenv(name, value)
    storage.create("log/0", b"")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("AWS_ACCESS_KEY_ID", "NOSUCHKEY", "the access key is unknown there: check AWS_ACCESS"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", "the secret key is wrong: check AWS_ACCESS_KEY_ID"),
        ("AWS_PROFILE", "nobody", "nobody"),
        ("AWS_ENDPOINT_URL", "localhost:9000", "AWS_ENDPOINT_URL: expected a URL as in http"),
        ("AWS_ENDPOINT_URL", f"user:{SECRET}@host:9000", "AWS_ENDPOINT_URL: expected"),
    ],
)
def test_a_wrong_setting_of_the_environment_is_said(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(RefusedError) as caught:
        S3Storage(s3_url).list("log")
    assert said in str(caught.value)
    assert "PLANTED" not in str(caught.value)


def test_without_credentials_it_says_where_they_belong(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, os.devnull)
    with pytest.raises(RefusedError, match="found no credentials: check AWS_ACCESS_KEY_ID"):
        S3Storage(s3_url).list("log")


def test_a_bucket_that_is_not_there_is_said(s3_url: str) -> None:
    for verb in (lambda it: it.list("log"), lambda it: it.create("log/0", b"")):
        with pytest.raises(RefusedError, match="there is no such bucket: make it, or correct"):
            verb(S3Storage("s3://nobody-made-this/run"))


PRELOADED = """
import sys, threading
from fmnist_dist.opening import open_place
place = open_place(sys.argv[1])
before = threading.active_count()
storage = place.storage()
print("s3fs" in sys.modules, before, threading.active_count())
"""


def test_a_keeper_loads_what_is_slow_and_has_no_second_thread(s3_url: str) -> None:
    told = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRELOADED, s3_url],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.stdout.split() == ["True", "1", "1"]
    assert told.stderr == ""


class TestPlace:
    @pytest.mark.parametrize(
        "url", ["s3://bucket/a/run", "s3://bucket/a/run/", "s3a://b", "memory://x"]
    )
    def test_it_is_shown_as_it_was_written(self, url: str) -> None:
        place = Place.of(url)
        assert str(place) == url.rstrip("/")
        assert place.folder is None

    def test_notes_lie_on_a_local_disk_apart_for_each_store(
        self, s3_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = Place.of(s3_url)
        notes = {place.notes, Place.of(f"{s3_url}2").notes}
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://elsewhere")
        notes.add(place.notes)
        assert len(notes) == 3
        folder = Path(os.environ["XDG_STATE_HOME"]) / "fmnist_dist"
        assert {each.parent for each in notes} == {folder}

    @pytest.mark.parametrize(
        ("url", "error", "said"),
        [
            ("s4://bucket/run", UsageError, "'s4' is no kind of storage; expected .*s3://"),
            ("gs://bucket/run", IncompatibleError, r"pip install 'fmnist-dist\[gcs\]'"),
            ("abfs://c@a/run", IncompatibleError, r"pip install 'fmnist-dist\[azure\]'"),
            ("smb://host/run", IncompatibleError, "smbprotocol"),
        ],
    )
    def test_what_cannot_be_opened_says_what_cures_it(
        self, url: str, error: type[Exception], said: str
    ) -> None:
        with pytest.raises(error, match=said) as caught:
            Place.of(url)
        assert "\n" not in str(caught.value)

    def test_a_file_system_that_looks_before_it_writes_needs_a_promise(self) -> None:
        with pytest.raises(IncompatibleError, match=r"no put-if-absent.*--single-writer"):
            Place.of("ftp://host/run").storage().create("log/0", b"")


def test_a_store_that_was_never_reached_is_given_up_soon_and_named(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STORAGE_FIRST_SECONDS", 0.5)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        with pytest.raises(StorageError, match=rf"connect to http://{address}: is"):
            S3Storage(s3_url).list("log")


def test_an_opening_that_the_store_refuses_is_final_and_one_line(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the program: 78, as every rank of it says."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    ended = subprocess.run(
        [sys.executable, "-m", "fmnist_dist.train", "--run-dir", s3_url, "--device=cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == ExitCode.INCOMPATIBLE, ended.stderr
    assert f"--run-dir {s3_url}: " in ended.stderr
    assert "the secret key is wrong: check AWS_ACCESS_KEY_ID" in ended.stderr
    assert "PLANTED" not in ended.stderr + ended.stdout
    assert "Traceback" not in ended.stderr
