"""Connections to the launcher's store have limits, and are not used again after one has passed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from jobs import free_port, wait_for

from fmnist_dist import limits
from fmnist_dist.distributed.connection import Connection, StoreLostError
from fmnist_dist.distributed.interface import interface_towards
from fmnist_dist.distributed.process import stat_fields
from fmnist_dist.distributed.roster import StoreKeys
from fmnist_dist.errors import TransientError
from fmnist_dist.keeper.peers import Peers

_SERVES = """
import sys, signal, torch.distributed as dist
server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(server.port, flush=True)
signal.pause()
"""


@dataclass
class Server:
    process: "subprocess.Popen[str]"
    port: int

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        wait_for(lambda: stat_fields(self.process.pid)[0] == "T", "a stopped store")


@pytest.fixture(scope="module")
def started() -> Iterator[Server]:
    command = [sys.executable, "-c", _SERVES]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Server(process, int(process.stdout.readline()))
        finally:
            process.kill()


@pytest.fixture
def server(started: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(limits, "ANSWER_SECONDS", 0.4)
    yield started
    started.process.send_signal(signal.SIGCONT)


def keys_of(server: Server) -> StoreKeys:
    return StoreKeys(Connection("127.0.0.1", server.port, prefix="here"))


def test_a_store_that_does_not_answer_is_lost_within_the_limit(server: Server) -> None:
    keys = keys_of(server)
    keys.set("name", "before")
    assert keys.get("name") == "before"
    server.stop()
    began = time.monotonic()
    with pytest.raises(StoreLostError, match="the launcher's store is gone"):
        keys.get("name")
    assert 0.3 < time.monotonic() - began < 5


def test_a_late_answer_is_never_taken_for_that_of_another_call(server: Server) -> None:
    keys = keys_of(server)
    keys.set("there", "yes")
    server.stop()
    with pytest.raises(StoreLostError):
        keys.check(["there"])
    os.kill(server.process.pid, signal.SIGCONT)
    fresh = keys_of(server)
    assert fresh.get("there") == "yes"  # by now the answer has come, on the connection before
    with pytest.raises(StoreLostError):
        keys.check(["not there"])
    assert not fresh.check(["not there"])


def test_a_store_that_is_not_there_is_named_with_its_address() -> None:
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "STORE_SECONDS", 1.0)
        with pytest.raises(TransientError, match=f"127.0.0.1:{port} did not answer in 1 s"):
            Connection("127.0.0.1", port, prefix="here")


def test_a_store_whose_process_dies_is_lost_at_once() -> None:
    command = [sys.executable, "-c", _SERVES]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        keys = keys_of(Server(process, int(process.stdout.readline())))
        keys.set("name", "value")
        process.kill()
        process.wait()
        began = time.monotonic()
        with pytest.raises(StoreLostError):
            keys.get("name")
        assert time.monotonic() - began < limits.ANSWER_SECONDS


def test_the_interface_towards_a_host_is_named() -> None:
    assert interface_towards("127.0.0.1", 1) == "lo"
    assert interface_towards("no.such.host.invalid", 1) is None


class Memory(dict[str, str]):
    """A store in memory."""

    def set(self, key: str, value: str) -> None:
        self[key] = value


def watched(*, until: float, alive: Memory, looks_from: float = 0.0) -> dict[int, float]:
    """Return when a keeper of three found which rank silent; rank 1 counts, rank 2 stops at 10."""
    mine = Peers(alive, rank=0, size=3)
    others = [Peers(alive, rank=rank, size=3) for rank in (1, 2)]
    found: dict[int, float] = {}
    for tenth in range(int(until * 10)):
        now = tenth / 10
        others[0].count(now)
        if now < 10:
            others[1].count(now)
        if now >= looks_from:
            for rank in mine.silent(now):
                found.setdefault(rank, now)
    return found


def test_a_host_whose_keeper_stops_counting_is_found_and_no_other() -> None:
    found = watched(until=60, alive=Memory())
    assert found.keys() == {2}
    assert (
        limits.SILENT_SECONDS <= found[2] - 10 <= limits.SILENT_SECONDS + 3 * limits.ALIVE_SECONDS
    )


def test_silence_is_counted_from_the_first_look() -> None:
    found = watched(until=120, alive=Memory(), looks_from=50.0)
    assert found[2] >= 50 + limits.SILENT_SECONDS


def test_a_keeper_that_was_stopped_itself_accuses_nobody() -> None:
    alive = Memory()
    mine, other = Peers(alive, rank=0, size=2), Peers(alive, rank=1, size=2)
    other.count(0.0)
    assert mine.silent(0.0) == []
    assert mine.silent(3600.0) == []  # for an hour: nobody has counted, or all have
    other.count(3600.0)
    assert mine.silent(3603.0) == []


def test_a_rank_that_still_loads_its_data_is_not_silent() -> None:
    alive = Memory()
    mine = Peers(alive, rank=0, size=2)
    assert not any(mine.silent(float(second)) for second in range(900))
