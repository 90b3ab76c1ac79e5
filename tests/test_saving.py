"""P3, nothing lost: when checkpoints are made, and what becomes of a run that cannot make one.

On a disk, and on a real S3 server. Full disks and operations of one are those of a disk; an object
store that is away is in `test_s3_runs`, and kills while saving there in `test_s3_crash_points`.
"""

import math
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from in_process import SmallRun, in_child, launch, number_of, operations, small_run
from jobs import Job, wait_for_step
from on_s3 import disk_only
from run_files import (
    Folder,
    assert_sound,
    bodies,
    checkpoints,
    fields_of,
    kinds,
    model_sha256,
    saved_bytes,
)
from running import running

from fmnist_dist import limits, lookout
from fmnist_dist.checkpoint.record import Finish
from fmnist_dist.distributed.stop import StopRequest
from fmnist_dist.due import Schedule
from fmnist_dist.errors import ExitCode

EVERY_TWO = ("--max-steps", "8", "--save-every-steps", "2")
MiB = 1 << 20


@pytest.fixture
def run(tmp_path: Path, root: Folder, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallRun]:
    monkeypatch.setattr(limits, "SAVE_RETRY_SECONDS", 0.0)
    with small_run(tmp_path, root) as run:
        yield run


@pytest.fixture
def undisturbed(run: SmallRun) -> str:
    """The weights that eight steps lead to."""
    other = run.beside("undisturbed")
    assert other.launch(*EVERY_TWO).code == 0
    return model_sha256(other.root)


@pytest.mark.parametrize(
    ("schedule", "at", "expected"),
    [
        (Schedule(every_steps=None, every_seconds=None), (7, False, 1e9), None),
        (Schedule(every_steps=None, every_seconds=None), (7, True, 0.0), "epoch"),
        (Schedule(every_steps=7, every_seconds=None), (14, False, 0.0), "steps"),
        (Schedule(every_steps=7, every_seconds=None), (15, False, 1e9), None),
        (Schedule(every_steps=7, every_seconds=None), (14, True, 0.0), "epoch"),
        (Schedule(every_steps=None, every_seconds=60.0), (15, False, 59.9), None),
        (Schedule(every_steps=None, every_seconds=60.0), (15, False, 60.0), "seconds"),
        (Schedule(every_steps=7, every_seconds=60.0), (15, False, 60.0), "seconds"),
        (Schedule(every_steps=7, every_seconds=60.0), (21, False, 60.0), "steps"),
    ],
)
def test_a_checkpoint_is_due_at_an_epochs_end_and_as_asked(
    schedule: Schedule, at: tuple[int, bool, float], expected: str | None
) -> None:
    step, ends_epoch, seconds = at
    assert schedule.reason(step=step, ends_epoch=ends_epoch, seconds_since=seconds) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], [(4, "epoch"), (8, "epoch"), (10, "finish")]),
        (
            ["--save-every-steps", "3"],
            [(3, "steps"), (4, "epoch"), (6, "steps"), (8, "epoch"), (9, "steps"), (10, "finish")],
        ),
        (
            ["--save-every-seconds", "1e-9"],
            [
                *((step, "epoch" if step % 4 == 0 else "seconds") for step in range(1, 10)),
                (10, "finish"),
            ],
        ),
    ],
)
def test_checkpoints_stand_where_they_were_due(
    run: SmallRun, flags: list[str], expected: list[tuple[int, str]]
) -> None:
    assert run.launch("--max-steps", "10", *flags).code == 0
    assert [(each.step, each.reason) for each in checkpoints(run.root)] == expected
    assert_sound(run.root)


# Operations of the disk: the first that matches the pattern, after one that matches the other.
MOMENTS = {
    "the checkpoint's folder": ("make_folder .*-0001-", ""),
    "half of the files": ("write", "link .*optimizer"),
    "the log record": ("write", "link .*metrics"),
    "the log record's name": ("link .*log/", "link .*metrics"),
    # The record stands by then, and a power cut might still take it.
    "after the log record": ("sync_folder .*log", "link .*log/000000000001"),
    "a later checkpoint": ("write", "link .*log/000000000001"),
}


@disk_only
@pytest.mark.parametrize("name", MOMENTS)
def test_a_full_disk_costs_one_warning_and_no_bit(
    run: SmallRun, undisturbed: str, name: str
) -> None:
    pattern, before = MOMENTS[name]
    number = number_of(operations(run, *EVERY_TWO), pattern, after=before)
    whole: list[int] = []

    def told(text: str) -> None:
        if "save failed" in text and kinds(run.root) != ["attempt"]:
            assert_sound(run.root)  # what was saved before is as good as it was
            whole.append(checkpoints(run.root)[-1].step)

    faults = {"FMNIST_DIST_FAULTS": f"disk:full:{number}"}
    ended = run.launch(*EVERY_TWO, environ=faults, told=told)
    assert ended.code == 0
    assert len(ended.saying(f"fault: full at storage operation {number} ")) == 1
    (warning,) = ended.saying("save failed, training goes on")
    late = name == "a later checkpoint"
    fields = fields_of(warning)
    assert fields["step"] == ("4" if late else "2")
    assert "No space left on device" in fields["error"]
    assert str(run.root) in fields["error"]
    stands = late or name == "after the log record"
    assert fields["newest_checkpoint"] == ("2" if stands else "none")
    assert whole == ([2] if stands else [])
    # Tried again at the next step, as soon as the wait is over.
    assert ended.saying("saved  step=5 reason=retry" if late else "saved  step=3 reason=retry")
    assert model_sha256(run.root) == undisturbed
    assert_sound(run.root)


@disk_only
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("times", [1, 7])
def test_a_disk_that_is_full_at_any_operation_costs_no_bit(
    run: SmallRun, undisturbed: str, times: int
) -> None:
    ends: set[int] = set()
    for number in range(len(operations(run, *EVERY_TWO))):
        each = run.beside(f"full-{number}")
        faults = {"FMNIST_DIST_FAULTS": f"disk:full:{number}:{times}"}
        ended = each.launch(*EVERY_TWO, environ=faults)
        assert ended.saying("fault: full at storage operation")
        ends.add(ended.code)
        if ended.code != 0:  # where nothing can go on without it: taking the run over, finishing
            assert ended.code == ExitCode.TRANSIENT
            assert each.launch(*EVERY_TWO).code == 0
        assert model_sha256(each.root) == undisturbed
        assert kinds(each.root)[-1] == "finish"
        assert_sound(each.root)
    assert ends == {0, ExitCode.TRANSIENT}


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system with 4 MiB, of which 3.6 are taken: records fit in, checkpoints do not."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tiny", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this user may not mount a file system: {error}")
    try:
        (folder / "filler").write_bytes(bytes(36 * MiB // 10))
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


@disk_only
def test_training_outlives_a_disk_that_is_really_full(
    run: SmallRun, undisturbed: str, tiny: Path
) -> None:
    full = SmallRun(root=tiny / "run", data=run.data)
    failures: list[str] = []

    def told(text: str) -> None:
        failures.extend(re.findall("save failed", text))
        if len(failures) == 3:
            (tiny / "filler").unlink(missing_ok=True)

    ended = full.launch(*EVERY_TWO, "--keep-last", "1", told=told)
    assert ended.code == 0, ended.lines
    warnings = ended.saying("save failed, training goes on")
    assert [fields_of(line)["step"] for line in warnings] == ["2", "3", "4"]
    assert all("No space left on device" in line for line in warnings)
    assert ended.saying("saved  step=5 reason=retry")
    assert model_sha256(full.root) == undisturbed
    assert_sound(full.root)


def away_from_saving(run: SmallRun) -> dict[str, str]:
    """Let the next launch begin, and then no byte be written any more."""
    number = number_of(operations(run, *EVERY_TWO), "make_folder .*/checkpoints/")
    return {"FMNIST_DIST_FAULTS": f"disk:full:{number}:1000000"}


@disk_only
def test_storage_that_stays_away_too_long_ends_the_launch_and_loses_nothing(
    run: SmallRun, undisturbed: str
) -> None:
    assert run.launch("--max-steps", "2").code == 0
    before = saved_bytes(run.root)
    ended = run.launch(*EVERY_TWO, "--max-unsaved-seconds", "1e-6", environ=away_from_saving(run))
    assert ended.code == ExitCode.TRANSIENT
    (line,) = ended.errors
    assert "No space left on device" in line
    assert str(run.root) in line
    after = saved_bytes(run.root)
    assert {name: after[name] for name in before} == before
    assert kinds(run.root)[3:] == ["attempt"]
    assert_sound(run.root)
    # The storage is back: the same command goes on, and nothing of the failed save is in its way.
    assert run.launch(*EVERY_TWO).code == 0
    assert model_sha256(run.root) == undisturbed


@disk_only
def test_storage_that_stays_away_says_what_is_safe_and_what_to_do(run: SmallRun) -> None:
    assert run.launch("--max-steps", "2").code == 0
    ended = run.launch(*EVERY_TWO, "--max-unsaved-seconds", "1e-6", environ=away_from_saving(run))
    (line,) = ended.errors
    assert "--max-unsaved-seconds" in line
    assert "step 2" in line


@disk_only
def test_a_checkpoint_that_stands_is_not_called_failed(
    run: SmallRun,
) -> None:
    number = number_of(operations(run, *EVERY_TWO), "unlink .*/checkpoints/")
    ended = run.launch(*EVERY_TWO, environ={"FMNIST_DIST_FAULTS": f"disk:full:{number}"})
    assert ended.saying(f"fault: full at storage operation {number} ")
    assert ended.code == 0
    assert not ended.saying("save failed")


def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_there(
    run: SmallRun, undisturbed: str
) -> None:
    ended = run.launch(*EVERY_TWO, told=after("saved  step=2 ", signal.SIGTERM))
    assert ended.code == ExitCode.DRAINED
    assert ended.saying("asked to stop: step 3 is saved, the same command goes on  exit_code=143")
    assert not ended.errors
    assert [(each.step, each.reason) for each in checkpoints(run.root)][-1] == (3, "drain")
    again = run.launch(*EVERY_TWO)
    assert again.code == 0
    assert again.saying('resumed  checkpoint="step 3" attempt=2 lost_steps=0')
    assert model_sha256(run.root) == undisturbed


def test_a_second_interrupt_stops_at_once(run: SmallRun, undisturbed: str) -> None:
    ended = run.launch(*EVERY_TWO, told=after("saved  step=2 ", signal.SIGINT, signal.SIGINT))
    assert ended.code == 128 + signal.SIGINT
    assert len(ended.errors) == 1
    assert "interrupted: steps since the newest checkpoint are lost" in ended.errors[0]
    assert run.launch(*EVERY_TWO).code == 0
    assert model_sha256(run.root) == undisturbed


@disk_only
def test_a_run_that_cannot_save_when_it_is_asked_to_stop_does_not_say_that_it_did(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On busy cores half of that time is over before the step is, and the other thread would act:
    # it ends the process, which is this one.
    monkeypatch.setattr(lookout, "_PATIENCE", math.inf)
    assert run.launch("--max-steps", "2").code == 0
    ended = run.launch(
        "--max-steps",
        "8",
        "--drain-seconds=0.01",
        environ=away_from_saving(run),
        told=after("started ", signal.SIGTERM),
    )
    assert ended.code == ExitCode.TRANSIENT
    assert not ended.saying("asked to stop")
    assert_sound(run.root)


def after(text: str, *signals: signal.Signals) -> Callable[[str], None]:
    """Return a listener that signals this process once `text` has been said, by any thread."""

    def told(said: str) -> None:
        if text not in said:
            return
        for place, number in enumerate(signals, start=1):
            heard = threading.Event()

            def asked(stop: StopRequest, heard: threading.Event = heard) -> None:
                ask(stop)
                heard.set()

            with mock.patch.object(StopRequest, "ask", asked):
                os.kill(os.getpid(), number)
                if place < len(signals):
                    assert heard.wait(60)  # two at once would be one

    ask = StopRequest.ask
    return told


@disk_only
@pytest.mark.slow  # `test_crash_points.py` has every such moment, without training
def test_a_kill_while_saving_loses_that_save_only(run: SmallRun) -> None:
    number = number_of(operations(run, *EVERY_TWO), "write", after="link .*log/000000000001")
    child = in_child(run, *EVERY_TWO, FMNIST_DIST_FAULTS=f"disk:tear:{number}")
    assert child.returncode == -signal.SIGKILL
    assert f"fault: tear at storage operation {number} (write " in child.stderr
    assert_sound(run.root)
    ended = run.launch(*EVERY_TWO)
    assert ended.code == 0
    assert ended.saying('resumed  checkpoint="step 2" attempt=2 lost_steps=2')
    assert_sound(run.root)
    assert not list((run.root / "tmp").iterdir())


LAUNCHED = ["--batch-size=64", "--save-every-seconds=none", "--device=cpu"]


def assert_goes_on_at(root: Folder, step: int, *, attempt: int) -> None:
    """Launch once more, which has nothing to train: it stands where it was asked to stop."""
    again = launch("--run-dir", str(root), *LAUNCHED, f"--max-steps={step}")
    assert again.code == 0
    assert again.saying(f'resumed  checkpoint="step {step}" attempt={attempt} lost_steps=0')
    assert [each.step for each in bodies(root, Finish)] == [step]
    assert_sound(root)


def test_when_one_worker_is_asked_to_stop_all_stop_after_the_same_step(
    root: Folder, tmp_path: Path
) -> None:
    flags = [*LAUNCHED, "--max-steps=1000000"]
    with running(Job(root, flags, workers=2, max_restarts=0, logs=tmp_path)) as job:
        wait_for_step(job, 2)
        os.kill(job.worker_pids()[1], signal.SIGTERM)  # rank 1; rank 0 saves
        text = job.wait()
    (drained,) = checkpoints(root)
    assert drained.reason == "drain"
    assert drained.step >= 2
    assert f"asked to stop: step {drained.step} is saved" in text
    assert "exitcode: 143" in text  # torchrun's own words on the worker that it saw end first
    assert_goes_on_at(root, drained.step, attempt=2)


@pytest.mark.slow
def test_neither_a_restart_after_a_stop_nor_the_stop_of_an_agent_loses_a_step(
    root: Folder, tmp_path: Path
) -> None:
    flags = [*LAUNCHED, "--max-steps=1000000"]
    with running(Job(root, flags, workers=2, max_restarts=1, logs=tmp_path)) as job:
        wait_for_step(job, 2)
        os.kill(job.worker_pids()[0], signal.SIGTERM)
        wait_for_step(job, 0, attempt=1)  # torchrun has started the workers again
        wait_for_step(job, checkpoints(root)[0].step + 2, attempt=1)
        job.process.terminate()  # as the end of a pod does
        text = job.wait()
    first, second = checkpoints(root)
    assert (first.reason, second.reason) == ("drain", "drain")
    assert text.count("asked to stop: step ") == 2, text
    assert f'resumed  checkpoint="step {first.step}" attempt=2 lost_steps=0' in text
    assert_goes_on_at(root, second.step, attempt=3)
