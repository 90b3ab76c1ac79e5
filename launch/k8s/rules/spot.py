"""What spot nodes need, and what makes their notice come too late."""

import math
from collections.abc import Iterator

from launch.k8s.manifest import COMPONENT, STORE, Document, Manifest, selects
from launch.k8s.providers import PROVIDERS, Provider, node_terms, provider_for

_LONGEST_TOLERATION = 60


def grace_fits_the_notice(manifest: Manifest) -> Iterator[str]:
    name = provider_for(manifest.pod)
    grace = manifest.pod.get("terminationGracePeriodSeconds", 30)
    if name is not None and grace > PROVIDERS[name].notice_seconds:
        notice = PROVIDERS[name].notice_seconds
        yield f"grace is {grace} s, expected at most {notice} s, the notice of {name}"


def spot_taints_are_tolerated(manifest: Manifest) -> Iterator[str]:
    name = provider_for(manifest.pod)
    taint = PROVIDERS[name].taint if name is not None else None
    keys = {each.get("key") for each in manifest.pod.get("tolerations", ())}
    if taint is not None and taint not in keys:
        yield f"no toleration of {taint}, expected one: nodes of {name} have this taint"


def no_toleration_is_a_wildcard(manifest: Manifest) -> Iterator[str]:
    for name, template in manifest.pods():
        for each in template["spec"].get("tolerations", ()):
            if not each.get("key"):
                yield f"{name} tolerates every taint, which also exempts it from being drained"


def lost_nodes_are_left_soon(manifest: Manifest) -> Iterator[str]:
    for name, template in manifest.pods():
        tolerations = template["spec"].get("tolerations", ())
        for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
            given = (each for each in tolerations if each.get("key") == key)
            toleration: Document = next(given, {"tolerationSeconds": 300})  # the server's default
            seconds = toleration.get("tolerationSeconds", math.inf)
            if seconds > _LONGEST_TOLERATION:
                yield f"{name} tolerates {key} for {seconds} s, expected at most 60 s"


def nothing_delays_the_notice(manifest: Manifest) -> Iterator[str]:
    if provider_for(manifest.pod) is None:
        return
    for name, template in manifest.pods():
        annotations = template["metadata"].get("annotations", {})
        if annotations.get("karpenter.sh/do-not-disrupt") == "true" and name.startswith("Job"):
            yield f"{name} has karpenter.sh/do-not-disrupt: no SIGTERM comes in time"
    for budget in manifest.of_kind("PodDisruptionBudget"):
        if selects(budget["spec"].get("selector"), manifest.template["metadata"]["labels"]):
            yield (
                f"PodDisruptionBudget {budget['metadata']['name']} covers the trainers: drains of "
                "spot nodes wait for it, and no SIGTERM comes in time"
            )


def the_store_stays_off_spot_nodes(manifest: Manifest) -> Iterator[str]:
    name = provider_for(manifest.pod)
    if name is None:
        return
    for deployment in manifest.of_kind("Deployment"):
        template = deployment["spec"]["template"]
        if template["metadata"]["labels"].get(COMPONENT) == STORE and not _avoids(
            template["spec"], PROVIDERS[name]
        ):
            yield f"Deployment {deployment['metadata']['name']} may run on spot nodes of {name}"


def the_store_is_in_no_spot_pod(manifest: Manifest) -> Iterator[str]:
    name = provider_for(manifest.pod)
    if name is not None and not manifest.has_store_apart:
        yield (
            f"index 0 hosts the rendezvous store on spot nodes of {name}: where it is preempted, "
            "all wait for its replacement; expected the component rendezvous"
        )


def _avoids(pod: Document, provider: Provider) -> bool:
    terms = node_terms(pod)
    return bool(terms) and all(
        any(
            (each["key"], each["operator"]) == (provider.key, "NotIn")
            and provider.value in each["values"]
            for each in term.get("matchExpressions", ())
        )
        for term in terms
    )
