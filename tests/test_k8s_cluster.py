"""On a real cluster, where one is reachable: `pytest -m cluster`. Without one all of it is skipped.

CLUSTER_IMAGE=registry/fmnist-dist@sha256:…   an image that the cluster can pull
CLUSTER_RUN_DIR=s3://bucket/prefix            a folder that its pods can write to
CLUSTER_SUBMIT="--with s3-static-file …"      more flags of `launch.k8s submit`, if any
CLUSTER_TRAIN="--epochs 2 …"                  flags of the training, long enough to be disturbed
"""

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jobs import ROOT

from launch.k8s.manifest import NAME, RUN_ID

LIMIT_SECONDS = 1200.0
_NEEDED = ("CLUSTER_IMAGE", "CLUSTER_RUN_DIR")

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3 * LIMIT_SECONDS)]


def missing() -> str:
    """Return why nothing here can run; "" where it can."""
    if shutil.which("kubectl") is None:
        return "kubectl is not installed"
    asked = subprocess.run(
        ["kubectl", "version", "--request-timeout=10s"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if asked.returncode != 0:
        lines = asked.stderr.strip().splitlines()
        return f"no cluster is reachable: {lines[-1] if lines else '?'}"
    absent = [each for each in _NEEDED if each not in os.environ]
    return f"a cluster is reachable, but not set: {', '.join(absent)}" if absent else ""


def kubectl(*words: str) -> str:
    command = ["kubectl", "--namespace", NAME, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def ours(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.k8s", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {LIMIT_SECONDS:g} s for {what}"
        time.sleep(2)
    return value


@pytest.fixture
def run() -> Iterator[str]:
    if why := missing():
        pytest.skip(why)
    name = f"test-{secrets.token_hex(4)}"
    subprocess.run(
        ["kubectl", "apply", "-f", str(ROOT / "k8s" / "namespace.yaml")], check=True, timeout=60
    )
    submitted = ours(
        "submit",
        f"--overlay={os.environ.get('CLUSTER_OVERLAY', 'cpu-local')}",
        f"--image={os.environ['CLUSTER_IMAGE']}",
        f"--run-dir={os.environ['CLUSTER_RUN_DIR'].rstrip('/')}/{name}",
        "--nodes=1:2",
        *shlex.split(os.environ.get("CLUSTER_SUBMIT", "--with rendezvous")),
        "--",
        *shlex.split(os.environ.get("CLUSTER_TRAIN", "--epochs 2")),
    )
    assert submitted.returncode == 0, submitted.stderr
    yield name
    ours("cancel", name)


def pods(run: str) -> list[dict[str, Any]]:
    """Return the trainers that run, by name."""
    selector = f"{RUN_ID}={run},app.kubernetes.io/component=trainer"
    items = json.loads(kubectl("get", "pods", "--selector", selector, "-o", "json"))["items"]
    return [each for each in items if each["status"].get("phase") == "Running"]


def step(run: str) -> int:
    told = ours("status", run, "--json")
    assert told.returncode == 0, told.stderr
    found: int = json.loads(told.stdout)["run"].get("step", 0)
    return found


def finishes(run: str) -> None:
    ended = ours("wait", run, f"--timeout={LIMIT_SECONDS}")
    assert ended.returncode == 0, ended.stderr
    status = json.loads(ours("status", run, "--json").stdout)
    assert status["run"]["status"] == "finished"
    assert status["pods"]["failed"] == 0, "nothing that was done here may be counted"


def test_a_run_whose_pods_are_deleted_one_after_the_other_finishes(run: str) -> None:
    for _ in range(2):
        reached = wait_for(lambda: step(run), "the first checkpoint")
        victim = wait_for(lambda: pods(run), "a pod that runs")[0]["metadata"]["name"]
        kubectl("delete", "pod", victim)
        wait_for(lambda: step(run) > reached, "steps after the deletion")  # noqa: B023 - at once
    finishes(run)


def test_a_run_whose_node_is_drained_finishes(run: str) -> None:
    wait_for(lambda: step(run), "the first checkpoint")
    node = wait_for(lambda: pods(run), "a pod that runs")[0]["spec"]["nodeName"]
    nodes = json.loads(kubectl("get", "nodes", "-o", "json"))["items"]
    if len(nodes) < 2:
        pytest.skip("this cluster has one node: a drain would leave no place to go on")
    try:
        kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=280s")
        finishes(run)
    finally:
        kubectl("uncordon", node)


def test_a_wrong_setting_fails_the_job_with_its_code(run: str) -> None:
    """The run's folder has a run with another seed by then."""
    wait_for(lambda: step(run), "the first checkpoint")
    cancelled = ours("cancel", run)
    assert cancelled.returncode == 0, cancelled.stderr
    again = ours(
        "submit",
        f"--overlay={os.environ.get('CLUSTER_OVERLAY', 'cpu-local')}",
        f"--image={os.environ['CLUSTER_IMAGE']}",
        f"--run-dir={os.environ['CLUSTER_RUN_DIR'].rstrip('/')}/{run}",
        "--nodes=1:2",
        *shlex.split(os.environ.get("CLUSTER_SUBMIT", "--with rendezvous")),
        "--",
        "--seed=77",
    )
    assert again.returncode == 0, again.stderr
    ended = ours("wait", run, f"--timeout={LIMIT_SECONDS}")
    assert ended.returncode == 78, ended.stderr
