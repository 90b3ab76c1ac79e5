"""Where a run is: the URL that its user wrote, and the storage behind it.

A place is plain data and crosses forks; what a storage opens belongs to the process that asked.
Object stores are named by URLs of fsspec (`s3://bucket/prefix`); endpoint, region and keys come
from the usual variables and files of the provider, never from the URL.
"""

import hashlib
import importlib.util
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fmnist_dist.checkpoint.disk import Disk
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.storage import Storage
from fmnist_dist.errors import IncompatibleError, UsageError
from fmnist_dist.usage import printable

S3_SCHEMES = ("s3", "s3a")
_LOCAL_SCHEMES = ("file", "local")
_REMOTE = re.compile(r"(?P<scheme>[^/]*)://(?P<rest>.*)", re.DOTALL)
# What each needs besides fsspec: the module, and the extra of this package that brings it.
_EXTRAS = {
    **dict.fromkeys(S3_SCHEMES, ("s3fs", "s3")),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", "gcs")),
    **dict.fromkeys(("az", "abfs", "abfss"), ("adlfs", "azure")),
}
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def extra_of(url: str) -> str:
    """Return the extra of this package that a run at this URL needs; "" for none."""
    match = _REMOTE.fullmatch(url)
    return _EXTRAS.get(match["scheme"], ("", ""))[1] if match else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A run's folder. `str` of it is what people are shown: it holds no credentials."""

    url: str  # an absolute path where it is local

    @staticmethod
    def of(url: str) -> "Place":
        """Return the place that a path or a URL names; makes and looks at nothing.

        Raises `UsageError` for a URL that can name none, `IncompatibleError` where a package that
        it needs is not installed.
        """
        match = _REMOTE.fullmatch(url)
        if match is None:
            # Path.expanduser raises for a user who does not exist; as fsspec, take it for a name.
            return Place(url=str(Path(os.path.expanduser(url)).absolute()))  # noqa: PTH111
        scheme = match["scheme"]
        if scheme in _LOCAL_SCHEMES:
            from fsspec.core import url_to_fs  # noqa: PLC0415 - 0.1 s, and most runs are named by a path

            return Place(url=str(Path(url_to_fs(url)[1])))
        _check(scheme, url)
        return Place(url=f"{scheme}://{match['rest'].strip('/')}")

    @property
    def folder(self) -> Path | None:
        """The folder of a run on a local disk; None for one in an object store."""
        return None if "://" in self.url else Path(self.url)

    @property
    def notes(self) -> Path:
        """Where attempts leave hints for later ones: no part of the truth, lost without harm.

        Always on a local disk, since they are written with every step.
        """
        if self.folder is not None:
            return self.folder / "progress"
        state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")  # noqa: PTH111 - that of Path raises without a home
        base = Path(state) if Path(state).is_absolute() else Path(tempfile.gettempdir())
        # The same bucket on another endpoint is another one.
        said = "|".join((*(os.environ.get(name, "") for name in _ENDPOINTS), self.url))
        return base / "fmnist_dist" / hashlib.sha256(said.encode()).hexdigest()[:24]

    def storage(self, *, single_writer: bool = False, disk: Disk | None = None) -> Storage:
        """Return the run's storage, for this process alone: nothing is opened before its first use.

        `disk` matters to local ones only.
        """
        if self.folder is not None:
            return LocalStorage(self.folder, single_writer=single_writer, disk=disk)
        if self._scheme in S3_SCHEMES:
            from fmnist_dist.checkpoint.s3 import S3Storage  # noqa: PLC0415 - 0.3 s, and an extra

            return S3Storage(self.url, single_writer=single_writer)
        from fmnist_dist.checkpoint.objects import ObjectStorage  # noqa: PLC0415 - fsspec: 0.1 s

        return ObjectStorage(self.url, single_writer=single_writer)

    def preload(self) -> None:
        """Import what the storage needs, and no more: no connection and no thread is made."""
        if self._scheme in S3_SCHEMES:
            from fmnist_dist.checkpoint import s3, s3client  # noqa: F401, PLC0415 - as above

            s3client.preload()
        elif self.folder is None:
            from fsspec import get_filesystem_class  # noqa: PLC0415 - as above

            get_filesystem_class(self._scheme)

    @property
    def _scheme(self) -> str:
        return self.url.partition("://")[0]

    def __str__(self) -> str:
        return self.url


def _check(scheme: str, url: str) -> None:
    from fsspec.registry import known_implementations  # noqa: PLC0415 - as above

    known = {*known_implementations, *_EXTRAS}
    if scheme not in known:
        raise UsageError(
            f"'{printable(url)}': '{printable(scheme)}' is no kind of storage; expected a path, or "
            f"a URL that begins with s3://, gs://, az:// or another one of fsspec's"
        )
    module, extra = _EXTRAS.get(scheme, (None, None))
    if module is not None and importlib.util.find_spec(module) is None:
        raise IncompatibleError(
            f"'{printable(url)}': {scheme}:// needs the package {module}: "
            f"pip install 'fmnist-dist[{extra}]'"
        )
    if module is None:
        from fsspec import get_filesystem_class  # noqa: PLC0415 - as above

        try:
            get_filesystem_class(scheme)
        except ImportError as error:
            raise IncompatibleError(f"'{printable(url)}': {error}") from error
