"""The Job of Kubernetes as it is shipped: an overlay, rendered for a run that is nowhere."""

from launch.k8s.manifest import Manifest
from launch.k8s.render import render
from launch.k8s.request import Request

IMAGE = f"registry/fmnist-dist@sha256:{'a' * 64}"


def rendered(overlay: str, *, nodes: str, flags: tuple[str, ...] = ()) -> Manifest:
    request = Request(overlay=overlay, image=IMAGE, run_dir="s3://bucket/run", nodes=nodes)
    return render(request, list(flags))
