"""What a user asks for when a run is rendered or submitted, checked before anything is made."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from fmnist_dist.config import Config
from fmnist_dist.errors import UsageError
from fmnist_dist.settings import PREFIX, load
from fmnist_dist.usage import did_you_mean, printable, shown
from launch.k8s.manifest import NAME

K8S = Path(__file__).resolve().parents[2] / "k8s"
_STORE_SUFFIX = "-store"  # of the longest name that must be one label of DNS
_LABEL_LENGTH = 63
_RUN_ID = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_NODES = re.compile(r"(?P<low>[1-9][0-9]{0,3})(:(?P<high>[1-9][0-9]{0,3}))?")
_REMOTE = re.compile(r"[a-z0-9]+://.+")
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_SECRET = re.compile(r"SECRET|PASSWORD|SESSION_TOKEN")

_PLACE = Group("Where", sort_key=1)
_SIZE = Group("How much", sort_key=2)
_MORE = Group("More", sort_key=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One run on one cluster. Raises `UsageError` for what cannot be meant."""

    overlay: Annotated[
        str, Parameter(group=_PLACE, help="of k8s/overlays, or a path of yours", metavar="NAME")
    ]
    image: Annotated[str, Parameter(group=_PLACE, help="by digest: name@sha256:…")]
    run_dir: Annotated[
        str, Parameter(group=_PLACE, help="a run found there goes on", metavar="URL")
    ]
    run_id: Annotated[
        str | None, Parameter(group=_PLACE, help="name of Job and pods; else from --run-dir")
    ] = None
    namespace: Annotated[str, Parameter(group=_PLACE, help="of all objects")] = NAME
    nodes: Annotated[
        str, Parameter(group=_SIZE, help="fewest and most pods", metavar="MIN:MAX")
    ] = "1:2"
    gpus_per_node: Annotated[int, Parameter(group=_SIZE, help="and workers; 0 = CPU")] = 0
    workers_per_node: Annotated[int, Parameter(group=_SIZE, help="without GPUs")] = 1
    crash_loop_budget: Annotated[
        int, Parameter(group=_SIZE, help="rounds without a newer step before 70")
    ] = 10
    components: Annotated[
        list[str],
        Parameter(
            name="--with", group=_MORE, help="of k8s/components", metavar="NAME", negative=""
        ),
    ] = field(default_factory=list)
    env: Annotated[
        list[str],
        Parameter(
            group=_MORE, help="as AWS_REGION=…; no secrets", metavar="KEY=VALUE", negative=""
        ),
    ] = field(default_factory=list)
    role_arn: Annotated[
        str | None, Parameter(group=_MORE, help="with s3-irsa and s3-projected-token")
    ] = None
    queue: Annotated[str | None, Parameter(group=_MORE, help="of Kueue, which admits it")] = None

    def __post_init__(self) -> None:
        if not _REMOTE.fullmatch(self.run_dir) or self.run_dir.startswith(
            ("file:", "local:", "memory:")
        ):
            raise UsageError(
                f"flag --run-dir: found {shown(self.run_dir)}, expected the URL of an object store "
                "(s3://bucket/run): every pod has a disk of its own"
            )
        self._check_name()
        self._check_sizes()
        for each in self.env:
            self._check_variable(each)
        self._check_components()

    @staticmethod
    def _check_variable(given: str) -> None:
        name, mark, _ = given.partition("=")
        if _SECRET.search(name):
            raise UsageError(
                f"flag --env: {printable(name)} is a secret: whoever sees the ConfigMap would "
                "read it; expected --with s3-static-file, or a role"
            )
        if not mark or not _VARIABLE.fullmatch(name):
            raise UsageError(f"flag --env: found {shown(given)}, expected KEY=VALUE")
        if name == f"{PREFIX}CONFIG":
            raise UsageError(f"flag --env: {name}: the pods do not have this file, expected flags")

    def _check_components(self) -> None:
        known = sorted(each.name for each in (K8S / "components").iterdir())
        for each in self.components:
            if each not in known:
                raise UsageError(
                    f"flag --with: found {shown(each)}, expected one of {', '.join(known)}"
                    f"{did_you_mean(each, known)}"
                )
        if "kueue" in self.components and not self.queue:
            raise UsageError("flag --queue: found nothing, expected the name of Kueue's queue")

    def _check_name(self) -> None:
        longest = _LABEL_LENGTH - max(len(_STORE_SUFFIX), len(f"-{self.most - 1}"))
        if len(self.name) > longest:
            raise UsageError(
                f"flag --run-id: found {shown(self.name)} ({len(self.name)} characters), expected "
                f"at most {longest}: pods are called <run-id>-<index>, in at most {_LABEL_LENGTH}"
            )
        if not _RUN_ID.fullmatch(self.name):
            raise UsageError(
                f"flag --run-id: found {shown(self.name)}, expected lower-case letters, digits and "
                "dashes, a letter first"
            )
        if not _NAMESPACE.fullmatch(self.namespace):
            raise UsageError(
                f"flag --namespace: found {shown(self.namespace)}, expected lower-case letters, "
                "digits and dashes"
            )

    def _check_sizes(self) -> None:
        for name, found, least in (
            ("gpus-per-node", self.gpus_per_node, 0),
            ("workers-per-node", self.workers_per_node, 1),
            ("crash-loop-budget", self.crash_loop_budget, 1),
        ):
            if found < least:
                raise UsageError(f"flag --{name}: found {found}, expected {least} or more")
        if self.fewest > self.most:
            raise UsageError(
                f"flag --nodes: found {shown(self.nodes)}, expected MIN:MAX with MIN at most MAX"
            )

    @property
    def name(self) -> str:
        if self.run_id is not None:
            return self.run_id
        last = self.run_dir.rstrip("/").rpartition("/")[2].lower()
        return re.sub(r"[^a-z0-9]+", "-", last).strip("-")

    @property
    def fewest(self) -> int:
        return self._range()[0]

    @property
    def most(self) -> int:
        return self._range()[1]

    def _range(self) -> tuple[int, int]:
        found = _NODES.fullmatch(self.nodes)
        if found is None:
            raise UsageError(
                f"flag --nodes: found {shown(self.nodes)}, expected MIN:MAX, as in 2:8, or a number"
            )
        return int(found["low"]), int(found["high"] or found["low"])

    @property
    def variables(self) -> dict[str, str]:
        """Of --env, by name."""
        return dict(each.split("=", 1) for each in self.env)

    @property
    def workers(self) -> int:
        """Of one node."""
        return self.gpus_per_node or self.workers_per_node

    @property
    def all_components(self) -> list[str]:
        """What was asked for, and what other flags need."""
        needed = ["gpu"] * bool(self.gpus_per_node) + ["kueue"] * bool(self.queue)
        return list(dict.fromkeys([*needed, *self.components]))

    @property
    def overlay_folder(self) -> Path:
        """Where the overlay is. Raises `UsageError` where there is none."""
        folder = Path(self.overlay) if "/" in self.overlay else K8S / "overlays" / self.overlay
        if not (folder / "kustomization.yaml").is_file():
            known = sorted(each.name for each in (K8S / "overlays").iterdir())
            raise UsageError(
                f"flag --overlay: found {printable(self.overlay)}, expected one of "
                f"{', '.join(known)}, or the path of a folder with a kustomization.yaml"
                f"{did_you_mean(self.overlay, known)}"
            )
        return folder.resolve()

    def settings(self, flags: list[str], environ: dict[str, str]) -> Config:
        """Parse the flags of the training as every pod will. Raises `UsageError`."""
        for each in flags:
            if each.partition("=")[0] == "--config":
                raise UsageError("flag --config: the pods do not have this file, expected flags")
        known = {name: value for name, value in environ.items() if name.startswith(PREFIX)}
        config = load([f"--run-dir={self.run_dir}", *flags], known).config
        if self.most * self.workers > config.logical_shards:
            raise UsageError(
                f"flag --nodes: found {self.most} nodes of {self.workers} workers, expected "
                f"at most --logical-shards = {config.logical_shards} workers in all"
            )
        return config
