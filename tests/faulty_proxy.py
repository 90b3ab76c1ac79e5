"""A proxy between a program and its S3 server that does what networks and stores do at their worst.

A `Fault` says which requests it meets, how often, and what becomes of them; it counts how often it
has happened, so that a test can assert that it really did. Requests that no fault meets pass
unchanged, the Host header too: the signature covers it.

    error      the server never sees the request; the answer is a status with an S3 error code
    cut        the connection is reset before the server has seen the request
    lost       the server has done it, then the connection is reset: the answer is lost
    late       the client is kept waiting until it gives up, and then the server does it
    truncated  half of the answer's body (of its head, if it has none), and the connection is closed
    stalled    nothing comes, ever; the server never sees the request
    hanging    as much comes as of a truncated one, and the connection stays open
    short      half of the answer's body, as if that were all
    slow       body and answer pass at so many bytes a second, each or (`shared`) all together
    deaf       the server never sees If-None-Match: a store that ignores put-if-absent

The proxy signs what it changes with a key of its own, as a man in the middle could not.
"""

import contextlib
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from seaweed import REGION, WRITER

_LIMIT_SECONDS = 120.0  # of anything that waits here: a test has a shorter limit
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
_CHUNK = 1000  # bytes that a slow connection passes at least at once
_KINDS = {
    "error",
    "cut",
    "lost",
    "late",
    "truncated",
    "stalled",
    "hanging",
    "short",
    "slow",
    "deaf",
}
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@dataclass
class Fault:
    """Meets requests of `method` whose target matches `target`: after `skip` of them, `times`."""

    kind: str
    method: str = ".*"  # a regular expression for all of it
    target: str = ""  # a regular expression for a part of path and query
    times: float = 1
    skip: int = 0
    status: int = 500  # of an error
    code: str = "InternalError"
    body: bytes | None = None  # of an error, where it is no S3 error
    rate: float = 10_000.0  # bytes a second, of a slow one
    shared: bool = False  # they are those of one line: all slow ones together
    happened: int = 0
    seen: int = 0
    gone: bool = field(default=False, init=False)  # switched off
    free: float = field(default=0.0, init=False)  # when a shared line has passed all that came

    def __post_init__(self) -> None:
        assert self.kind in _KINDS, f"{self.kind} would change nothing"

    def meets(self, method: str, target: str) -> bool:
        if self.gone or not re.fullmatch(self.method, method) or not re.search(self.target, target):
            return False
        self.seen += 1
        if not self.skip < self.seen <= self.skip + self.times:
            return False
        self.happened += 1
        return True


class FaultyProxy:
    """Listens on a port of its own for one server; `endpoint` is what the program is told."""

    def __init__(self, server: str) -> None:
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # every one that came: `METHOD target`
        self.under_way = 0
        self.refused = 0  # requests that the server did not answer
        self.over = threading.Event()
        self.lock = threading.Lock()
        place = urlsplit(server)
        assert place.hostname is not None
        self.server = (place.hostname, place.port or 80)
        self._listener = _Listener(self)
        self.endpoint = f"http://127.0.0.1:{self._listener.server_address[1]}"
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,))
        self._thread.start()

    def add(self, fault: Fault) -> Fault:
        with self.lock:
            self.faults.append(fault)
        return fault

    @contextlib.contextmanager
    def during(self, fault: Fault) -> Iterator[Fault]:
        """Let a fault happen inside the block only; it must happen."""
        with self.lock:
            self.faults.insert(0, fault)
        try:
            yield fault
        finally:
            fault.gone = True
        assert fault.happened, f"{fault} met nothing of {self.requests[-20:]}"

    def clear(self) -> None:
        with self.lock:
            for fault in self.faults:
                fault.gone = True
            self.faults.clear()
            self.requests.clear()

    def settle(self) -> None:
        """Wait until no request is under way: what comes late has come."""
        deadline = time.monotonic() + _LIMIT_SECONDS
        while self.under_way:
            assert time.monotonic() < deadline, "a request is still under way"
            time.sleep(0.005)

    def close(self) -> None:
        self.over.set()
        self._listener.shutdown()
        self._listener.end_connections()
        self._listener.server_close()
        self._thread.join()

    def met(self, method: str, target: str) -> Fault | None:
        with self.lock:
            self.requests.append(f"{method} {target}")
            for fault in self.faults:
                if fault.meets(method, target):
                    return fault
            return None


def _chunk(slow: Fault) -> int:
    """Return how many bytes pass at once: few, but not so few that this takes time itself."""
    return max(_CHUNK, int(slow.rate / 20))


class _Listener(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for them
    request_queue_size = 128

    def __init__(self, proxy: FaultyProxy) -> None:
        self.proxy = proxy
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self._open.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        for each in tuple(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that go away: their tests look at what they tell."""


class _Ended(Exception):  # noqa: N818 - no error: the connection is closed on purpose
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (_Ended, OSError):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def _pass(self) -> None:
        proxy = self.server.proxy
        with proxy.lock:
            proxy.under_way += 1
        try:
            self._handle(proxy)
        finally:
            with proxy.lock:
                proxy.under_way -= 1

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass  # noqa: N815

    def _handle(self, proxy: FaultyProxy) -> None:
        fault = proxy.met(self.command, self.path)
        kind = fault.kind if fault else ""
        if kind == "cut":
            self._reset()
        if kind == "stalled":
            self._await_end()
        slow = fault if fault and kind == "slow" else None
        body = self._body(slow)
        if fault and kind == "error":
            text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>fault</Message>"
            said = f"{text}</Error>".encode() if fault.body is None else fault.body
            self._answer(fault.status, [("Content-Type", "application/xml")], said)
            return
        if kind == "late":
            self._await_end(raises=False)
        try:
            status, headers, content = self._ask(body, deaf=kind == "deaf")
        except (OSError, HTTPException):  # killed, or not there: as if the client had asked itself
            proxy.refused += 1
            self._reset()
        if kind == "lost":
            self._reset()
        if kind == "late":
            raise _Ended
        if kind == "short":
            content = content[: len(content) // 2]
        half = kind in {"truncated", "hanging"}
        self._answer(status, headers, content, half=half, slow=slow)
        if kind == "hanging":
            self._await_end()

    def _body(self, slow: Fault | None) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        left, parts = int(self.headers.get("Content-Length") or 0), []
        while left:
            part = self.rfile.read(left if slow is None else min(_chunk(slow), left))
            if not part:
                raise _Ended
            self._pace(len(part), slow)
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _ask(self, body: bytes, *, deaf: bool) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = [(name, text) for name, text in self.headers.items() if name.lower() not in _HOP]
        if deaf:
            headers = self._signed_again(headers, body)
        connection = HTTPConnection(*self.server.proxy.server, timeout=_LIMIT_SECONDS)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, text in headers:
                connection.putheader(name, text)
            if body or self.command in {"PUT", "POST"}:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _signed_again(self, headers: list[tuple[str, str]], body: bytes) -> list[tuple[str, str]]:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        told = {name.lower(): text for name, text in headers}
        kept = {
            name: text for name, text in told.items() if name.startswith(("content-", "x-amz-"))
        }
        for name in ("x-amz-date", "x-amz-content-sha256"):
            kept.pop(name, None)
        request = AWSRequest(
            method=self.command,
            url=f"http://{self.headers['Host']}{self.path}",
            headers=kept,
            data=body,
        )
        S3SigV4Auth(Credentials(WRITER.access, WRITER.secret), "s3", REGION).add_auth(request)
        return [("Host", self.headers["Host"]), *request.headers.items()]

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        *,
        half: bool = False,
        slow: Fault | None = None,
    ) -> None:
        """Send an answer, or half of it, after which no other follows on this connection."""
        self.send_response_only(status)
        told = {name.lower(): text for name, text in headers}
        for name, text in headers:
            if name.lower() not in _HOP:
                self.send_header(name, text)
        size = told.get("content-length", "0") if self.command == "HEAD" else str(len(content))
        if status != 204:
            self.send_header("Content-Length", size)
        empty = self.command == "HEAD" or not content
        if half:
            self.close_connection = True
        if half and empty:  # of what there is: the head
            head = b"".join(self._headers_buffer)
            self._headers_buffer = []
            self.wfile.write(head[: len(head) // 2])
            return
        self.end_headers()
        if empty:
            return
        if half:
            self.wfile.write(content[: len(content) // 2])
            return
        step = _chunk(slow) if slow is not None else max(1, len(content))
        for start in range(0, len(content), step):
            self._pace(step, slow)
            self.wfile.write(content[start : start + step])

    def _pace(self, size: int, slow: Fault | None) -> None:
        if slow is None or slow.gone:
            return
        seconds = size / slow.rate
        if slow.shared:
            with self.server.proxy.lock:
                slow.free = max(slow.free, time.monotonic()) + seconds
                seconds = slow.free - time.monotonic()
        if self.server.proxy.over.wait(seconds):
            raise _Ended

    def _reset(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        # Closed here: the server would shut it down first, and end it in good order.
        self.rfile.close()
        self.connection.close()
        raise _Ended

    def _await_end(self, *, raises: bool = True) -> None:
        """Keep the client waiting until it gives up, or the test is over."""
        deadline = time.monotonic() + _LIMIT_SECONDS
        while time.monotonic() < deadline and not self.server.proxy.over.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.02)
            if readable and not self.connection.recv(1 << 16, socket.MSG_PEEK):
                break
            if readable:  # the body, which nobody reads
                self.connection.recv(1 << 16)
        if raises:
            raise _Ended
