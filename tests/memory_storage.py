"""A storage in memory: obeys the contract that `test_storage.py` holds every storage to."""

import threading

from fmnist_dist.checkpoint.storage import AlreadyExistsError, MissingError


class MemoryStorage:
    """`Storage` in a dictionary; each verb is atomic."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.reads = 0
        self._lock = threading.Lock()

    def create(self, path: str, data: bytes) -> None:
        with self._lock:
            if path in self.objects:
                raise AlreadyExistsError(path)
            self.objects[path] = bytes(data)

    def read(self, path: str) -> bytes:
        with self._lock:
            self.reads += 1
            if path not in self.objects:
                raise MissingError(path)
            return self.objects[path]

    def list(self, folder: str) -> list[str]:
        with self._lock:
            inside = (path.removeprefix(f"{folder}/") for path in self._inside(folder))
            return sorted({path.partition("/")[0] for path in inside})

    def delete(self, *paths: str) -> None:
        for path in paths:
            with self._lock:
                self.objects.pop(path, None)

    def delete_folder(self, folder: str) -> None:
        with self._lock:
            for path in self._inside(folder):
                del self.objects[path]

    def _inside(self, folder: str) -> tuple[str, ...]:
        return tuple(path for path in self.objects if path.startswith(f"{folder}/"))
