"""Which errors of a collective mean that a peer is gone."""

import pytest

from fmnist_dist.distributed.world import naming_lost_peers
from fmnist_dist.errors import PeerLostError

SEEN = {
    "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:5. This is ...": (
        "Connection closed by peer [10.0.0.1]:5"
    ),
    "[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 60000ms for recv": (
        "Timed out waiting 60000ms for recv"
    ),
    "Application timeout caused pair closure": "Application timeout caused pair closure",
    "Got the following error when running the callback: RuntimeError: Application timeout caused "
    "pair closure\n\nAt:\n  reduce.py(127): add\n": "Application timeout caused pair closure",
}


@pytest.mark.parametrize("text", SEEN)
def test_what_gloo_raises_names_a_lost_peer(text: str) -> None:
    with pytest.raises(PeerLostError) as caught, naming_lost_peers():
        raise RuntimeError(text)
    assert str(caught.value) == f"another rank is gone ({SEEN[text]})"


def test_a_bug_stays_one() -> None:
    with pytest.raises(RuntimeError, match="inplace") as caught, naming_lost_peers():
        raise RuntimeError("a leaf Variable that requires grad is used in an inplace operation")
    assert not isinstance(caught.value, PeerLostError)
