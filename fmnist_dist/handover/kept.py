"""The copy of its state that a trainer leaves with its keeper, as often as that costs under 1 %."""

import time
from collections.abc import Callable, Sequence

from fmnist_dist.handover.slots import Slots

_SHARE = 0.01  # of a step's time, at most


class KeptCopy:
    """Writes the state into the keeper's slots. Without a keeper there are no slots, and no copy.

    Memory that does not suffice ends the copying, with a warning, and not the training.
    """

    def __init__(self, slots: Slots | None, *, warn: Callable[[str], None]) -> None:
        self._slots = slots
        self._warn = warn
        self._cost = 0.0  # seconds of the last copy
        self._saved_up = 0.0  # seconds that may be spent

    def keep(
        self,
        position: int,
        image: Callable[[], Sequence[bytes | memoryview]],
        *,
        step_seconds: float,
    ) -> bool:
        """Copy the state if its share of time allows; return whether it was copied."""
        if self._slots is None:
            return False
        self._saved_up = min(self._saved_up + _SHARE * step_seconds, self._cost)
        if self._saved_up < self._cost:
            return False
        return self.keep_now(position, image)

    def keep_now(self, position: int, image: Callable[[], Sequence[bytes | memoryview]]) -> bool:
        """Copy the state whatever it costs; return whether it was copied."""
        if self._slots is None:
            return False
        # What this thread did, not how long it took: on a busy machine another process may have had
        # its turn meanwhile, and copies would become rare just there.
        started = time.thread_time()
        try:
            self._slots.write(position, image())
        except OSError as error:
            self._slots = None
            self._warn(f"no copy of the state for a lost worker any more: {error}")
            return False
        self._cost = time.thread_time() - started
        self._saved_up = 0.0
        return True
