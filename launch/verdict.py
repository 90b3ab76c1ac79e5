"""What a drill makes of the evidence: the run's own log, the bits, and what was done to it."""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.place import Place
from launch.launched import LIMIT_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """One fault that happened: proved by the state of the processes that it hit."""

    what: str
    at_step: int
    workers: int
    level: str  # healed | restarted | launched anew | trained on
    seconds: float  # to the next finished step
    leaves_nobody: bool  # all that held the newest state ended at once, and without notice

    def line(self, number: int) -> str:
        return (
            f"{number:3}  {self.what:18} step {self.at_step:4}  {self.workers} workers  "
            f"{self.level:14} {self.seconds:7.2f} s"
        )


def judge(calm: Place, disturbed: Place, struck: list[Struck], *, faults: int) -> list[str]:
    """Return what is wrong with the evidence; nothing: it cannot be killed."""
    problems = []
    if len(struck) < faults:
        problems.append(f"{len(struck)} of {faults} faults happened: train for more --steps")
    stories = {run: show(run) for run in (calm, disturbed)}
    for run, story in stories.items():
        if story["status"] != "finished":
            name = str(run).rpartition("/")[2]
            problems.append(f"the {name} run is {story['status']}, not finished")
    if problems:
        return problems
    if bits(calm) != bits(disturbed):
        problems.append("the bits differ from the undisturbed run's")
    proof = _runs("ledger", disturbed)
    if proof.returncode:
        problems.append(f"the ledger: {proof.stdout or proof.stderr}")
    story = stories[disturbed]
    silent = sum(each.leaves_nobody for each in struck)
    without = sum(1 for each in story["attempts"] if each["lost_steps"])
    if without > silent:
        problems.append(f"{without} attempts lost steps, {silent} ended with nobody left or told")
    alone = any(each.what == "kill all trainers" or each.workers == 1 for each in struck)
    lost = sum(each["lost_steps"] for each in story["heals"])
    if lost and not alone:
        problems.append(f"heals lost {lost} steps although a trainer was left each time")
    return problems


def tell(struck: list[Struck], problems: list[str], story: dict[str, Any]) -> None:
    for level in sorted({each.level for each in struck}):
        seconds = [each.seconds for each in struck if each.level == level]
        middle = statistics.median(seconds)
        print(f"{level:14} {len(seconds):3} times, {middle:.2f} s (max {max(seconds):.2f} s)")
    lost = [
        sum(each["lost_steps"] or 0 for each in story.get(n, ())) for n in ("heals", "attempts")
    ]
    print(f"steps lost, by the run's own log: {lost[0]} in heals, {lost[1]} between attempts")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("FAIL" if problems else "PASS: same bits, every sample once, nothing hung")


def bits(run: Place) -> dict[str, str]:
    """Return the SHA-256 of every file of the newest checkpoint but its metric rows."""
    log = RunLog(run.storage())
    body: Any = log.record(log.read().head.checkpoints[-1].index).body
    return {name: file.sha256 for name, file in body.files.items() if name != "metrics.jsonl"}


def show(run: Place) -> dict[str, Any]:
    found = _runs("show", run, "--json")
    return json.loads(found.stdout) if found.returncode == 0 else {"status": "not there"}


def _runs(command: str, run: Place, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fmnist_dist.runs", command, str(run), *flags],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
