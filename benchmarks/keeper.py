"""What the keeper costs while nothing goes wrong: time of a step, and memory.

    python benchmarks/keeper.py [rounds] [batch size]

Trains the default CNN with two workers, with and without keepers in turn; each round takes the
median seconds of a step, once the spare is ready, and the PSS (pages that are shared are counted
once) of all processes of the launch. Prints one JSON object.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

from heal import Job, children

WARM_UP_STEPS = 200  # a spare is prepared beside the first ones
STEPS = 100


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    batch_size = sys.argv[2] if len(sys.argv) > 2 else "64"
    found: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    for _ in range(rounds):
        for name, flags in (("with", []), ("without", ["--no-keeper"])):
            found[name].append(one(batch_size, flags))
    result = {
        name: {
            "step_milliseconds": round(1e3 * statistics.median(each[0] for each in measured), 2),
            "memory_mib": round(statistics.median(each[1] for each in measured)),
        }
        for name, measured in found.items()
    }
    print(json.dumps({"rounds": rounds, "batch_size": int(batch_size), **result}, indent=1))


def one(batch_size: str, flags: list[str]) -> tuple[float, float]:
    """Return the median seconds of a step, and MiB of all workers, spares included."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder) / "run", batch_size, *flags)
        try:
            job.await_step(WARM_UP_STEPS)
            took = [job.one_step() for _ in range(STEPS)]
            memory = sum(map(pss, descendants(job.process.pid)))
        finally:
            job.end()
    return statistics.median(took), memory / 2**10


def descendants(process: int) -> list[int]:
    found = children(process)
    for child in found:
        found += children(child)
    return found


def pss(process: int) -> int:
    """Return a process's proportional set size, KiB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
