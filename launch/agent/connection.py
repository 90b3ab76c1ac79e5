"""The link to the rendezvous store, opened again whenever it is lost, by one look after the other.

Workers do not need that store, so they train on meanwhile; the agent meets the others again when
there is a new link.
"""

import random
import time
from concurrent.futures import Future

from torch.distributed.launcher.api import LaunchConfig

from fmnist_dist.telemetry.events import EventLog
from launch.agent import limits
from launch.agent.aside import aside
from launch.agent.rendezvous import Link, failure

_events = EventLog("launch.agent")


class Connection:
    """Where the link is, if there is one; `look` at it often."""

    def __init__(self, config: LaunchConfig) -> None:
        self._config = config
        if config.max_nodes > 1:  # else there is nobody to wait for, and nothing to say
            _events.info("opening the rendezvous store", endpoint=config.rdzv_endpoint)
        self._opening: Future[Link] | None = None
        self._next_at = self._give_up_at = 0.0
        self.link: Link | None = None
        self.why = ""  # there is none, where that is known

    def look(self) -> None:
        """See whether the link is lost, or a new one has come. It waits for nothing.

        Raises what is no fault of network or store.
        """
        now = time.monotonic()
        if self.link is not None:
            if why := self.link.why_lost:
                self.drop(why)
        elif self._opening is None:
            if now >= self._next_at:
                self._opening = aside(lambda: Link(self._config), name="rendezvous")
                self._give_up_at = now + limits.OPEN_SECONDS
        elif self._opening.done():
            opening, self._opening = self._opening, None
            if why := failure(opening):
                self._tell(why)
                self._pause()
            else:
                self.link, self.why = opening.result(), ""
        elif now > self._give_up_at:
            opening, self._opening = self._opening, None
            opening.add_done_callback(_abandon)
            self._tell(f"no answer for {limits.OPEN_SECONDS:.0f} s")

    def drop(self, why: str) -> None:
        """Leave the link behind; a new one is opened after a pause."""
        if self.link is not None:
            self.link.abandon()
        self.link = None
        self._tell(why)
        self._pause()

    def _pause(self) -> None:
        self._next_at = time.monotonic() + limits.RETRY_SECONDS * random.uniform(0.25, 1.0)

    def _tell(self, why: str) -> None:
        if not self.why:
            _events.warning("the rendezvous store is away, it is tried again", why=why)
        self.why = why


def _abandon(opening: "Future[Link]") -> None:
    """Leave a link behind that has come too late."""
    if opening.exception() is None:
        opening.result().abandon()
