"""The program on S3: what it promises on a disk it keeps there, with the same bits."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
from alone import FLAGS, Alone, files_of_undisturbed
from faulty_proxy import Fault, FaultyProxy
from in_process import SmallRun, _process_as_before, in_child, small_run
from jobs import (
    Job,
    files_of_newest,
    ledger,
    reached,
    show,
    wait_for,
    wait_for_step,
)
from plain_s3 import PlainStorage
from run_files import assert_sound, bodies, checkpoints, kinds, model_sha256
from running import running
from seaweed import Seaweed

from fmnist_dist import evaluate, limits, runs
from fmnist_dist.checkpoint.record import Attempt, Checkpoint
from fmnist_dist.errors import ExitCode

EVERY_TWO = ("--max-steps", "8", "--save-every-steps", "2")
ALWAYS = float("inf")
LONG = ("--epochs=500", "--eval-every-epochs=499")
STEPS = 70  # of 64 images


@pytest.fixture
def run(tmp_path: Path, proxied_url: str) -> Iterator[SmallRun]:
    """A small run on S3, behind the proxy; the one `beside` it is on disk."""
    with small_run(tmp_path) as run:
        yield replace(run, url=proxied_url)


@pytest.fixture
def stored(seaweed: Seaweed, s3_url: str) -> PlainStorage:
    return PlainStorage(seaweed, s3_url)


@pytest.fixture(scope="module")
def small_sha256(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the weights of a small run on disk that nobody disturbed."""
    with small_run(tmp_path_factory.mktemp("on-disk")) as run:
        assert run.launch(*EVERY_TWO).code == 0
        return model_sha256(run.root)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the files of a run on disk that nobody disturbed, in a world of one."""
    return files_of_undisturbed(tmp_path_factory.mktemp("undisturbed"), f"--max-steps={STEPS}")


def command(
    capsys: pytest.CaptureFixture[str], module: ModuleType, *arguments: str
) -> tuple[int, str]:
    """Run a command in this process; return its exit code, and all that it printed."""
    capsys.readouterr()
    with _process_as_before(), mock.patch.object(sys, "argv", [module.__name__, *arguments]):
        code = module.main()
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_a_run_on_s3_is_killed_goes_on_and_ends_with_the_bits_of_a_run_on_disk(
    run: SmallRun, stored: PlainStorage, small_sha256: str
) -> None:
    killed = in_child(run, *EVERY_TWO, FMNIST_DIST_FAULTS="update:crash:6")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "fault: crash at update, call 6" in killed.stderr
    again = run.launch(*EVERY_TWO)
    assert again.code == 0, again.lines
    assert again.saying('resumed  checkpoint="step 4" attempt=2 lost_steps=1')
    assert model_sha256(stored) == small_sha256
    assert_sound(stored)
    assert not run.root.exists()  # nothing of it is on disk


@pytest.mark.slow
def test_every_command_that_takes_a_run_takes_one_on_s3(
    run: SmallRun, stored: PlainStorage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.url is not None
    assert run.launch(*EVERY_TWO, "--keep-last=9").code == 0
    code, out = command(capsys, runs, "show", run.url, "--json")
    story = json.loads(out)
    assert (code, story["run"], story["status"], story["step"]) == (0, run.url, "finished", 8)
    assert story["checkpoints"][-1]["model_sha256"] == model_sha256(stored)
    for name in ("show", "verify", "ledger"):
        code, out = command(capsys, runs, name, run.url)
        assert code == 0, out
    stored.create("checkpoints/000000099-0001-00000000000000aa/model.safetensors", b"orphan")
    code, out = command(capsys, runs, "prune", run.url)
    assert code == 0, out
    assert "000000099-0001-00000000000000aa" in out
    assert len(stored.list("checkpoints")) == 4
    code, out = command(capsys, runs, "export", run.url, str(tmp_path / "exported"))
    assert code == 0, out
    assert (tmp_path / "exported" / "model.safetensors").exists()
    scored = (run.url, "--json", "--data-dir", str(run.data))
    code, out = command(capsys, evaluate, *scored)
    assert (code, json.loads(out)["step"]) == (0, 8), out
    # Damage on the store is found, named, and passed over.
    folder = bodies(stored, Checkpoint)[-1].folder
    stored.replace(f"{folder}/model.safetensors", b"damaged")
    code, out = command(capsys, runs, "verify", run.url)
    assert code == ExitCode.DATA_DAMAGED
    assert f"{folder}/model.safetensors" in out
    code, out = command(capsys, evaluate, *scored)
    assert (code, json.loads(out)["step"]) == (0, 6), out
    more = run.launch("--max-steps", "10", "--save-every-steps", "2")
    assert more.code == 0, more.lines
    assert more.saying("the checkpoint of step 8 is unusable")
    assert "quarantine" in kinds(stored)


def test_storage_that_stays_away_ends_the_launch_with_one_line_and_the_same_command_goes_on(
    run: SmallRun,
    stored: PlainStorage,
    s3_proxy: FaultyProxy,
    small_sha256: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "SAVE_RETRY_SECONDS", 0.05)
    away = Fault("error", "PUT|POST", times=ALWAYS, status=503, code="SlowDown")

    def told(text: str) -> None:
        if " saved  step=2 " in text:
            s3_proxy.add(away)
            monkeypatch.setattr(limits, "STORAGE_SECONDS", 0.5)

    ended = run.launch(*EVERY_TWO, "--max-unsaved-seconds", "0.5", told=told)
    assert ended.code == ExitCode.TRANSIENT
    assert away.happened > 1
    (line,) = ended.errors
    for words in ("--max-unsaved-seconds 0.5", "SlowDown", "newest checkpoint: step 2", "/run"):
        assert words in line
    s3_proxy.clear()
    monkeypatch.setattr(limits, "STORAGE_SECONDS", 60.0)
    assert [each.step for each in checkpoints(stored)] == [2]
    again = run.launch(*EVERY_TWO)
    assert again.code == 0, again.lines
    assert model_sha256(stored) == small_sha256
    assert_sound(stored)


def test_storage_that_is_away_for_a_while_is_told_and_costs_no_step(
    run: SmallRun,
    stored: PlainStorage,
    s3_proxy: FaultyProxy,
    small_sha256: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "SAVE_RETRY_SECONDS", 0.05)
    away = Fault("error", "PUT|POST", times=ALWAYS, status=503, code="SlowDown")

    def told(text: str) -> None:
        if " saved  step=2 " in text:
            s3_proxy.add(away)
            monkeypatch.setattr(limits, "STORAGE_SECONDS", 0.5)
        if "save failed, training goes on" in text:
            s3_proxy.clear()
            monkeypatch.setattr(limits, "STORAGE_SECONDS", 60.0)

    ended = run.launch(*EVERY_TWO, told=told)
    assert ended.code == 0, ended.lines
    (warning,) = ended.saying("save failed, training goes on")
    assert "newest_checkpoint=2" in warning
    assert model_sha256(stored) == small_sha256
    assert_sound(stored)


@pytest.mark.slow
def test_lost_trainers_are_replaced_in_place_by_ones_that_save_to_s3(
    undisturbed: Mapping[str, str], s3_url: str, stored: PlainStorage, tmp_path: Path
) -> None:
    """Two ranks; the one that saves is killed, and the other, and it, while the first is forked."""
    brake = tmp_path / "brake"
    brake.touch()
    flags = [*FLAGS, f"--max-steps={STEPS}", "--save-every-steps=10"]
    job = Job(s3_url, flags, workers=2, module="train_small", logs=tmp_path)
    with (
        mock.patch.dict(os.environ, {"TRAIN_SMALL_BRAKE": str(brake)}),
        running(job),
    ):
        for rank, step in ((0, 2), (1, 4)):
            wait_for_step(job, step)
            job.kill_trainer(rank)
        wait_for_step(job, 6)
        job.kill_keeper(0)  # too much to heal: the other rank saves, and all start again
        wait_for_step(job, 7, attempt=1)
        brake.unlink()
        text = job.finish()
    story = show(s3_url)
    assert [each["lost_steps"] for each in story["attempts"]] == [0, 0]
    assert [each["reason"] for each in story["heals"]] == ["killed by SIGKILL"] * 2
    assert {each["lost_steps"] for each in story["heals"]} == {0}
    assert text.count("a new one takes its place") == 2
    assert files_of_newest(s3_url) == undisturbed
    assert ledger(s3_url).returncode == 0
    assert_sound(stored)


@pytest.mark.slow
def test_a_store_that_is_killed_in_a_save_comes_back_and_a_signal_saves_there(
    undisturbed: Mapping[str, str],
    proxied_url: str,
    seaweed: Seaweed,
    s3_proxy: FaultyProxy,
    stored: PlainStorage,
    tmp_path: Path,
) -> None:
    environ = {
        "TRAIN_SMALL_BRAKE": str(tmp_path / "brake"),
        "TRAIN_SMALL_LIMITS": "STORAGE_SECONDS=2 STORAGE_REQUEST_SECONDS=1 SAVE_RETRY_SECONDS=0.2",
    }
    (tmp_path / "brake").touch()
    flags = (f"--max-steps={STEPS}", "--save-every-steps=4")
    with Alone(proxied_url, *flags, logs=tmp_path, **environ) as job:
        job.await_text(" saved  step=4 ")
        held = s3_proxy.add(Fault("stalled", "PUT", "/optimizer", times=ALWAYS))
        wait_for(lambda: held.happened, "a save under way")
        seaweed.kill()
        try:
            held.gone = True
            job.await_text("save failed, training goes on")
            job.await_steps(reached(proxied_url)[1] + 2)  # it does
        finally:
            seaweed.start()
        job.await_text(" saved  step=", times=2)
        assert job.text().count("save failed") >= 1
        os.kill(job.process.pid, signal.SIGTERM)
        code, text = job.end()
    assert code == ExitCode.DRAINED, text[-3000:]
    assert "asked to stop: step " in text
    last = reached(proxied_url)[1]
    assert checkpoints(stored)[-1].step == last
    assert_sound(stored)
    (tmp_path / "brake").unlink()
    code, text = Alone(proxied_url, *flags, logs=tmp_path).end()
    assert code == 0, text[-3000:]
    assert f'checkpoint="step {last}" attempt=2 lost_steps=0' in text
    assert files_of_newest(proxied_url) == undisturbed
    assert len(bodies(stored, Attempt)) == 2


def test_a_drain_ends_in_its_time_though_the_store_does_not_answer(
    proxied_url: str, s3_proxy: FaultyProxy, stored: PlainStorage, tmp_path: Path
) -> None:
    """One operation may take a minute, a drain three seconds; no keeper is there to end it."""
    environ = {"FMNIST_DIST_NO_KEEPER": "true"}
    flags = ("--drain-seconds=3", "--save-every-steps=4")
    with Alone(proxied_url, *LONG, *flags, logs=tmp_path, **environ) as job:
        job.await_text(" saved  step=4 ")
        away = s3_proxy.add(Fault("stalled", "PUT|POST", times=ALWAYS))
        wait_for(lambda: away.happened, "a save that gets no answer")
        os.kill(job.process.pid, signal.SIGTERM)
        began = time.monotonic()
        code, text = job.end()
        assert time.monotonic() - began < limits.STORAGE_SECONDS / 2
    assert code == ExitCode.TRANSIENT, text[-3000:]
    assert "no answer in time; newest checkpoint: step " in text
    assert_sound(stored)


@pytest.mark.slow
def test_a_second_launch_ends_the_first_on_s3(
    run: SmallRun, stored: PlainStorage, small_sha256: str
) -> None:
    """P4: what the first would have saved after it, nobody sees."""
    other = SmallRun(root=run.root, data=run.data, url=run.url)
    said: list[int] = []

    def told(text: str) -> None:
        if " saved  step=2 " in text:
            ended = in_child(other, "--max-steps", "6", "--save-every-steps", "2")
            said.append(ended.returncode)

    ended = run.launch(*EVERY_TWO, told=told)
    assert said == [0]
    assert ended.code == ExitCode.FENCED, ended.lines
    assert "attempt 2 has taken this run over: attempt 1 stops here" in ended.errors[0]
    assert kinds(stored)[-1] == "finish"
    assert [each.step for each in checkpoints(stored)] == [2, 4, 6]
    assert_sound(stored)
    assert run.launch(*EVERY_TWO).code == 0
    assert model_sha256(stored) == small_sha256
