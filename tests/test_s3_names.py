"""A name server that does not answer, as one that has gone with a preempted node."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from seaweed import Seaweed

from fmnist_dist import limits
from fmnist_dist.checkpoint import s3names
from fmnist_dist.checkpoint.s3 import S3Storage
from fmnist_dist.checkpoint.storage import StorageError

NAME = "localhost"


class NameServer:
    """Stands for the system's lookups, of which it can keep back or refuse those of one name."""

    def __init__(self) -> None:
        self.asked = 0
        self.is_silent = self.is_gone = False
        self.back = threading.Event()
        self._look_up = socket.getaddrinfo

    def __call__(self, host: Any, *rest: Any, **options: Any) -> Any:
        if host == NAME:
            self.asked += 1
            if self.is_silent:
                self.back.wait(60)
            if self.is_gone:
                raise socket.gaierror(socket.EAI_AGAIN, "no answer, as if it were gone")
        return self._look_up(host, *rest, **options)


@pytest.fixture
def names(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    server = NameServer()
    monkeypatch.setattr(socket, "getaddrinfo", server)
    monkeypatch.setattr(s3names, "_last", {})
    yield server
    server.back.set()  # the threads that wait end


@pytest.fixture
def url(s3_url: str, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a run on a server that is reached by its name."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.endpoint.replace("127.0.0.1", NAME))
    return s3_url


@pytest.mark.parametrize("how", ["is_silent", "is_gone"])
def test_a_new_connection_goes_where_the_store_was_last(
    url: str, names: NameServer, how: str
) -> None:
    S3Storage(url).create("x", b"1")
    known = names.asked
    assert known >= 1
    setattr(names, how, True)
    began = time.monotonic()
    S3Storage(url).create("y", b"2")
    assert time.monotonic() - began < 10  # the server answers, and so did a name server, once
    assert names.asked > known
    names.back.set()
    assert S3Storage(url).list("") == ["x", "y"]


def test_the_answer_that_comes_late_counts_from_then_on(
    url: str, names: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NAME_SECONDS", 0.2)
    S3Storage(url).create("x", b"1")
    for key, found in s3names._last.items():  # where nobody listens: the store has moved since
        s3names._last[key] = [{**each, "host": "127.0.0.2"} for each in found]
    names.is_silent = True
    storage = S3Storage(url)
    threading.Timer(1.0, names.back.set).start()
    assert storage.read("x") == b"1"


def test_a_name_that_was_never_found_is_an_error(
    url: str, names: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STORAGE_FIRST_SECONDS", 1.0)
    names.is_gone = True
    with pytest.raises(StorageError, match="cannot connect to http://localhost"):
        S3Storage(url).read("x")
    assert names.asked >= 1
