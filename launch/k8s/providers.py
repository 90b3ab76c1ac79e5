"""Spot nodes of the clouds: by what they are known, and how long their notice is."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One kind of spot nodes."""

    key: str  # of the label that selects them
    value: str
    notice_seconds: int  # from the notice to the end of the node
    taint: str | None  # that its nodes have, always or mostly


PROVIDERS = {
    "gke-spot": Provider(
        key="cloud.google.com/gke-spot",
        value="true",
        notice_seconds=15,
        taint="cloud.google.com/gke-spot",
    ),
    "eks-spot-karpenter": Provider(
        key="karpenter.sh/capacity-type", value="spot", notice_seconds=120, taint=None
    ),
    "eks-spot-mng": Provider(
        key="eks.amazonaws.com/capacityType", value="SPOT", notice_seconds=120, taint=None
    ),
    "aks-spot": Provider(
        key="kubernetes.azure.com/scalesetpriority",
        value="spot",
        notice_seconds=30,
        taint="kubernetes.azure.com/scalesetpriority",
    ),
}


def provider_of(labels: Mapping[str, str]) -> str | None:
    """Return whose spot nodes a nodeSelector, or the labels of a node, are about."""
    found = (name for name, each in PROVIDERS.items() if labels.get(each.key) == each.value)
    return next(found, None)
