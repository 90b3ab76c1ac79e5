"""Where the time of a start goes: from process start to the first finished step, by phase.

    python benchmarks/restart.py [repetitions]

Trains a few steps, then measures restarts of that run (a world of one, and torchrun with two
workers), side by side with `python -c 'import torch, torch._dynamo'`, which nothing that uses an
optimizer can avoid. Prints one JSON object with medians in seconds.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLAGS = ["--batch-size=512", "--log-format=json", "--eval-every-epochs=99", "--keep-last=2"]


def main() -> None:
    """Measure and print."""
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    seconds: dict[str, list[float]] = {"import torch, torch._dynamo": []}
    phases: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "python -m": [sys.executable, "-m", "fmnist_dist.train"],
            "torchrun 2": [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc_per_node=2", "-m", "fmnist_dist.train"),
            ],
        }
        for name, command in runs.items():
            start(command, Path(folder) / name, environ, steps=2)
        for repetition in range(repetitions):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", "import torch, torch._dynamo"], check=True, env=environ
            )
            seconds["import torch, torch._dynamo"].append(time.perf_counter() - started)
            for name, command in runs.items():
                found = start(command, Path(folder) / name, environ, steps=4 + repetition)
                for phase, value in found.items():
                    phases.setdefault(name, {}).setdefault(phase, []).append(value)
    result = {
        "repetitions": repetitions,
        **{name: round(statistics.median(each), 3) for name, each in seconds.items()},
        "start to first step": {
            name: {phase: round(statistics.median(each), 3) for phase, each in found.items()}
            for name, found in phases.items()
        },
    }
    print(json.dumps(result, indent=2))


def start(
    command: list[str], run: Path, environ: dict[str, str], *, steps: int
) -> dict[str, float]:
    """Run to `steps` steps and return rank 0's phases, in seconds since its process began."""
    done = subprocess.run(
        [*command, f"--run-dir={run}", f"--max-steps={steps}", *FLAGS],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    for line in done.stderr.splitlines():
        if line.startswith("{") and json.loads(line)["event"] == "started":
            event = json.loads(line)
            outside = {"time", "level", "event", "rank", "attempt"}
            return {name: value for name, value in event.items() if name not in outside}
    raise RuntimeError(f"no start in:\n{done.stderr}")


if __name__ == "__main__":
    main()
