"""Settings of Karpenter's own that cost a run its notice, where this user may see them.

https://karpenter.sh/docs/reference/settings, https://karpenter.sh/docs/concepts/disruption
"""

from collections.abc import Iterable, Iterator

from launch.k8s.kubectl import Kubectl
from launch.k8s.manifest import Document
from launch.k8s.providers import PROVIDERS

_POOL = "karpenter.sh/nodepool"  # of a node: which NodePool has made it
_SPOT = PROVIDERS["eks-spot-karpenter"]
_UNDERUSED = "WhenEmptyOrUnderutilized"  # the default of `consolidationPolicy`


def examine(kubectl: Kubectl, nodes: Iterable[Document]) -> Iterator[str]:
    """Yield what is wrong for pods that run on these nodes, a line each."""
    made = [labels for each in nodes if _POOL in (labels := each["metadata"].get("labels", {}))]
    if not made:
        return
    names = {labels[_POOL] for labels in made}
    for pool in kubectl.seen("nodepools.karpenter.sh") or ():
        if pool["metadata"]["name"] in names:
            yield from _moves(pool)
    if any(labels.get(_SPOT.key) == _SPOT.value for labels in made):
        own = "app.kubernetes.io/name=karpenter"
        for each in kubectl.seen("deployments", "--all-namespaces", selector=own) or ():
            yield from _deaf(each)


def _moves(pool: Document) -> Iterator[str]:
    disruption = pool["spec"].get("disruption", {})
    policy = disruption.get("consolidationPolicy", _UNDERUSED)
    if policy != "WhenEmpty" and disruption.get("consolidateAfter") != "Never":
        yield (
            f"NodePool {pool['metadata']['name']} moves pods off nodes that are little used "
            f"({policy}), expected consolidationPolicy: WhenEmpty"
        )


def _deaf(controller: Document) -> Iterator[str]:
    """A controller without a queue: nothing says so, and nodes are taken without a notice."""
    containers = controller["spec"]["template"]["spec"]["containers"]
    is_told = any(
        "envFrom" in each  # it may be in there
        or any(variable["name"] == "INTERRUPTION_QUEUE" for variable in each.get("env", ()))
        or any("interruption-queue" in word for word in each.get("args", ()))
        for each in containers
    )
    if not is_told:
        metadata = controller["metadata"]
        yield (
            f"Karpenter ({metadata['namespace']}/{metadata['name']}) has no INTERRUPTION_QUEUE: it "
            "hears of no spot interruption, and no SIGTERM comes before a node is taken"
        )
