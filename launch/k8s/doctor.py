"""Why a run on spot nodes does not go on: the traps that are known, looked for one by one.

Nothing is changed: what would help is printed, to be run by somebody who has looked.
"""

import sys
from collections.abc import Iterator
from datetime import UTC, datetime

from launch.k8s import karpenter
from launch.k8s.controller import backoff_seconds
from launch.k8s.kubectl import Kubectl
from launch.k8s.live import LiveJob, find_job, index_of, indexes
from launch.k8s.manifest import COMPONENT, RUN_ID, STORE, Document, Manifest, selects
from launch.k8s.providers import PROVIDERS, provider_for, provider_of
from launch.k8s.rules import check

_PATIENCE_SECONDS = 30  # beyond its grace, before a pod counts as a ghost
_SLOW_SECONDS = 300  # to find a node, or to be started
_ON_THE_WAY = {None, "ContainerCreating", "PodInitializing"}
# The Job controller's annotations on a pod: the ends of its index before it.
_COUNTS = (
    "batch.kubernetes.io/job-index-failure-count",
    "batch.kubernetes.io/job-index-ignored-failure-count",
)
_OWNED = ("configmaps", "services", "deployments")
# These cover our pods by their labels, whoever has made them.
_COVERING = ("networkpolicies", "poddisruptionbudgets")


def examine(kubectl: Kubectl, name: str, *, now: datetime | None = None) -> list[str]:
    """Return what is wrong with a submitted run, a line each."""
    job = find_job(kubectl, name)
    run_id = job.document["metadata"]["labels"][RUN_ID]
    around = [each for kind in _OWNED for each in kubectl.all(kind, selector=f"{RUN_ID}={run_id}")]
    around += [each for kind in _COVERING for each in kubectl.all(kind)]
    store = kubectl.all("pods", selector=f"{RUN_ID}={run_id},{COMPONENT}={STORE}")
    listed = kubectl.seen("nodes")
    nodes = None if listed is None else {each["metadata"]["name"]: each for each in listed}
    if nodes is None:
        print("warning: this user may not see nodes: what they say is left out", file=sys.stderr)
    when = now or datetime.now(UTC)
    pods = [each for each in job.pods if _is_alive(each)]
    host = store if job.manifest.has_store_apart else [e for e in pods if index_of(e) == 0]
    return [
        *(str(each) for each in check(Manifest([job.document, *around]))),
        *_ghosts(pods, nodes, kubectl.namespace, when),
        *_not_started([*pods, *store], when),
        *_short_notices(pods, nodes or {}, told=provider_for(job.manifest.pod)),
        *_undisrupted(pods),
        *_undrained(pods, job.manifest.pod),
        *_budgeted(pods, nodes or {}, Manifest(around), told=provider_for(job.manifest.pod)),
        *karpenter.examine(kubectl, [n for each in pods if (n := _node_of(each, nodes or {}))]),
        *_stores_on_spot_nodes(host, nodes or {}),
        *_abandoned_indexes(job, kubectl.namespace, when),
        *_ends(job),
    ]


def _ghosts(
    pods: list[Document], nodes: dict[str, Document] | None, namespace: str, now: datetime
) -> Iterator[str]:
    """Pods that are Terminating for longer than their grace: nothing replaces them meanwhile."""
    for pod in pods:
        # Of the end of the grace, as the server computes it.
        until = pod["metadata"].get("deletionTimestamp")
        if until is None or _age(until, now) < _PATIENCE_SECONDS:
            continue
        name, node = pod["metadata"]["name"], pod["spec"].get("nodeName", "no node")
        yield (
            f"pod {name} is Terminating since {until}, and its index waits for it (its node {node} "
            f"{_fate(node, nodes)}). If the node will not come back: kubectl --namespace "
            f"{namespace} delete pod {name} --grace-period=0 --force"
        )


def _not_started(pods: list[Document], now: datetime) -> Iterator[str]:
    for pod in pods:
        name = pod["metadata"]["name"]
        waiting = [
            each["state"]["waiting"]
            for each in pod["status"].get("containerStatuses", ())
            if each.get("state", {}).get("waiting", {}).get("reason") not in _ON_THE_WAY
        ]
        if waiting:
            why = waiting[0].get("message", "no message")
            yield f"pod {name} does not start: {waiting[0]['reason']}: {why}"
            continue
        found = (c for c in pod["status"].get("conditions", ()) if c["type"] == "PodScheduled")
        scheduled: Document = next(found, {})
        since = scheduled.get("lastTransitionTime")
        if since is None or _age(since, now) < _SLOW_SECONDS:
            continue
        if scheduled["status"] == "False":
            why = scheduled.get("message", scheduled.get("reason", "?"))
            yield f"pod {name} finds no node since {since}: {why}"
        elif pod["status"].get("phase") == "Pending":
            yield (
                f"pod {name} has a node since {since} and has not started: its events say why "
                "(kubectl describe pod: a Secret that is missing, a volume, the image)"
            )


def _short_notices(
    pods: list[Document], nodes: dict[str, Document], *, told: str | None
) -> Iterator[str]:
    """Graces that are longer than the notice of the nodes that pods really run on."""
    for pod in pods:
        node = pod["spec"].get("nodeName", "")
        found = _spot_of(pod, nodes)
        grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
        if found and found != told and grace > PROVIDERS[found].notice_seconds:
            notice = PROVIDERS[found].notice_seconds
            yield (
                f"pod {pod['metadata']['name']} has a grace of {grace} s on node {node}, whose "
                f"notice is {notice} s ({found}): use that overlay"
            )


def _undisrupted(pods: list[Document]) -> Iterator[str]:
    """Annotations that somebody, or a webhook, has put on the pods themselves."""
    for pod in pods:
        if pod["metadata"].get("annotations", {}).get("karpenter.sh/do-not-disrupt") == "true":
            yield (
                f"pod {pod['metadata']['name']} has karpenter.sh/do-not-disrupt: drains wait for "
                "it, and no SIGTERM comes before the node is taken"
            )


def _undrained(pods: list[Document], template: Document) -> Iterator[str]:
    """Tolerations of everything that somebody, or a webhook, has put on the pods themselves."""
    if _tolerates_all(template):  # a rule tells
        return
    for pod in filter(lambda each: _tolerates_all(each["spec"]), pods):
        name = pod["metadata"]["name"]
        yield f"pod {name} tolerates every taint, which also exempts it from being drained"


def _tolerates_all(pod: Document) -> bool:
    return any(not each.get("key") for each in pod.get("tolerations", ()))


def _budgeted(
    pods: list[Document], nodes: dict[str, Document], around: Manifest, *, told: str | None
) -> Iterator[str]:
    """Budgets over pods that run on spot nodes though their Job does not ask for any."""
    if told is not None:  # a rule tells
        return
    on_spot = [each for each in pods if _spot_of(each, nodes)]
    for budget in around.of_kind("PodDisruptionBudget"):
        selector, name = budget["spec"].get("selector"), budget["metadata"]["name"]
        if any(selects(selector, each["metadata"]["labels"]) for each in on_spot):
            yield (
                f"PodDisruptionBudget {name} covers pods on spot nodes: drains wait for it, and no "
                "SIGTERM comes before the node is taken"
            )


def _stores_on_spot_nodes(pods: list[Document], nodes: dict[str, Document]) -> Iterator[str]:
    for pod in pods:
        if found := _spot_of(pod, nodes):
            name, node = pod["metadata"]["name"], pod["spec"]["nodeName"]
            yield f"pod {name}, the rendezvous store, is on spot node {node} ({found})"


def _abandoned_indexes(job: LiveJob, namespace: str, now: datetime) -> Iterator[str]:
    """Indexes without a pod: given up, waiting for a back-off, or refused one."""
    given_up = indexes(job.status.get("failedIndexes"))
    for index in sorted(given_up):
        yield f"index {index} is given up: its failures have used up backoffLimitPerIndex"
    began = job.status.get("startTime")
    if job.decisive is not None or began is None or _age(began, now) < _SLOW_SECONDS:
        return
    done = given_up | indexes(job.status.get("completedIndexes"))
    alive = {index_of(each) for each in job.pods if _is_alive(each)}
    for index in sorted({*range(job.spec["completions"])} - done - alive):
        ends = max((_ends_so_far(each) for each in job.pods if index_of(each) == index), default=0)
        pause = backoff_seconds(ends)
        if not ends:
            yield (
                f"index {index} has no pod: kubectl --namespace {namespace} describe job "
                f"{job.name} says why (a quota, an admission webhook)"
            )
        elif pause >= _SLOW_SECONDS:
            yield (
                f"index {index} has no pod: after {ends} ends, preemptions too, Kubernetes waits "
                f"{pause:g} s before it starts another"
            )


def _node_of(pod: Document, nodes: dict[str, Document]) -> Document | None:
    return nodes.get(pod["spec"].get("nodeName", ""))


def _spot_of(pod: Document, nodes: dict[str, Document]) -> str | None:
    """Return on whose spot node a pod runs; None where it is no such node, or not known."""
    node = _node_of(pod, nodes)
    return provider_of(node["metadata"].get("labels", {})) if node else None


def _is_alive(pod: Document) -> bool:
    """Whether a pod may still do something: those that have ended stay as long as the Job."""
    return pod["status"].get("phase") not in {"Succeeded", "Failed"}


def _ends_so_far(pod: Document) -> int:
    """Return how often its index has ended, this pod among them, as the Job controller counts."""
    noted = pod["metadata"].get("annotations", {})
    return 1 + sum(int(noted.get(each, 0)) for each in _COUNTS)


def _ends(job: LiveJob) -> Iterator[str]:
    """The last words of pods that ended by a fault which a replacement may well repeat."""
    for each in job.ends():
        if each.is_fault:
            yield f"pod {each.pod} ended with exit code {each.code}: {each.message or 'no message'}"


def _fate(node: str, nodes: dict[str, Document] | None) -> str:
    if nodes is None:
        return "cannot be seen by this user"
    if node not in nodes:
        return "is gone"
    found = (c for c in nodes[node].get("status", {}).get("conditions", ()) if c["type"] == "Ready")
    ready = next(found, {"status": "Unknown"})["status"]
    return {"True": "is ready", "False": "is not ready"}.get(ready, "is unreachable")


def _age(text: str, now: datetime) -> float:
    return (now - datetime.fromisoformat(text)).total_seconds()
