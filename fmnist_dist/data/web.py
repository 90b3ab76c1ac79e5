"""The data set from its mirror on the web, each file checked against the published MD5."""

import hashlib
import http.client
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from fmnist_dist import limits
from fmnist_dist.data.files import Contents, DataFile, SourceUnavailableError, gunzip

_log = logging.getLogger("fmnist_dist.data")
_CHUNK_BYTES = 1 << 20
_MAX_BYTES = 1 << 30  # of one file: a server that never ends must not fill the memory
_FIRST_SERVER_ERROR = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to try."""

    silence_seconds: float = limits.WEB_SILENCE_SECONDS
    total_seconds: float = limits.WEB_SECONDS
    num_tries: int = 3  # only for what may pass: time-outs, broken connections, status 5xx
    pause_seconds: float = limits.WEB_PAUSE_SECONDS


def download(
    files: Sequence[DataFile], *, mirror: str, patience: Patience | None = None
) -> Contents:
    """Return the decoded `files`, each fetched as `<mirror><name>.gz`.

    Raises:
        SourceUnavailableError: A file cannot be had, or is not the one that was published.
        DataDamagedError: The published file does not decode to the pinned content.
    """
    patience = patience or Patience()
    deadline = time.monotonic() + patience.total_seconds
    contents = {}
    for file in files:
        url = f"{mirror}{file.name}.gz"
        data = _get(url, patience, deadline)
        found = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if found != file.gz_md5:
            raise SourceUnavailableError(
                f"{url} sent {len(data)} bytes with MD5 {found}, expected {file.gz_md5}"
            )
        contents[file.name] = gunzip(data, file, where=url)
    return contents


def _get(url: str, patience: Patience, deadline: float) -> bytes:
    reason = ""
    for attempt in range(patience.num_tries):
        try:
            if attempt:
                time.sleep(min(patience.pause_seconds * 2 ** (attempt - 1), _left(deadline)))
            return _get_once(url, silence_seconds=patience.silence_seconds, deadline=deadline)
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"HTTP status {error.code}"
            if error.code < _FIRST_SERVER_ERROR:
                break
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        _log.info("%s, attempt %d of %d: %s", url, attempt + 1, patience.num_tries, reason)
    raise SourceUnavailableError(f"{url}: {reason}")


def _get_once(url: str, *, silence_seconds: float, deadline: float) -> bytes:
    data = bytearray()
    timeout = min(silence_seconds, _left(deadline))
    # The URL comes from our own table of data sets, and what it sends must have the pinned digest.
    with urllib.request.urlopen(url, timeout=timeout) as response:  # noqa: S310
        while chunk := response.read1(_CHUNK_BYTES):
            data += chunk
            if len(data) > _MAX_BYTES:
                raise SourceUnavailableError(f"{url} sent more than {_MAX_BYTES} bytes")
            _left(deadline)
        if response.length:  # read1, unlike read, does not notice that the end came early
            raise http.client.IncompleteRead(bytes(data), response.length)
    return bytes(data)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time for this source is used up")
    return left
