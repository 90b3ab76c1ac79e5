"""Where a data set comes from: what the user named, or the first source that has the pinned bits.

1. `--data-dir`, if given, and then nothing else: who names a folder wants to know that it is bad.
2. The cache of this machine (`cache.py`).
3. The folder of the system's package.
4. The system's package, downloaded and unpacked without root (`apt.py`).
5. The web (`web.py`).

There is no sixth: a job that trains on invented data looks exactly like one that learns badly.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fmnist_dist.data import apt, web
from fmnist_dist.data.files import Contents, DataFile, SourceUnavailableError, read_folder
from fmnist_dist.errors import DataDamagedError, TransientError, UsageError

_log = logging.getLogger("fmnist_dist.data")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the files of one data set can be had; None where there is no such source."""

    files: tuple[DataFile, ...]
    system_folder: Path | None = None
    package: str | None = None  # Debian's, and installs into `system_folder`
    mirror: str | None = None  # URL to which `<name>.gz` is appended


def read_data_dir(folder: Path, files: Sequence[DataFile]) -> Contents:
    """Read `--data-dir`.

    Raises:
        UsageError: The folder or a file is missing or cannot be read.
        DataDamagedError: A file is not the pinned one.
    """
    advice = "or leave --data-dir out and the data set is fetched"
    try:
        return read_folder(folder, files)
    except DataDamagedError as error:
        raise DataDamagedError(f"--data-dir: {error}; put a good file there, {advice}") from error
    except OSError as error:
        names = ", ".join(file.name for file in files)
        raise UsageError(
            f"--data-dir: {error}; expected a folder with {names}, each raw or as .gz, {advice}"
        ) from error


def fetch(title: str, origin: Origin) -> Contents:
    """Return the decoded files from the first source that has them; `title` is for the error.

    Raises:
        TransientError: No source has them; the message says why for each.
    """
    failures: list[str] = []
    for name, read in _sources(origin):
        _log.info("trying source: %s", name)
        try:
            contents = read()
        except (SourceUnavailableError, DataDamagedError, OSError) as error:
            _log.info("source failed: %s: %s", name, error)
            failures.append(f"({len(failures) + 1}) {name}: {error}")
        else:
            _log.info("data set found: %s", name)
            return contents
    raise TransientError(
        f"{title} is not in the cache, and no source has it: {'; '.join(failures)}. Put "
        f"{', '.join(file.name for file in origin.files)} (raw or .gz) into a folder and name it "
        "with --data-dir"
    )


def _sources(origin: Origin) -> list[tuple[str, Callable[[], Contents]]]:
    files, folder, package, mirror = (
        origin.files,
        origin.system_folder,
        origin.package,
        origin.mirror,
    )
    sources: list[tuple[str, Callable[[], Contents]]] = []
    if folder is not None:
        sources.append((f"folder {folder}", lambda: read_folder(folder, files)))
    if package is not None and folder is not None:
        sources.append((f"package {package}", lambda: apt.download(package, files, folder=folder)))
    if mirror is not None:
        sources.append((f"web {mirror}", lambda: web.download(files, mirror=mirror)))
    return sources
