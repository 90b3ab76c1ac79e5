"""Finding out, beside the steps, whether all ranks have copied the same state.

Each rank leaves the digest of its copy in the launcher's store, from a thread of its own; rank 0
reads them before it commits. All keys lie under the nonce of the keepers' roll call and carry their
generation. Rank 0 deletes what it has read, so that the store does not grow with the run.

Nothing here makes a step wait, and a peer that is lost makes no save wait for long: what cannot be
compared is committed all the same, as survivors save a state that nobody is left to compare with.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from fmnist_dist.distributed import generation
from fmnist_dist.distributed.generation import KeyValue


class Keys(KeyValue, Protocol):
    """The part of a store that a comparison needs."""

    def delete(self, key: str) -> None: ...


class Comparison:
    """One rank's part in it, in one generation. For the thread that saves, with its own keys."""

    def __init__(self, keys: Keys, *, generation: int, rank: int, size: int) -> None:
        self._keys = keys
        self._generation = generation
        self._rank = rank
        self._others = [other for other in range(size) if other != rank]

    def tell(self, step: int, digest: str) -> None:
        """Leave this rank's digest for rank 0."""
        self._keys.set(self._key(step, self._rank), digest)

    def gather(
        self, step: int, digest: str, *, pause: Callable[[], bool]
    ) -> Mapping[int, str] | None:
        """Return the digests of all ranks, by rank; None where not all are to be had any more.

        `pause` is called between looks; it returns False when there is no more time.
        """
        names = {other: self._key(step, other) for other in self._others}
        while not self._keys.check(list(names.values())):
            moved = generation.number(self._keys) != self._generation
            if moved or generation.left(self._keys) or not pause():
                return None
        found = {self._rank: digest}
        for other, name in names.items():
            value = self._keys.get(name)
            assert value is not None, f"{name} was there, and nobody else deletes it"
            found[other] = value
            self._keys.delete(name)
        return found

    def _key(self, step: int, rank: int) -> str:
        return f"g/{self._generation}/copied/{step}/{rank}"
