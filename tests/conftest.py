"""Runs that several test files look at, trained once; the S3 server that many of them use."""

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Cluster
from faulty_proxy import FaultyProxy
from jobs import ROOT
from run_files import Folder
from s3_path import S3Path
from seaweed import BUCKET, Seaweed, missing, s3_environ

TRAIN_SECONDS = 240
TMPFS_BYTES = 256 * 1024


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of 6 steps with checkpoints at 2, 4 and 6; read it, change nothing."""
    run = tmp_path_factory.mktemp("trained") / "run"
    command = [sys.executable, "-m", "fmnist_dist.train", "--run-dir", str(run), "--device=cpu"]
    subprocess.run(
        [*command, "--batch-size=64", "--save-every-steps=2", "--max-steps=6"],
        cwd=ROOT,
        timeout=TRAIN_SECONDS,
        check=True,
    )
    return run


@pytest.fixture
def run_copy(trained_run: Path, tmp_path: Path) -> Path:
    """Return a copy of `trained_run` that the test may damage or go on with."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of a quarter of a MiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(place)]
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"this machine does not let root mount: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """Start an S3 server for all tests, with a bucket; who kills it starts it again."""
    if why := missing():
        pytest.skip(why)
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    try:
        server.start()
        server.make_bucket(BUCKET)
        yield server
    finally:
        server.stop()


@pytest.fixture
def s3_url(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Return the URL of a run that nobody has begun, with the environment to reach it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, text in s3_environ(seaweed.endpoint).items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return f"s3://{BUCKET}/{secrets.token_hex(6)}/run"


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    """Return where a run may be begun: on this disk, and once more on the S3 server."""
    if request.param == "disk":
        yield tmp_path / "run"
        return
    url = request.getfixturevalue("s3_url")
    folder = S3Path.of(url, request.getfixturevalue("seaweed"))
    yield folder
    assert list(folder.parent.iterdir()), "this test has left nothing on the server"


@pytest.fixture
def proxied_url(s3_url: str, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a run that nobody has begun, reached through the proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy.endpoint)
    return s3_url


@pytest.fixture
def s3_proxy(seaweed: Seaweed) -> Iterator[FaultyProxy]:
    """Put a proxy before the S3 server, without faults as yet."""
    proxy = FaultyProxy(seaweed.endpoint)
    try:
        yield proxy
    finally:
        proxy.close()


@pytest.fixture(scope="session")
def submission(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the first test that needs it leaves what a submission comes to."""
    return tmp_path_factory.mktemp("submission") / "cluster"


@pytest.fixture
def cluster(tmp_path: Path, submission: Path) -> Cluster:
    folder, program = tmp_path / "cluster", tmp_path / "bin" / "kubectl"
    folder.mkdir()
    program.parent.mkdir()
    stand_in = ROOT / "tests" / "kubectl_stand_in.py"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stand_in}" "$@"\n')
    program.chmod(0o755)
    return Cluster(folder, program, submission)
