"""Numbers that must agree: pods, ports, names, seconds."""

import re
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit

from fmnist_dist.errors import UsageError
from fmnist_dist.settings import PREFIX, load
from launch.k8s.manifest import STORE, Manifest, flag_in, node_range

_LABEL_LENGTH = 63
_VARIABLE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")


def completions_equal_parallelism(manifest: Manifest) -> Iterator[str]:
    found = manifest.spec.get("completions"), manifest.spec.get("parallelism")
    if found[0] != found[1]:
        yield f"completions is {found[0]} and parallelism {found[1]}, expected the same"


def is_indexed(manifest: Manifest) -> Iterator[str]:
    mode = manifest.spec.get("completionMode")
    if mode != "Indexed":
        yield f"completionMode is {mode}, expected Indexed: names, successPolicy, limits per index"


def fails_when_the_smallest_world_is_out_of_reach(manifest: Manifest) -> Iterator[str]:
    low, high = node_range(manifest.args)
    completions = manifest.spec["completions"]
    if not low <= completions <= high:
        yield f"completions is {completions}, expected between {low} and {high}, those of --nnodes"
    allowed = manifest.spec.get("maxFailedIndexes")
    if allowed != completions - low:
        yield f"maxFailedIndexes is {allowed}, expected {completions - low}: completions - {low}"


def host_names_fit(manifest: Manifest) -> Iterator[str]:
    name = f"{manifest.job['metadata']['name']}-{manifest.spec['completions'] - 1}"
    if len(name) > _LABEL_LENGTH:
        yield f"host name {name} has {len(name)} characters, expected at most {_LABEL_LENGTH}"


def ports_agree(manifest: Manifest) -> Iterator[str]:
    wanted = {
        "rendezvous": urlsplit(f"//{manifest.flag('rdzv-endpoint').rpartition(')')[2]}").port,
        "metrics": int(manifest.flag("metrics-port") or 0),
    }
    places: list[tuple[str, Iterable[tuple[str, int]]]] = []
    for name, template in manifest.pods():
        for container in template["spec"]["containers"]:
            ports = container.get("ports", ())
            open_ = [(each.get("name", ""), each["containerPort"]) for each in ports]
            places.append((f"container {container['name']} of {name}", open_))
            listens = flag_in(container.get("args", []), "port")
            if listens and container["name"] == STORE:
                places.append((f"--port of {name}", [("rendezvous", int(listens))]))
    for service in manifest.of_kind("Service"):
        name, ports = service["metadata"]["name"], service["spec"].get("ports", ())
        open_ = [(each.get("name", ""), each["port"]) for each in ports]
        led = [(each.get("name", ""), each.get("targetPort", each["port"])) for each in ports]
        places.append((f"Service {name}", open_))
        places.append(
            (f"targetPort of Service {name}", [each for each in led if each[0] != each[1]])
        )
    for place, found in places:
        for name, port in found:
            if name in wanted and port != wanted[name]:  # others are none of our programs'
                yield f"{place} has port {name} {port}, expected {wanted[name]} as in the args"


def limits_are_nested(manifest: Manifest) -> Iterator[str]:
    grace = manifest.pod.get("terminationGracePeriodSeconds", 30)
    environ = manifest.environment()
    name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    if not (text := environ.get(name, "30")).isdecimal():  # as torch reads it
        yield f"{name} is {text}, expected whole seconds"
        return
    shutdown = int(text)
    try:
        ours = {n: v for n, v in environ.items() if n.startswith(PREFIX)}
        drain = load(manifest.training_flags, ours).config.drain_seconds
    except UsageError as error:
        yield f"the training would refuse its settings: {error}"
        return
    if not grace > shutdown > drain:
        yield (
            f"grace {grace} s, shutdown {shutdown} s, drain {drain:g} s: expected each shorter "
            "than the one before, or what drains is killed"
        )


def variables_are_defined_before_their_use(manifest: Manifest) -> Iterator[str]:
    known = {*manifest.environment()} - {each["name"] for each in manifest.trainer["env"]}
    for each in manifest.trainer["env"]:
        for name in _VARIABLE.findall(each.get("value", "")):
            if name not in known:
                yield f"{each['name']} uses $({name}), which is not defined before it"
        known.add(each["name"])
    for argument in manifest.args:
        for name in _VARIABLE.findall(argument):
            if name not in known:
                yield f"argument {argument} uses $({name}), which is not defined"
