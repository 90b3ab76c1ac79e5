"""One connection to the store in which agents meet, and what torch's rendezvous leaves open.

*Silence.* A store whose host is cut off answers nothing, and torch's calls wait for ever. A second
connection asks it every second for nodes that wait; where no answer comes for twice the time after
which torch gives a node up, this connection is taken for lost, and is left behind.

*Generations.* torch closes a rendezvous for ever, under one run id (an agent of torchrun's own that
has failed does so). The number behind the run id is agreed through the store by compare-and-set:
each agent that finds generation g closed proposes g + 1, so that all land in the same one.
"""

import time
from concurrent.futures import Future
from datetime import timedelta
from threading import Event
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import (
    C10dRendezvousBackend,
    create_backend,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    Token,
    _RendezvousExitOp,
    create_handler,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig

from fmnist_dist.telemetry.events import EventLog
from launch.agent import limits
from launch.agent.aside import aside

_GENERATIONS = 1000  # closed one after the other; each was a launch that failed

_events = EventLog("launch.agent")
# One of them may be the store itself, on whose host this is: the others lose it when it goes.
_kept: list[TCPStore] = []


def parameters(config: LaunchConfig, run_id: str) -> RendezvousParameters:
    return RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )


def failure(future: "Future[Any]") -> str:
    """Return why a thread's work has failed, where that may pass; "" for success.

    Raises what is no fault of network or store.
    """
    error = future.exception()
    if error is None:
        return ""
    # RuntimeError: what torch's store raises, also where something else listens on its port.
    if isinstance(error, RendezvousError | RuntimeError | OSError):
        return f"{type(error).__name__}: {error.__cause__ or error}".splitlines()[0]
    raise error


class Link(RendezvousHandler):
    """A rendezvous handler that goes on with the next generation, and knows when it is lost."""

    def __init__(self, config: LaunchConfig) -> None:
        """Connect to the store, and host it where this is its host. It may take for ever."""
        self._config = config
        _, store = create_backend(parameters(config, config.run_id))
        assert isinstance(store, TCPStore)
        _kept.append(store)
        self._store = store
        self._key = f"launch.agent/{config.run_id}/generation"
        self._abandoned = Event()
        self._watch = self._entered(int(store.compare_set(self._key, "", "0")))

    def _entered(self, generation: int) -> "_Watch":
        """Be in a generation of the rendezvous from now on; return who watches it."""
        self.generation = generation
        run_id = self._config.run_id + (f".{generation}" if generation else "")
        params = parameters(self._config, run_id)
        backend = _Backend(self._store, run_id, self._abandoned)
        self._handler = create_handler(self._store, backend, params)
        return _Watch(self._store, params, self._abandoned)

    # What the agent asks.

    @property
    def why_lost(self) -> str:
        """Why the store counts as away; "" while it answers."""
        return self._watch.why_lost

    def waiting_since(self, moment: float) -> int:
        """Return how many nodes wait for the next round, of what was seen after `moment`."""
        return self._watch.waiting if self._watch.asked_at >= moment else 0

    def abandon(self) -> None:
        """Never touch the store again, whatever thread is still in there."""
        self._abandoned.set()
        aside(self._handler._stop_heartbeats, name="heartbeats")  # noqa: SLF001 - it may hang, too

    def leave(self) -> "Future[None]":
        """Take this node off the round, so that the others need not wait until it counts as dead.

        torch has no public word for it: `shutdown` would close the rendezvous for all.
        """

        def act() -> None:
            self._handler._stop_heartbeats()  # noqa: SLF001
            deadline = time.monotonic() + limits.LEAVE_SECONDS
            self._handler._op_executor.run(_RendezvousExitOp(), deadline)  # noqa: SLF001

        return aside(act, name="leave")

    # What torch's agent asks.

    def next_rendezvous(self) -> RendezvousInfo:
        for _ in range(_GENERATIONS):
            try:
                return self._handler.next_rendezvous()
            except (RendezvousClosedError, RendezvousGracefulExitError):
                now, following = str(self.generation), str(self.generation + 1)
                agreed = int(self._store.compare_set(self._key, now, following))
                _events.warning("the rendezvous was closed, all meet in another", generation=agreed)
                former, self._watch = self._watch, self._entered(agreed)
                former.stop()  # after that: who looks meanwhile must not see a lost link
        raise RendezvousClosedError

    def get_run_id(self) -> str:
        """Return the launch's, in every generation: the run log knows agents by it."""
        return self._config.run_id

    def get_backend(self) -> str:
        return self._handler.get_backend()

    @property
    def use_agent_store(self) -> bool:
        return self._handler.use_agent_store

    def is_closed(self) -> bool:
        return self._handler.is_closed()

    def set_closed(self) -> None:
        self._handler.set_closed()

    def num_nodes_waiting(self) -> int:
        return self._handler.num_nodes_waiting()

    def shutdown(self) -> bool:
        return self._handler.shutdown()


class _Backend(C10dRendezvousBackend):
    """torch's, until it is abandoned: a thread that comes back late joins nothing."""

    def __init__(self, store: TCPStore, run_id: str, abandoned: Event) -> None:
        super().__init__(store, run_id)
        self._abandoned = abandoned

    def get_state(self) -> tuple[bytes, Token] | None:
        self._check()
        return super().get_state()

    def set_state(
        self, state: bytes, token: Token | None = None
    ) -> tuple[bytes, Token, bool] | None:
        self._check()
        return super().set_state(state, token)

    def _check(self) -> None:
        if self._abandoned.is_set():
            raise RendezvousConnectionError("this connection was given up")


class _Watch:
    """Asks the store, on a connection and a thread of its own, which nodes wait."""

    def __init__(self, store: TCPStore, params: RendezvousParameters, abandoned: Event) -> None:
        self.waiting = 0
        self.asked_at = self._answered_at = time.monotonic()
        interval = params.get_as_int("keep_alive_interval", 5) or 5
        attempts = params.get_as_int("keep_alive_max_attempt", 3) or 3
        self._silent_seconds = 2.0 * interval * attempts
        self._limit = timedelta(seconds=self._silent_seconds)
        self._stopped = Event()
        self._abandoned = abandoned
        host, _ = parse_rendezvous_endpoint(params.endpoint, default_port=store.port)
        self._asking = aside(lambda: self._ask(host, store.port, params), name="watch")

    @property
    def why_lost(self) -> str:
        if self._asking.done():
            return failure(self._asking)
        silent = time.monotonic() - self._answered_at
        return f"no answer for {silent:.0f} s" if silent > self._silent_seconds else ""

    def stop(self) -> None:
        self._stopped.set()

    def _ask(self, host: str, port: int, params: RendezvousParameters) -> None:
        """Ask until the store is lost, which raises, or until it is stopped."""
        store = TCPStore(host, port, is_master=False, timeout=self._limit, wait_for_workers=False)
        # It only reads: torch's handler has no lock for two threads that join and look.
        reader = create_handler(store, C10dRendezvousBackend(store, params.run_id), params)
        while not self._stopped.wait(limits.ASK_SECONDS) and not self._abandoned.is_set():
            asked_at = time.monotonic()
            waiting = reader.num_nodes_waiting()
            self._answered_at = time.monotonic()
            self.waiting, self.asked_at = waiting, asked_at
