"""What a rank that is behind receives: nothing of it counts before all of it has come, unharmed.

It is received into a second buffer, and the rank goes on to advertise the step that it holds; it
holds the new state from `adopt` on, in one assignment. A sender that dies half-way leaves no trace.
"""

import hashlib


class TornStateError(Exception):
    """What was received is not what the sender had advertised."""


def digest_of(data: bytes | memoryview) -> str:
    """Return the digest by which a state is advertised: SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def adopt(data: bytes | memoryview, *, digest: str) -> bytes | memoryview:
    """Return a received state that equals the sender's. Raises `TornStateError`."""
    found = digest_of(data)
    if found != digest:
        raise TornStateError(
            f"the state that was sent ({len(data)} bytes) has SHA-256 {found[:12]}, and its sender "
            f"holds {digest[:12]}: it is not used"
        )
    return data
