"""What a user of S3 can get wrong: one line that helps, the exit code, and no secret in it."""

import importlib.util
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
from faulty_proxy import Fault, FaultyProxy
from in_process import Ended, SmallRun, clean_environ, launch, small_run
from jobs import ROOT, show
from plain_s3 import PlainStorage
from run_files import assert_sound, kinds
from seaweed import READER, STRANGER, WRITER, Key, Seaweed

from fmnist_dist import limits
from fmnist_dist.checkpoint import s3client
from fmnist_dist.errors import ExitCode

ALWAYS = float("inf")
FOUR = ("--max-steps", "4", "--save-every-steps", "2")
PLANTED = "PLANTEDsecretPLANTED"


@pytest.fixture
def run(tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallRun]:
    """A small run on S3, in a process that has not yet looked for any credentials."""
    monkeypatch.setattr(s3client, "_preloaded", [])
    monkeypatch.setattr(limits, "STORAGE_SECONDS", 20.0)
    monkeypatch.setattr(limits, "STORAGE_FIRST_SECONDS", 1.0)
    with small_run(tmp_path) as run:
        yield replace(run, url=s3_url)


@pytest.fixture
def stored(seaweed: Seaweed, s3_url: str) -> PlainStorage:
    return PlainStorage(seaweed, s3_url)


def assert_refused(ended: Ended, code: ExitCode, *words: str) -> None:
    """One error, on one line, with all these words, no traceback and no secret."""
    assert ended.code == code, ended.lines
    (line,) = ended.errors
    for word in words:
        assert word in line
    text = "\n".join(ended.lines)
    for hidden in ("Traceback", *secrets_of(WRITER, STRANGER, READER), PLANTED):
        assert hidden not in text


def secrets_of(*keys: Key) -> list[str]:
    return [text for key in keys for text in (key.access, key.secret)]


def use(key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key.access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key.secret)


def test_a_bucket_that_is_not_there_is_refused(run: SmallRun) -> None:
    ended = replace(run, url="s3://no-such-bucket/run").launch(*FOUR)
    assert_refused(
        ended, ExitCode.INCOMPATIBLE, "--run-dir s3://no-such-bucket/run:", "no such bucket: make"
    )


def test_no_credentials_are_refused_with_where_they_could_be(
    run: SmallRun, stored: PlainStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert_refused(
        run.launch(*FOUR), ExitCode.INCOMPATIBLE, "found no credentials", "AWS_ACCESS_KEY_ID"
    )
    assert stored.list("log") == []


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (STRANGER, "the access key is unknown there: check AWS_ACCESS_KEY_ID"),
        (replace(WRITER, secret=PLANTED), "the secret key is wrong: check AWS_ACCESS_KEY_ID"),
        (READER, "these credentials may not do that: allow s3:GetObject, s3:PutObject"),
    ],
    ids=["unknown", "wrong secret", "may only read"],
)
def test_a_key_that_does_not_fit_is_refused(
    run: SmallRun,
    stored: PlainStorage,
    monkeypatch: pytest.MonkeyPatch,
    key: Key,
    words: str,
) -> None:
    use(key, monkeypatch)
    refused = f"--run-dir {run.url}: cannot write {run.url}/tmp/probe-"
    assert_refused(run.launch(*FOUR), ExitCode.INCOMPATIBLE, refused, words)
    assert stored.list("log") == []


def test_a_key_that_may_only_read_suffices_for_readers(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.launch(*FOUR).code == 0
    use(READER, monkeypatch)
    assert run.url is not None
    assert show(run.url)["step"] == 4


def test_an_endpoint_where_nobody_answers_is_given_up_soon(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for endpoint in (nobody, "http://no-such-host.invalid:9000"):
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            ended = run.launch(*FOUR)
            assert_refused(
                ended, ExitCode.TRANSIENT, f"cannot connect to {endpoint}", "AWS_ENDPOINT_URL"
            )


def test_an_endpoint_that_is_no_url_is_refused(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    assert_refused(
        run.launch(*FOUR), ExitCode.INCOMPATIBLE, "AWS_ENDPOINT_URL", "localhost:9000", "http://"
    )


def test_a_clock_that_is_wrong_is_refused(
    run: SmallRun, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's clock is an hour ahead: what it signs, the server refuses."""
    from botocore import auth

    now = auth.get_current_datetime
    with mock.patch.object(
        auth, "get_current_datetime", lambda *args, **how: now(*args, **how) + timedelta(hours=1)
    ):
        ended = run.launch(*FOUR)
    assert_refused(ended, ExitCode.INCOMPATIBLE, "clocks differ too much", "NTP")
    # And in the words of AWS.
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy.endpoint)
    with s3_proxy.during(Fault("error", times=ALWAYS, status=403, code="RequestTimeTooSkewed")):
        ended = run.launch(*FOUR)
    assert_refused(ended, ExitCode.INCOMPATIBLE, "clocks differ too much", "NTP")


def test_a_store_that_ignores_put_if_absent_is_refused_unless_nobody_else_writes(
    run: SmallRun, stored: PlainStorage, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy.endpoint)
    deaf = s3_proxy.add(Fault("deaf", "PUT|POST", times=ALWAYS))
    ended = run.launch(*FOUR)
    assert_refused(
        ended, ExitCode.INCOMPATIBLE, f"--run-dir {run.url}: ", "If-None-Match", "--single-writer"
    )
    assert deaf.happened >= 2
    assert stored.list("log") == stored.list("tmp") == []
    accepted = run.launch(*FOUR, "--single-writer")
    assert accepted.code == 0, accepted.lines
    assert kinds(stored) == ["attempt", "checkpoint", "checkpoint", "finish"]
    assert_sound(stored)
    again = run.launch("--max-steps", "6", "--single-writer")
    assert again.code == 0, again.lines
    assert again.saying("lost_steps=0")


def test_a_kind_of_storage_that_does_not_exist_is_one_line_with_the_nearest(run: SmallRun) -> None:
    ended = replace(run, url="s4://bucket/run").launch(*FOUR)
    assert ended.code == ExitCode.USAGE, ended.lines
    (line,) = ended.lines
    assert "'s4' is no kind of storage" in line
    assert "begins with s3://" in line


_WITHOUT = """
import importlib.machinery, sys
class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, *rest)
ABSENT = set(sys.argv.pop(1).split(","))
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
sys.argv[0] = "fmnist_dist.train"
from fmnist_dist.train import main
sys.exit(main())
"""


def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _WITHOUT, "s3fs,aiobotocore", "--run-dir", "s3://bucket/run"],
        env={**clean_environ(), "PYTHONPATH": str(ROOT), "FMNIST_DIST_NO_KEEPER": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == ExitCode.INCOMPATIBLE, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert "'s3://bucket/run': s3:// needs the package s3fs: pip install" in line
    assert "pip install 'fmnist-dist[s3]'" in line


@pytest.mark.parametrize(("url", "extra"), [("gs://bucket/run", "gcs"), ("az://b/run", "azure")])
def test_a_package_of_another_store_is_named_likewise(
    monkeypatch: pytest.MonkeyPatch, url: str, extra: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)  # wherever they are installed
    ended = launch("--run-dir", url)
    assert_refused(ended, ExitCode.INCOMPATIBLE, url, f"pip install 'fmnist-dist[{extra}]'")


def test_a_run_may_have_any_prefix_and_none(run: SmallRun, seaweed: Seaweed) -> None:
    for url in (f"s3://{seaweed.make_bucket()}", f"{run.url}/a b/ü+%20&=x"):
        assert replace(run, url=url).launch(*FOUR).code == 0
        again = replace(run, url=url).launch(*FOUR)
        assert again.code == 0
        assert again.saying("already finished"), again.lines
        assert kinds(PlainStorage(seaweed, url)) == [
            "attempt",
            "checkpoint",
            "checkpoint",
            "finish",
        ]
        tops = {name.partition("/")[0] for name in seaweed.objects(url)}
        assert tops == {"log", "checkpoints"}


def test_rights_that_are_taken_away_in_mid_run_and_given_back_cost_nothing(
    run: SmallRun, stored: PlainStorage, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are rotated: at a run's opening it is a mistake, later it is storage that is away."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy.endpoint)
    monkeypatch.setattr(limits, "SAVE_RETRY_SECONDS", 0.05)
    expired = Fault("error", times=ALWAYS, status=403, code="ExpiredToken")

    def told(text: str) -> None:
        if " saved  step=2 " in text:
            s3_proxy.add(expired)
        if "save failed, training goes on" in text:
            s3_proxy.clear()

    ended = run.launch("--max-steps", "8", "--save-every-steps", "2", told=told)
    assert ended.code == 0, ended.lines
    assert expired.happened
    (warning,) = ended.saying("save failed, training goes on")
    assert "ExpiredToken" in warning
    assert_sound(stored)
    assert kinds(stored)[-1] == "finish"


def test_no_secret_is_ever_shown_or_stored(
    run: SmallRun,
    seaweed: Seaweed,
    s3_proxy: FaultyProxy,
    stored: PlainStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In what is printed, in each object of the run, in the notes on disk; well or ill."""
    said: list[str] = []
    for flags in (FOUR, ("--max-steps", "6", "--log-format", "json")):
        ended = run.launch(*flags)
        assert ended.code == 0, ended.lines
        said += ended.lines
    # A store that quotes the key, as AWS does; an endpoint with a password; keys in the URL.
    quoting = (
        f"<Error><Code>InvalidAccessKeyId</Code><Message>no key {WRITER.access}</Message>"
        f"<AWSAccessKeyId>{WRITER.access}</AWSAccessKeyId></Error>"
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy.endpoint)
    for status in (403, 400, 500):
        s3_proxy.clear()
        s3_proxy.add(Fault("error", times=ALWAYS, status=status, body=quoting.encode()))
        with mock.patch.object(limits, "STORAGE_SECONDS", 1.0):
            ended = run.launch("--max-steps", "8")
        assert ended.code in {ExitCode.INCOMPATIBLE, ExitCode.TRANSIENT}
        assert len(ended.errors) == 1
        said += ended.lines
    password = seaweed.endpoint.replace("http://", f"http://user:{PLANTED}@")
    for endpoint in (password, f"http://user:{PLANTED}@127.0.0.1:9", f"{PLANTED}@host"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        ended = run.launch("--max-steps", "8")
        assert_refused(ended, ExitCode.INCOMPATIBLE, "AWS_ENDPOINT_URL: expected")
        said += ended.lines
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.endpoint)
    monkeypatch.setenv("AWS_SESSION_TOKEN", PLANTED)
    said += run.launch("--max-steps", "8").lines
    for url in (f"s3://{WRITER.access}:{PLANTED}@bucket/run", f"s3://bucket/run?secret={PLANTED}"):
        ended = launch("--run-dir", url)
        assert ended.code == ExitCode.USAGE
        said += ended.lines
    notes = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert notes
    kept = [*seaweed.objects(stored.url).values(), *(path.read_bytes() for path in notes)]
    for secret in (*secrets_of(WRITER), PLANTED):
        assert not [line for line in said if secret in line]
        assert not [data for data in kept if secret.encode() in data]
