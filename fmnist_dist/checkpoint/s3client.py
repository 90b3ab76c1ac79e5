"""Requests to an S3 store: each within its limit, tried again after what may pass.

s3fs gives the session, the credentials, the signatures and the thread. Tries are counted here and
nowhere else (botocore's and s3fs's own are off): only here is it known how long the bytes of one
may take, so that a connection that stalls or trickles is left for another one; and the body of an
answer, and a conflict of two puts, are outside of what they try again.

Nothing is opened before the first request, and `preload` makes no connection and no thread: a
keeper calls it, and its trainers find what is slow loaded.
"""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from aiobotocore.session import AioSession
from aiohttp import ClientError as ConnectionFailure
from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError
from botocore.parsers import ResponseParserError
from fsspec.asyn import get_loop, sync
from s3fs import S3FileSystem

from fmnist_dist import limits
from fmnist_dist.checkpoint.deadline import deadline, within
from fmnist_dist.checkpoint.s3errors import Meaning, is_of_credentials, line
from fmnist_dist.checkpoint.s3names import LastingResolver

T = TypeVar("T")

_FAILURES = (BotoCoreError, ClientError, ConnectionFailure, ResponseParserError, OSError)
_AGAIN = frozenset({Meaning.TRANSIENT, Meaning.CONFLICT})
_CONNECTIONS = 16  # of one process
_preloaded: list[AioSession] = []


class S3Failure(Exception):  # noqa: N818 - most of them are answers
    """A request that did not succeed, and will not: what it means, in one line."""

    def __init__(self, meaning: Meaning, text: str) -> None:
        super().__init__(text)
        self.meaning = meaning


@dataclass(slots=True)
class Patience:
    """How long one operation may take, all tries and requests of it together.

    A `deadline.within` of the caller counts too.
    """

    deadline: float

    @staticmethod
    def of(size: int) -> "Patience":
        """Return that of an operation that moves `size` bytes."""
        return Patience.until(limits.STORAGE_SECONDS + _seconds_of(size))

    @staticmethod
    def until(seconds: float) -> "Patience":
        return Patience(min(time.monotonic() + seconds, deadline()))

    def extend(self, size: int) -> None:
        """Allow for bytes that nobody knew of."""
        self.deadline = min(self.deadline + _seconds_of(size), deadline())

    def shorten(self, deadline: float) -> None:
        self.deadline = min(self.deadline, deadline)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()


class S3Client:
    """A session with the store that the usual AWS variables and files name."""

    def __init__(self) -> None:
        self._files: S3FileSystem | None = None
        self._session = _preloaded[0] if _preloaded else None
        self._is_answered = False  # by anybody, ever

    def run(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what an operation does, on fsspec's thread. Raises `S3Failure`.

        Every request of it has its limit, and so has their sum: `Patience`.
        """
        end = deadline()  # of this thread, whose context the other one does not see

        async def before_its_end() -> T:
            with within(end - time.monotonic()):
                return await operation()

        result: T = sync(get_loop(), before_its_end)
        return result

    async def call(
        self,
        method: str,
        patience: Patience,
        arguments: Mapping[str, Any],
        *,
        again: Collection[Meaning] = _AGAIN,
    ) -> dict[str, Any]:
        """Return the answer to a request that carries few bytes. Raises `S3Failure`."""
        return await self.attempt(lambda: self.request(method, arguments), patience, again=again)

    async def attempt(
        self,
        request: Callable[[], Awaitable[T]],
        patience: Patience,
        *,
        size: int = 0,
        is_upload: bool = False,
        again: Collection[Meaning] = _AGAIN,
    ) -> T:
        """Try until it succeeds, what went wrong is not in `again`, or the time is over.

        `size` is how many bytes go or come at most.
        """
        tries, began = 0, time.monotonic()
        said: BaseException | None = None
        while True:
            tries += 1
            seconds = limits.STORAGE_REQUEST_SECONDS + _seconds_of(size)
            if patience.left < limits.STORAGE_REQUEST_SECONDS and not is_upload:
                # A dead connection must not take all the time of a drain; only bytes may need it.
                seconds = max(limits.LAST_TRY_SECONDS, patience.left / 2)
            seconds = min(seconds, patience.left)
            try:
                async with asyncio.timeout(seconds):
                    answer = await request()
            except _FAILURES as error:
                meaning = Meaning.of(error)
                # The last try may only have had no time left: what came before says more.
                said = said if said is not None and isinstance(error, TimeoutError) else error
                self._is_answered |= not isinstance(error, EndpointConnectionError)
                if not self._is_answered:
                    patience.shorten(began + limits.STORAGE_FIRST_SECONDS)
                if is_of_credentials(error):
                    self._forget()
                longest = limits.STORAGE_PAUSE_SECONDS * 2**tries
                pause = random.uniform(0, min(longest, limits.STORAGE_LONGEST_PAUSE_SECONDS))
                if meaning not in again or pause > patience.left:
                    text = line(said)
                    tried = f" ({tries} tries in {time.monotonic() - began:.0f} s)"
                    raise S3Failure(meaning, text + tried * (tries > 1)) from error
            else:
                self._is_answered = True
                return answer
            await asyncio.sleep(pause)

    async def request(self, method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to one request, tried once."""
        files = self._files
        if files is None:
            files = _open(self._session)
            try:
                await files.set_session()
            except ValueError as error:  # it may hold a password, so it is not repeated
                expected = "expected a URL as in http://localhost:9000"
                raise S3Failure(Meaning.REFUSED, f"AWS_ENDPOINT_URL: {expected}") from error
            if "@" in urlsplit(files.s3.meta.endpoint_url).netloc:  # no request would ever leave
                expected = "expected no user and no password in it: keys are AWS_ACCESS_KEY_ID, ..."
                raise S3Failure(Meaning.REFUSED, f"AWS_ENDPOINT_URL: {expected}")
            self._files = files
        answer: dict[str, Any] = await files._call_s3(method, **arguments)  # noqa: SLF001 - fsspec's name for the coroutine behind `call_s3`
        return answer

    def _forget(self) -> None:
        """Begin a new session with the next request: credentials may have been rotated."""
        self._files = self._session = None


async def together(works: Sequence[Callable[[], Awaitable[T]]], *, at_once: int) -> list[T]:
    """Return the results of all works; the first that fails ends the others."""
    gate = asyncio.Semaphore(at_once)

    async def one(work: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await work()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(work)) for work in works]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def preload() -> None:
    """Load what is slow and the same for all: botocore's models of the service, 0.1 s."""
    if not _preloaded:
        session = AioSession()
        loader = session.get_component("data_loader")
        for name in ("service-2", "endpoint-rule-set-1"):
            loader.load_service_model("s3", name)
        for name in ("endpoints", "partitions", "sdk-default-configuration", "_retry"):
            loader.load_data(name)
        _preloaded.append(session)


def _open(session: AioSession | None) -> S3FileSystem:
    """Return a session, to be used on the thread that asks: fsspec's."""
    region = os.environ.get("AWS_REGION")  # of the other AWS tools; botocore does not know it
    files = S3FileSystem(
        session=session,
        skip_instance_cache=True,
        use_listings_cache=False,
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            "connect_timeout": limits.STORAGE_CONNECT_SECONDS,
            "read_timeout": limits.STORAGE_SILENCE_SECONDS,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": _CONNECTIONS,
            # A second: an address that turns out to be old is looked up again with the next try.
            "connector_args": {"resolver": LastingResolver(), "ttl_dns_cache": 1},
            # Many stores that are not AWS refuse the newer checksums; records carry our own.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    )
    files.retries = 1
    return files


def _seconds_of(size: int) -> float:
    return size / limits.STORAGE_BYTES_PER_SECOND
