"""The thread that stays awake while a trainer's main thread is blocked in a collective.

It shows the keeper that the process lives, hears signals, gets the main thread out of a collective
of a generation that has failed, and, when a drain's time runs short, saves the state itself: in the
quiet window that any thread may use (see `state`).

Some collectives do not end when all their connections are closed, and some groups cannot be taken
down then (gloo of torch 2.14.1, four ranks on two busy cores: 4 of 200 losses). Then the state is
left with the keeper, and the process ends itself: its successor goes on with the very same state.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from fmnist_dist import limits
from fmnist_dist.distributed.stop import StopRequest
from fmnist_dist.distributed.world import World
from fmnist_dist.errors import INTERRUPTED, ExitCode, FmnistDistError
from fmnist_dist.handover.board import Board, Section
from fmnist_dist.telemetry.events import EventLog

_PATIENCE = 0.5  # share of a drain's time that all ranks have to stop together
# There the main thread hears of the wish by itself, or is in storage, as any thread would be.
_ENDS_BY_ITSELF = {Section.MEETING, Section.SAVE, Section.FINISH}

_events = EventLog("fmnist_dist.lookout")


class Lookout:
    """Looks around ten times a second, and at once when a signal comes."""

    def __init__(self, board: Board, stop: StopRequest, *, drain_seconds: float) -> None:
        self._board = board
        self._stop = stop
        self._drain_seconds = drain_seconds
        self._world: World | None = None
        self._has_failed: Callable[[], bool] = lambda: False
        self._secure: Callable[[float], str] | None = None
        self._hand_over: Callable[[], bool] = lambda: False
        self._broken_off_at: float | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="lookout", daemon=True)

    def secure_with(self, secure: Callable[[float], str]) -> None:
        """Say how to make the state durable within so many seconds; returns what was done."""
        self._secure = secure

    def hand_over_with(self, hand_over: Callable[[], bool]) -> None:
        """Say how to leave the state with the keeper; returns whether it is there."""
        self._hand_over = hand_over

    def drain_seconds_left(self) -> float:
        """Return how long a drain may still take, before the keeper kills, and saves in its place.

        All of its time where others were asked to stop, and not this rank.
        """
        if self._stop.since is None:
            return self._drain_seconds
        reserve = limits.kill_reserve_seconds(self._drain_seconds)
        return max(0.0, self._drain_ends_at() - reserve - time.monotonic())

    def _drain_ends_at(self) -> float:
        assert self._stop.since is not None
        return self._board.drain_deadline or self._stop.since + self._drain_seconds

    @contextmanager
    def running(self) -> Iterator["Lookout"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._closing.set()
            self._thread.join(limits.FAREWELL_SECONDS)

    @contextmanager
    def watching(self, world: World, has_failed: Callable[[], bool]) -> Iterator[None]:
        """Break a generation's collectives off as soon as `has_failed` says so."""
        with self._lock:
            self._world, self._has_failed, self._broken_off_at = world, has_failed, None
        try:
            yield
        finally:
            with self._lock:
                self._world = None

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._board.beat()
                self._hear()
                self._break_off()
                select.select([self._stop.descriptor], [], [], limits.LOOKOUT_SECONDS)
        except OSError:
            if not self._closing.is_set():  # the pipe was closed under it by a closing trainer
                raise

    def _hear(self) -> None:
        self._stop.read()
        if self._board.draining:
            self._stop.ask()
        if self._stop.num_interrupts > 1:
            time.sleep(limits.LOOKOUT_SECONDS)  # the main thread ends by itself, if it can
            if not self._closing.is_set():
                _leave(INTERRUPTED)
        if self._stop.since is not None:
            since = self._stop.since
            if time.monotonic() > since + _PATIENCE * (self._drain_ends_at() - since):
                self._save_alone()

    def _save_alone(self) -> None:
        """Save without the others, and without the main thread, which is stuck."""
        if self._board.section in _ENDS_BY_ITSELF or self._secure is None:
            return
        try:
            done = self._secure(self.drain_seconds_left())
        except FmnistDistError as error:
            _events.error(str(error), exit_code=int(error.exit_code))
            _leave(error.exit_code)
        _events.info(f"asked to stop, and others do not answer: {done}", exit_code=143)
        _leave(ExitCode.DRAINED)

    def _break_off(self) -> None:
        """Break the collectives of a failed generation off, and see that the main thread leaves."""
        section, seconds = self._board.where()
        if section is Section.LEAVE and seconds > limits.LEAVE_SECONDS:
            self._leave_group()
        # Wherever it is, it may come into a collective; in one it waits, and others for it.
        patience = limits.LOOKOUT_SECONDS if section is Section.COLLECTIVE else limits.LEAVE_SECONDS
        if seconds < patience:
            return
        with self._lock:
            if self._world is None or not self._has_failed():
                return
            self._world.break_off()
        now = time.monotonic()
        if self._broken_off_at is None:
            self._broken_off_at = now
        elif section is Section.COLLECTIVE and now - self._broken_off_at > limits.LEAVE_SECONDS:
            self._leave_group()

    def _leave_group(self) -> None:
        """End this process, whose main thread does not come out; nothing that it holds is lost."""
        if self._board.finished:
            _leave(ExitCode.FINISHED)
        _events.warning("a collective does not end although its peers are gone: this worker does")
        if self._hand_over():
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)  # for the keeper a loss like any other
        if self._secure is None:
            _leave(ExitCode.TRANSIENT)
        try:
            done = self._secure(limits.RESCUE_SECONDS)
        except FmnistDistError as error:
            _events.error(str(error), exit_code=int(error.exit_code))
            _leave(error.exit_code)
        _events.error(f"another rank is gone: {done}", exit_code=int(ExitCode.PEER_LOST))
        _leave(ExitCode.PEER_LOST)


def _leave(code: int) -> NoReturn:
    sys.stderr.flush()
    os._exit(code)
