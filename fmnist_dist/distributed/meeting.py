"""How the ranks of one launch find each other, in a store that remembers dead attempts.

torchrun keeps one TCPStore for all restarts of a launch, with every key that dead workers wrote. On
torch 2.14.1 restarted workers that build their process group straight on it read each other's dead
addresses and hang in most cases. So each attempt of a group meets anew, and trusts no key that the
living have not answered:

1. Rank 0 writes an invitation: a fresh nonce, under which everything of this attempt will stand.
2. Every other rank answers the newest invitation that it sees with a nonce of its own process, and
   answers again whenever another invitation takes its place: the first may have been a dead one.
3. When all have answered, rank 0 confirms with the list of their nonces. A rank leaves only on a
   confirmation that names its own nonce, which no dead attempt's can.

Restart counters are deliberately not used: they do not move when membership changes. No torch here.
"""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fmnist_dist import limits
from fmnist_dist.errors import TransientError


class KeyValue(Protocol):
    """The part of a store that a meeting needs."""

    def get(self, key: str) -> str | None:
        """Return the value, or None at once where there is none."""

    def set(self, key: str, value: str) -> None: ...


def host_meeting(keys: KeyValue, *, world_size: int, limit_seconds: float, name: str = "") -> str:
    """Invite all other ranks; return the nonce once each has answered. Raises `TransientError`.

    `name` is what all ranks are to know of this one (`names_at`).
    """
    nonce = secrets.token_hex(8)
    keys.set("invitation", nonce)
    answers: dict[int, str] = {}

    def all_answered() -> bool:
        for rank in range(1, world_size):
            answer = keys.get(f"answer/{nonce}/{rank}")
            if answer is not None:
                answers[rank] = answer
        return len(answers) == world_size - 1

    if not _wait(all_answered, limit_seconds):
        missing = sorted(set(range(1, world_size)) - answers.keys())
        raise TransientError(
            f"ranks {missing} of {world_size} did not come to the meeting in {limit_seconds:g} s"
        )
    everyone = [_Answer(nonce, name).encode(), *(answers[rank] for rank in range(1, world_size))]
    keys.set(f"confirmed/{nonce}", json.dumps(everyone))
    return nonce


def join_meeting(keys: KeyValue, *, rank: int, limit_seconds: float, name: str = "") -> str:
    """Answer rank 0's invitation; return its nonce once confirmed. Raises `TransientError`."""
    own = _Answer(secrets.token_hex(8), name).encode()
    found: list[str] = []

    def confirmed() -> bool:
        nonce = keys.get("invitation")
        if nonce is None:
            return False
        if not found or found[-1] != nonce:
            found.append(nonce)
            keys.set(f"answer/{nonce}/{rank}", own)
        answers = keys.get(f"confirmed/{nonce}")
        return answers is not None and own in json.loads(answers)

    if not _wait(confirmed, limit_seconds):
        raise TransientError(f"rank 0 did not call rank {rank} to a meeting in {limit_seconds:g} s")
    return found[-1]


def names_at(keys: KeyValue, nonce: str) -> tuple[str, ...]:
    """Return the names of all ranks, in their order, at a meeting that one of them has left."""
    answers = keys.get(f"confirmed/{nonce}")
    assert answers is not None, "whoever leaves a meeting has read or written the confirmation"
    return tuple(_Answer.decode(each).name for each in json.loads(answers))


@dataclass(frozen=True, slots=True)
class _Answer:
    nonce: str  # of one process
    name: str

    def encode(self) -> str:
        return f"{self.nonce} {self.name}"

    @classmethod
    def decode(cls, text: str) -> "_Answer":
        nonce, _, name = text.partition(" ")
        return cls(nonce, name)


def _wait(condition: Callable[[], bool], limit_seconds: float) -> bool:
    deadline = time.monotonic() + limit_seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(limits.ROLL_CALL_POLL_SECONDS)
    return True
