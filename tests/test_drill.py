"""The drill: a short real one passes, and its verdict fails on every kind of bad evidence."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import ROOT, wait_for

from fmnist_dist.checkpoint.place import Place
from launch import launched, verdict

CALM, DISTURBED = Place.of("/of/calm"), Place.of("/of/disturbed")
STRUCK = verdict.Struck(
    what="kill a trainer",
    at_step=3,
    workers=2,
    level="healed",
    seconds=0.1,
    leaves_nobody=False,
)


def run_drill(*flags: str, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.drill", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.slow
def test_a_training_that_is_struck_again_and_again_passes(tmp_path: Path) -> None:
    ended = run_drill("--faults=3", "--steps=90", "--seed=3", f"--keep={tmp_path}", timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "PASS: same bits" in ended.stdout
    assert [line for line in ended.stdout.splitlines() if line.startswith("  3  ")], ended.stdout


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(10))
def test_twenty_faults_with_ten_seeds_in_a_row(seed: int, tmp_path: Path) -> None:
    flags = ["--faults=20", "--steps=500", f"--seed={seed}", f"--keep={tmp_path}"]
    ended = run_drill(*flags, timeout=1200)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_its_help_is_a_page_for_people() -> None:
    ended = run_drill("--help", timeout=120)
    assert ended.stdout.startswith("Usage: python -m launch.drill [flags]\n")
    assert "--faults INT                   how many must happen [20]" in ended.stdout
    assert "object at" not in ended.stdout


def test_a_wrong_flag_is_one_line(tmp_path: Path) -> None:
    ended = run_drill("--workers=9", timeout=120)
    assert ended.returncode == 64
    assert ended.stderr.splitlines() == [
        "launch.drill: flag --workers: found '9', expected numbers from 1 to 8, as in 1,2"
    ]


def story(**changed: Any) -> dict[str, Any]:
    return {"status": "finished", "attempts": [], "heals": [], **changed}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"faults": 2}, "1 of 2 faults happened"),
        ({"story": story(status="running")}, "is running, not finished"),
        ({"bits": "other"}, "the bits differ"),
        ({"ledger": 65}, "the ledger"),
        ({"story": story(attempts=[{"lost_steps": 3}])}, "1 attempts lost steps, 0 ended"),
        ({"story": story(heals=[{"lost_steps": 1}])}, "heals lost 1 steps"),
        ({}, None),
    ],
    ids=["too few", "unfinished", "bits", "ledger", "lost", "healed but lost", "nothing"],
)
def test_the_verdict_fails_on_bad_evidence_and_on_nothing_else(
    bad: dict[str, Any], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bits(run: Place) -> dict[str, str]:
        return {"model": bad.get("bits", "same") if run == DISTURBED else "same"}

    proof = subprocess.CompletedProcess([], bad.get("ledger", 0), "broken", "")
    monkeypatch.setattr(verdict, "bits", bits)
    monkeypatch.setattr(verdict, "_runs", lambda *_: proof)
    monkeypatch.setattr(
        verdict, "show", lambda run: bad.get("story", story()) if run == DISTURBED else story()
    )
    problems = verdict.judge(CALM, DISTURBED, [STRUCK], faults=bad.get("faults", 1))
    assert [said in problem for problem in problems] == ([True] if said else [])


def test_a_process_that_ends_while_it_is_looked_at_hides_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a node that is lost would leave some of its processes alive."""
    read_text = Path.read_text
    with subprocess.Popen(["sleep", "60"]) as gone, subprocess.Popen(["sleep", "60"]) as stays:

        def read(path: Path, *words: Any, **named: Any) -> str:
            if path == Path(f"/proc/{gone.pid}/comm"):
                raise FileNotFoundError
            return read_text(path, *words, **named)

        try:
            both = sorted([gone.pid, stays.pid])
            # The name comes with exec, a moment after Popen has returned.
            wait_for(lambda: launched.children(os.getpid(), "sleep") == both, "their names")
            monkeypatch.setattr(Path, "read_text", read)
            assert launched.children(os.getpid(), "sleep") == [stays.pid]
        finally:
            gone.kill()
            stays.kill()
