"""The drill on the Job that is shipped: rendered, its pods run as processes, and preempted."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import ROOT
from shipped import rendered

from fmnist_dist.errors import ExitCode
from launch.k8s.controller import Pod
from launch.k8s.localpods import LocalPods
from launch.k8s.manifest import Manifest

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def drill_on(manifest: Manifest, folder: Path, *flags: str, timeout: float) -> tuple[int, str]:
    job = folder / "job.yaml"
    job.write_text(manifest.dump())
    ended = subprocess.run(
        [sys.executable, "-m", "launch.drill", f"--job={job}", f"--keep={folder}", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return ended.returncode, ended.stdout


@pytest.mark.slow
def test_pods_of_the_shipped_job_are_preempted_and_nothing_is_lost(tmp_path: Path) -> None:
    manifest = rendered("eks-spot-karpenter", nodes="1:2")
    flags = ["--faults=2", "--steps=250", "--seed=1"]
    code, output = drill_on(manifest, tmp_path, *flags, timeout=240)
    assert code == 0, output
    assert "PASS: same bits" in output
    assert [line for line in output.splitlines() if line.startswith("  2  ")], output


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("overlay", "nodes"), [("cpu-local", "1:3"), ("gke-spot", "1:2"), ("aks-spot", "2:3")]
)
def test_ten_faults_of_pods_with_three_seeds(
    overlay: str, nodes: str, seed: int, tmp_path: Path
) -> None:
    flags = ["--faults=10", "--steps=2500", f"--seed={seed}"]
    code, output = drill_on(rendered(overlay, nodes=nodes), tmp_path, *flags, timeout=1100)
    assert code == 0, output


def test_a_mistake_of_the_user_fails_the_job_and_the_drill_says_so(tmp_path: Path) -> None:
    manifest = rendered("cpu-local", nodes="1:1")
    manifest.trainer["args"].append("--model=nothing")
    code, output = drill_on(manifest, tmp_path, "--faults=1", "--steps=5", timeout=240)
    assert code == 1
    assert "failed with exit code 64 matching FailJob rule at index 0" in output


@pytest.mark.parametrize(
    ("content", "said"),
    [("kind: Service\n", "holds no Job, or several"), (None, "cannot be read: No such file")],
    ids=["no Job", "no file"],
)
def test_what_is_no_rendered_job_is_one_line(
    content: str | None, said: str, tmp_path: Path
) -> None:
    job = tmp_path / "job.yaml"
    if content is not None:
        job.write_text(content)
    ended = subprocess.run(
        [sys.executable, "-m", "launch.drill", f"--job={job}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == ExitCode.USAGE
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"launch.drill: flag --job: {job} ")
    assert said in line


def test_a_container_gets_what_its_manifest_says(tmp_path: Path) -> None:
    manifest = rendered("cpu-local", nodes="1:2", flags=("--lr=0.1",))
    pods = LocalPods(manifest, run="/runs/mine", flags=["--seed=3"], folder=tmp_path, uid="uid-1")
    folder = tmp_path / "pod"
    environ = pods.environment(Pod("run-1-5", 1), folder)
    assert environ["POD_IP"] == "127.0.0.2"
    assert environ["FMNIST_DIST_OWNER"] == "uid-1"
    assert environ["RUN_ID"] == environ["JOB_NAME"] == "run"
    assert environ["FMNIST_DIST_LOCAL_TIER"] == f"{folder}/scratch/tier"
    settings = manifest.environment()
    assert environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == settings["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    arguments = pods.arguments(environ, folder)
    assert "--rdzv-id=run" in arguments
    assert "--local-addr=127.0.0.2" in arguments
    assert arguments[-3:] == ["--run-dir=/runs/mine", "--lr=0.1", "--seed=3"]
    assert not [each for each in arguments if "$(" in each]
