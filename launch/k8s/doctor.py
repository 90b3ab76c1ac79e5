"""Why a run on spot nodes does not go on: the traps that are known, looked for one by one.

Nothing is changed: what would help is printed, to be run by somebody who has looked.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from launch.k8s.kubectl import Kubectl
from launch.k8s.live import LiveJob, find_job
from launch.k8s.manifest import COMPONENT, RUN_ID, Document, Manifest
from launch.k8s.providers import PROVIDERS, provider_of
from launch.k8s.rules import check

_PATIENCE_SECONDS = 30  # beyond its grace, before a pod counts as a ghost
_SLOW_SECONDS = 300  # to find a node
_OWNED = ("configmaps", "services", "deployments")
# These cover our pods by their labels, whoever has made them.
_COVERING = ("networkpolicies", "poddisruptionbudgets")


def examine(kubectl: Kubectl, name: str, *, now: datetime | None = None) -> list[str]:
    """Return what is wrong with a submitted run, a line each."""
    job = find_job(kubectl, name)
    run_id = job.document["metadata"]["labels"][RUN_ID]
    around = [each for kind in _OWNED for each in kubectl.all(kind, selector=f"{RUN_ID}={run_id}")]
    around += [each for kind in _COVERING for each in kubectl.all(kind)]
    nodes = {each["metadata"]["name"]: each for each in kubectl.nodes()}
    store = kubectl.all("pods", selector=f"{RUN_ID}={run_id},{COMPONENT}=store")
    when = now or datetime.now(UTC)
    return [
        *(str(each) for each in check(Manifest([job.document, *around]))),
        *_ghosts(job, nodes, kubectl.namespace, when),
        *_homeless(job, when),
        *_short_notices(job, nodes),
        *_undisrupted(job),
        *_stores_on_spot_nodes(store, nodes),
        *_ends(job),
    ]


def _ghosts(
    job: LiveJob, nodes: dict[str, Document], namespace: str, now: datetime
) -> Iterator[str]:
    """Pods that are Terminating for longer than their grace: nothing replaces them meanwhile."""
    for pod in job.pods:
        # Of the end of the grace, as the server computes it.
        until = pod["metadata"].get("deletionTimestamp")
        if until is None or (now - _time(until)).total_seconds() < _PATIENCE_SECONDS:
            continue
        name, node = pod["metadata"]["name"], pod["spec"].get("nodeName", "no node")
        gone = "is gone" if node not in nodes else "is " + _readiness(nodes[node])
        yield (
            f"pod {name} is Terminating since {until}, and its index waits for it (its node {node} "
            f"{gone}). If the node will not come back: kubectl --namespace {namespace} delete pod "
            f"{name} --grace-period=0 --force"
        )


def _homeless(job: LiveJob, now: datetime) -> Iterator[str]:
    for pod in job.pods:
        for condition in pod["status"].get("conditions", ()):
            waits = condition["type"] == "PodScheduled" and condition["status"] == "False"
            since = condition.get("lastTransitionTime")
            if waits and since and (now - _time(since)).total_seconds() > _SLOW_SECONDS:
                why = condition.get("message", condition.get("reason", "?"))
                yield f"pod {pod['metadata']['name']} finds no node since {since}: {why}"


def _short_notices(job: LiveJob, nodes: dict[str, Document]) -> Iterator[str]:
    """Graces that are longer than the notice of the nodes that pods really run on."""
    told = provider_of(job.spec["template"]["spec"].get("nodeSelector", {}))
    for pod in job.pods:
        node = pod["spec"].get("nodeName", "")
        found = provider_of(nodes.get(node, {}).get("metadata", {}).get("labels", {}))
        grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
        if found and found != told and grace > PROVIDERS[found].notice_seconds:
            notice = PROVIDERS[found].notice_seconds
            yield (
                f"pod {pod['metadata']['name']} has a grace of {grace} s on node {node}, whose "
                f"notice is {notice} s ({found}): use that overlay"
            )


def _undisrupted(job: LiveJob) -> Iterator[str]:
    """Annotations that somebody, or a webhook, has put on the pods themselves."""
    for pod in job.pods:
        if pod["metadata"].get("annotations", {}).get("karpenter.sh/do-not-disrupt") == "true":
            yield (
                f"pod {pod['metadata']['name']} has karpenter.sh/do-not-disrupt: drains wait for "
                "it, and no SIGTERM comes before the node is taken"
            )


def _stores_on_spot_nodes(pods: list[Document], nodes: dict[str, Document]) -> Iterator[str]:
    for pod in pods:
        node = pod["spec"].get("nodeName", "")
        if found := provider_of(nodes.get(node, {}).get("metadata", {}).get("labels", {})):
            name = pod["metadata"]["name"]
            yield f"pod {name}, the rendezvous store, is on spot node {node} ({found})"


def _ends(job: LiveJob) -> Iterator[str]:
    """The last words of pods that ended by a fault which a replacement may well repeat."""
    for each in job.ends():
        if each.is_fault:
            yield f"pod {each.pod} ended with exit code {each.code}: {each.message or 'no message'}"


def _readiness(node: Document) -> str:
    conditions: list[Any] = node.get("status", {}).get("conditions", [])
    ready = next((each["status"] for each in conditions if each["type"] == "Ready"), "Unknown")
    return {"True": "ready", "False": "not ready"}.get(ready, "unreachable")


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
