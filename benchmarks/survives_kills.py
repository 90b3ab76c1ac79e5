"""Draws the README's picture: a run that is killed again and again, over one that is left alone.

    pip install matplotlib
    python benchmarks/survives_kills.py docs/survives-kills.svg

Runs both for real (two workers, plain torchrun), kills a worker or the whole process tree with
SIGKILL at random steps, and draws the loss that each committed. Prints both SHA-256 of the weights.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.hint import read_hints
from fmnist_dist.checkpoint.history import read_history
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.restore import read_file

STEPS = 200
KILLS = 6
SMOOTH = 8  # steps of a moving mean


def main() -> None:
    """Run, kill, compare and draw."""
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = Path(folder) / "calm", Path(folder) / "killed"
        launch(calm).wait()
        kills = kill_again_and_again(killed)
        shas = [newest_sha256(run) for run in (calm, killed)]
        print(json.dumps({"kills": kills, "model_sha256": shas, "same": shas[0] == shas[1]}))
        draw(target, calm, killed)


def launch(run: Path) -> subprocess.Popen[bytes]:
    """Start a training of `STEPS` steps, or go on with it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--max-restarts=20", "-m", "fmnist_dist.train", f"--run-dir={run}"]
    command += [f"--max-steps={STEPS}", "--save-every-steps=20", "--eval-every-epochs=99"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)


def kill_again_and_again(run: Path) -> list[str]:
    """Kill rank 1, or everything, at random steps; return what was killed when."""
    draw_number = random.Random(1)
    steps = sorted(draw_number.sample(range(15, STEPS - 10), KILLS))
    told = []
    process = launch(run)
    for attempt, step in enumerate(steps):
        notes = run / "progress"
        while not (hints := read_hints(notes)) or max(hints) <= attempt or reached(run) < step:
            assert process.poll() is None
            time.sleep(0.01)
        if draw_number.random() < 0.5:
            process.kill()  # its workers die with it
            process.wait()
            process = launch(run)
            told.append(f"everything at step {reached(run)}")
        else:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            told.append(f"a worker at step {reached(run)}")
            os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait() == 0
    return told


def reached(run: Path) -> int:
    """Return the last step that the newest attempt has finished."""
    hints = read_hints(run / "progress")
    return hints[max(hints)].last_step


def newest_sha256(run: Path) -> str:
    """Return the digest of the final weights."""
    log = RunLog(LocalStorage(run))
    return lineage.line(log, log.read().head)[-1].checkpoint.files["model.safetensors"].sha256


def losses(run: Path) -> tuple[list[int], list[float]]:
    """Return steps and smoothed training loss along the committed line."""
    storage = LocalStorage(run)
    log = RunLog(storage)
    rows = [
        json.loads(line)
        for commit in lineage.line(log, log.read().head)
        for line in read_file(storage, commit.checkpoint, "metrics.jsonl").decode().splitlines()
    ]
    rows = [row for row in rows if "train_loss" in row]
    values = [row["train_loss"] for row in rows]
    means = [
        sum(values[max(0, i - SMOOTH + 1) : i + 1]) / min(i + 1, SMOOTH) for i in range(len(values))
    ]
    return [row["step"] for row in rows], means


def draw(target: Path, calm: Path, killed: Path) -> None:
    """Draw both curves, with each kill where it struck and how far it threw the run back."""
    plt.rcParams.update({"font.size": 11, "svg.hashsalt": "fmnist_dist", "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axes.plot(*losses(calm), color="#9ecae1", linewidth=6, label="left alone")
    axes.plot(*losses(killed), color="#08306b", linewidth=1.5, label="killed 6 times: same bits")
    top = axes.get_ylim()[1]
    log = RunLog(LocalStorage(killed))
    stories = read_history(log, read_hints(killed / "progress")).attempts
    for number, story in enumerate(each for each in stories if each.lost_steps is not None):
        if story.ended == "finished" or story.last_step is None:
            continue
        axes.axvspan(
            story.last_step - story.lost_steps, story.last_step, color="#fcbba1", linewidth=0
        )
        axes.axvline(story.last_step, color="#cb181d", linewidth=1.2)
        axes.annotate(
            "kill -9" if number == 0 else "",
            (story.last_step, top),
            xytext=(4, -12),
            textcoords="offset points",
            color="#cb181d",
        )
    axes.set(xlabel="step", ylabel="training loss", xlim=(0, STEPS))
    axes.spines[["top", "right"]].set_visible(False)
    again = Patch(color="#fcbba1", label="steps done again")
    axes.legend(
        handles=[*axes.get_legend_handles_labels()[0], again], loc="upper right", framealpha=1
    )
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
