"""Spot nodes of the clouds: by what they are known, and how long their notice is."""

from collections.abc import Mapping
from dataclasses import dataclass

from launch.k8s.manifest import Document


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
    """Return whose spot node has these labels."""
    found = (name for name, each in PROVIDERS.items() if labels.get(each.key) == each.value)
    return next(found, None)


def provider_for(pod: Document) -> str | None:
    """Return whose spot nodes a pod asks for, by its nodeSelector or its required affinity."""
    if (selected := provider_of(pod.get("nodeSelector", {}))) is not None:
        return selected
    wanted = {
        (each["key"], value)
        for term in node_terms(pod)
        for each in term.get("matchExpressions", ())
        if each["operator"] == "In"
        for value in each["values"]
    }
    found = (name for name, each in PROVIDERS.items() if (each.key, each.value) in wanted)
    return next(found, None)


def node_terms(pod: Document) -> list[Document]:
    """Return the terms of a pod's required affinity to nodes, of which one must be met."""
    affinity = pod.get("affinity", {}).get("nodeAffinity", {})
    needed = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {})
    terms: list[Document] = needed.get("nodeSelectorTerms", [])
    return terms
