"""Where a run is: the URL that its user wrote, and the storage behind it.

A place is plain data and crosses forks; what a storage opens belongs to the process that asked.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from fmnist_dist.checkpoint.disk import Disk
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.storage import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A run's folder. `str` of it is what people are shown."""

    folder: Path

    @staticmethod
    def of(url: str) -> "Place":
        """Return the place that a path or a file:// URL names; makes and looks at nothing."""
        if not url.startswith("file://"):
            # Path.expanduser raises for a user who does not exist; as fsspec, take it for a name.
            return Place(folder=Path(os.path.expanduser(url)).absolute())  # noqa: PTH111
        from fsspec.core import url_to_fs  # noqa: PLC0415 - 0.1 s, and most runs are named by a path

        return Place(folder=Path(url_to_fs(url)[1]))

    @property
    def notes(self) -> Path:
        """Where attempts leave hints for later ones: no part of the truth, lost without harm."""
        return self.folder / "progress"

    def storage(self, *, single_writer: bool = False, disk: Disk | None = None) -> Storage:
        """Open the run's storage, for this process alone."""
        return LocalStorage(self.folder, single_writer=single_writer, disk=disk)

    def __str__(self) -> str:
        return str(self.folder)
