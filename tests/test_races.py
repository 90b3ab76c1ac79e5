"""Two processes race for one run: one commits, nobody loses what was acknowledged."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from jobs import ROOT
from plain_s3 import PlainStorage
from race_child import KEEP_LAST, files_by
from run_builders import begin
from run_files import records, storage_of
from run_model import Model
from seaweed import Seaweed, child_environ

from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import Attempt, Checkpoint, Quarantine, path_of
from fmnist_dist.checkpoint.storage import Storage
from fmnist_dist.checkpoint.verify import verify
from fmnist_dist.filenames import METRICS

TESTS = ROOT / "tests"
NAMES = ("first", "second")
EVENTS = 6  # of a round that nobody disturbs, and its end


@dataclass
class Racer:
    """One process, and all that it has told."""

    process: "subprocess.Popen[str]"
    told: list[str] = field(default_factory=list)

    def go(self, number: int) -> None:
        assert self.process.stdin is not None
        self.told.append(f"round {number}")
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()

    def hear(self, lines: int = 1) -> bool:
        """Wait for so many more lines; return whether the round is over."""
        assert self.process.stdout is not None
        for _ in range(lines):
            line = self.process.stdout.readline().strip()
            assert line, f"{self.process.args!r} has died after {self.told[-5:]}"
            self.told.append(line)
            if line in {"done", "fenced"}:
                return True
        return False


@contextmanager
def racers(url: str, environ: dict[str, str]) -> Iterator[list[Racer]]:
    path = f"{ROOT}:{TESTS}"
    started = [
        Racer(
            subprocess.Popen(
                [sys.executable, str(TESTS / "race_child.py"), url, name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**environ, "PYTHONPATH": path},
            )
        )
        for name in NAMES
    ]
    try:
        for each in started:
            each.hear()
        yield started
    finally:
        for each in started:
            each.process.kill()
            each.process.communicate()


def race(url: str, environ: dict[str, str], *, rounds: int) -> dict[str, list[str]]:
    """Let two launches race; return what each owner told.

    In each round the one sets out at another event of the other, in the first at the same time.
    """
    with racers(url, environ) as both:
        for number in range(rounds):
            ahead, behind = both if number // EVENTS % 2 else reversed(both)
            ahead.go(number)
            over = ahead.hear(number % EVENTS)
            behind.go(number)
            for racer in (behind, *([] if over else [ahead])):
                while not racer.hear():
                    pass
        return {
            f"{name}-{part.splitlines()[0]}": part.splitlines()[1:]
            for name, racer in zip(NAMES, both, strict=True)
            for part in "\n".join(racer.told).split("round ")[1:]
        }


def check(storage: Storage, told: dict[str, list[str]]) -> None:
    """Hold the whole log against the rules, and against what each racer was told."""
    model, found = Model(), records(storage)
    starts: dict[str, tuple[int, int]] = {}  # owner: attempt, newest step when it took over
    by_index: dict[int, tuple[str, int]] = {}  # owner and step of each commit
    owner = ""
    for record in found:
        objects = {path_of(record.index): storage.read(path_of(record.index))}
        assert not isinstance(record.body, Quarantine), record.body.why
        if isinstance(record.body, Attempt):
            owner = record.body.owner
            starts[owner] = (record.attempt, model.newest or 0)
        elif isinstance(record.body, Checkpoint):
            folder, step = record.body.folder, record.body.step
            objects |= {f"{folder}/{name}": data for name, data in files_by(owner, step).items()}
            by_index[record.index] = (owner, step)
        model.created(objects, path_of(record.index))  # raises where a rule is broken
    acknowledged: dict[int, tuple[str, int]] = {}
    for each, lines in told.items():
        for line in lines:
            kind, *numbers = line.split()
            assert kind != "damage", line
            if kind == "begun":
                assert starts[each][0] == int(numbers[0])
            elif kind == "starts":
                assert starts[each][1] == int(numbers[0]), "not from the newest checkpoint"
            elif kind == "saved":
                step, index = map(int, numbers)
                assert index not in acknowledged, f"two commits at {index}"
                acknowledged[index] = (each, step)
    assert acknowledged == by_index
    _check_left(storage)


def _check_left(storage: Storage) -> None:
    """What is retained is whole; what is not is swept by the next launch."""
    assert verify(storage, RunLog(storage)).damage == ()
    writer = begin(storage, "last")
    writer.choose(report=pytest.fail)
    writer.sweep()
    retained = {each.index for each in writer.head.checkpoints}
    assert len(retained) >= KEEP_LAST
    kept = {
        record.body.folder: sorted(record.body.files) if record.index in retained else [METRICS]
        for record in records(storage)
        if isinstance(record.body, Checkpoint)
    }
    left = {f"checkpoints/{name}" for name in storage.list("checkpoints")}
    assert {folder: storage.list(folder) for folder in left} == kept


@pytest.mark.parametrize("rounds", [2 * EVENTS, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_two_launches_that_race_for_a_run_on_disk(tmp_path: Path, rounds: int) -> None:
    told = race(str(tmp_path / "run"), child_environ(), rounds=rounds)
    assert sum(lines[-1] == "fenced" for lines in told.values()) > rounds / 8
    check(storage_of(tmp_path / "run"), told)


@pytest.mark.parametrize("rounds", [EVENTS, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_two_launches_that_race_for_a_run_on_s3(seaweed: Seaweed, s3_url: str, rounds: int) -> None:
    told = race(s3_url, child_environ(seaweed.endpoint), rounds=rounds)
    assert sum(lines[-1] == "fenced" for lines in told.values()) > rounds / 8
    check(PlainStorage(seaweed, s3_url), told)
