"""The README's commands do what it says: each is run here, as it stands there or nearly."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from clusters import Cluster
from jobs import ROOT, Job, show

README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
SUBMIT = (
    "python -m launch.k8s submit --overlay eks-spot-karpenter --with s3-pod-identity "
    '--image "$IMAGE" --run-dir s3://bucket/runs/mine --nodes 2:4'
)
KUBERNETES = [
    "kubectl apply -f k8s/namespace.yaml",
    SUBMIT,
    "python -m launch.k8s status mine",
    "python -m launch.k8s wait mine",
]


def commands() -> list[str]:
    """Return the lines of all shell blocks, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def run(
    command: str, *, cwd: Path = ROOT, python_path: Path = ROOT, path: Path = BIN
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        shlex.split(command),
        cwd=cwd,
        env={
            **os.environ,
            "PATH": os.pathsep.join([str(path), str(BIN), os.environ["PATH"]]),
            "LAUNCH_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(python_path),
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_every_command_of_the_readme_is_run_below() -> None:
    assert commands() == [
        "launch/local.sh",
        "launch/test.sh",  # what runs this test
        "pip install .",
        "torchrun --nproc_per_node=2 --max-restarts=100 -m fmnist_dist.train --run-dir runs/mine",
        "python -m fmnist_dist.runs show runs/mine",
        "python -m fmnist_dist.runs ledger runs/mine",
        "python -m fmnist_dist.evaluate runs/mine",
        "python -m launch.drill",  # by `test_drill.py`, with fewer faults
        "pip install '.[k8s,s3]'",  # as `pip install .`, with packages of others
        *KUBERNETES,
    ]


def test_the_extras_that_it_names_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {
        each for found in re.findall(r"\[([a-z0-9,]+)\]'", README) for each in found.split(",")
    }
    assert named
    assert named <= project["optional-dependencies"].keys()


def test_local_sh_trains_tells_the_accuracy_and_how_to_go_on(tmp_path: Path) -> None:
    ended = run(
        f"{ROOT}/launch/local.sh --run-dir runs/first --max-steps 3 --batch-size 64", cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    said = ended.stdout + ended.stderr
    assert "runs/first" in said
    story = show(tmp_path / "runs" / "first")
    assert story["status"] == "finished"
    accuracy = story["metrics"]["test_accuracy"]
    assert f"{accuracy:.4f}" in said
    assert "launch/local.sh" in ended.stdout.splitlines()[-1]


def test_the_package_installs_alone_and_finds_itself(tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    made = run(f"{sys.executable} -m pip install --quiet --no-deps --target {installed} .")
    if "No matching distribution found for hatchling" in made.stderr:
        pytest.skip("no package registry here: the build needs hatchling")
    assert made.returncode == 0, made.stderr
    ended = run(f"{sys.executable} -m fmnist_dist.runs", cwd=tmp_path, python_path=installed)
    assert "show" in ended.stdout + ended.stderr
    packaged = {p.relative_to(installed) for p in installed.glob("fmnist_dist/**/*.py")}
    assert packaged == {p.relative_to(ROOT) for p in ROOT.glob("fmnist_dist/**/*.py")}


def test_torchrun_show_ledger_and_evaluate_work_as_written(tmp_path: Path) -> None:
    train, *readers = commands()[3:7]
    mine = tmp_path / "mine"
    job = Job(mine, ["--max-steps=3", "--batch-size=64"]).start()
    job.finish()
    assert train.startswith("torchrun --nproc_per_node=2")
    answers = [run(command.replace("runs/mine", str(mine))) for command in readers]
    assert [each.returncode for each in answers] == [0, 0, 0], [each.stderr for each in answers]
    shown, ledger, evaluated = (each.stdout for each in answers)
    assert "finished" in shown
    assert "192" in ledger  # 3 batches of 64 so far
    assert f"{show(mine)['metrics']['test_accuracy']:.4f}"[:5] in evaluated


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_commands_for_kubernetes_bring_a_run_into_a_cluster(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the stand-in for kubectl of `clusters.py`: there is no cluster here."""
    for name, text in cluster.environ().items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    image = f"registry.example/fmnist-dist@sha256:{'a' * 64}"
    made, submit, status, wait = (each.replace('"$IMAGE"', image) for each in KUBERNETES)
    answers = [run(each, path=cluster.program.parent) for each in (made, submit, status)]
    assert [each.returncode for each in answers] == [0, 0, 0], [each.stderr for each in answers]
    assert "namespace/fmnist-dist" in answers[0].stdout
    assert answers[1].stdout == "submitted mine: 4 pods, run s3://bucket/runs/mine\n"
    assert "mine (running)" in answers[2].stdout
    complete = {"conditions": [{"type": "Complete", "status": "True"}]}
    cluster.edit("job", "mine", status=complete)
    ended = run(wait, path=cluster.program.parent)
    assert (ended.returncode, ended.stdout) == (0, "mine: finished\n")
