"""The system calls of local storage, one method each, so that each can be a fault point.

`FaultyDisk` is what tests and drills put in its place: it kills or stops the process, or makes the
call fail, at the n-th operation. A run that is not armed never constructs one.
"""

import errno
import os
import re
import signal
import sys
from pathlib import Path

from fmnist_dist.faults import DISK_FORM, FAULTS_VARIABLE, Faults

__all__ = ["FAULTS_VARIABLE", "Disk", "FaultyDisk", "disk_from"]


class Disk:
    """Plain system calls."""

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def open_new(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, descriptor: int, data: memoryview) -> int:
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        path.rmdir()

    def sync_folder(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class FaultyDisk(Disk):
    """A disk that kills or stops the process, half-writes or fails at one counted operation.

    `action` is `kill` (SIGKILL to this process before the operation), `tear` (half of a write is
    done, then SIGKILL), `stop` (SIGSTOP before the operation, which is done after a SIGCONT) or
    `full` (ENOSPC from this operation on, `times` times). The fault announces itself on stderr
    first: a test asserts that it really happened.
    """

    def __init__(self, *, action: str, at: int, times: int = 1) -> None:
        self._action = action
        self._at = at
        self._last = at + times
        self.operations = 0

    def make_folder(self, path: Path) -> None:
        self._point("make_folder", path)
        super().make_folder(path)

    def open_new(self, path: Path) -> int:
        self._point("open_new", path)
        return super().open_new(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        if self._action == "tear" and self.operations == self._at:
            super().write(descriptor, data[: len(data) // 2])
        self._point("write", Path(f"<descriptor {descriptor}>"))
        return super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        self._point("sync", Path(f"<descriptor {descriptor}>"))
        super().sync(descriptor)

    def link(self, source: Path, target: Path) -> None:
        self._point("link", target)
        super().link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self._point("rename", target)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._point("unlink", path)
        super().unlink(path)

    def remove_folder(self, path: Path) -> None:
        self._point("remove_folder", path)
        super().remove_folder(path)

    def sync_folder(self, path: Path) -> None:
        self._point("sync_folder", path)
        super().sync_folder(path)

    def _point(self, name: str, path: Path) -> None:
        number = self.operations
        self.operations += 1
        if not self._at <= number < self._last:
            return
        sys.stderr.write(f"fault: {self._action} at storage operation {number} ({name} {path})\n")
        sys.stderr.flush()
        if self._action == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.kill(os.getpid(), signal.SIGSTOP if self._action == "stop" else signal.SIGKILL)


def disk_from(specification: str | None) -> Disk:
    """Return the disk that `FMNIST_DIST_FAULTS` asks for, a plain one without.

    `disk:<action>:<n>[:<times>]`, alone or among others; raises ValueError for what it, or
    `Faults`, cannot read.
    """
    entry = Faults.parse(specification).disk
    if entry is None:
        return Disk()
    found = re.fullmatch(r"disk:(kill|tear|stop|full):(\d+)(?::(\d+))?", entry)
    if found is None:
        raise ValueError(f"{FAULTS_VARIABLE}={entry}: expected {DISK_FORM}")
    action, at, times = found.groups()
    return FaultyDisk(action=action, at=int(at), times=int(times or 1))
