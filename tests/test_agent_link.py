"""The agent's link to the rendezvous store, while a generation is left and while it is given up."""

from collections.abc import Iterator

import pytest
from agent import ALONE
from jobs import wait_for
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, dynamic_rendezvous
from torch.distributed.launcher.api import LaunchConfig

from launch.agent import limits, rendezvous
from launch.agent.arguments import parse
from launch.agent.connection import Connection
from launch.agent.rendezvous import Link


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> LaunchConfig:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    monkeypatch.setattr(limits, "ASK_SECONDS", 0.02)
    conf = "--rdzv-conf=last_call_timeout=1,join_timeout=30"
    return parse([*ALONE, conf, "program.py"], {}).launch


@pytest.fixture
def link(config: LaunchConfig) -> Iterator[Link]:
    opened = Link(config)
    yield opened
    opened.abandon()


def at_the_next_generation(monkeypatch: pytest.MonkeyPatch, link: Link, seen: list[str]) -> None:
    """Look at a link in the middle of its way into another generation, and give it up there."""
    create = rendezvous.create_handler

    def act(*words: object) -> object:
        if not seen:
            seen.append(f"{link._watch._stopped.is_set()} {link.why_lost}")
            link.abandon()
        return create(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(rendezvous, "create_handler", act)


def test_a_link_given_up_on_its_way_to_the_next_generation_joins_nothing(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a thread that comes back late: it would be a node that nobody is."""
    seen: list[str] = []
    link.set_closed()
    at_the_next_generation(monkeypatch, link, seen)
    with pytest.raises(RendezvousConnectionError):
        link.next_rendezvous()
    assert seen == ["False "], "a link that goes on must not look lost"


def test_what_is_no_fault_of_the_store_is_not_taken_for_its_silence(
    config: LaunchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an agent on a torch that it does not know would wait half an hour for a store."""

    def unknown(_: object) -> int:
        raise AttributeError("num_nodes_waiting is not what it was")

    monkeypatch.setattr(dynamic_rendezvous.DynamicRendezvousHandler, "num_nodes_waiting", unknown)
    connection = Connection(config)

    def look() -> bool:
        connection.look()
        return False

    with pytest.raises(AttributeError, match="is not what it was"):
        wait_for(look, "the fault")
    assert connection.link is not None
    connection.link.abandon()
