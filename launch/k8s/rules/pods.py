"""What a pod may do, and what runs in it."""

import re
from collections.abc import Iterator

from launch.k8s.manifest import Manifest

_DIGEST = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")
_USER = 10001
_NO_RIGHTS = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def image_by_digest(manifest: Manifest) -> Iterator[str]:
    images = {
        container["image"]
        for _, template in manifest.pods()
        for container in template["spec"]["containers"]
    }
    for each in sorted(images):
        if not _DIGEST.fullmatch(each):
            yield f"image {each} has no digest: pods that start later may run another one"


def the_store_is_not_shared(manifest: Manifest) -> Iterator[str]:
    name = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    if manifest.environment().get(name) != "1":
        yield f"{name} is not 1: a node that comes back would end the job (torch 2.14.1)"


def service_links_are_off(manifest: Manifest) -> Iterator[str]:
    if manifest.pod.get("enableServiceLinks") is not False:
        yield "enableServiceLinks is on: variables of Services would look like settings"


def pods_are_restricted(manifest: Manifest) -> Iterator[str]:
    for name, template in manifest.pods():
        pod = template["spec"]
        context = pod.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or context.get("runAsUser") != _USER:
            yield f"{name} does not run as user 10001, expected runAsNonRoot and runAsUser"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{name} has no seccompProfile RuntimeDefault"
        if pod.get("automountServiceAccountToken") is not False:
            yield f"{name} mounts a token of the API server: automountServiceAccountToken"
        for container in pod["containers"]:
            inner = container.get("securityContext", {})
            if not _NO_RIGHTS.items() <= inner.items():
                yield f"container {container['name']} of {name} has rights that it does not need"


def scratch_is_limited(manifest: Manifest) -> Iterator[str]:
    for name, template in manifest.pods():
        for volume in template["spec"].get("volumes", ()):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"volume {volume['name']} of {name} has no sizeLimit"
