"""Runs that several test files look at; trained once."""

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import ROOT
from seaweed import BUCKET, Seaweed

TRAIN_SECONDS = 240
TMPFS_BYTES = 256 * 1024


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """Return a running S3 server, one for all tests; each makes a prefix of its own."""
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    server.start()
    try:
        server.bucket(BUCKET)
        yield server
    finally:
        server.kill()


@pytest.fixture
def s3_url(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Return the URL of a run that nobody has begun, with the environment to reach it."""
    for name, value in seaweed.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return f"s3://{BUCKET}/{secrets.token_hex(8)}/run"


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
