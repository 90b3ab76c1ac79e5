"""An overlay, by `kubectl kustomize`, with one run's parameters filled in."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from fmnist_dist.errors import UsageError
from launch.k8s.kubectl import call
from launch.k8s.manifest import (
    NAME,
    QUEUE,
    RUN_DIR,
    RUN_ID,
    STORE,
    TRAINER,
    Document,
    Manifest,
    endpoint_port,
)
from launch.k8s.request import K8S, Request
from launch.k8s.rules import check

_UNSET_ROLE = "arn:aws:iam::000000000000:role/unset"
_ROLE_ANNOTATION = "eks.amazonaws.com/role-arn"
_ROLE_VARIABLE = "AWS_ROLE_ARN"
_SETTINGS = f"{NAME}-settings"


def render(request: Request, flags: list[str]) -> Manifest:
    """Return the documents of one run; `flags` are the training's.

    Raises `UsageError` for what cannot be meant or breaks a rule, `IncompatibleError` without
    kubectl. Warns of what is only unwise.
    """
    manifest = kustomize(request.overlay_folder, request.all_components)
    _fill_in(manifest, request, flags)
    request.settings(flags, manifest.environment())
    problems = check(manifest)
    for each in (each for each in problems if each.is_warning):
        print(f"warning: {each}", file=sys.stderr)
    if broken := [str(each) for each in problems if not each.is_warning]:
        raise UsageError(f"overlay {request.overlay}: {'; '.join(broken)}")
    return manifest


def kustomize(overlay: Path, components: list[str]) -> Manifest:
    """Return an overlay with more components, as kubectl builds it."""
    with tempfile.TemporaryDirectory() as folder:
        # Kustomize takes relative paths only, to wherever they lead.
        def path(target: Path) -> str:
            return os.path.relpath(target, Path(folder).resolve())

        wanted: Document = {
            "resources": [path(overlay)],
            "components": [path(K8S / "components" / each) for each in components],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
        return Manifest.parse(call(["kubectl", "kustomize", folder]))


def _fill_in(manifest: Manifest, request: Request, flags: list[str]) -> None:
    for document in manifest.documents:
        _label(document, request.name)
        metadata = document["metadata"]
        metadata["namespace"] = request.namespace
        if document["kind"] == "ConfigMap" and metadata["name"] == _SETTINGS:
            document["data"] |= request.variables
        if document["kind"] != "ServiceAccount":  # clouds know it by its name
            metadata["name"] = _renamed(metadata["name"], request)
    for _, template in manifest.pods():
        for container in template["spec"]["containers"]:
            if container["name"] in {TRAINER, STORE}:  # an overlay may bring others
                container["image"] = request.image
    _give_role(manifest, request)
    _fill_in_job(manifest, request, flags)
    _open_endpoint(manifest)


def _fill_in_job(manifest: Manifest, request: Request, flags: list[str]) -> None:
    manifest.job["metadata"].setdefault("annotations", {})[RUN_DIR] = request.run_dir
    if request.queue:
        manifest.job["metadata"]["labels"][QUEUE] = request.queue
    manifest.job["spec"] |= {
        "completions": request.most,
        "parallelism": request.most,
        "maxFailedIndexes": request.most - request.fewest,
    }
    pod, trainer = manifest.pod, manifest.trainer
    pod["subdomain"] = _renamed(pod["subdomain"], request)
    trainer["args"] = [*_with_sizes(trainer["args"], request), *flags]
    for each in trainer["envFrom"]:
        if reference := each.get("configMapRef"):  # Secrets are the user's own
            reference["name"] = _renamed(reference["name"], request)
    for each in trainer["env"]:
        if each["name"] in request.variables:  # it would win, and nobody be told
            raise UsageError(f"flag --env: {each['name']} is set by the manifest itself")
        if each["name"] == "RDZV_HOST":
            each["value"] = each["value"].replace(NAME, request.name)
    if request.gpus_per_node:
        for amounts in trainer["resources"].values():
            amounts["nvidia.com/gpu"] = str(request.gpus_per_node)


def _with_sizes(args: list[str], request: Request) -> list[str]:
    values = {
        "--nnodes": f"{request.fewest}:{request.most}",
        "--nproc-per-node": str(request.workers),
        "--crash-loop-budget": str(request.crash_loop_budget),
        "--run-dir": request.run_dir,
    }
    pairs = ((each.partition("=")[0], each) for each in args)
    return [f"{name}={values[name]}" if name in values else each for name, each in pairs]


def _renamed(name: str, request: Request) -> str:
    return name.replace(NAME, request.name, 1) if name.startswith(NAME) else name


def _label(value: Any, run_id: str) -> None:
    """Name the run in every label and selector below."""
    if isinstance(value, dict):
        if RUN_ID in value:
            value[RUN_ID] = run_id
        for each in value.values():
            _label(each, run_id)
    elif isinstance(value, list):
        for each in value:
            _label(each, run_id)


def _give_role(manifest: Manifest, request: Request) -> None:
    """Put the role where the components have left room.

    Raises `UsageError` for a role without room, and for room without a role.
    """
    accounts = manifest.of_kind("ServiceAccount")
    places = [(each["metadata"].get("annotations", {}), _ROLE_ANNOTATION) for each in accounts]
    places += [
        (each, "value") for each in manifest.trainer["env"] if each["name"] == _ROLE_VARIABLE
    ]
    unset = [(place, key) for place, key in places if place.get(key) == _UNSET_ROLE]
    if unset and request.role_arn is None:
        raise UsageError("flag --role-arn: found nothing, expected the role of the bucket")
    if not unset and request.role_arn is not None:
        raise UsageError(
            "flag --role-arn: nothing takes a role, expected --with s3-irsa or s3-projected-token"
        )
    for place, key in unset:
        place[key] = request.role_arn


def _open_endpoint(manifest: Manifest) -> None:
    """Let the pods reach an S3 server of the user's own, on whatever port it has."""
    port = endpoint_port(manifest.environment())
    if port == 443:  # noqa: PLR2004 - open already
        return
    for policy in manifest.of_kind("NetworkPolicy"):
        if policy["metadata"]["name"] == manifest.job["metadata"]["name"]:
            policy["spec"]["egress"].append({"ports": [{"port": port, "protocol": "TCP"}]})
