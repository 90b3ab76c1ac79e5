"""What the Job makes of the ends of its pods."""

from collections.abc import Iterator

from fmnist_dist.errors import ExitCode
from launch.k8s.manifest import Document, Manifest

FAIL_CODES = sorted(
    map(
        int,
        (
            ExitCode.USAGE,
            ExitCode.DATA_DAMAGED,
            ExitCode.NO_PROGRESS,
            ExitCode.FENCED,
            ExitCode.INCOMPATIBLE,
        ),
    )
)
IGNORED_CODES = sorted(map(int, (ExitCode.PEER_LOST, ExitCode.DRAINED)))


def never_restarts(manifest: Manifest) -> Iterator[str]:
    policy = manifest.pod.get("restartPolicy")
    if policy != "Never":
        yield f"restartPolicy is {policy}, expected Never: podFailurePolicy needs it"


def replaces_only_what_has_ended(manifest: Manifest) -> Iterator[str]:
    policy = manifest.spec.get("podReplacementPolicy")
    if policy != "Failed":
        yield f"podReplacementPolicy is {policy}, expected Failed: podFailurePolicy forces it"


def _code_rules(manifest: Manifest) -> Iterator[Document]:
    for rule in manifest.spec.get("podFailurePolicy", {}).get("rules", ()):
        if rule.get("onExitCodes"):
            yield {"action": rule["action"], **rule["onExitCodes"]}


def codes_are_sorted_and_unique(manifest: Manifest) -> Iterator[str]:
    for rule in _code_rules(manifest):
        codes = rule["values"]
        if codes != sorted(set(codes)):
            yield f"exit codes {codes} of {rule['action']}: expected sorted and each once"


def no_rule_is_for_success(manifest: Manifest) -> Iterator[str]:
    for rule in _code_rules(manifest):
        if 0 in rule["values"]:
            yield f"exit code 0 is among those of {rule['action']}: it is no failure"


def codes_name_their_container(manifest: Manifest) -> Iterator[str]:
    names = {each["name"] for each in manifest.pod["containers"]}
    for rule in _code_rules(manifest):
        name = rule.get("containerName")
        if name not in names:
            yield f"podFailurePolicy is about container {name}, expected one of {sorted(names)}"


def codes_are_those_of_the_table(manifest: Manifest) -> Iterator[str]:
    for action, expected in (("FailJob", FAIL_CODES), ("Ignore", IGNORED_CODES)):
        rules = [each for each in _code_rules(manifest) if each["action"] == action]
        found = sorted(code for each in rules for code in each["values"])
        if found != expected or {each["operator"] for each in rules} != {"In"}:
            yield f"{action} is for exit codes {found}, expected {expected}"


def own_faults_come_before_disruptions(manifest: Manifest) -> Iterator[str]:
    rules = manifest.spec.get("podFailurePolicy", {}).get("rules", [])
    kinds = [(each["action"], bool(each.get("onExitCodes"))) for each in rules]
    if ("FailJob", True) not in kinds or ("Ignore", False) not in kinds:
        yield "podFailurePolicy: expected FailJob on exit codes and Ignore on DisruptionTarget"
    elif kinds.index(("FailJob", True)) > kinds.index(("Ignore", False)):
        yield "podFailurePolicy: Ignore on DisruptionTarget comes first, expected FailJob before it"


def disruptions_are_free(manifest: Manifest) -> Iterator[str]:
    rules = manifest.spec.get("podFailurePolicy", {}).get("rules", [])
    expected = {"type": "DisruptionTarget", "status": "True"}
    ignored = [each.get("onPodConditions") or [] for each in rules if each["action"] == "Ignore"]
    if not any(expected in each for each in ignored):
        yield "podFailurePolicy: no rule ignores DisruptionTarget, so preemptions use up the Job"


def retries_are_counted_per_index(manifest: Manifest) -> Iterator[str]:
    if "backoffLimitPerIndex" not in manifest.spec:
        yield "backoffLimitPerIndex is missing: all pods would share one allowance and its back-off"


def one_success_ends_the_job(manifest: Manifest) -> Iterator[str]:
    rules = manifest.spec.get("successPolicy", {}).get("rules")
    if rules != [{"succeededCount": 1}]:
        yield f"successPolicy is {rules}, expected one rule, succeededCount 1"
