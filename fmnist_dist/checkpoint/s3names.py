"""Where an S3 store is: should the name server not answer in time, where it was last.

A name server is one more host that may go with a preempted node, and a drain has seconds. A record
that is too old is far better than none: "Serving Stale Data to Improve DNS Resiliency", RFC 8767.
"""

import asyncio
import socket
from typing import TYPE_CHECKING

from aiohttp.resolver import ThreadedResolver

from fmnist_dist import limits

if TYPE_CHECKING:  # aiohttp 3.9 has no name for it
    from aiohttp.abc import ResolveResult

# Of this process, whatever its clients: a new one may be made when there is no time to ask.
_last: "dict[tuple[str, int, socket.AddressFamily], list[ResolveResult]]" = {}


class LastingResolver(ThreadedResolver):
    """The system's resolver, which remembers the addresses that it has found."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> "list[ResolveResult]":
        """Return the addresses of a host. Raises OSError where none was ever found."""
        key = host, port, family
        lookup = asyncio.create_task(self._look_up(*key))
        if key not in _last:
            return await lookup
        await asyncio.wait({lookup}, timeout=limits.NAME_SECONDS)  # it goes on, for the next time
        return _last[key]

    async def _look_up(
        self, host: str, port: int, family: socket.AddressFamily
    ) -> "list[ResolveResult]":
        key = host, port, family
        try:
            _last[key] = await super().resolve(*key)
        except OSError:
            if key not in _last:
                raise
        return _last[key]
