"""Whether the other ranks' hosts are there: a network that is cut says nothing, and gloo waits.

A process that is lost closes its connections; a host that is lost does not. Every keeper counts in
the launcher's store while it can, and who waits for others looks at their counts.
"""

from fmnist_dist import limits
from fmnist_dist.distributed.generation import KeyValue
from fmnist_dist.keeper.watchdog import Stopwatch


class Peers:
    """What one keeper knows of the others. Times are seconds of `time.monotonic`."""

    def __init__(self, keys: KeyValue, *, rank: int, size: int) -> None:
        self._keys = keys
        self._rank = rank
        self._counts = {other: Stopwatch() for other in range(size) if other != rank}
        self._count = 0
        self._counted_at = self._looked_at = float("-inf")

    def count(self, now: float) -> None:
        """Let the others see that this keeper lives. Raises `StoreLostError`."""
        if self._counts and now - self._counted_at >= limits.ALIVE_SECONDS:
            self._counted_at = now
            self._count += 1
            self._keys.set(f"alive/{self._rank}", str(self._count))

    def silent(self, now: float) -> list[int]:
        """Return the ranks whose counts have stood for too long; look often, or it takes longer.

        A rank that has not begun to count may still be loading its data. Raises `StoreLostError`.
        """
        passed = now - self._looked_at
        if passed < limits.ALIVE_SECONDS:
            return []
        self._looked_at = now
        # Longer than looks are apart: this keeper was stopped meanwhile, or had nobody to wait for.
        passed = passed if passed < 2 * limits.ALIVE_SECONDS else 0.0
        found = []
        for other, stopwatch in self._counts.items():
            count = self._keys.get(f"alive/{other}")
            seconds = stopwatch.seconds(count, passed)
            if count is not None and seconds > limits.SILENT_SECONDS:
                found.append(other)
        return found
