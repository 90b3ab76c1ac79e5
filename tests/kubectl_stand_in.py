"""Stands in for kubectl and the API server behind it: objects are files in the folder $CLUSTER.

Only for the logic of our commands; it knows nothing of schedulers, controllers or admission, and
proves nothing about a cluster. Its words, messages and exit codes are written after the source and
documentation of kubectl. `kubectl kustomize` is the real one. Calls are noted in $CLUSTER/calls.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

CLUSTER = Path(os.environ["CLUSTER"])
REAL = os.environ["REAL_KUBECTL"]
SINGULAR = {
    "jobs": "job",
    "pods": "pod",
    "nodes": "node",
    "configmaps": "configmap",
    "services": "service",
    "networkpolicies": "networkpolicy",
    "deployments": "deployment",
    "poddisruptionbudgets": "poddisruptionbudget",
    "nodepools.karpenter.sh": "nodepool",
}
PLURAL = {one: many for many, one in SINGULAR.items()}
# ValidateJobSpecUpdate of pkg/apis/batch/validation: what no patch may change.
FIXED = ("template", "completionMode", "podFailurePolicy", "backoffLimitPerIndex", "successPolicy")


def main(words: list[str]) -> int:
    if "kustomize" in words:
        os.execv(REAL, [REAL, *words])
    with (CLUSTER / "calls").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    namespace = option(words, "--namespace") or "default"
    rest = [each for each in words if each not in {"--namespace", namespace}]
    verb, *rest = rest
    for refused in (f"refuse-{verb}", f"refuse-{verb}-{rest[0]}"):
        if (CLUSTER / refused).exists():
            return fail((CLUSTER / refused).read_text().strip())
    return {
        "get": get,
        "create": create,
        "apply": apply,
        "patch": patch,
        "delete": delete,
        "logs": logs,
    }[verb](namespace, rest)


def option(words: list[str], name: str) -> str | None:
    for number, each in enumerate(words):
        if each == name:
            return words[number + 1]
        if each.startswith(f"{name}="):
            return each.partition("=")[2]
    return None


def fail(line: str) -> int:
    sys.stderr.write(f"{line}\n")
    return 1


def place(namespace: str, kind: str, name: str) -> Path:
    return CLUSTER / namespace / kind / f"{name}.json"


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(each.read_text()) for each in sorted(folder.glob("*.json"))]


def write(document: dict[str, Any], namespace: str) -> None:
    metadata = document["metadata"]
    path = place(namespace, document["kind"].lower(), metadata["name"])
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata.setdefault("uid", f"uid-of-{metadata['name']}")
    path.write_text(json.dumps(document))


def get(namespace: str, words: list[str]) -> int:
    kind = SINGULAR.get(words[0], words[0])
    names = [each for each in words[1:2] if not each.startswith("-")]
    if names:
        path = place(namespace, kind, names[0])
        if path.exists():
            print(path.read_text())
        elif "--ignore-not-found" not in words:
            return fail(
                f'Error from server (NotFound): {PLURAL[kind]}.batch "{names[0]}" not found'
            )
        return 0
    if "." in words[0] and not (CLUSTER / namespace / kind).exists():
        return fail(f'error: the server doesn\'t have a resource type "{PLURAL[kind]}"')
    wanted = dict(
        each.split("=") for each in (option(words, "--selector") or "").split(",") if each
    )
    inside = sorted(CLUSTER.glob("*")) if "--all-namespaces" in words else [CLUSTER / namespace]
    items = [
        each
        for folder in inside
        for each in read(folder / kind)
        if wanted.items() <= each["metadata"].get("labels", {}).items()
    ]
    print(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    return 0


def sent(words: list[str]) -> list[dict[str, Any]]:
    name = option(words, "--filename") or option(words, "-f") or "-"
    text = sys.stdin.read() if name == "-" else Path(name).read_text()
    document = yaml.safe_load(text)  # JSON is YAML
    return document["items"] if document["kind"] == "List" else [document]


def create(namespace: str, words: list[str]) -> int:
    (document,) = sent(words)
    name = document["metadata"]["name"]
    if place(namespace, document["kind"].lower(), name).exists():
        return fail(
            "Error from server (AlreadyExists): error when creating "
            f'"STDIN": jobs.batch "{name}" already exists'
        )
    write(document, namespace)
    print(json.dumps(document))
    return 0


def apply(namespace: str, words: list[str]) -> int:
    for document in sent(words):
        if "--dry-run=server" not in words:
            write(document, namespace)
        print(f"{document['kind'].lower()}/{document['metadata']['name']} configured")
    return 0


def patch(namespace: str, words: list[str]) -> int:
    kind, name = words[:2]
    path = place(namespace, kind, name)
    if not path.exists():
        return fail(f'Error from server (NotFound): {PLURAL[kind]}.batch "{name}" not found')
    document, changes = json.loads(path.read_text()), json.loads(option(words, "--patch") or "{}")
    spec = document["spec"] | changes["spec"]
    if spec["completions"] != document["spec"]["completions"] and (
        spec["completions"] != spec["parallelism"]
    ):
        return fail(
            f'The Job "{name}" is invalid: spec.completions: Invalid value: '
            f"{spec['completions']}: can only be modified in tandem with spec.parallelism"
        )
    if any(spec.get(each) != document["spec"].get(each) for each in FIXED):
        return fail(f'The Job "{name}" is invalid: spec.template: field is immutable')
    document["spec"] = spec
    path.write_text(json.dumps(document))
    print(f"{kind}.batch/{name} patched")
    return 0


def delete(namespace: str, words: list[str]) -> int:
    kind, name = words[:2]
    path = place(namespace, kind, name)
    if path.exists():
        uid = json.loads(path.read_text())["metadata"]["uid"]
        path.unlink()
        for owned in (CLUSTER / namespace).rglob("*.json"):  # the garbage collector
            owners = json.loads(owned.read_text())["metadata"].get("ownerReferences", ())
            if any(each["uid"] == uid for each in owners):
                owned.unlink()
        print(f'{kind}.batch "{name}" deleted')
    return 0


def logs(_: str, words: list[str]) -> int:
    print("[pod/trainer] a line of", option(words, "--selector"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
