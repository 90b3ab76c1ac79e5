"""`--save-every-steps auto` at work: what is chosen follows the run, is told and recorded."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from in_process import SmallRun, small_run
from memory_storage import MemoryStorage
from run_builders import begin, snapshot
from run_files import assert_sound, checkpoints, model_sha256

from fmnist_dist import interval as intervals
from fmnist_dist import runs
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import path_of
from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.errors import ExitCode
from fmnist_dist.interval import FIRST_SECONDS, Cost, Evidence, choose
from fmnist_dist.pace import Pace
from fmnist_dist.steptimes import StepTimes

AUTO = ("--max-steps", "11", "--save-every-steps", "auto", "--keep-last", "99")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallRun]:
    """A run that is over in a second; so the bounds that would forbid any save do not hold."""
    monkeypatch.setattr(intervals, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(intervals, "LEAST_SECONDS", 0.0)
    with small_run(tmp_path) as run:
        yield run


def shown(run: SmallRun, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fmnist_dist.runs", "show", str(run.root), *flags])
        capsys.readouterr()
        assert runs.main() == 0
    return capsys.readouterr().out


def test_saving_when_the_program_chooses_costs_no_bit_and_is_told_and_recorded(
    run: SmallRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = run.beside("other")
    assert other.launch("--max-steps", "11").code == 0
    assert json.loads(shown(other, capsys, "--json"))["save_interval"] is None

    ended = run.launch(*AUTO, environ={"FMNIST_DIST_FAULTS": "update:error:4"})
    assert ended.code == ExitCode.BUG
    assert ended.saying("fault: error at update")
    # With interruptions in so short a time saves are due between the epochs' ends too.
    monkeypatch.setattr(intervals, "ASSUMED_SECONDS", 1e-3)
    ended = run.launch(*AUTO)
    assert ended.code == 0
    assert model_sha256(run.root) == model_sha256(other.root)
    assert_sound(run.root)

    saved = checkpoints(run.root)
    assert {"auto", "epoch", "finish"} <= {each.reason for each in saved}
    newest = saved[-1].interval
    assert newest is not None
    assert newest.interruptions == 1
    assert newest.cost is not None
    assert newest.trained_seconds > 0
    lines = ended.saying("save interval")
    assert lines
    assert "a save costs" in lines[-1]
    assert "(1 in " in lines[-1]
    found = json.loads(shown(run, capsys, "--json"))["save_interval"]
    assert found["why"] == newest.why
    assert found["seconds"] == newest.seconds
    assert newest.why in shown(run, capsys)


def test_seconds_that_were_written_still_hold(run: SmallRun) -> None:
    intervals.FIRST_SECONDS = 3600.0  # the fixture gives it back
    ended = run.launch(*AUTO, "--save-every-seconds", "1e-9")
    assert ended.code == 0
    assert {each.reason for each in checkpoints(run.root)} == {"seconds", "epoch", "finish"}


# The pace alone


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that a pace reads; tests add to its one number."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def fresh() -> Pace:
    """Return the pace of a run that has begun, and has read that it has."""
    storage = MemoryStorage()
    begin(storage).choose(report=lambda _: None)
    pace = Pace(RunLog(storage))
    pace.read()
    return pace


def steps(pace: Pace, clock: list[float], *seconds: float, beside_save: bool = False) -> None:
    for each in seconds:
        pace.stepping(beside_save=beside_save)
        clock[0] += each


def saves(pace: Pace, *pauses: float, save_seconds: float = 1.0) -> None:
    for each in pauses:
        pace.leave_out()
        pace.saved(pause_seconds=each, save_seconds=save_seconds)


def test_a_fresh_run_saves_soon_and_then_as_its_saves_cost() -> None:
    pace = fresh()
    assert not pace.is_due(FIRST_SECONDS - 0.1)
    assert pace.is_due(FIRST_SECONDS)
    saves(pace, 1.0)
    assert pace.interval.seconds == pytest.approx(170, rel=0.02)  # the root of 2 · 1 s · 4 h
    assert not pace.is_due(160)
    assert pace.is_due(180)
    saves(pace, *[4.0] * 20)
    assert pace.interval.seconds == pytest.approx(340, rel=0.02)


def test_one_slow_save_moves_the_interval_little() -> None:
    pace = fresh()
    saves(pace, *[1.0] * 10)
    before = pace.interval.seconds
    saves(pace, 3.0)
    assert before < pace.interval.seconds < 1.3 * before


def test_only_a_change_that_matters_is_told_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    pace = fresh()

    def told() -> int:
        return [each.getMessage() for each in caplog.records].count("save interval")

    assert told() == 1
    saves(pace, 1.0)
    assert told() == 2
    saves(pace, *[1.1] * 20)
    assert told() == 2
    saves(pace, *[2.0] * 20)
    assert told() == 3


def test_what_a_save_slows_steps_down_is_part_of_its_cost(clock: list[float]) -> None:
    pace = fresh()
    steps(pace, clock, *[0.1] * 20)
    saves(pace, 0.01)
    assert pace.interval.cost_seconds == pytest.approx(0.01)
    assert pace.interval.step_seconds == pytest.approx(0.1)
    for _ in range(20):
        steps(pace, clock, *[0.1] * 5)
        pace.leave_out()
        clock[0] += 0.5  # the copy, an evaluation: whatever it is, it is no step
        steps(pace, clock, *[0.13] * 10, beside_save=True)
        pace.saved(pause_seconds=0.01, save_seconds=1.3)
    assert pace.interval.cost_seconds == pytest.approx(0.01 + 10 * 0.03, rel=0.05)
    assert pace.interval.step_seconds == pytest.approx(0.1)


def test_noise_is_no_slowdown() -> None:
    noise = np.random.default_rng(3)
    found = []
    for _ in range(200):
        times = StepTimes()
        for _ in range(64):
            for beside_save in (True, False):
                times.add(float(noise.normal(0.3, 0.06)), beside_save=beside_save)
        found.append(times.slowdown_seconds)
    assert sum(each == 0 for each in found) > 180
    assert np.mean(found) < 0.003


def test_a_slowdown_stands_out_from_noise_and_from_single_steps_that_hang() -> None:
    noise = np.random.default_rng(3)
    times = StepTimes()
    for number in range(64):
        hiccup = 5.0 if number % 10 == 0 else 0.0
        times.add(float(noise.normal(0.3, 0.02)) + hiccup, beside_save=False)
        times.add(float(noise.normal(0.4, 0.02)) + hiccup, beside_save=True)
    assert times.slowdown_seconds == pytest.approx(0.1, abs=0.02)
    assert times.step_seconds == pytest.approx(0.3, abs=0.02)


def test_of_a_few_steps_nothing_is_said() -> None:
    times = StepTimes()
    assert (times.step_seconds, times.slowdown_seconds) == (None, 0.0)
    times.add(2.0, beside_save=True)
    assert (times.step_seconds, times.slowdown_seconds) == (2.0, 0.0)
    times.add(1.0, beside_save=False)
    assert (times.step_seconds, times.slowdown_seconds) == (1.0, 0.0)


def test_a_launch_goes_on_from_what_saves_cost_the_last_time() -> None:
    storage = MemoryStorage()
    writer = begin(storage)
    writer.choose(report=lambda _: None)
    before = choose(
        cost=Cost(pause_seconds=2.0, save_seconds=3.0), evidence=Evidence(), step_seconds=0.25
    )
    writer.save(dataclasses.replace(snapshot(10), interval=before))
    begin(storage)  # the former one was killed
    pace = Pace(RunLog(storage))
    pace.read()
    assert (pace.interval.cost, pace.interval.step_seconds) == (before.cost, 0.25)
    assert pace.interval.interruptions == 1
    assert pace.interval.seconds == pytest.approx(before.seconds / 2**0.5, rel=0.01)


def test_a_history_that_cannot_be_read_stops_no_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage = MemoryStorage()
    begin(storage)

    def away(path: str) -> bytes:
        raise StorageError(f"{path}: away")

    storage.read = away  # type: ignore[method-assign]
    pace = Pace(RunLog(storage))
    pace.read()
    assert pace.is_due(FIRST_SECONDS)
    (warning,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert "not known" in warning.getMessage()
    assert path_of(0) in str(vars(warning)["fields"])
