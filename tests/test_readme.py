"""The README's commands do what it says: each is run here, as it stands there or nearly."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import ROOT, Job, show

README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def commands() -> list[str]:
    """Return the lines of all shell blocks, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def run(
    command: str, *, cwd: Path = ROOT, python_path: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        shlex.split(command),
        cwd=cwd,
        env={
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
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
    ]


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
    train, *readers = commands()[3:-1]  # the drill has tests of its own
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
