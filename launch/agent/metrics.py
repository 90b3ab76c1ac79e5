"""/metrics for Prometheus and /healthz, on a port and a thread of their own.

Every number is looked up when it is asked for; what this agent cannot know is not there.
"""

import socket
import time
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import torch

import fmnist_dist
from fmnist_dist.errors import IncompatibleError, UsageError
from launch.agent import limits
from launch.agent.notices import Notices
from launch.agent.progress import Progress
from launch.agent.rounds import Rounds

_PREFIX = "fmnist_dist"

try:
    from prometheus_client import CollectorRegistry, make_wsgi_app
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        InfoMetricFamily,
        Metric,
    )
    from prometheus_client.exposition import ThreadingWSGIServer
except ImportError as error:
    raise UsageError(
        "flag --metrics-port: needs the package prometheus-client: pip install 'fmnist-dist[agent]'"
    ) from error


class Metrics:
    """A collector of prometheus_client: what the agent is asked for at each scrape."""

    def __init__(
        self, rounds: Rounds, notices: Notices, progress: Progress | None, *, min_nodes: int
    ) -> None:
        self._rounds = rounds
        self._notices = notices
        self._progress = progress
        self._min_nodes = min_nodes

    def collect(self) -> Iterator[Metric]:
        build = {"version": fmnist_dist.__version__, "torch": str(torch.__version__)}
        yield InfoMetricFamily(f"{_PREFIX}_build", "What runs here.", build)
        yield _gauge("world_size", "Workers that train; 0 between rounds.", self._rounds.world_size)
        yield _gauge("min_nodes", "Nodes that a round needs.", self._min_nodes)
        yield _gauge(
            "rendezvous_generation",
            "How many rendezvous of this run id were closed before.",
            self._rounds.generation,
        )
        restarts = CounterMetricFamily(
            f"{_PREFIX}_restarts", "Rounds after the first, by reason.", labels=["reason"]
        )
        for reason in REASONS:
            restarts.add_metric([reason], self._rounds.restarts[reason])
        yield restarts
        yield CounterMetricFamily(
            f"{_PREFIX}_preemption_notices", "Signals to stop.", value=self._notices.count
        )
        yield from self._of_the_run()

    def _of_the_run(self) -> Iterator[Metric]:
        reached = self._progress.latest if self._progress is not None else None
        if reached is None:
            return
        # No counter: where steps are lost or rolled back it goes down, which is not a reset to 0.
        yield _gauge("step", "Newest finished step of the run.", reached.step)
        yield _gauge("attempt", "The newest attempt of the run.", reached.attempt)
        if reached.checkpoint_step is not None:
            yield _gauge(
                "checkpoint_step", "Step of the newest checkpoint.", reached.checkpoint_step
            )


REASONS = ("preempted", "collateral", "worker_error", "membership")


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=value)


class _Silent(WSGIRequestHandler):
    timeout = limits.SCRAPE_SECONDS

    def log_message(self, *_: object) -> None:
        """Say nothing: a scrape every few seconds is no event."""


class _Server(ThreadingWSGIServer):
    """Listens on all addresses of the pod: a kubelet probes the one that the cluster knows."""

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, *_: object) -> None:
        """Say nothing: who asked has gone, or has asked for nothing in time."""


def serve(port: int, metrics: Metrics, rounds: Rounds, notices: Notices) -> None:
    """Answer on `port` until the process ends. Raises IncompatibleError where it is taken."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics)
    pages = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        match environ["PATH_INFO"]:
            case "/metrics":
                return pages(environ, start)
            case "/healthz":
                status, text = health(rounds, notices)
            case _:
                status, text = "404 Not Found", "expected /metrics or /healthz"
        start(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]

    try:
        server = make_server("", port, answer, _Server, _Silent)
    except OSError as error:
        raise IncompatibleError(f"flag --metrics-port: port {port} is not free: {error}") from error
    Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def health(rounds: Rounds, notices: Notices) -> tuple[str, str]:
    """Return status and text of /healthz: whether new work may be expected of this agent."""
    stalled = time.monotonic() - rounds.ticked_at
    if notices.count:
        return "503 Service Unavailable", "draining"
    if stalled > limits.STALLED_SECONDS:
        return "503 Service Unavailable", f"the agent's loop stands still for {stalled:.0f} s"
    return "200 OK", "training" if rounds.is_training else "waiting for the other agents"
