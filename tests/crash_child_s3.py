"""`crash_child` on S3: a process that starts, saves and retires, and dies at one of its requests.

    python crash_child_s3.py        one `URL before|after NUMBER` per line, each in a forked child

Before a request the server has not heard of it; after it, it has done it and nobody was told. Each
child answers with `saved STEP` for every acknowledged save; then comes its wait status. The parent
loads what is slow and opens nothing, as a keeper does.
"""

import os
import signal
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from crash_child import INTERVAL, KEEP_LAST, SAVES
from run_builders import snapshot, start, step_of

from fmnist_dist.checkpoint import s3, s3client
from fmnist_dist.checkpoint.s3 import S3Storage


class Dying(s3client.S3Client):
    """Counts its requests, and kills its process at one of them."""

    def __init__(self, when: str, number: int) -> None:
        super().__init__()
        self._when, self._left = when, number

    async def request(self, method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        self._left -= 1
        is_last = self._left == -1  # others may begin before it is answered
        if is_last and self._when == "before":
            self._die(method)
        try:
            return await super().request(method, arguments)
        finally:  # that there is no such object is an answer too
            if is_last and self._when == "after":
                self._die(method)

    def _die(self, method: str) -> None:
        print(f"dies {self._when} {method}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def work(storage: S3Storage) -> None:
    writer, restored, _ = start(storage)
    first = step_of(restored)
    for step in range(first + INTERVAL, first + SAVES * INTERVAL + 1, INTERVAL):
        writer.save(snapshot(step))
        print(f"saved {step}", flush=True)
        writer.retire(keep_last=KEEP_LAST, keep_every=None)


def serve() -> None:
    s3client.preload()
    print("ready", flush=True)
    for line in sys.stdin:
        url, when, number = line.split()
        child = os.fork()
        if not child:
            s3.S3Client = partial(Dying, when, int(number))
            try:
                work(S3Storage(url))
                os._exit(0)
            except BaseException as error:  # noqa: BLE001 - it must not go on as a second server
                print(f"raised {error!r}", flush=True)
                os._exit(1)
        _, status = os.waitpid(child, 0)
        print(f"status {status}", flush=True)


if __name__ == "__main__":
    serve()
