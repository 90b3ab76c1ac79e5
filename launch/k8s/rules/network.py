"""Who finds whom, and who may reach whom."""

from collections.abc import Iterator
from typing import Any

from launch.k8s.manifest import RUN_ID, Manifest, endpoint_port, selects


def services_select_the_pods(manifest: Manifest) -> Iterator[str]:
    labels = [template["metadata"]["labels"] for _, template in manifest.pods()]
    for service in manifest.of_kind("Service"):
        selector = service["spec"].get("selector", {})
        if not selector or not any(selector.items() <= each.items() for each in labels):
            yield f"Service {service['metadata']['name']} selects {selector}, which no pod has"
    for deployment in manifest.of_kind("Deployment"):
        wanted = deployment["spec"]["selector"]["matchLabels"]
        if not wanted.items() <= deployment["spec"]["template"]["metadata"]["labels"].items():
            yield f"Deployment {deployment['metadata']['name']} does not select its own pods"


def subdomain_is_a_headless_service(manifest: Manifest) -> Iterator[str]:
    name = manifest.pod.get("subdomain")
    found = [each for each in manifest.of_kind("Service") if each["metadata"]["name"] == name]
    if not found:
        yield f"subdomain is {name}, expected the name of a Service: pods would have no names"
    for service in found:
        if service["spec"].get("clusterIP") != "None":
            yield f"Service {name} has an address of its own, expected clusterIP None"
        if service["spec"].get("publishNotReadyAddresses") is not True:
            yield f"Service {name} hides pods that are not ready, expected publishNotReadyAddresses"


def rendezvous_leads_to_its_store(manifest: Manifest) -> Iterator[str]:
    host = manifest.environment().get("RDZV_HOST", "")
    first = host.partition(".")[0]
    services = {each["metadata"]["name"]: each["spec"] for each in manifest.of_kind("Service")}
    if manifest.has_store_apart:
        service = services.get(first, {"clusterIP": "None"})
        if service.get("clusterIP") == "None":
            yield f"RDZV_HOST is {host}, expected a Service with an address: no node is the host"
        elif "rendezvous" not in {each.get("name") for each in service.get("ports", ())}:
            yield f"Service {first} has no port called rendezvous: the store would not be reached"
    elif not host.startswith(f"$(JOB_NAME)-0.{manifest.pod.get('subdomain')}."):
        yield f"RDZV_HOST is {host}, expected index 0 under the subdomain: it hosts the store"


def policies_cover_the_pods(manifest: Manifest) -> Iterator[str]:
    policies = [each["spec"] for each in manifest.of_kind("NetworkPolicy")]
    for name, template in manifest.pods():
        labels = template["metadata"]["labels"]
        mine = [each for each in policies if selects(each.get("podSelector", {}), labels)]
        for direction in ("Ingress", "Egress"):
            if not any(direction in each.get("policyTypes", ()) for each in mine):
                yield f"no NetworkPolicy limits {direction} of {name}: its port executes pickles"


def only_the_run_reaches_the_pods(manifest: Manifest) -> Iterator[str]:
    metrics = int(manifest.flag("metrics-port") or 0)
    pods = [template["metadata"]["labels"] for _, template in manifest.pods()]
    run_id = manifest.template["metadata"]["labels"].get(RUN_ID)
    for policy in manifest.of_kind("NetworkPolicy"):  # what one of them allows, is allowed
        if not any(selects(policy["spec"].get("podSelector", {}), each) for each in pods):
            continue
        for rule in policy["spec"].get("ingress") or ():
            ports = [(each.get("port"), each.get("endPort")) for each in rule.get("ports") or ()]
            if set(ports) == {(metrics, None)}:
                continue
            for peer in rule.get("from") or [{}]:
                labels = (peer.get("podSelector") or {}).get("matchLabels") or {}
                if labels.get(RUN_ID) != run_id or "namespaceSelector" in peer:
                    name = policy["metadata"]["name"]
                    yield f"NetworkPolicy {name} lets {peer or 'everybody'} in, expected this run"


def storage_is_reachable(manifest: Manifest) -> Iterator[str]:
    wanted = {53, endpoint_port(manifest.environment())}
    labels = manifest.template["metadata"]["labels"]
    opened: set[Any] = set()
    for policy in manifest.of_kind("NetworkPolicy"):
        if selects(policy["spec"].get("podSelector", {}), labels):
            for rule in policy["spec"].get("egress") or ():
                if not rule.get("to"):
                    opened |= {each.get("port") for each in rule.get("ports") or [{"port": "all"}]}
    if "all" in opened:
        return
    for port in sorted(wanted - opened):
        yield f"no NetworkPolicy lets the trainers out to port {port}: the bucket is out of reach"
