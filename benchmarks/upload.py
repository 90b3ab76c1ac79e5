"""What training loses while a save uploads to S3 through a slow line.

    python benchmarks/upload.py [megabytes of state] [saves] [megabytes per second]

One worker with one thread; the server (SeaweedFS), behind a proxy that is a line of so many bytes a
second, has one of two cores. The worker has both, then none but the other one: there, what the save
computes is time that training does not get. A round is training without a save for as long as the
last upload took, then a save: `Saves.offer` and steps until the thread has committed it and retired
an older one. Throughput is steps by second, the pause of the save included. Prints one JSON object.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from faulty_proxy import Fault, FaultyProxy  # noqa: E402
from saves import Ours, Training  # noqa: E402
from seaweed import Seaweed, s3_environ  # noqa: E402

from fmnist_dist.distributed import world  # noqa: E402

FIRST_SECONDS = 3.0  # of training without a save, as long as no upload was timed


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        serve(float(sys.argv[2]))
        return
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
        return
    state = sys.argv[1] if len(sys.argv) > 1 else "100"
    saves = sys.argv[2] if len(sys.argv) > 2 else "10"
    rate = float(sys.argv[3]) if len(sys.argv) > 3 else 20.0
    cores = sorted(os.sched_getaffinity(0))[:2]
    found = {}
    for name, of_worker in (("two_cores", cores), ("one_core", cores[:1])):
        with on_cores(cores[1:], "serve", str(1e6 * rate)) as server:
            assert server.stdout is not None
            os.environ.update(json.loads(server.stdout.readline()))
            with on_cores(of_worker, "measure", state, saves) as worker:
                found[name] = json.loads(worker.communicate()[0].splitlines()[-1])
            server.communicate("")
    print(json.dumps({"megabytes_per_second": rate, **found}, indent=1))


def on_cores(cores: list[int], *arguments: str) -> subprocess.Popen[str]:
    """Start this program anew, bound to `cores`."""
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),  # noqa: PLW1509 - no threads yet
    )


def serve(rate: float) -> None:
    """Run the server and the slow line before it, until stdin ends."""
    with tempfile.TemporaryDirectory() as folder:
        server = Seaweed(Path(folder))
        server.start()
        proxy = FaultyProxy(server.endpoint)
        try:
            proxy.add(Fault("slow", "PUT", times=float("inf"), rate=rate, shared=True))
            bucket = server.make_bucket()
            told = {**s3_environ(proxy.endpoint), "BENCHMARK_RUN": f"s3://{bucket}/run"}
            print(json.dumps(told), flush=True)
            sys.stdin.read()
        finally:
            proxy.close()
            server.stop()


def measure(state: str, saves: int) -> dict[str, object]:
    torch.set_num_threads(1)
    with world.alone(torch.device("cpu")), contextlib.ExitStack() as stack:
        training = Training(state)
        ours = Ours(training, os.environ["BENCHMARK_RUN"])
        stack.callback(ours.close)
        rates: dict[str, list[float]] = {"without": [], "beside": []}
        uploads: list[float] = []
        for turn in range(saves + 1):  # the first one connects
            without = rate_until(
                training, time.monotonic() + (uploads[-1] if uploads else FIRST_SECONDS)
            )
            began, steps = time.monotonic(), 0
            ours.save()
            while ours.is_busy():
                training.step()
                steps += 1
            took = time.monotonic() - began
            uploads.append(took)
            if turn:
                rates["without"].append(without)
                rates["beside"].append(steps / took)
        usual, beside = (statistics.median(rates[each]) for each in ("without", "beside"))
        return {
            "state_mb": round(training.state_bytes / 1e6, 1),
            "saves": saves,
            "seconds_of_a_save": round(statistics.median(uploads[1:]), 2),
            "steps_per_second": {"without": round(usual, 2), "beside": round(beside, 2)},
            "throughput_percent": round(100 * beside / usual, 1),
            "each": [
                round(100 * one / other, 1)
                for one, other in zip(rates["beside"], rates["without"], strict=True)
            ],
        }


def rate_until(training: Training, deadline: float) -> float:
    began, steps = time.monotonic(), 0
    while time.monotonic() < deadline:
        training.step()
        steps += 1
    return steps / (time.monotonic() - began)


if __name__ == "__main__":
    main()
