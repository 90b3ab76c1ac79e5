"""Asking a disk that nothing depends on: it may fail, or never answer, and the run goes on."""

import threading
from collections.abc import Callable
from typing import TypeVar

from fmnist_dist import limits
from fmnist_dist.checkpoint.storage import StorageError

_T = TypeVar("_T")


class BestEffort:
    """Does what it can. `warn` is told of each thing that fails, once until it works again."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._told: set[str] = set()
        self._is_dead = False

    def do(self, failed: str, action: Callable[[], _T], *, otherwise: _T) -> _T:
        """Return what `action` returns; `otherwise` where that raises `StorageError`.

        In a thread of its own: a dead disk does not even fail, and nothing that counts must wait
        for it. After a limit that thread is left behind, and the disk is not asked again.
        """
        if self._is_dead:
            return otherwise
        results: list[_T] = []
        errors: list[BaseException] = []

        def act() -> None:
            try:
                results.append(action())
            except BaseException as error:  # noqa: BLE001 - raised below, or told
                errors.append(error)

        thread = threading.Thread(target=act, name="fmnist-tier", daemon=True)
        thread.start()
        thread.join(limits.LOCAL_TIER_SECONDS)
        if thread.is_alive():
            self._is_dead = True
            errors.append(StorageError(f"no answer in {limits.LOCAL_TIER_SECONDS:g} s"))
        for error in errors:
            if not isinstance(error, StorageError):
                raise error
            if failed not in self._told:
                self._warn(f"{failed}, the run goes on without: {error}")
            self._told.add(failed)
            return otherwise
        self._told.discard(failed)
        return results[0]
