"""The documents that make up one submitted run, rendered or as a cluster holds them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import yaml

from fmnist_dist.errors import UsageError
from fmnist_dist.usage import shown

Document = dict[str, Any]

NAME = "fmnist-dist"  # of everything in `k8s/`, as the overlays have it
RUN_ID = "fmnist-dist/run-id"  # the label that selects what belongs to one run
RUN_DIR = "fmnist-dist/run-dir"  # the annotation with its folder
APP = "app.kubernetes.io/name"
COMPONENT = "app.kubernetes.io/component"
QUEUE = "kueue.x-k8s.io/queue-name"
JOB_NAME = "batch.kubernetes.io/job-name"
INDEX = "batch.kubernetes.io/job-completion-index"
TRAINER = "trainer"
STORE = "store"


@dataclass(frozen=True, slots=True)
class Manifest:
    """Documents of which exactly one is a Job."""

    documents: list[Document]

    @staticmethod
    def parse(text: str) -> "Manifest":
        """Return what `kubectl kustomize` has printed."""
        return Manifest([each for each in yaml.safe_load_all(text) if each])

    def dump(self) -> str:
        return yaml.safe_dump_all(self.documents, sort_keys=False)

    def of_kind(self, kind: str) -> list[Document]:
        return [each for each in self.documents if each["kind"] == kind]

    @property
    def job(self) -> Document:
        (job,) = self.of_kind("Job")
        return job

    @property
    def spec(self) -> Document:
        """Of the Job."""
        spec: Document = self.job["spec"]
        return spec

    @property
    def template(self) -> Document:
        template: Document = self.spec["template"]
        return template

    @property
    def pod(self) -> Document:
        pod: Document = self.template["spec"]
        return pod

    @property
    def trainer(self) -> Document:
        containers = (each for each in self.pod["containers"] if each["name"] == TRAINER)
        return next(containers, self.pod["containers"][0])

    @property
    def args(self) -> list[str]:
        return list(self.trainer.get("args", ()))

    def flag(self, name: str) -> str:
        """Return what the container's arguments give a flag; "" without it."""
        return flag_in(self.args, name)

    @property
    def training_flags(self) -> list[str]:
        """Return the arguments of the program that the agent starts."""
        args = self.args
        return args[args.index("-m") + 2 :] if "-m" in args else []

    @property
    def has_store_apart(self) -> bool:
        """Whether no trainer hosts the rendezvous store; else the one of index 0 does."""
        return re.search(r"\bis_host=0\b", self.environment().get("RDZV_CONF", "")) is not None

    def environment(self) -> dict[str, str]:
        """Return the variables of the trainer that have a fixed value."""
        given = {each["name"]: each["value"] for each in self.trainer["env"] if "value" in each}
        return {**self._from_settings(), **given}

    def _from_settings(self) -> dict[str, str]:
        maps = self.of_kind("ConfigMap")
        named = {each["metadata"]["name"]: each.get("data", {}) for each in maps}
        found: dict[str, str] = {}
        for each in self.trainer.get("envFrom", ()):
            found |= named.get(each.get("configMapRef", {}).get("name"), {})
        return found

    def pods(self) -> Iterator[tuple[str, Document]]:
        """Yield the name and the pod template of everything that makes pods."""
        for each in self.documents:
            if "template" in each.get("spec", {}):
                yield f"{each['kind']} {each['metadata']['name']}", each["spec"]["template"]


def flag_in(args: Sequence[str], name: str) -> str:
    """Return the value of `--name=value` or `--name value`; "" where it is not given."""
    for each, following in zip(args, [*args[1:], ""], strict=False):
        if each == f"--{name}":
            return following
        if each.startswith(f"--{name}="):
            return each.partition("=")[2]
    return ""


def node_range(args: Sequence[str]) -> tuple[int, int]:
    """Return the smallest and the largest number of nodes, as torchrun's arguments name them."""
    low, _, high = flag_in(args, "nnodes").partition(":")
    return int(low), int(high or low)


def endpoint_port(environ: Mapping[str, str]) -> int:
    """Return the port of the S3 server that an environment names; AWS's without.

    Raises `UsageError` for what is no URL.
    """
    url = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or "https://aws"
    try:
        parts = urlsplit(url)
        return parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"environment AWS_ENDPOINT_URL: found {shown(url)}, expected http(s)://HOST:PORT"
        ) from error


def selects(selector: Document | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects: an empty one everything, none nothing."""
    if selector is None:
        return False
    wanted: Document = selector.get("matchLabels") or {}
    expressions: list[Document] = selector.get("matchExpressions") or []
    return wanted.items() <= labels.items() and all(_meets(each, labels) for each in expressions)


def _meets(expression: Document, labels: Mapping[str, str]) -> bool:
    found, values = labels.get(expression["key"]), expression.get("values") or ()
    match expression["operator"]:
        case "In":
            return found in values
        case "NotIn":
            return found not in values
        case "Exists":
            return found is not None
        case _:  # DoesNotExist
            return found is None
