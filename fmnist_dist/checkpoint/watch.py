"""Who watches over a save: may give it up on the way, and has the last word before its record."""

from collections.abc import Mapping
from typing import Protocol

from fmnist_dist.checkpoint.record import File


class AbandonedError(Exception):
    """The save was given up: something newer is to be saved, or nothing any more."""


class Watch(Protocol):
    """Asked by the thread that saves."""

    def go_on(self) -> None:
        """Return, or raise `AbandonedError`: asked again and again until the record is appended."""

    def confirm(self, files: Mapping[str, File]) -> None:
        """Return, or raise: asked once, when all files are durable and before the record is."""


class Unwatched:
    """Nobody: what is asked for is saved."""

    def go_on(self) -> None:
        pass

    def confirm(self, files: Mapping[str, File]) -> None:
        pass


UNWATCHED = Unwatched()
