"""Our command before a stand-in for kubectl: `kubectl_stand_in.py`, to which objects are files."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from jobs import ROOT

KUBECTL = shutil.which("kubectl")
IMAGE = f"registry.example/fmnist-dist@sha256:{'a' * 64}"
NAMESPACE = "fmnist-dist"
RUN_DIR = "s3://bucket/runs/mine"
SUBMIT = ["submit", "--overlay=gke-spot", f"--image={IMAGE}", f"--run-dir={RUN_DIR}"]
SUBMIT += ["--nodes=2:4"]


@dataclass
class Cluster:
    """What the stand-in keeps, and our command before it."""

    folder: Path
    program: Path
    submission: Path  # what a cluster holds after `SUBMIT`, to begin with

    def submit(self) -> None:
        """Be where `told(*SUBMIT)` leads, without a second of calls."""
        if not self.submission.exists():
            self.told(*SUBMIT)
            shutil.copytree(self.folder, self.submission)
        shutil.copytree(self.submission, self.folder, dirs_exist_ok=True)

    def environ(self) -> dict[str, str]:
        given = {name: os.environ[name] for name in os.environ if not name.startswith("AWS_")}
        return {
            **given,
            "PATH": f"{self.program.parent}{os.pathsep}{os.environ['PATH']}",
            "CLUSTER": str(self.folder),
            "REAL_KUBECTL": str(KUBECTL),
            "PYTHONPATH": str(ROOT),
        }

    def start(
        self, *words: str, environ: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run our command as a program."""
        return subprocess.run(
            [sys.executable, "-m", "launch.k8s", *words],
            cwd=ROOT,
            env={**self.environ(), **(environ or {})},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run our command in this process: half a second less, each time."""
        from launch.k8s.__main__ import main  # here, since conftest.py imports this file

        output, errors = StringIO(), StringIO()
        with (
            patch.dict(os.environ, self.environ(), clear=True),
            patch.object(sys, "argv", ["launch.k8s", *words]),
            redirect_stdout(output),
            redirect_stderr(errors),
        ):
            code = main()
        return subprocess.CompletedProcess([*words], code, output.getvalue(), errors.getvalue())

    def told(self, *words: str) -> str:
        ended = self.run(*words)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    def refused(self, *words: str) -> tuple[int, str]:
        """Return the exit code, and the one line that was said."""
        ended = self.run(*words)
        assert ended.returncode, ended.stdout
        (line,) = [each for each in ended.stderr.splitlines() if not each.startswith("warning")]
        return ended.returncode, line

    def object(self, kind: str, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._path(kind, name).read_text())
        return found

    def put(self, document: dict[str, Any], *, namespace: str | None = None) -> None:
        folder = self.folder / (namespace or NAMESPACE) / document["kind"].lower()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{document['metadata']['name']}.json").write_text(json.dumps(document))

    def edit(self, kind: str, name: str, **changes: Any) -> None:
        self.put({**self.object(kind, name), **changes})

    def names(self, kind: str) -> list[str]:
        return sorted(each.stem for each in (self.folder / NAMESPACE / kind).glob("*.json"))

    def calls(self) -> list[list[str]]:
        return [json.loads(each) for each in (self.folder / "calls").read_text().splitlines()]

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / NAMESPACE / kind / f"{name}.json"
