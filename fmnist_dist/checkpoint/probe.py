"""Whether an object store keeps what the run log rests on, found out before anything is written.

Two puts of one new name: the second must be refused and change nothing. Some stores that speak the
language of S3 take no notice of the condition; there two attempts could both append, and the newer
one would never know. What is written lies in the run's `tmp`, which sweeps empty: if one comes
between the two puts, the second succeeds as well, so a store is given several chances.
"""

import contextlib
import secrets

from fmnist_dist.checkpoint.storage import (
    TEMPORARY_FOLDER,
    AlreadyExistsError,
    MissingError,
    Storage,
)
from fmnist_dist.errors import IncompatibleError

_TRIES = 3


def probe(storage: Storage, *, shown: str) -> None:
    """Raise `IncompatibleError` for a store, called `shown`, that cannot hold a run.

    Raises `StorageError` where it does not answer, `RefusedError` where it refuses this user.
    """
    for _ in range(_TRIES):
        if _keeps_the_first(storage):
            return
    raise IncompatibleError(
        f"--run-dir {shown}: this store takes no notice of `If-None-Match: *` (two puts of one new "
        "object both succeeded), so two writers could not be told apart; use another store, or "
        "--single-writer if nothing else can ever write to this run"
    )


def _keeps_the_first(storage: Storage) -> bool:
    path = f"{TEMPORARY_FOLDER}/probe-{secrets.token_hex(8)}"
    first, second = b"first", b"second"
    # Its own, if the answer was lost: nobody else knows the name.
    with contextlib.suppress(AlreadyExistsError):
        storage.create(path, first)
    try:
        storage.create(path, second)
    except AlreadyExistsError:
        kept = _reads(storage, path) == first
    else:
        kept = False
    # Only now: a store that has failed would fail again, and what it says first is what matters.
    storage.delete(path)
    return kept


def _reads(storage: Storage, path: str) -> bytes | None:
    """Return an object, None where a sweep has taken it."""
    try:
        return storage.read(path)
    except MissingError:
        return None
