"""From a SIGKILL to the next finished step: a trainer, all trainers, or a keeper, under torchrun.

    python benchmarks/heal.py [kills] [one|all|keeper] [batch size]

A plain `torchrun --nproc_per_node=2` trains the default CNN; every kill waits for a few steps after
the last one. A lost keeper costs a restart of all workers: it is compared with the bare import of
torch in the same run. Prints one JSON object; seconds.
"""

import json
import mmap
import os
import random
import re
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 120.0
POLL_SECONDS = 0.001


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    what = sys.argv[2] if len(sys.argv) > 2 else "one"
    batch_size = sys.argv[3] if len(sys.argv) > 3 else "64"
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder) / "run", batch_size)
        try:
            job.await_step(job.step() + 5)
            seconds = [job.kill(what) for _ in range(kills)]
            steps = [job.one_step() for _ in range(20)]
        finally:
            job.end()
        text = job.log.read_text()
    found = {
        "kills": kills,
        "of": what,
        "batch_size": int(batch_size),
        "median": round(statistics.median(seconds), 3),
        "p90": round(sorted(seconds)[int(0.9 * (kills - 1))], 3),
        "max": round(max(seconds), 3),
        "step_without_a_kill": round(statistics.median(steps), 3),
        "lost_steps": sum(map(int, re.findall(r"healed .* lost_steps=(\d+)", text)))
        + sum(map(int, re.findall(r" resumed .* lost_steps=(\d+)", text))),
        "healed": text.count(" healed "),
        "restarted": text.count(" resumed "),
    }
    if what == "keeper":
        found["bare_import"] = round(statistics.median(bare_import() for _ in range(5)), 3)
    print(json.dumps(found, indent=1))


def bare_import() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch, torch._dynamo"], check=True)
    return time.monotonic() - began


class Job:
    """A training that is watched through its mapped progress file: that costs little."""

    def __init__(self, run: Path, batch_size: str, *flags: str) -> None:
        self.run = run
        self.log = run.parent / "log"
        self.attempt = 0
        self.map = None
        self.draw = random.Random(0)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        command += ["--max-restarts=1000", "-m", "fmnist_dist.train", "--run-dir", str(run)]
        command += [f"--batch-size={batch_size}", "--epochs=1000", "--eval-every-epochs=1000"]
        command += flags
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environ, start_new_session=True
            )

    def step(self) -> int:
        """Return the last finished step of the newest attempt."""
        path = self.run / "progress" / f"{self.attempt + 1:06d}"
        if path.exists() and path.stat().st_size == 16:
            self.attempt += 1
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 16, access=mmap.ACCESS_READ)
        return struct.unpack("<qq", self.map)[1] if self.map else -1

    def first_step(self) -> int:
        return struct.unpack("<qq", self.map)[0]

    def await_step(self, step: int) -> float:
        self.await_that(lambda: self.step() >= step)
        return time.monotonic()

    def await_that(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise SystemExit(f"stuck at step {self.step()}:\n{self.log.read_text()[:6000]}")
            time.sleep(POLL_SECONDS)

    def kill(self, what: str) -> float:
        """Kill at a random moment; return the seconds to the first step that is finished after."""
        self.await_step(self.step() + self.draw.randrange(3, 6))
        time.sleep(self.draw.random() * 0.1)
        keepers = children(self.process.pid, "fmnist-keeper")
        trainers = [child for keeper in keepers for child in children(keeper, "fmnist-trainer")]
        victims = {"one": trainers, "all": trainers, "keeper": keepers}[what]
        victims = victims if what == "all" else [self.draw.choice(victims)]
        healed, began = self.healed(), time.monotonic()
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        if what == "keeper":
            return self.await_attempt(self.attempt + 1) - began
        # Told after the first step with the successors. The steps themselves do not tell: one that
        # was all but done when the victim died is finished without it.
        self.await_that(lambda: self.healed() == healed + len(victims))
        return time.monotonic() - began

    def healed(self) -> int:
        return self.log.read_text().count(" healed ")

    def await_attempt(self, number: int) -> float:
        """Wait until an attempt has finished a step of its own."""
        self.await_that(lambda: self.step() > self.first_step() and self.attempt >= number)
        return time.monotonic()

    def one_step(self) -> float:
        began = self.await_step(self.step() + 1)
        return self.await_step(self.step() + 1) - began

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def children(parent: int, name: str | None = None) -> list[int]:
    found = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            comm = Path(f"/proc/{child}/comm")
            if comm.exists() and name in {None, comm.read_text().strip()}:
                found.append(child)
    return found


if __name__ == "__main__":
    main()
