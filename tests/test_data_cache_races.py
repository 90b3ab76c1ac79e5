"""Processes that race, die or fail on one cache leave it whole, and fetch no more than needed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from published import Fetch, Mirror, as_bytes, data_files, never, small_files

from fmnist_dist.data import cache

FILES = small_files()
TABLE = data_files(FILES)
IMAGES = "train-images-idx3-ubyte"
LIMIT_SECONDS = 30.0

# Loads through the cache in `folder`. `die_at` counts the operations on the disk that must not be
# torn apart; the process kills itself before that one. `max_file_bytes` stands for a full disk.
WORKER = """
import json, logging, os, resource, signal, sys
from pathlib import Path
from fmnist_dist.data import cache, sources
from fmnist_dist.data.files import DataFile
folder, mirror, table, die_at, max_file_bytes = json.loads(sys.argv[1])
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
files = tuple(DataFile(**row) for row in table)
if max_file_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
countdown = iter(range(die_at, -1, -1))
def deadly(operation):
    def run(*args):
        if next(countdown, -1) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*args)
    return run
if die_at >= 0:
    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
fetch = lambda: sources.fetch("Small", sources.Origin(files=files, mirror=mirror))
contents = cache.load(files, folder=Path(folder), fetch=fetch)
assert all(content.size for content in contents.values())
print("LOADED", len(contents))
"""


def start_worker(
    folder: Path, mirror: Mirror, output: Path, *, die_at: int = -1, max_file_bytes: int = 0
) -> subprocess.Popen[bytes]:
    table = [asdict(file) for file in TABLE]
    arguments = json.dumps([str(folder), mirror.url, table, die_at, max_file_bytes])
    with output.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, arguments],
            stdout=stream,
            stderr=stream,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        threading.Event().wait(0.01)


def test_two_processes_that_race_fetch_each_file_once(tmp_path: Path) -> None:
    mirror, go = Mirror(FILES), threading.Event()

    def wait_for_both(handler: BaseHTTPRequestHandler) -> None:
        go.wait(LIMIT_SECONDS)
        at_once(handler)

    first = f"/{TABLE[0].name}.gz"
    (at_once,) = mirror.answers[first]
    mirror.answers[first] = [wait_for_both]
    outputs = [tmp_path / "a.log", tmp_path / "b.log"]
    with mirror.serve():
        workers = [start_worker(tmp_path / "cache", mirror, output) for output in outputs]
        # Go on when the loser waits for the lock, or fetches as well, which is the bug.
        wait_until(
            lambda: (
                len(mirror.requests) > 1
                or any("not acquired" in output.read_text() for output in outputs)
            )
        )
        go.set()
        statuses = [worker.wait(LIMIT_SECONDS) for worker in workers]
    assert statuses == [0, 0], [output.read_text() for output in outputs]
    assert sorted(mirror.requests) == sorted(f"/{name}.gz" for name in FILES)


def test_a_process_killed_while_it_fetches_leaves_the_cache_to_the_next(tmp_path: Path) -> None:
    mirror = Mirror(FILES)
    first = f"/{TABLE[0].name}.gz"

    def stay_silent(_: BaseHTTPRequestHandler) -> None:
        mirror.closing.wait(LIMIT_SECONDS)

    mirror.answers[first].insert(0, stay_silent)
    with mirror.serve():
        victim = start_worker(tmp_path / "cache", mirror, tmp_path / "victim.log")
        wait_until(lambda: first in mirror.requests)
        victim.kill()
        victim.wait(LIMIT_SECONDS)
        heir = start_worker(tmp_path / "cache", mirror, tmp_path / "heir.log")
        assert heir.wait(LIMIT_SECONDS) == 0, (tmp_path / "heir.log").read_text()
    assert as_bytes(cache.load(TABLE, folder=tmp_path / "cache", fetch=never)) == FILES


def test_a_kill_at_any_disk_operation_leaves_whole_files_only(tmp_path: Path) -> None:
    num_operations = 0
    with Mirror(FILES).serve() as mirror:
        while True:
            folder = tmp_path / str(num_operations)
            output = tmp_path / f"{num_operations}.log"
            status = start_worker(folder, mirror, output, die_at=num_operations).wait(LIMIT_SECONDS)
            present = {p.name: p.read_bytes() for p in folder.iterdir() if p.name in FILES}
            assert present == {name: FILES[name] for name in present}
            if status != -signal.SIGKILL:
                break
            assert as_bytes(cache.load(TABLE, folder=folder, fetch=Fetch())) == FILES
            assert {p.name for p in folder.iterdir()} == {".lock", *FILES}
            num_operations += 1
    assert status == 0, output.read_text()
    assert num_operations == 3 * len(FILES)  # sync the file, rename it, sync the folder


def test_a_full_disk_costs_a_warning_and_not_the_run(tmp_path: Path) -> None:
    folder, output = tmp_path / "cache", tmp_path / "log"
    with Mirror(FILES).serve() as mirror:
        worker = start_worker(folder, mirror, output, max_file_bytes=10_000)
        assert worker.wait(LIMIT_SECONDS) == 0, output.read_text()
    assert output.read_text().count("WARNING") == 1
    assert "LOADED 4" in output.read_text()
    assert [p.name for p in folder.iterdir() if p.suffix == ".tmp" or p.name == IMAGES] == []
