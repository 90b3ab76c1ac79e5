"""Claims about what a user can get wrong: one line that helps, the exit code, nothing lost."""

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from in_process import Ended, SmallRun, launch, small_run
from jobs import Job
from published import flipped
from run_files import assert_sound, bodies, checkpoints, kinds, records, rewrite, saved_bytes
from running import running

from fmnist_dist.checkpoint.record import Attempt, Finish, Quarantine
from fmnist_dist.errors import ExitCode

NOBODY = 65534


@pytest.fixture
def run(tmp_path: Path) -> Iterator[SmallRun]:
    with small_run(tmp_path) as run:
        yield run


@pytest.fixture
def started(run: SmallRun) -> SmallRun:
    """A run that stands at step 2, in the middle of its first epoch."""
    assert run.launch("--max-steps", "2", "--dropout", "0.1", "--ema", "0.9").code == 0
    return run


def assert_refused(ended: Ended, code: ExitCode, *words: str) -> str:
    """One error, on one line, with all these words, and no traceback; return it."""
    assert ended.code == code, ended.lines
    (line,) = ended.errors
    for word in words:
        assert word in line
    assert not ended.saying("Traceback")
    return line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--bacth-size", "64"], "flag --bacth-size: there is no such flag; did you mean --batch-"),
        (["--epochs", "ten"], "flag --epochs: found 'ten', expected a whole number above 0"),
        (["--epochs", "1.5"], "flag --epochs: found '1.5', expected a whole number above 0"),
        (["--lr", "nan"], "flag --lr: found nan, expected a number above 0"),
        (["--lr", "-0.1"], "flag --lr: found -0.1, expected a number above 0"),
        (["--max-steps", "0"], "flag --max-steps: found 0, expected a whole number above 0 or"),
        (["--precision", "fp16"], "flag --precision: found 'fp16', expected fp32 or bf16"),
        (
            ["--batch-size", "100"],
            "flag --batch-size: found 100, expected a multiple of logical_shards = 8 (its default)",
        ),
        (
            ["--batch-size", "64", "--logical-shards", "5"],
            "flag --batch-size: found 64, expected a multiple of logical_shards = 5 (flag --logi",
        ),
    ],
)
def test_a_wrong_flag_is_one_line_and_starts_nothing(
    run: SmallRun, flags: list[str], expected: str
) -> None:
    ended = launch("--run-dir", str(run.root), *flags)
    line = assert_refused(ended, ExitCode.USAGE)
    assert line.startswith(f"fmnist_dist.train: {expected}")
    assert ended.lines == (line,)
    assert not run.root.exists()


def test_a_wrong_environment_variable_is_one_line_with_the_nearest_name(run: SmallRun) -> None:
    ended = run.launch(environ={"FMNIST_DIST_BACTH_SIZE": "64"})
    line = assert_refused(ended, ExitCode.USAGE, "did you mean FMNIST_DIST_BATCH_SIZE?")
    assert ended.lines == (line,)
    assert not run.root.exists()


@pytest.mark.parametrize("faults", ["nonsense", "disk:kill", "disk:melt:3", "disk:full:three"])
def test_faults_that_cannot_be_read_are_refused_before_the_run_is_touched(
    started: SmallRun, faults: str
) -> None:
    before = saved_bytes(started.root)
    ended = started.launch("--max-steps", "4", environ={"FMNIST_DIST_FAULTS": faults})
    assert_refused(ended, ExitCode.USAGE, f"FMNIST_DIST_FAULTS={faults}: expected disk:")
    assert saved_bytes(started.root) == before


@pytest.mark.parametrize("below", ["", "a/run"])
def test_a_file_in_the_place_of_the_run_folder_is_left_alone(run: SmallRun, below: str) -> None:
    file = run.root
    file.write_text("somebody's notes")
    ended = launch("--run-dir", str(file / below), "--data-dir", str(run.data))
    assert_refused(
        ended, ExitCode.INCOMPATIBLE, f"--run-dir {file / below}: {file} is a file; expected a fol"
    )
    assert file.read_text() == "somebody's notes"


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may write anywhere: become somebody else for a moment. Other users stay who they are."""
    if os.getuid() != 0:
        yield
        return
    try:
        os.setresuid(NOBODY, NOBODY, 0)
    except OSError as error:
        pytest.skip(f"this root may not become another user: {error}")
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A folder that everybody may enter: pytest's own is its user's alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "mode", [pytest.param(0o555, id="not written"), pytest.param(0o333, id="not read")]
)
def test_a_run_folder_that_this_user_may_not_use_is_refused(
    run: SmallRun, foreign: Path, mode: int
) -> None:
    root = foreign / "run"
    shutil.copytree(run.data, root / "checkpoints")
    before = saved_bytes(root)
    root.chmod(mode)
    with ordinary_user():
        ended = launch("--run-dir", str(root), "--data-dir", str(run.data))
    assert_refused(
        ended,
        ExitCode.INCOMPATIBLE,
        f"--run-dir {root}: {root} cannot be read and written by this user (uid ",
        "change its permissions, or take another folder",
    )
    assert stat.S_IMODE(root.stat().st_mode) == mode
    root.chmod(0o755)
    assert saved_bytes(root) == before


def test_a_run_folder_inside_one_that_this_user_may_not_enter_is_refused(
    run: SmallRun, foreign: Path
) -> None:
    closed = foreign / "closed"
    closed.mkdir()
    closed.chmod(0o000)
    with ordinary_user():
        ended = launch("--run-dir", str(closed / "run"), "--data-dir", str(run.data))
    assert_refused(ended, ExitCode.INCOMPATIBLE, f"--run-dir {closed / 'run'}: ", "permissions")


def test_a_local_tier_that_this_user_may_not_write_to_is_refused(
    run: SmallRun, foreign: Path
) -> None:
    root, tier = foreign / "open" / "run", foreign / "tier"
    root.parent.mkdir()
    root.parent.chmod(0o777)
    tier.mkdir()
    tier.chmod(0o555)
    folders = ("--run-dir", str(root), "--local-tier", str(tier), "--data-dir", str(run.data))
    with ordinary_user():
        ended = launch(*folders)
    assert_refused(
        ended, ExitCode.INCOMPATIBLE, f"--local-tier {tier}: {tier} cannot be read and written by"
    )
    assert not root.exists()


def test_a_data_file_with_one_flipped_bit_is_refused(started: SmallRun) -> None:
    before = saved_bytes(started.root)
    path = started.data / "train-images-idx3-ubyte"
    path.write_bytes(flipped(path.read_bytes(), at=1000))
    ended = started.launch("--max-steps", "4")
    assert_refused(
        ended,
        ExitCode.DATA_DAMAGED,
        f"--data-dir: {path} is damaged: found content of 23536 bytes with sha256 ",
        "expected sha256 ",
        "put a good file there, or leave --data-dir out",
    )
    assert saved_bytes(started.root) == before


def test_a_missing_data_file_is_named(started: SmallRun) -> None:
    before = saved_bytes(started.root)
    (started.data / "t10k-labels-idx1-ubyte").unlink()
    ended = started.launch("--max-steps", "4")
    assert_refused(
        ended,
        ExitCode.USAGE,
        f"--data-dir: {started.data} has neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte"
        ".gz; expected a folder with ",
        "or leave --data-dir out and the data set is fetched",
    )
    assert saved_bytes(started.root) == before


def test_all_settings_that_make_another_run_are_told_at_once_with_old_and_new(
    started: SmallRun,
) -> None:
    before = saved_bytes(started.root)
    others = {
        "dropout": ("0.1", "0.3"),
        "logical_shards": ("8", "4"),
        "optimizer": ("'sgd'", "'adamw'"),
        "precision": ("'fp32'", "'bf16'"),
        "seed": ("0", "3"),
        "threads_per_worker": ("1", "2"),
        "ema": ("0.9", "0.0"),
    }
    flags = [
        word
        for name, (_, new) in others.items()
        for word in (f"--{name.replace('_', '-')}", new.strip("'"))
    ]
    line = assert_refused(
        started.launch("--max-steps", "4", *flags),
        ExitCode.INCOMPATIBLE,
        "start another run with --run-dir",
    )
    for name, (old, new) in others.items():
        assert f"{name} is {old} in the run and {new} now" in line
    assert saved_bytes(started.root) == before


def test_settings_that_nobody_wrote_come_from_the_run(run: SmallRun) -> None:
    assert run.launch("--max-steps", "2", "--seed", "3", "--dropout", "0.3").code == 0
    assert run.launch("--max-steps", "4").code == 0  # not: seed 0, as the default has it
    assert bodies(run.root, Finish)[-1].step == 4


def test_another_batch_size_in_the_middle_of_an_epoch_is_refused(started: SmallRun) -> None:
    before = saved_bytes(started.root)
    ended = started.launch("--max-steps", "4", "--batch-size", "16")
    assert_refused(
        ended, ExitCode.INCOMPATIBLE, "at an epoch's boundary only", "step 2 is 16 samples"
    )
    assert saved_bytes(started.root) == before


def test_a_batch_size_that_the_runs_shards_do_not_divide_is_refused(run: SmallRun) -> None:
    assert run.launch("--epochs", "1", "--logical-shards", "16", "--batch-size", "16").code == 0
    before = saved_bytes(run.root)
    # A multiple of the default, 8 shards, but not of the run's 16.
    ended = run.launch("--epochs", "2", "--batch-size", "24")
    assert_refused(ended, ExitCode.USAGE, "24", "16")
    assert saved_bytes(run.root) == before


def test_a_run_that_a_newer_version_went_on_with_is_refused(started: SmallRun) -> None:
    newest = records(started.root)[-1].index
    path = started.root / f"log/{newest + 1:012d}.json"
    path.write_bytes(rewrite(started.root / f"log/{newest:012d}.json", format=2, index=newest + 1))
    before = saved_bytes(started.root)
    assert_refused(
        started.launch("--max-steps", "4"),
        ExitCode.INCOMPATIBLE,
        f"log/{newest + 1:012d}.json has format 2, this version reads up to 1",
        "install that one",
    )
    assert saved_bytes(started.root) == before


def test_a_setting_of_a_newer_version_is_refused(started: SmallRun) -> None:
    path = started.root / "log/000000000000.json"
    (attempt,) = bodies(started.root, Attempt)
    body = {**asdict(attempt), "config": {**attempt.config, "magic": 3}}
    path.write_bytes(rewrite(path, body=body))
    before = saved_bytes(started.root)
    assert_refused(
        started.launch("--max-steps", "4"),
        ExitCode.INCOMPATIBLE,
        "a setting magic = 3 that this version does not know; use the version that wrote it",
    )
    assert saved_bytes(started.root) == before


def test_when_all_checkpoints_are_damaged_the_run_stops_and_says_what_to_do(
    run: SmallRun,
) -> None:
    assert run.launch("--max-steps", "4", "--save-every-steps", "2").code == 0
    for checkpoint in checkpoints(run.root):
        path = run.root / checkpoint.folder / "model.safetensors"
        path.write_bytes(flipped(path.read_bytes(), at=5000))
    before = saved_bytes(run.root)
    for _ in range(2):  # and it stays so
        line = assert_refused(
            run.launch("--max-steps", "6"),
            ExitCode.DATA_DAMAGED,
            "this run has committed checkpoints and none is valid any more: restore the run folder "
            "from a copy, or start a new run with another --run-dir",
        )
        assert "exit_code=65" in line
    after = saved_bytes(run.root)
    assert {name: after[name] for name in before} == before
    # The damaged ones stay for a look; nothing was trained from step 0 in their place.
    assert kinds(run.root)[4:] == ["attempt", "quarantine", "quarantine", "attempt"]


def test_damage_in_the_newest_checkpoint_is_named_and_the_one_before_is_used(
    run: SmallRun,
) -> None:
    assert run.launch("--max-steps", "4", "--save-every-steps", "2").code == 0
    model = run.root / checkpoints(run.root)[-1].folder / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    ended = run.launch("--max-steps", "6")
    assert ended.code == 0
    (line,) = ended.saying("fell back")
    assert re.search(r"step 4 is unusable: .*model.safetensors has \d+ bytes, \d+ were saved", line)
    assert ended.saying('resumed  checkpoint="step 2"')


def test_a_batch_size_that_fell_back_into_an_epoch_does_not_block_the_run(run: SmallRun) -> None:
    assert run.launch("--max-steps", "4", "--save-every-steps", "2").code == 0
    model = run.root / checkpoints(run.root)[-1].folder / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    # Step 4 ends an epoch, so 16 may begin there; but the checkpoint that can be read is step 2's.
    ended = run.launch("--max-steps", "6", "--batch-size", "16")
    assert_refused(ended, ExitCode.INCOMPATIBLE, "step 2 is 16 samples")
    without = launch("--run-dir", str(run.root), "--data-dir", str(run.data), "--max-steps", "6")
    assert without.code == 0, without.errors
    assert [each.step for each in bodies(run.root, Quarantine)] == [4]


DIVERGES = ("--schedule", "constant", "--lr", "1e30")


def test_a_loss_that_is_no_number_ends_the_run_and_says_what_to_change(started: SmallRun) -> None:
    ended = started.launch("--max-steps", "8", *DIVERGES)
    line = assert_refused(ended, ExitCode.NO_PROGRESS, "lower --lr", "checkpoint of step 2")
    assert re.search(r"the loss of step [34] is (nan|inf): ", line)
    assert_sound(started.root)
    again = started.launch("--max-steps", "8", "--lr", "0.1")
    assert again.code == 0, again.errors
    assert again.saying('resumed  checkpoint="step 2"')


def test_a_loss_that_is_no_number_names_the_checkpoint_to_go_on_from(started: SmallRun) -> None:
    ended = started.launch("--max-steps", "8", *DIVERGES)
    assert_refused(ended, ExitCode.NO_PROGRESS, "step 2")


def test_a_checkpoint_from_which_the_loss_is_no_number_is_not_gone_on_from(
    started: SmallRun,
) -> None:
    """Else the advice to lower --lr could not help."""
    each_step = ("--max-steps", "8", "--save-every-steps", "1")
    assert started.launch(*each_step, *DIVERGES).code == ExitCode.NO_PROGRESS
    again = started.launch(*each_step, "--lr", "0.1")
    assert again.code == 0, again.errors


def test_an_evaluation_that_is_no_number_is_no_bug(started: SmallRun) -> None:
    before = saved_bytes(started.root)
    ended = started.launch("--max-steps", "3", *DIVERGES)
    assert_refused(ended, ExitCode.NO_PROGRESS, "lower --lr")
    after = saved_bytes(started.root)
    assert {name: after[name] for name in before} == before
    assert kinds(started.root)[-1] != "finish"


@pytest.mark.slow
def test_more_workers_than_logical_shards_is_said_once_and_not_tried_again(tmp_path: Path) -> None:
    flags = ["--logical-shards", "2", "--batch-size", "64", "--device", "cpu"]
    with running(Job(tmp_path / "run", flags, workers=3, max_restarts=5)) as job:
        text = job.wait()
    assert job.process.returncode != 0
    lines = [line for line in text.splitlines() if "workers for" in line]
    assert len(lines) == 1, text
    for words in (
        "3 workers for 2 logical shards",
        "start at most 2 (--nproc_per_node), or a new run with --logical-shards 3 or more",
        "exit_code=64",
    ):
        assert words in lines[0]
    assert "restart worker group" not in text
    assert "Traceback" not in "\n".join(lines)
    assert saved_bytes(tmp_path / "run") == {}
