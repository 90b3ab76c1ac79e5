"""Runs that several test files look at; trained once."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import ROOT

TRAIN_SECONDS = 240


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
