"""A process that starts on a run, saves and retires, and dies where its disk is told to kill it.

    python crash_child.py work RUN FAULTS    once, in this process
    python crash_child.py serve              one `RUN FAULTS` per line, each in a forked child

It answers on stdout with `saved STEP` for each acknowledged save and `finished` at the end. `serve`
writes the children's output to RUN.out and RUN.err, and answers with their wait status. Forking
from a warm process makes a kill cost milliseconds; the child that dies is as real. Its syncs do
nothing: they take most of the time, and a kill spares the page cache (see `test_power_cut`).
"""

import os
import sys
from pathlib import Path

from run_builders import snapshot, start, step_of

from fmnist_dist.checkpoint.disk import disk_from
from fmnist_dist.checkpoint.local import LocalStorage

SAVES = 3
INTERVAL = 10  # steps
KEEP_LAST = 2


def work(run: Path, faults: str | None) -> None:
    storage = LocalStorage(run, disk=disk_from(faults))
    writer, restored, _ = start(storage)
    first = step_of(restored)
    for step in range(first + INTERVAL, first + SAVES * INTERVAL + 1, INTERVAL):
        writer.save(snapshot(step))
        print(f"saved {step}", flush=True)
        writer.retire(keep_last=KEEP_LAST, keep_every=None)
    writer.finish(step=step, reason="epochs", metrics={})
    print("finished", flush=True)


def serve() -> None:
    os.fsync = lambda _: None
    for line in sys.stdin:
        run, faults = line.split()
        child = os.fork()
        if not child:
            for descriptor, suffix in ((1, ".out"), (2, ".err")):
                os.dup2(os.open(run + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            try:
                work(Path(run), faults)
                os._exit(0)
            except BaseException as error:  # noqa: BLE001 - it must not go on as a second server
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        _, status = os.waitpid(child, 0)
        print(status, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        work(Path(sys.argv[2]), sys.argv[3])
