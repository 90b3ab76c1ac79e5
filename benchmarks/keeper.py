"""What the keeper costs while nothing goes wrong: time of a step, and memory.

    python benchmarks/keeper.py [rounds] [batch size]

Trains the default CNN with two workers, with and without keepers in turn; each round takes the
median seconds of a step, once the spare is ready, the PSS (pages that are shared are counted
once) of all processes of the launch, and the share of one core that keepers and spares use. Prints
one JSON object: medians, and the step of every round, since jobs differ more than their means do.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from heal import Job, children

WARM_UP_STEPS = 200  # a spare is prepared beside the first ones
STEPS = 100
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    batch_size = sys.argv[2] if len(sys.argv) > 2 else "64"
    found: dict[str, list[tuple[float, float, float]]] = {"with": [], "without": []}
    for _ in range(rounds):
        for name, flags in (("with", []), ("without", ["--no-keeper"])):
            found[name].append(one(batch_size, flags))
    result = {
        name: {
            "step_milliseconds": round(1e3 * statistics.median(each[0] for each in measured), 2),
            "each": [round(1e3 * each[0], 1) for each in measured],
            "memory_mib": round(statistics.median(each[1] for each in measured)),
            "core_percent_beside": round(statistics.median(each[2] for each in measured), 2),
        }
        for name, measured in found.items()
    }
    print(json.dumps({"rounds": rounds, "batch_size": int(batch_size), **result}, indent=1))


def one(batch_size: str, flags: list[str]) -> tuple[float, float, float]:
    """Return the median seconds of a step, MiB of all workers, per cent of a core beside them."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder) / "run", batch_size, *flags)
        try:
            job.await_step(WARM_UP_STEPS)
            # Without keepers what torchrun starts trains itself, and nothing is beside it.
            keepers = children(job.process.pid, "fmnist-keeper")
            beside = keepers + [
                child for keeper in keepers for child in children(keeper, "fmnist-spare")
            ]
            ticks, began = sum(map(cpu_ticks, beside)), time.monotonic()
            took = [job.one_step() for _ in range(STEPS)]
            share = (sum(map(cpu_ticks, beside)) - ticks) / TICKS / (time.monotonic() - began)
            memory = sum(map(pss, descendants(job.process.pid)))
        finally:
            job.end()
    return statistics.median(took), memory / 2**10, 100 * share


def cpu_ticks(process: int) -> int:
    """Return the processor time that a process has used, in ticks."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


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
