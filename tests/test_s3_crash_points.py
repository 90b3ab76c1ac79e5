"""A real SIGKILL at the requests of a start, of saves and of retention on S3."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from crash_child import INTERVAL, KEEP_LAST, SAVES
from plain_s3 import PlainStorage
from run_builders import files_of, start, step_of
from run_files import assert_sound, records
from seaweed import Seaweed

from fmnist_dist.checkpoint.record import Checkpoint
from fmnist_dist.filenames import METRICS, MODEL

CHILD = Path(__file__).with_name("crash_child_s3.py")
NEVER = 1_000  # requests: no child makes so many
FEW = [(when, number) for number in range(3, 100, 12) for when in ("before", "after")]


class Server:
    """Forks children that die; see `crash_child_s3`."""

    def __init__(self) -> None:
        path = os.pathsep.join(each for each in sys.path if each)
        self._process = subprocess.Popen(
            [sys.executable, str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def child(self, url: str, when: str, number: int) -> tuple[int, list[str]]:
        """Return a child's wait status and what it told."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{url} {when} {number}\n")
        self._process.stdin.flush()
        told: list[str] = []
        while not (line := self._line()).startswith("status "):
            assert line, "the server has died"
            told.append(line)
        return int(line.split()[1]), told

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def server(s3_url: str) -> Iterator[Server]:
    """Start one in the environment that comes with the URL."""
    server = Server()
    yield server
    server.close()


def kill_and_look(
    server: Server, stored: PlainStorage, when: str, number: int, *, newest: int
) -> tuple[str | None, int]:
    """Let a child die, and start again; return at which request, None if at none, and the step."""
    status, told = server.child(stored.url, when, number)
    saved = [int(line.split()[1]) for line in told if line.startswith("saved ")]
    if status == 0:
        assert len(saved) == SAVES
        return None, saved[-1]
    assert os.WIFSIGNALED(status), told
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert told[-1].startswith(f"dies {when} ")
    least = max(saved, default=newest)
    _, restored, swept = start(stored, report=pytest.fail)
    step = step_of(restored)
    assert step in {least, least + INTERVAL}, f"{step} after {told}"
    assert swept.suspended is None
    if restored is not None:
        assert restored.files == files_of(step)
    return told[-1].split()[2], step


def assert_tidy(stored: PlainStorage) -> None:
    """What is retained is whole, and nothing else is left but metrics."""
    writer, _, _ = start(stored, report=pytest.fail)
    retained = {each.index for each in writer.head.checkpoints}
    kept = {
        each.body.folder: sorted(each.body.files) if each.index in retained else [METRICS]
        for each in records(stored)
        if isinstance(each.body, Checkpoint)
    }
    left = [f"checkpoints/{name}" for name in stored.list("checkpoints")]
    assert {folder: stored.list(folder) for folder in left} == kept
    assert_sound(stored)


def test_kills_at_requests_one_after_another_lose_nothing_acknowledged(
    server: Server, seaweed: Seaweed, s3_url: str
) -> None:
    stored, newest, met = PlainStorage(seaweed, s3_url), 0, Counter[str]()
    for when, number in FEW:
        method, newest = kill_and_look(server, stored, when, number, newest=newest)
        met[str(method)] += 1
    assert met.keys() >= {"get_object", "put_object"}, met
    assert_tidy(stored)


@pytest.fixture
def old_run(server: Server, seaweed: Seaweed, s3_url: str) -> dict[str, bytes]:
    """Return the objects of a run whose next launch restores, sweeps and retires."""
    url = f"{s3_url}/old"
    status, told = server.child(url, "before", NEVER)
    assert status == 0, told
    # What a save has left that died after its first file.
    PlainStorage(seaweed, url).create(f"checkpoints/000000040-0001-{16 * '0'}/{MODEL}", b"orphan")
    return seaweed.objects(url)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("is_old", [False, True], ids=["new-run", "old-run"])
def test_a_kill_at_any_request_loses_nothing_acknowledged(
    server: Server,
    seaweed: Seaweed,
    s3_url: str,
    old_run: Mapping[str, bytes],
    *,
    when: str,
    is_old: bool,
) -> None:
    """Each kill meets a run of its own in the same state, so no request is left out."""
    before, newest = (old_run, SAVES * INTERVAL) if is_old else ({}, 0)
    # An attempt; the files and the record of each save; one retirement as soon as three stand.
    puts = 1 + SAVES * (len(files_of(0)) + 1) + (SAVES if is_old else SAVES - KEEP_LAST)
    met = list[str]()
    for number in range(NEVER):
        stored = PlainStorage(seaweed, f"{s3_url}/{number}")
        for path, data in before.items():
            stored.create(path, data)
        method, _ = kill_and_look(server, stored, when, number, newest=newest)
        if method is None:
            break
        assert_tidy(stored)
        met.append(method)
    assert_tidy(stored)
    print(f"{len(met)} kills: {Counter(met)}")
    kinds = {"get_object", "put_object", "list_objects_v2", "list_multipart_uploads"}
    assert set(met) == kinds | {"delete_objects"} | ({"delete_object"} if is_old else set())
    assert met.count("put_object") == puts
