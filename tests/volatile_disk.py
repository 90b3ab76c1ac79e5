"""A disk that knows what a power cut would leave: only what was synced is sure to stay.

It does every operation for real, but for the syncs, and keeps a second picture of files and folders
beside it, each with its present and its durable state. `power_cut` writes the worst picture into a
new folder. It also stops the process at a given operation, as a SIGKILL does.
"""

from dataclasses import dataclass, field
from pathlib import Path

from fmnist_dist.checkpoint.disk import Disk


class Stopped(BaseException):
    """The process was killed here."""


class Careless(Disk):
    """A disk that does not sync, for tests that cut no power: syncs are most of their time."""

    def sync(self, descriptor: int) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        if not path.is_dir():
            raise FileNotFoundError(path)


@dataclass
class File:
    data: bytes = b""
    durable: bytes = b""


@dataclass
class Folder:
    entries: dict[str, "File | Folder"] = field(default_factory=dict)
    durable: dict[str, "File | Folder"] = field(default_factory=dict)


class VolatileDisk(Careless):
    """Everything above `base` is durable; `stop_at` counts from the last `restart`."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._root = Folder()
        self._open: dict[int, File] = {}
        self.restart(stop_at=None)

    def restart(self, *, stop_at: int | None) -> None:
        """Go on as another process on the same machine: what is in memory is still there."""
        self.operations = 0
        self._stop_at = stop_at

    def power_cut(self, target: Path, *, names_too: bool) -> None:
        """Write what is left to `target`; with `names_too` the names that were not synced stay."""
        self._write(self._root, target, names_too=names_too)

    def make_folder(self, path: Path) -> None:
        self._count()
        super().make_folder(path)
        self._parent(path).entries[path.name] = Folder()

    def open_new(self, path: Path) -> int:
        self._count()
        descriptor = super().open_new(path)
        self._open[descriptor] = File()
        self._parent(path).entries[path.name] = self._open[descriptor]
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        self._count()
        self._open[descriptor].data += bytes(data)
        return super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        self._count()
        super().sync(descriptor)
        self._open[descriptor].durable = self._open[descriptor].data

    def link(self, source: Path, target: Path) -> None:
        self._count()
        super().link(source, target)
        self._parent(target).entries[target.name] = self._parent(source).entries[source.name]

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)
        self._parent(target).entries[target.name] = self._parent(source).entries.pop(source.name)

    def unlink(self, path: Path) -> None:
        self._count()
        super().unlink(path)
        del self._parent(path).entries[path.name]

    def remove_folder(self, path: Path) -> None:
        self._count()
        super().remove_folder(path)
        del self._parent(path).entries[path.name]

    def sync_folder(self, path: Path) -> None:
        self._count()
        super().sync_folder(path)
        if path.is_relative_to(self._base):
            folder = self._folder(path)
            folder.durable = dict(folder.entries)

    def _count(self) -> None:
        if self._stop_at is not None and self.operations >= self._stop_at:
            raise Stopped
        self.operations += 1

    def _parent(self, path: Path) -> Folder:
        return self._folder(path.parent)

    def _folder(self, path: Path) -> Folder:
        folder = self._root
        for name in path.relative_to(self._base).parts:
            inner = folder.entries[name]
            assert isinstance(inner, Folder)
            folder = inner
        return folder

    def _write(self, folder: Folder, target: Path, *, names_too: bool) -> None:
        target.mkdir()
        for name, inner in (folder.entries if names_too else folder.durable).items():
            if isinstance(inner, File):
                (target / name).write_bytes(inner.durable)
            else:
                self._write(inner, target / name, names_too=names_too)
