"""What the run log and the checkpoints ask of a storage: five verbs.

Paths are relative to the run folder, with `/` between their parts. An implementation guarantees
that an object is seen whole or not at all, that it is durable when `create` returns, and that of
two `create`s of one path exactly one succeeds (put-if-absent).
"""

from typing import Protocol

from fmnist_dist.errors import TransientError

TEMPORARY_FOLDER = "tmp"  # what a killed `create` may leave behind lies here; sweeps empty it


class StorageError(TransientError):
    """The storage did not do what was asked: full, away, read-only. Trying again may help."""


class RefusedError(StorageError):
    """The storage refuses this user, or knows no such place: credentials, rights, bucket, clock.

    At a run's opening that is final. Later it is a storage that is away: credentials are rotated.
    """


class AlreadyExistsError(Exception):
    """`create` found the path taken. The caller looks whose it is: it may be its own."""


class MissingError(Exception):
    """`read` found nothing under the path."""


class Storage(Protocol):
    """Where a run lives. Every verb raises `StorageError` when the storage fails."""

    def create(self, path: str, data: bytes | memoryview) -> None:
        """Write a new object, durably. Raises `AlreadyExistsError`; never replaces anything."""

    def read(self, path: str) -> bytes:
        """Return a whole object. Raises `MissingError`."""

    def list(self, folder: str) -> list[str]:
        """Return the sorted names in a folder, never from a cache; [] where there is none."""

    def delete(self, *paths: str) -> None:
        """Delete objects, in one request where the store can; nothing happens where none is.

        If it fails, some may be gone.
        """

    def delete_folder(self, folder: str) -> None:
        """Delete a folder with all it holds; nothing happens where there is none."""
