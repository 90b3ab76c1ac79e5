"""The rules of manifests: all hold on every overlay, and each finds the mistake that it is for."""

import copy
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from launch.k8s.manifest import Manifest
from launch.k8s.render import render
from launch.k8s.request import K8S, Request
from launch.k8s.rules import RULES, check

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")

OVERLAYS = sorted(each.name for each in (K8S / "overlays").iterdir())
COMPONENTS = sorted(each.name for each in (K8S / "components").iterdir())
IMAGE = f"registry.example/fmnist-dist@sha256:{'a' * 64}"
ROLE = "arn:aws:iam::123456789012:role/trainer"


@cache
def rendered(overlay: str, *components: str) -> Manifest:
    request = Request(
        overlay=overlay,
        image=IMAGE,
        run_dir="s3://bucket/runs/mine",
        nodes="2:4",
        components=list(components),
        queue="research" if "kueue" in components else None,
        role_arn=ROLE if {"s3-irsa", "s3-projected-token"} & {*components} else None,
    )
    return render(request, [])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_rule_holds_on_every_overlay(overlay: str) -> None:
    assert check(rendered(overlay)) == []


@pytest.mark.parametrize("component", [c for c in COMPONENTS if c != "rendezvous"])
@pytest.mark.parametrize("overlay", ["cpu-local", "gke-spot"])
def test_every_rule_holds_with_every_component(overlay: str, component: str) -> None:
    assert check(rendered(overlay, component)) == []


def test_the_store_may_be_apart_on_a_cluster_of_your_own_too() -> None:
    assert check(rendered("cpu-local", "rendezvous")) == []


def trainer(manifest: Manifest) -> dict[str, Any]:
    return manifest.pod["containers"][0]


def replace_argument(manifest: Manifest, old: str, new: str) -> None:
    args = trainer(manifest)["args"]
    args[args.index(old)] = new


def rules_of(manifest: Manifest) -> list[Any]:
    rules: list[Any] = manifest.spec["podFailurePolicy"]["rules"]
    return rules


def store(manifest: Manifest) -> dict[str, Any]:
    spec: dict[str, Any] = manifest.of_kind("Deployment")[0]["spec"]
    return spec


def store_service(manifest: Manifest) -> dict[str, Any]:
    spec: dict[str, Any] = manifest.of_kind("Service")[1]["spec"]
    return spec


def add_budget(manifest: Manifest) -> None:
    labels = {"matchLabels": {"fmnist-dist/run-id": "mine"}}
    add(manifest, "PodDisruptionBudget", {"selector": labels})


def add(manifest: Manifest, kind: str, spec: dict[str, Any]) -> None:
    manifest.documents.append({"kind": kind, "metadata": {"name": "another"}, "spec": spec})


def expression(key: str, operator: str, *values: str) -> dict[str, Any]:
    return {"matchExpressions": [{"key": key, "operator": operator, "values": [*values]}]}


def annotate(manifest: Manifest) -> None:
    manifest.template["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] = "true"


def ask_for_spot_by_affinity(manifest: Manifest) -> None:
    terms = [expression("cloud.google.com/gke-spot", "In", "true"), expression("own", "Exists")]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    manifest.pod["affinity"] = {"nodeAffinity": required}


def replace_values(manifest: Manifest, values: list[str]) -> None:
    """Let the store avoid nodes with other values of the label."""
    affinity = store(manifest)["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    term["matchExpressions"][0]["values"] = values


def move_variable(manifest: Manifest) -> None:
    env = trainer(manifest)["env"]
    env.insert(0, next(each for each in env if each["name"] == "RDZV_HOST"))


def service(manifest: Manifest) -> dict[str, Any]:
    spec: dict[str, Any] = manifest.of_kind("Service")[0]["spec"]
    return spec


def settings(manifest: Manifest) -> dict[str, Any]:
    data: dict[str, Any] = manifest.of_kind("ConfigMap")[0]["data"]
    return data


def set_variable(manifest: Manifest, name: str, value: str) -> None:
    next(e for e in trainer(manifest)["env"] if e["name"] == name)["value"] = value


def policy(manifest: Manifest) -> dict[str, Any]:
    spec: dict[str, Any] = manifest.of_kind("NetworkPolicy")[0]["spec"]
    return spec


Mutation = tuple[str, Callable[[Manifest], Any]]
# For each rule, manifests that break it: an overlay, and what is done to it.
MUTATIONS: dict[str, list[Mutation]] = {
    "never_restarts": [("gke-spot", lambda m: m.pod.update(restartPolicy="OnFailure"))],
    "replaces_only_what_has_ended": [
        ("gke-spot", lambda m: m.spec.update(podReplacementPolicy="TerminatingOrFailed")),
        ("gke-spot", lambda m: m.spec.pop("podReplacementPolicy")),
    ],
    "codes_are_sorted_and_unique": [
        ("gke-spot", lambda m: rules_of(m)[0]["onExitCodes"]["values"].reverse()),
        ("gke-spot", lambda m: rules_of(m)[0]["onExitCodes"]["values"].append(78)),
    ],
    "no_rule_is_for_success": [
        ("gke-spot", lambda m: rules_of(m)[2]["onExitCodes"]["values"].insert(0, 0))
    ],
    "codes_name_their_container": [
        ("gke-spot", lambda m: rules_of(m)[0]["onExitCodes"].update(containerName="main")),
        ("gke-spot", lambda m: rules_of(m)[0]["onExitCodes"].pop("containerName")),
    ],
    "codes_are_those_of_the_table": [
        ("gke-spot", lambda m: rules_of(m)[0]["onExitCodes"]["values"].remove(76)),
        ("gke-spot", lambda m: rules_of(m)[0]["onExitCodes"]["values"].append(79)),
        ("gke-spot", lambda m: rules_of(m)[2]["onExitCodes"].update(operator="NotIn")),
        ("gke-spot", lambda m: rules_of(m).pop(2)),
    ],
    "own_faults_come_before_disruptions": [("gke-spot", lambda m: rules_of(m).reverse())],
    "disruptions_are_free": [
        ("gke-spot", lambda m: rules_of(m)[1]["onPodConditions"][0].update(status="False")),
        ("gke-spot", lambda m: rules_of(m).pop(1)),
    ],
    "retries_are_counted_per_index": [("gke-spot", lambda m: m.spec.pop("backoffLimitPerIndex"))],
    "one_success_ends_the_job": [
        ("gke-spot", lambda m: m.spec.pop("successPolicy")),
        ("gke-spot", lambda m: m.spec.update(successPolicy={"rules": [{"succeededCount": 4}]})),
    ],
    "completions_equal_parallelism": [("gke-spot", lambda m: m.spec.update(parallelism=2))],
    "is_indexed": [("gke-spot", lambda m: m.spec.update(completionMode="NonIndexed"))],
    "fails_when_the_smallest_world_is_out_of_reach": [
        ("gke-spot", lambda m: m.spec.update(maxFailedIndexes=3)),
        ("gke-spot", lambda m: m.spec.update(completions=5, parallelism=5, maxFailedIndexes=3)),
        ("gke-spot", lambda m: m.spec.update(completions=1, parallelism=1, maxFailedIndexes=-1)),
    ],
    "host_names_fit": [("gke-spot", lambda m: m.job["metadata"].update(name="x" * 62))],
    "services_select_the_pods": [
        ("gke-spot", lambda m: service(m)["selector"].update({"fmnist-dist/run-id": "other"})),
        (
            "gke-spot",
            lambda m: store(m)["selector"]["matchLabels"].update(
                {"app.kubernetes.io/component": "trainer"}
            ),
        ),
    ],
    "subdomain_is_a_headless_service": [
        ("cpu-local", lambda m: m.pod.update(subdomain="other")),
        ("cpu-local", lambda m: service(m).pop("clusterIP")),
        ("cpu-local", lambda m: service(m).pop("publishNotReadyAddresses")),
    ],
    "rendezvous_leads_to_its_store": [
        ("cpu-local", lambda m: set_variable(m, "RDZV_HOST", "$(JOB_NAME)-0.elsewhere.ns")),
        ("cpu-local", lambda m: set_variable(m, "RDZV_CONF", "is_host=0")),
        ("gke-spot", lambda m: set_variable(m, "RDZV_HOST", "mine")),
        ("gke-spot", lambda m: set_variable(m, "RDZV_CONF", "join_timeout=600")),
        ("gke-spot", lambda m: store_service(m)["ports"][0].update(name="store")),
    ],
    "ports_agree": [
        (
            "gke-spot",
            lambda m: replace_argument(
                m, "--rdzv-endpoint=$(RDZV_HOST):29500", "--rdzv-endpoint=$(RDZV_HOST):29400"
            ),
        ),
        ("gke-spot", lambda m: replace_argument(m, "--metrics-port=9400", "--metrics-port=9401")),
        ("gke-spot", lambda m: service(m)["ports"][0].update(port=1)),
        ("gke-spot", lambda m: store_service(m)["ports"][0].update(targetPort=29501)),
        (
            "gke-spot",
            lambda m: store(m)["template"]["spec"]["containers"][0].update(args=["--port=29501"]),
        ),
    ],
    "limits_are_nested": [
        ("gke-spot", lambda m: m.pod.update(terminationGracePeriodSeconds=10)),
        ("gke-spot", lambda m: trainer(m)["args"].append("--drain-seconds=10")),
        ("gke-spot", lambda m: trainer(m)["args"].extend(["--drain-seconds", "10"])),
        ("gke-spot", lambda m: trainer(m)["args"].append("--drain_seconds=10")),
        ("gke-spot", lambda m: trainer(m)["args"].append("--drain-seconds=soon")),
        *(
            (
                "gke-spot",
                lambda m, text=text: settings(m).update(TORCH_ELASTIC_SHUTDOWN_TIMEOUT=text),
            )
            for text in ("9.5", "soon")
        ),
        (
            "gke-spot",
            lambda m: settings(m).pop("TORCH_ELASTIC_SHUTDOWN_TIMEOUT"),
        ),
    ],
    "variables_are_defined_before_their_use": [
        ("cpu-local", move_variable),
        ("cpu-local", lambda m: trainer(m)["args"].append("--label=$(NOBODY)")),
    ],
    "policies_cover_the_pods": [
        ("gke-spot", lambda m: policy(m).update(policyTypes=["Ingress"])),
        ("gke-spot", lambda m: policy(m).update(policyTypes=["Egress"])),
        (
            "gke-spot",
            lambda m: policy(m).update(
                podSelector={"matchLabels": {"app.kubernetes.io/component": "trainer"}}
            ),
        ),
    ],
    "only_the_run_reaches_the_pods": [
        ("gke-spot", lambda m: policy(m)["ingress"].append({})),
        ("gke-spot", lambda m: policy(m)["ingress"].append({"from": [{"podSelector": {}}]})),
        ("gke-spot", lambda m: policy(m)["ingress"].append({"from": [{"namespaceSelector": {}}]})),
        ("gke-spot", lambda m: policy(m)["ingress"].append({"ports": [{"port": 29500}]})),
        (
            "gke-spot",
            lambda m: policy(m)["ingress"].append({"ports": [{"port": 9400, "endPort": 29500}]}),
        ),
        (
            "gke-spot",
            lambda m: policy(m)["ingress"][0]["from"][0]["podSelector"]["matchLabels"].update(
                {"fmnist-dist/run-id": "other"}
            ),
        ),
        (
            "gke-spot",
            lambda m: add(
                m,
                "NetworkPolicy",
                {"podSelector": expression("fmnist-dist/run-id", "Exists"), "ingress": [{}]},
            ),
        ),
    ],
    "storage_is_reachable": [
        ("gke-spot", lambda m: policy(m)["egress"].pop()),
        (
            "gke-spot",
            lambda m: settings(m).update(AWS_ENDPOINT_URL="http://s3:8333"),
        ),
    ],
    "grace_fits_the_notice": [
        ("gke-spot", lambda m: m.pod.update(terminationGracePeriodSeconds=16)),
        ("eks-spot-karpenter", lambda m: m.pod.update(terminationGracePeriodSeconds=121)),
        ("eks-spot-mng", lambda m: m.pod.update(terminationGracePeriodSeconds=121)),
        ("aks-spot", lambda m: m.pod.update(terminationGracePeriodSeconds=31)),
        ("cpu-local", ask_for_spot_by_affinity),
    ],
    "spot_taints_are_tolerated": [
        ("aks-spot", lambda m: m.pod["tolerations"].pop()),
        ("gke-spot", lambda m: m.pod["tolerations"].pop()),
    ],
    "no_toleration_is_a_wildcard": [
        ("eks-spot-karpenter", lambda m: m.pod["tolerations"].append({"operator": "Exists"})),
        ("gke-spot", lambda m: m.pod["tolerations"].append({"operator": "Exists", "key": ""})),
    ],
    "lost_nodes_are_left_soon": [
        ("gke-spot", lambda m: m.pod["tolerations"].pop(0)),
        ("gke-spot", lambda m: m.pod["tolerations"][1].pop("tolerationSeconds")),
        ("gke-spot", lambda m: m.pod["tolerations"][0].update(tolerationSeconds=300)),
        ("gke-spot", lambda m: store(m)["template"]["spec"].pop("tolerations")),
    ],
    "nothing_delays_the_notice": [
        ("eks-spot-karpenter", annotate),
        ("gke-spot", add_budget),
        ("gke-spot", lambda m: add(m, "PodDisruptionBudget", {"selector": {}})),
        *(
            (
                "gke-spot",
                lambda m, selector=selector: add(m, "PodDisruptionBudget", {"selector": selector}),
            )
            for selector in (
                expression("fmnist-dist/run-id", "In", "mine", "other"),
                expression("fmnist-dist/run-id", "NotIn", "other"),
                expression("fmnist-dist/run-id", "Exists"),
                expression("team", "DoesNotExist"),
            )
        ),
    ],
    "the_store_stays_off_spot_nodes": [
        (
            "gke-spot",
            lambda m: store(m)["template"]["spec"].pop("affinity"),
        ),
        ("gke-spot", lambda m: replace_values(m, ["false"])),
    ],
    "the_store_is_in_no_spot_pod": [
        ("cpu-local", lambda m: m.pod.update(nodeSelector={"karpenter.sh/capacity-type": "spot"})),
    ],
    "image_by_digest": [
        ("gke-spot", lambda m: trainer(m).update(image="fmnist-dist:latest")),
        ("gke-spot", lambda m: trainer(m).update(image="fmnist-dist@sha256:abc")),
    ],
    "the_store_is_not_shared": [
        (
            "gke-spot",
            lambda m: set_variable(m, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0"),
        )
    ],
    "service_links_are_off": [("gke-spot", lambda m: m.pod.pop("enableServiceLinks"))],
    "pods_are_restricted": [
        ("gke-spot", lambda m: m.pod["securityContext"].update(runAsNonRoot=False)),
        ("gke-spot", lambda m: m.pod["securityContext"].pop("seccompProfile")),
        ("gke-spot", lambda m: m.pod.pop("automountServiceAccountToken")),
        ("gke-spot", lambda m: trainer(m)["securityContext"].update(readOnlyRootFilesystem=False)),
        ("gke-spot", lambda m: trainer(m)["securityContext"].pop("capabilities")),
    ],
    "scratch_is_limited": [
        ("gke-spot", lambda m: m.pod["volumes"][0]["emptyDir"].pop("sizeLimit")),
        (
            "gke-spot",
            lambda m: store(m)["template"]["spec"]["volumes"][0]["emptyDir"].pop("sizeLimit"),
        ),
    ],
}
CASES = [
    pytest.param(name, overlay, mutate, id=f"{name}-{number}")
    for name, mutations in MUTATIONS.items()
    for number, (overlay, mutate) in enumerate(mutations)
]


def test_every_rule_has_a_manifest_that_breaks_it() -> None:
    assert set(MUTATIONS) == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize(("name", "overlay", "mutate"), CASES)
def test_a_manifest_that_breaks_a_rule_is_found_with_a_line(
    name: str, overlay: str, mutate: Callable[[Manifest], Any]
) -> None:
    broken = Manifest(copy.deepcopy(rendered(overlay).documents))
    mutate(broken)
    lines = [each.line for each in check(broken) if each.rule == name]
    assert lines, f"{name} does not find it"
    assert all("\n" not in line and len(line) > 20 for line in lines)


@pytest.mark.parametrize(
    "selector",
    [None, expression("fmnist-dist/run-id", "In", "other"), expression("team", "Exists")],
)
def test_a_budget_that_covers_others_is_none_of_ours(selector: dict[str, Any] | None) -> None:
    beside = Manifest(copy.deepcopy(rendered("gke-spot").documents))
    add(beside, "PodDisruptionBudget", {} if selector is None else {"selector": selector})
    assert check(beside) == []


def test_ports_of_others_and_what_the_server_leaves_empty_are_no_mistakes() -> None:
    fine = Manifest(copy.deepcopy(rendered("gke-spot").documents))
    trainer(fine)["ports"] += [{"containerPort": 8080}, {"name": "debug", "containerPort": 5678}]
    service(fine)["ports"].append({"port": 8080})
    store_service(fine)["ports"][0]["targetPort"] = "rendezvous"
    for rule in rules_of(fine):
        rule.setdefault("onPodConditions", None)
    assert check(fine) == []


def test_an_image_without_digest_is_only_warned_of() -> None:
    broken = Manifest(copy.deepcopy(rendered("gke-spot").documents))
    trainer(broken)["image"] = "fmnist-dist:latest"
    assert [each.is_warning for each in check(broken)] == [True]
