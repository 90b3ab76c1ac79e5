"""`python -m fmnist_dist.evaluate`: the run's own numbers again, from what it saved.

On a disk, and on a real S3 server.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from in_process import SmallRun, _process_as_before, small_run
from jobs import ROOT
from run_builders import begin, snapshot
from run_files import Folder, opened

from fmnist_dist import evaluate
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.errors import ExitCode


def evaluated(
    capsys: pytest.CaptureFixture[str], run: SmallRun, *flags: str
) -> tuple[int, str, str]:
    """Evaluate in this process; return (exit code, stdout, stderr)."""
    with _process_as_before():
        code, out, err = called(capsys, run.root, "--data-dir", run.data, *flags)
    return code, out, err


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with mock.patch.object(sys, "argv", ["fmnist_dist.evaluate", *map(str, arguments)]):
        code = evaluate.main()
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def process(*arguments: object, program: str | None = None) -> subprocess.CompletedProcess[str]:
    how = ["-m", "fmnist_dist.evaluate"] if program is None else ["-c", program]
    return subprocess.run(
        [sys.executable, *how, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def contents(run: Folder) -> dict[Folder, tuple[bytes, object]]:
    files = (path for path in run.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), written_at(path)) for path in files}


def written_at(path: Folder) -> object:
    return path.stat().st_mtime_ns if isinstance(path, Path) else path.written_at()


def recorded(run: Folder) -> dict[int, dict[str, float]]:
    """Return the evaluations among the metric rows, by step: what the run itself measured."""
    rows = [
        json.loads(line)
        for path in run.glob("checkpoints/*/metrics.jsonl")
        for line in path.read_text().splitlines()
    ]
    return {row["step"]: row for row in rows if "test_loss" in row}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code, out, err = called(capsys, *arguments)
    assert (out, err.count("\n")) == ("", 1)
    return code, err


def test_a_trained_run_is_scored_as_it_scored_itself_bit_for_bit(trained_run: Path) -> None:
    before = contents(trained_run)
    own = recorded(trained_run)
    assert sorted(own) == [6]
    ended = process(trained_run, "--json", "--device=cpu")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {
        "run": str(trained_run),
        "step": 6,
        "test_accuracy": own[6]["test_accuracy"],
        "test_loss": own[6]["test_loss"],
        "samples": 10_000,
        "weights": "ema",
    }
    assert contents(trained_run) == before  # it only reads


@pytest.mark.parametrize(
    ("flags", "weights"),
    [(["--ema=0.9"], "ema"), (["--ema=0"], "model"), (["--precision=bf16"], "ema")],
)
def test_every_evaluated_step_is_scored_as_the_run_scored_it(
    flags: list[str], weights: str, root: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_run(tmp_path, root) as run:
        for last in (3, 9):
            assert run.launch(f"--max-steps={last}", "--keep-last=9", *flags).code == 0
        own = recorded(run.root)
        assert sorted(own) == [3, 4, 8, 9]
        for step in own:
            code, out, err = evaluated(capsys, run, "--json", f"--checkpoint={step}")
            assert code == 0, err
            found = json.loads(out)
            assert found["step"] == step
            assert found["test_loss"] == own[step]["test_loss"]
            assert found["test_accuracy"] == own[step]["test_accuracy"]
            assert found["weights"] == weights
        assert len({own[step]["test_loss"] for step in own}) == 4  # or equality would say little


def test_without_a_step_it_is_the_newest_valid_checkpoint_and_nothing_is_put_in_quarantine(
    root: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_run(tmp_path, root) as run:
        assert run.launch("--max-steps=8").code == 0
        model = next(run.root.glob("checkpoints/000000008-*/model.safetensors"))
        data = bytearray(model.read_bytes())
        data[-1] ^= 1
        model.write_bytes(data)
        before = contents(run.root)
        code, out, err = evaluated(capsys, run)
        own = recorded(run.root)[4]
        assert code == 0, err
        assert [line.split() for line in out.splitlines()] == [
            ["step", "4", "(ema", "weights)"],
            ["test", "accuracy", f"{own['test_accuracy']:.4f}", "on", "10", "samples"],
            ["test", "loss", f"{own['test_loss']:.4f}"],
        ]
        assert contents(run.root) == before
        assert evaluated(capsys, run, "--checkpoint=8")[0] == ExitCode.DATA_DAMAGED


def test_a_data_folder_that_is_not_there_is_64(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_run(tmp_path) as run:
        assert run.launch("--max-steps=2").code == 0
        code, out, err = evaluated(capsys, dataclasses.replace(run, data=tmp_path / "none"))
    assert (code, out) == (ExitCode.USAGE, "")
    assert "--data-dir" in err


def test_a_step_without_a_checkpoint_is_answered_with_those_that_there_are(
    root: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = begin(opened(root))
    code, line = refused(capsys, root)
    assert code == ExitCode.USAGE
    assert "none yet" in line
    for step in (2, 4):
        writer.save(snapshot(step))
    code, line = refused(capsys, root, "--checkpoint=3")
    assert code == ExitCode.USAGE
    assert "no checkpoint of step 3 in this run; there is: 2, 4" in line


def test_a_run_without_a_valid_checkpoint_is_65(
    root: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(opened(root)).save(snapshot(2))
    next(root.glob("checkpoints/*/model.safetensors")).unlink()
    code, line = refused(capsys, root)
    assert code == ExitCode.DATA_DAMAGED
    assert "model.safetensors is missing" in line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--device=gpu"], "flag --device: found 'gpu', expected auto or cpu or cuda"),
        (["--checkpoint=x"], "flag --checkpoint: found 'x', expected a whole number"),
        (["--jsn"], "flag --jsn: there is no such flag; did you mean --json?"),
    ],
)
def test_a_wrong_flag_is_one_line_and_64(
    flags: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(LocalStorage(tmp_path / "run")).save(snapshot(2))
    code, line = refused(capsys, tmp_path / "run", *flags)
    assert code == ExitCode.USAGE
    assert line.startswith(f"fmnist_dist.evaluate: {expected}")


def test_a_run_that_is_not_there_is_64_before_torch_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys; from fmnist_dist import evaluate; code = evaluate.main(); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    ended = process(tmp_path / "nothing", program=program)
    assert ended.returncode == ExitCode.USAGE, ended.stderr
    assert "there is no such folder" in ended.stderr
