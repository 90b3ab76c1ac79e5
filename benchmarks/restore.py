"""How ranks get a checkpoint: one reads and sends it, or each reads it.

    python benchmarks/restore.py [megabytes of state] [rounds] [workers]

On local disk, on SeaweedFS, and on it through a line of 100 MB/s that all ranks share.
Both ways begin together on all ranks and end when the last one has every file, verified: `one` is
`read_checkpoint` on rank 0 and `share.broadcast`, which is what a start does; `each` is
`read_checkpoint` on every rank. In turn, medians of all rounds. Prints one JSON object.
"""

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
import torch.distributed as dist  # noqa: E402
from faulty_proxy import Fault, FaultyProxy  # noqa: E402
from run_builders import begin, snapshot  # noqa: E402
from seaweed import Seaweed, s3_environ  # noqa: E402

from fmnist_dist.checkpoint.log import RunLog  # noqa: E402
from fmnist_dist.checkpoint.place import Place  # noqa: E402
from fmnist_dist.checkpoint.restore import read_checkpoint  # noqa: E402
from fmnist_dist.distributed import share, world  # noqa: E402
from fmnist_dist.distributed.roster import call_roll  # noqa: E402
from fmnist_dist.filenames import EMA, MODEL, OPTIMIZER  # noqa: E402
from fmnist_dist.keeper.fork import fork  # noqa: E402

DEFAULTS = (100, 7, 2)
LINE = 100e6  # bytes a second, of all ranks together


def main() -> None:
    if "RANK" in os.environ:
        work(int(sys.argv[1]), sys.argv[2:])
        return
    given = [int(each) for each in sys.argv[1:]]
    megabytes, rounds, workers = (*given, *DEFAULTS[len(given) :])
    share = int(megabytes * 1e6 / 4)
    files = {MODEL: os.urandom(share), EMA: os.urandom(share), OPTIMIZER: os.urandom(2 * share)}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        server = Seaweed(Path(folder) / "server")
        server.start()
        proxy = FaultyProxy(server.endpoint)
        try:
            os.environ.update(s3_environ(server.endpoint))
            places = {"disk": f"{folder}/run", "s3": f"s3://{server.make_bucket()}/run"}
            for url in places.values():
                begin(Place.of(url).storage()).save(snapshot(1, files))
            proxy.add(Fault("slow", "GET", times=float("inf"), rate=LINE, shared=True))
            for name, url, endpoint in (
                ("disk", places["disk"], server.endpoint),
                ("s3", places["s3"], server.endpoint),
                ("s3, line of 100 MB/s", places["s3"], proxy.endpoint),
            ):
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                command += ["--local-addr=127.0.0.1", f"--nproc_per_node={workers}"]
                done = subprocess.run(
                    [*command, __file__, str(rounds), url],
                    env={**os.environ, **s3_environ(endpoint), "OMP_NUM_THREADS": "1"},
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                found[name] = json.loads(done.stdout.splitlines()[-1])
        finally:
            proxy.close()
            server.stop()
    print(json.dumps({"megabytes": megabytes, "workers": workers, **found}, indent=1))


def work(rounds: int, urls: list[str]) -> None:
    """Be one rank."""
    torch.set_num_threads(1)
    roster = call_roll(os.environ, fork=lambda serve: fork(serve, name="fmnist-store"))
    with world.join(roster, roster.connect(), device=torch.device("cpu")) as joined:
        storage = Place.of(urls[0]).storage()
        log = RunLog(storage)
        retained = log.read().head.checkpoints[-1]
        names = sorted(read_checkpoint(storage, log, retained).files)

        def one(turn: int) -> None:
            restored = read_checkpoint(storage, log, retained) if joined.rank == 0 else None
            for name in names:
                data = restored.files[name] if restored is not None else None
                recorded = restored.commit.checkpoint.files[name].sha256 if restored else None
                share.broadcast(joined, data, source=0, key=f"{turn}/{name}", digest=recorded)

        def each(_turn: int) -> None:
            read_checkpoint(storage, log, retained)

        took: dict[str, list[float]] = {"one": [], "each": []}
        for turn in range(rounds + 1):
            for name, action in (("one", one), ("each", each)):
                dist.barrier()
                began = time.perf_counter()
                action(turn)
                dist.barrier()
                if turn:
                    took[name].append(time.perf_counter() - began)
        if joined.rank == 0:
            medians = {name: round(statistics.median(all_), 3) for name, all_ in took.items()}
            print(json.dumps(medians))


if __name__ == "__main__":
    main()
