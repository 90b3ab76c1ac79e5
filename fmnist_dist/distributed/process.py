"""What a process arranges with its parent: not to outlive it, and not to be asked again."""

import ctypes
import os
import signal
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # linux/prctl.h


def die_with_parent(environ: Mapping[str, str]) -> None:
    """Have the kernel kill this process when the agent that launched it dies (Linux).

    torchrun starts workers in their own session and without a parent-death signal: SIGKILL of the
    agent would leave ranks that hold memory and can still write. A process that nobody launched
    (`python -m`, perhaps under nohup) is left alone. Call it first, before slow imports.
    """
    if "TORCHELASTIC_RUN_ID" not in environ or sys.platform != "linux":
        return
    # Had the parent died before this function, its store is gone with it: the roll call ends then.
    die_with(os.getppid())


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent`, its parent, dies (Linux).

    The signal follows the *thread* that forked: fork from one that outlives the child.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the request stood: then no signal will ever come.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def name_process(name: str) -> None:
    """Show `name` (15 characters at most) in `ps`, `top` and /proc/PID/comm (Linux)."""
    if sys.platform == "linux":
        _prctl(_PR_SET_NAME, ctypes.create_string_buffer(name.encode()))


def _prctl(option: int, argument: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")


def stat_fields(process: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name: state, parent, ... Raises OSError."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def open_sockets() -> dict[int, int]:
    """Return the inode of each open socket of this process, by descriptor (Linux)."""
    found: dict[int, int] = {}
    for path in list(Path("/proc/self/fd").iterdir()):
        try:
            status = os.fstat(int(path.name))
        except OSError:  # the listing's own descriptor, or one that was closed meanwhile
            continue
        if stat.S_ISSOCK(status.st_mode):
            found[int(path.name)] = status.st_ino
    return found


def end_launcher(environ: Mapping[str, str]) -> bool:
    """Ask a bare torchrun to stop, and return whether there was one to ask.

    torchrun restarts a worker whatever its exit code says, `--max-restarts` times. After an end
    that would repeat itself (wrong settings, fenced, damaged) that is minutes of the same line. An
    agent that reads exit codes is left alone.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return False
    parent = os.getppid()
    command = Path(f"/proc/{parent}/cmdline")
    words = command.read_bytes().decode(errors="replace").split("\0") if command.exists() else []
    names = {Path(word).name for word in words[:4]}
    if not names & {"torchrun", "torch.distributed.run", "torch.distributed.launch"}:
        return False
    os.kill(parent, signal.SIGTERM)
    return True
