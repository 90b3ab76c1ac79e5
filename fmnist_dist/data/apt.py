"""The data set from its Debian package, downloaded and unpacked without root, never installed."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fmnist_dist import limits
from fmnist_dist.data.files import Contents, DataFile, SourceUnavailableError, read_folder

_NETWORK_OPTIONS = (
    "Acquire::Retries=1",
    f"Acquire::http::Timeout={limits.APT_SILENCE_SECONDS}",
    f"Acquire::https::Timeout={limits.APT_SILENCE_SECONDS}",
    "Acquire::Languages=none",
)


def download(package: str, files: Sequence[DataFile], *, folder: Path) -> Contents:
    """Return the decoded `files` that `package` would install in `folder` (an absolute path).

    The system's package lists are tried first; containers mostly come without any, so the second
    try updates private ones.

    Raises:
        SourceUnavailableError: This is no Debian, or the package cannot be had.
        FileNotFoundError, DataDamagedError: The package does not hold the pinned files.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SourceUnavailableError(f"there is no {tool} here")
    with tempfile.TemporaryDirectory(prefix="fmnist-dist-apt-") as name:
        scratch = Path(name)
        try:
            archive = download_archive(package, scratch, private_lists=False)
        except SourceUnavailableError:
            archive = download_archive(package, scratch, private_lists=True)
        _run(["dpkg-deb", "-x", str(archive), str(scratch / "root")], scratch)
        return read_folder(scratch / "root" / folder.relative_to("/"), files)


def download_archive(package: str, scratch: Path, *, private_lists: bool) -> Path:
    """Download the `.deb` of `package` into `scratch`, with the system's or fresh package lists."""
    options = (*_NETWORK_OPTIONS, *_private_options(scratch, lists=private_lists))
    command = ["apt-get", "-q", *(f"-o{option}" for option in options)]
    if private_lists:
        _run([*command, "update"], scratch)
    _run([*command, "download", package], scratch)
    archives = sorted(scratch.glob("*.deb"))
    if not archives:
        raise SourceUnavailableError(f"apt-get download {package} left no .deb")
    return archives[-1]


def _private_options(scratch: Path, *, lists: bool) -> list[str]:
    cache = scratch / "cache"
    (cache / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    options = [f"Dir::Cache={cache}"]
    if lists:
        state = scratch / "state"
        (state / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        options += [f"Dir::State={state}", f"Dir::State::Lists={state / 'lists'}"]
    if os.geteuid() == 0:
        options.append("APT::Sandbox::User=root")  # user _apt may not write into our scratch
    return options


def _run(command: list[str], scratch: Path) -> None:
    """Run in `scratch` with a time limit; on any end take the whole process group down."""
    output_path = scratch / "output"
    # A file, not a pipe: apt's download helpers inherit it, and a pipe would keep us waiting for
    # them. A session of its own lets one signal reach them all.
    with (
        output_path.open("wb") as output,
        subprocess.Popen(
            command,
            cwd=scratch,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            status = process.wait(timeout=limits.APT_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise SourceUnavailableError(
                f"{_shown(command)} did not end within {limits.APT_SECONDS:.0f} s"
            ) from error
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    if status:
        lines = output_path.read_text(errors="replace").split("\n")
        reason = next((line for line in reversed(lines) if line.startswith("E:")), "no reason")
        raise SourceUnavailableError(f"{_shown(command)} ended with {status}: {reason}")


def _shown(command: list[str]) -> str:
    return " ".join(word for word in command if not word.startswith("-o"))
