"""`python -m fmnist_dist.runs`: what it tells of a run, how it ends, and what it leaves alone.

On a disk, and on a real S3 server; folders that are no run, and a run that was trained, on a disk.
"""

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import ROOT
from run_builders import attempt, files_of, snapshot
from run_files import Folder, opened

from fmnist_dist import digest, keys, runs
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.hint import ProgressHint
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.place import Place
from fmnist_dist.checkpoint.record import Attempt, path_of
from fmnist_dist.checkpoint.verify import verify
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.data.order import epoch_order
from fmnist_dist.digest import EpochDigest
from fmnist_dist.errors import ExitCode
from fmnist_dist.filenames import METRICS, MODEL
from fmnist_dist.interval import Cost, Evidence, choose, duration
from fmnist_dist.plan import Plan, Settings

NUM_SAMPLES = 60  # of a fake run: four steps an epoch, of 16, 16, 16 and 12
SEED = 5
CONFIG = {"batch_size": 16, "epochs": 3, "lr": 0.4, "seed": SEED, "run_dir": "of/a/launch"}
Ids = dict[int, list[int]]  # samples by step, from 1
Result = tuple[int, str, str]
Command = Callable[..., Result]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs a command and returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["fmnist_dist.runs", *map(str, arguments)])
        code = runs.main()
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def process(*arguments: object, program: str | None = None) -> subprocess.CompletedProcess[str]:
    how = ["-m", "fmnist_dist.runs"] if program is None else ["-c", program]
    return subprocess.run(
        [sys.executable, *how, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def begin(root: Folder, owner: str = "pod-a", *, same_bits: bool = True) -> RunWriter:
    """Take a fake run over, as a launch does."""
    storage = opened(root)

    def make(_: Head) -> Attempt:
        own = attempt(owner)
        return dataclasses.replace(own, config=CONFIG, same_bits=same_bits)

    writer = RunWriter.begin(storage, RunLog(storage), owner=owner, make=make)
    writer.choose(report=lambda _: None)
    return writer


def save(writer: RunWriter, *steps: int, reason: str = "steps") -> None:
    for step in steps:
        assert writer.save(dataclasses.replace(snapshot(step), reason=reason))


def reach(root: Folder, attempt_number: int, first: int, last: int) -> None:
    hint = ProgressHint(Place.of(str(root)).notes, attempt=attempt_number, first_step=first)
    hint.reached(last)
    hint.close()


def story(command: Command, root: Folder) -> dict[str, Any]:
    code, out, err = command("show", root, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def damage(root: Folder, pattern: str) -> None:
    path = max(root.glob(pattern))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


# show


def test_json_has_the_fixed_keys_and_what_the_log_holds(root: Folder, command: Command) -> None:
    writer = begin(root)
    save(writer, 2, 4)
    writer.override(step=4, settings={"lr": 0.1})
    save(writer, 6)
    assert list(story(command, root)) == [
        "run",
        "status",
        "step",
        "epoch",
        "same_bits",
        "attempts",
        "heals",
        "checkpoints",
        "overrides",
        "config",
        "metrics",
        "save_interval",
    ]
    found = story(command, root)
    assert found["run"] == str(root)
    assert (found["status"], found["step"], found["epoch"]) == ("running", 6, 0.6)
    assert found["same_bits"] is True
    assert found["heals"] == []
    assert [each["step"] for each in found["checkpoints"]] == [2, 4, 6]
    assert found["checkpoints"][-1] == {
        "step": 6,
        "epoch": 0.6,
        "reason": "steps",
        "bytes": sum(map(len, files_of(6).values())),
        "model_sha256": hashlib.sha256(files_of(6)[MODEL]).hexdigest(),
        "attempt": 1,
        "copies": [],
    }
    assert found["overrides"] == [{"step": 4, "settings": {"lr": 0.1}}]
    assert found["config"]["lr"] == 0.1
    assert found["config"]["batch_size"] == 16
    assert found["config"]["optimizer"] == "sgd"  # a default, which the record does not hold
    assert "run_dir" not in found["config"]  # of one launch, not of the run
    assert found["metrics"] == {"train_loss": 1 / 6}
    assert found["save_interval"] is None


def test_the_interval_that_the_newest_attempt_has_chosen_is_shown(
    root: Folder, command: Command
) -> None:
    chosen = choose(
        cost=Cost(pause_seconds=0.25, save_seconds=0.5),
        evidence=Evidence(interruptions=3, seconds=7200.0),
        step_seconds=0.5,
    )
    writer = begin(root)
    assert writer.save(dataclasses.replace(snapshot(2), interval=chosen))
    save(writer, 4, reason="survivor")  # by a rank that chooses nothing
    assert story(command, root)["save_interval"] == dataclasses.asdict(chosen)
    assert (
        f"saving     every {duration(chosen.seconds)} (auto): {chosen.why}\n"
        in command("show", root)[1]
    )
    save(begin(root), 6)  # and this launch does not choose any more
    assert story(command, root)["save_interval"] is None
    assert "(auto)" not in command("show", root)[1]


def test_metrics_of_a_finished_run_are_those_of_its_end(root: Folder, command: Command) -> None:
    writer = begin(root)
    save(writer, 2)
    writer.finish(step=2, reason="epochs", metrics={"train_loss": 0.5, "test_accuracy": 0.9})
    found = story(command, root)
    assert found["status"] == "finished"
    assert found["metrics"] == {"train_loss": 0.5, "test_accuracy": 0.9}
    assert found["attempts"][-1]["ended"] == "finished"
    begin(root)  # goes on, so nothing of the end counts any more
    found = story(command, root)
    assert found["status"] == "running"
    assert found["metrics"] == {"train_loss": 0.5}


def test_a_run_whose_log_is_empty_is_new(tmp_path: Path, command: Command) -> None:
    (tmp_path / "run" / "log").mkdir(parents=True)
    found = story(command, tmp_path / "run")
    assert (found["status"], found["step"], found["epoch"]) == ("new", 0, 0.0)
    assert (found["attempts"], found["checkpoints"], found["config"]) == ([], [], {})


def test_attempts_tell_where_they_began_how_far_they_got_and_what_was_lost(
    root: Folder, command: Command
) -> None:
    save(begin(root), 2, 4)
    reach(root, 1, 0, 7)  # killed at step 7: 3 steps lost
    writer = begin(root)
    save(writer, 6)
    save(writer, 9, reason="drain")  # asked to stop, and nobody wrote a hint
    save(begin(root), 12)  # no hint: it may have got further than 12
    begin(root, "pod-b")
    keys_shown = ("first_step", "last_step", "lost_steps", "ended", "owner", "world_size")
    found = story(command, root)["attempts"]
    assert [tuple(each[key] for key in keys_shown) for each in found] == [
        (0, 7, 3, "lost", "pod-a", 2),
        (4, 9, 0, "drained", "pod-a", 2),
        (9, 12, None, "superseded", "pod-a", 2),
        (12, None, None, None, "pod-b", 2),
    ]
    assert [each["attempt"] for each in found] == [1, 2, 3, 4]
    assert all(each["started_at"].endswith("Z") for each in found)


def test_falling_back_behind_a_damaged_checkpoint_counts_as_lost_steps(
    root: Folder, command: Command
) -> None:
    save(begin(root), 2, 4)
    reach(root, 1, 0, 5)
    damage(root, "checkpoints/000000004-*/model.safetensors")
    begin(root)
    found = story(command, root)
    assert [each["first_step"] for each in found["attempts"]] == [0, 2]
    assert found["attempts"][0]["lost_steps"] == 3
    assert found["step"] == 2


def test_other_bits_on_one_machine_show_for_ever(root: Folder, command: Command) -> None:
    save(begin(root), 2)
    save(begin(root, same_bits=False), 4)
    save(begin(root), 6)
    assert story(command, root)["same_bits"] is False
    assert "same bits  no" in command("show", root)[1]


def test_the_page_holds_what_json_holds(root: Folder, command: Command) -> None:
    writer = begin(root)
    save(writer, 2, 4)
    writer.override(step=4, settings={"lr": 0.1})
    reach(root, 1, 0, 7)
    begin(root)
    code, out, err = command("show", root)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert "\nstatus     not finished: running, or stopped on the way\n" in out
    assert ["step", "4"] in lines
    assert ["train_loss", "0.25"] in lines
    assert ["from", "step", "4", "lr", "=", "0.1"] in lines
    assert ["lr", "0.1"] in lines
    started = story(command, root)["attempts"][0]["started_at"]
    assert ["1", "2", started, "0", "to", "7", "3", "lost", "pod-a"] in lines
    sha256 = story(command, root)["checkpoints"][0]["model_sha256"]
    assert any(line[:2] == ["2", "0.2"] and line[-1] == sha256[:12] for line in lines)


def test_damaged_records_are_left_out_and_named_on_stderr(root: Folder, command: Command) -> None:
    writer = begin(root)
    save(writer, 2, 4)
    save(writer, 6)
    damage(root, path_of(2))
    for flags in ([], ["--json"]):
        code, out, err = command("show", root, *flags)
        assert code == 0
        assert err == "warning: damaged records of the log are left out: 2\n"
    found = json.loads(out)
    assert [each["step"] for each in found["checkpoints"]] == [2, 6]


def test_a_log_without_an_intact_record_is_65(root: Folder, command: Command) -> None:
    begin(root)
    damage(root, path_of(0))
    code, out, err = command("show", root)
    assert (code, out) == (ExitCode.DATA_DAMAGED, "")
    assert err.startswith("fmnist_dist.runs: all 1 records of the run log are damaged")


# wrong names


def test_a_name_that_is_no_run_is_answered_with_the_nearest_one(
    tmp_path: Path, command: Command
) -> None:
    begin(tmp_path / "baseline")
    (tmp_path / "basement").mkdir()  # nearer, and no run
    code, out, err = command("show", tmp_path / "basemnt")
    assert (code, out) == (ExitCode.USAGE, "")
    assert err == (
        f"fmnist_dist.runs: run {tmp_path}/basemnt: there is no such folder, expected that of a "
        f"run; did you mean {tmp_path}/baseline?\n"
    )
    assert "did you mean" not in command("show", tmp_path / "xyz")[2]


def test_a_folder_of_runs_is_answered_with_the_runs_in_it(tmp_path: Path, command: Command) -> None:
    begin(tmp_path / "one")
    begin(tmp_path / "two")
    code, _, err = command("verify", tmp_path)
    assert code == ExitCode.USAGE
    assert f"holds no run; did you mean one of {tmp_path}/one, {tmp_path}/two?" in err


@pytest.mark.parametrize("name", ["show", "verify", "prune", "ledger"])
def test_a_file_is_78_and_nothing_is_64_for_every_command(
    name: str, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "file").write_text("no run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign" / "log").mkdir(parents=True)
    (tmp_path / "foreign" / "log" / "syslog").touch()
    for what, expected in (
        ("file", ExitCode.INCOMPATIBLE),
        ("file/below", ExitCode.USAGE),
        ("empty", ExitCode.USAGE),
        ("foreign", ExitCode.USAGE),
        ("none", ExitCode.USAGE),
        ("n" * 300, ExitCode.INCOMPATIBLE),
    ):
        code, out, err = command(name, tmp_path / what)
        assert (code, out, err.count("\n")) == (expected, "", 1), what
    assert command(name, "s4://bucket/run")[0] == ExitCode.USAGE
    assert command(name, "")[0] == ExitCode.USAGE
    assert not (tmp_path / "none").exists()  # looking makes nothing


def test_a_file_url_names_a_run(tmp_path: Path, command: Command) -> None:
    begin(tmp_path / "run")
    assert command("show", f"file://{tmp_path}/run")[0] == 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("shwo x", "command shwo: there is no such command"),
        ("show", "argument RUN: found nothing, expected a value"),
        ("show x --jsn", "flag --jsn: there is no such flag; did you mean --json?"),
        ("verify x --json", "flag --json: there is no such flag"),
        ("export x", "argument OUT: found nothing, expected a value"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_64(
    line: str, expected: str, command: Command
) -> None:
    code, out, err = command(*line.split())
    assert (code, out, err.count("\n")) == (ExitCode.USAGE, "", 1)
    assert err.startswith(f"fmnist_dist.runs: {expected}")


def test_no_command_prints_help_and_is_64(command: Command) -> None:
    code, out, _ = command()
    assert code == ExitCode.USAGE
    assert (0, out) == command("--help")[:2]
    for name in ("show", "verify", "prune", "ledger", "export"):
        assert f"\n  {name} " in out


# verify


def test_verify_reads_every_file_and_names_each_damage(root: Folder, command: Command) -> None:
    save(begin(root), 2, 4, 6)
    code, out, err = command("verify", root)
    assert (code, err) == (0, "")
    assert "read    4 records, 9 files" in out
    assert "valid   3 of 3: steps 2, 4, 6" in out
    for path in sorted(root.glob("checkpoints/*/*")):
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        code, out, err = command("verify", root)
        assert code == ExitCode.DATA_DAMAGED
        assert f"damage  {path.relative_to(root)} is damaged" in out
        newest = 4 if path.parent.name.startswith("000000006") else 6
        assert err.endswith(f"found 1 damages; step {newest} would be used\n")
        path.write_bytes(good)
    assert command("verify", root)[0] == 0


def test_verify_says_when_no_valid_checkpoint_is_left(root: Folder, command: Command) -> None:
    save(begin(root), 2)
    next(root.glob("checkpoints/*/model.safetensors")).unlink()
    code, out, err = command("verify", root)
    assert code == ExitCode.DATA_DAMAGED
    assert "model.safetensors is missing" in out
    assert err.endswith("no valid checkpoint is left\n")


def test_verify_finds_a_damaged_record_and_metrics_of_a_retired_checkpoint(
    root: Folder, command: Command
) -> None:
    writer = begin(root)
    save(writer, 2, 4, 6)
    writer.retire(keep_last=1, keep_every=None)
    assert command("verify", root)[0] == 0
    damage(root, f"checkpoints/000000002-*/{METRICS}")
    code, out, _ = command("verify", root)
    assert code == ExitCode.DATA_DAMAGED
    assert METRICS in out
    damage(root, path_of(0))
    assert f"{path_of(0)}: " in command("verify", root)[1]


def test_a_checkpoint_in_quarantine_is_named_and_is_no_damage(
    root: Folder, command: Command
) -> None:
    save(begin(root), 2, 4)
    damage(root, "checkpoints/000000004-*/model.safetensors")
    assert command("verify", root)[0] == ExitCode.DATA_DAMAGED
    save(begin(root), 4)  # falls back to 2 and does step 4 again
    code, out, _ = command("verify", root)
    assert code == 0
    assert "note    step 4 is in quarantine: " in out
    assert "valid   2 of 2: steps 2, 4" in out


def test_a_checkpoint_that_is_retired_while_it_is_read_is_no_damage(tmp_path: Path) -> None:
    root = tmp_path / "run"
    writer = begin(root)
    save(writer, 2, 4)

    class Retiring(LocalStorage):
        def read(self, path: str) -> bytes:
            if path.startswith("checkpoints/000000002-"):
                writer.retire(keep_last=1, keep_every=None)
            return super().read(path)

    storage = Retiring(root)
    findings = verify(storage, RunLog(storage))
    assert findings.damage == ()
    assert findings.valid_steps == (4,)


# prune


def test_prune_deletes_orphans_of_older_attempts_and_names_them(
    root: Folder, command: Command
) -> None:
    save(begin(root), 2)
    orphans = []
    for number in (1, 2):
        name = f"checkpoints/000000009-{number:04d}-0123456789abcdef/part"
        opened(root).create(name, b"")
        orphans.append(root / name)
    begin(root)  # sweeps nothing by itself here; its own folders may still be wanted
    code, out, err = command("prune", root)
    assert (code, err) == (0, "")
    assert out == f"deleted {orphans[0].relative_to(root)}\n1 files deleted, 4 kept\n"
    assert not orphans[0].exists()
    assert orphans[1].exists()
    assert command("prune", root)[1] == "0 files deleted, 4 kept\n"
    assert command("verify", root)[0] == 0


def test_prune_deletes_nothing_where_a_record_is_damaged(root: Folder, command: Command) -> None:
    save(begin(root), 2, 4)
    orphan = root / "checkpoints/000000009-0001-0123456789abcdef"
    opened(root).create(f"checkpoints/{orphan.name}/part", b"")
    begin(root)
    damage(root, path_of(1))
    code, out, err = command("prune", root)
    assert (code, out) == (ExitCode.DATA_DAMAGED, "")
    assert "nothing was deleted" in err
    assert path_of(1) in err
    assert orphan.exists()


# ledger


def planned(steps: int) -> Ids:
    """Return the samples of each step, as a right training gathers them."""
    ids: Ids = {}
    for step in range(1, steps + 1):
        epoch, place = divmod(step - 1, 4)
        order = epoch_order(seed=SEED, epoch=epoch, num_samples=NUM_SAMPLES)
        ids[step] = order[place * 16 : (place + 1) * 16].tolist()
    return ids


def consume(root: Folder, ids: Mapping[int, list[int]], *, every: int) -> None:
    """Make a run that gathered `ids` and saved after every `every` steps."""
    writer = begin(root)
    table = keys.identity_table(NUM_SAMPLES)
    ledger: tuple[EpochDigest, ...] = ()
    rows = ""
    for step, taken in ids.items():
        epoch = (step - 1) // 4
        sums = table[np.array(taken, dtype=np.int64)].sum(axis=0)
        lanes = (int(sums[0]), int(sums[1]))
        ledger = digest.add(ledger, epoch=epoch, count=len(taken), digest=lanes)
        rows += json.dumps({"step": step, "epoch": epoch, "samples": len(taken)}) + "\n"
        if step % every == 0:
            files = {**files_of(step), METRICS: rows.encode()}
            epochs = step // 4 + (step % 4) * 16 / NUM_SAMPLES
            assert writer.save(
                dataclasses.replace(snapshot(step, files), ledger=ledger, epoch=epochs)
            )
            ledger, rows = ledger[-1:], ""


def test_the_fake_run_is_planned_as_the_plan_says() -> None:
    settings = Settings(
        epochs=3,
        batch_size=16,
        lr=0.4,
        schedule="constant",
        weight_decay=0.0,
        label_smoothing=0.0,
        ema=0.0,
        augment="none",
    )
    plan = Plan(settings, num_samples=NUM_SAMPLES)
    assert [len(each) for each in planned(12).values()] == [plan.at(s).size for s in range(12)]


@pytest.mark.parametrize("every", [1, 2, 3, 5, 11])
def test_finished_epochs_are_proved_wherever_checkpoints_fell(
    every: int, root: Folder, command: Command
) -> None:
    consume(root, planned(11), every=every)
    code, out, err = command("ledger", root)
    assert (code, err) == (0, "")
    last = 11 // every * every
    proved = [f"epoch {e}        proved: each of 60 samples exactly once" for e in range(last // 4)]
    assert [line for line in out.splitlines() if "proved" in line] == proved
    in_progress = 16 * (last % 4)
    assert (f"in progress: {in_progress} of 60 samples" in out) is (in_progress > 0)
    told = json.loads(command("ledger", root, "--json")[1])
    assert told["proved"] is True
    assert told["repeated"] == []


def twice(ids: Ids) -> None:
    ids[6][3] = ids[6][2]


def foreign(ids: Ids) -> None:
    ids[6][3] = ids[7][0]


def missing(ids: Ids) -> None:
    del ids[6][3]


def shifted(ids: Ids) -> None:
    ids[6].append(ids[7].pop(0))
    ids[6].pop(0)


def two_wrongs(ids: Ids) -> None:
    # The count and even the sum of the ids stay right: only identities tell.
    ids[6][0] += 1
    ids[6][1] -= 1
    assert min(ids[6]) >= 0
    assert max(ids[6]) < NUM_SAMPLES


@pytest.mark.parametrize("every", [1, 2, 3, 12])
@pytest.mark.parametrize("plant", [twice, foreign, missing, shifted, two_wrongs])
def test_a_planted_wrong_sample_fails_its_epoch_only_and_the_step_is_narrowed_down(
    plant: Callable[[Ids], None], every: int, root: Folder, command: Command
) -> None:
    ids = planned(12)
    right = {step: sorted(taken) for step, taken in ids.items()}
    plant(ids)
    assert next(step for step in ids if sorted(ids[step]) != right[step]) == 6
    consume(root, ids, every=every)
    code, out, err = command("ledger", root)
    assert code == ExitCode.DATA_DAMAGED
    consumed = sum(len(ids[step]) for step in range(5, 9))
    assert err.endswith(
        f"not every sample exactly once: epoch 1: consumed {consumed}, expected 60\n"
    )
    assert "epoch 1        NOT PROVED: " in out
    assert out.count(" proved: ") == 2
    told = json.loads(command("ledger", root, "--json")[1])
    assert told["proved"] is False
    assert [each["exactly_once"] for each in told["epochs"]] == [True, False, True]
    suspect = told["epochs"][1]["suspect"]
    if plant is missing:  # its row tells: it took fewer samples
        assert (suspect["first_step"], suspect["last_step"]) == (6, 6)
        assert suspect["why"] == "it took 15 samples, not 16"
    elif plant is shifted and every > 1:  # two rows tell, the first of them by its neighbour
        assert suspect["first_step"] <= 7
    else:
        first = (5 // every) * every + 1
        assert suspect["first_step"] == max(first, 5)
        assert suspect["last_step"] == min(first + every - 1, 8)


def test_a_step_that_was_left_out_or_done_twice_is_named(tmp_path: Path, command: Command) -> None:
    ids = planned(8)
    left_out = {step: taken for step, taken in ids.items() if step != 3}
    consume(tmp_path / "less", left_out, every=4)
    code, out, _ = command("ledger", tmp_path / "less")
    assert code == ExitCode.DATA_DAMAGED
    assert "consumed 44, expected 60; first wrong: step 3: it took no samples, not 16" in out
    consume(tmp_path / "more", {**ids, 3: ids[3] * 2}, every=4)
    assert (
        "consumed 76, expected 60; first wrong: step 3" in command("ledger", tmp_path / "more")[1]
    )


def test_an_epoch_that_no_checkpoint_counted_is_not_proved(root: Folder, command: Command) -> None:
    writer = begin(root)
    writer.save(dataclasses.replace(snapshot(4), epoch=1.0, ledger=()))
    code, out, _ = command("ledger", root)
    assert code == ExitCode.DATA_DAMAGED
    assert "epoch 0        NOT PROVED: consumed 0, expected 60" in out


def test_repeated_work_is_listed_and_leaves_the_proof_alone(root: Folder, command: Command) -> None:
    consume(root, planned(8), every=4)
    reach(root, 1, 0, 10)
    begin(root)  # nobody knows how far this one got
    begin(root)
    code, out, _ = command("ledger", root)
    assert code == 0
    assert "attempt 1  lost 2 steps" in out
    assert "attempt 2  lost an unknown number of steps after step 8" in out
    told = json.loads(command("ledger", root, "--json")[1])
    assert [(each["attempt"], each["lost_steps"]) for each in told["repeated"]] == [
        (1, 2),
        (2, None),
    ]


def test_a_broken_line_proves_nothing(root: Folder, command: Command) -> None:
    consume(root, planned(8), every=2)
    damage(root, path_of(1))
    code, _, err = command("ledger", root)
    assert code == ExitCode.DATA_DAMAGED
    assert "the line of checkpoints is broken" in err


# export, and a run that was really trained


def test_exported_weights_load_in_three_lines_and_are_what_the_run_evaluates(
    trained_run: Path, tmp_path: Path
) -> None:
    before = contents(trained_run)
    out = tmp_path / "deep" / "out"
    ended = process("export", trained_run, out)
    assert ended.returncode == 0, ended.stderr
    assert contents(trained_run) == before
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # no temporary is left
    config = json.loads((out / "config.json").read_text())
    told = json.loads(process("show", trained_run, "--json").stdout)
    assert config["test_accuracy"] == told["metrics"]["test_accuracy"]
    assert (config["step"], config["weights"]) == (6, "ema")
    assert len(config["class_names"]) == config["model"]["num_classes"] == 10
    assert len(config["load"]) == 3
    # The averaged values where there are any, the model's own elsewhere.
    check = """
from safetensors.torch import load_file
own = load_file(FOLDER + "/model.safetensors")
averaged = load_file(FOLDER + "/ema.safetensors")
for name, tensor in model.state_dict().items():
    assert tensor.equal(averaged.get(name, own[name])), name
assert set(own) == set(model.state_dict()) and not model.training
assert any(not own[name].equal(averaged[name]) for name in averaged)
"""
    folder = str(next(trained_run.glob("checkpoints/000000006-*")))
    program = "\n".join([*config["load"], f"FOLDER = {folder!r}", check])
    loaded = subprocess.run(
        [sys.executable, "-c", program],
        cwd=out,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr


def test_export_replaces_an_empty_folder_and_nothing_else(
    trained_run: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "empty").mkdir()
    assert command("export", trained_run, tmp_path / "empty")[0] == 0
    whole = contents(tmp_path / "empty")
    assert set(whole) == {"config.json", "model.safetensors"}
    (tmp_path / "file").touch()
    for taken in ("empty", "file"):
        code, out, err = command("export", trained_run, tmp_path / taken)
        assert (code, out, err.count("\n")) == (ExitCode.USAGE, "", 1)
        assert "is there already; expected a new or an empty folder" in err
    assert contents(tmp_path / "empty") == whole
    code, _, err = command("export", trained_run, tmp_path / "file" / "below")
    assert code == ExitCode.TRANSIENT
    assert err.count("\n") == 1


def test_a_trained_run_is_verified_proved_and_shown_without_torch(trained_run: Path) -> None:
    program = (
        "import sys; from fmnist_dist import runs; code = runs.main(); "
        "loaded = {'torch', 'fmnist_dist.job'} & sys.modules.keys(); "
        "assert not loaded, loaded; sys.exit(code)"
    )
    for name in ("show", "verify", "prune", "ledger"):
        ended = process(name, trained_run, program=program)
        assert ended.returncode == 0, ended.stderr
        assert str(trained_run) in ended.stdout or name == "prune"


def test_a_reader_that_has_seen_enough_leaves_no_traceback(trained_run: Path) -> None:
    for name in ("show", "verify"):
        with subprocess.Popen(
            [sys.executable, "-m", "fmnist_dist.runs", name, str(trained_run)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as child:
            assert child.stdout is not None
            child.stdout.close()  # long before the first line comes
            assert child.stderr is not None
            assert child.stderr.read() == b""
        assert child.returncode == 141
