"""The manifests fit Kubernetes' schemas, checkov's checks, and the programs that they start."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import torch
import yaml
from jobs import ROOT
from test_k8s_rules import COMPONENTS, OVERLAYS, rendered
from torch.distributed import run as torchrun

from fmnist_dist.distributed.roster import OWNER_VARIABLE
from fmnist_dist.errors import ExitCode
from fmnist_dist.settings import NOT_SETTINGS, PREFIX, load
from launch import store
from launch.agent.arguments import parse
from launch.k8s.manifest import Document, Manifest, flag_in
from launch.k8s.render import kustomize
from launch.k8s.request import K8S
from launch.k8s.rules import ends

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")

VERSIONS = ["1.33", kubernetes_validate.latest_version()]
FOREIGN = {"PodMonitor"}  # custom resources: their schema is not Kubernetes'
CHECKOV = shutil.which("checkov") or str(ROOT / ".venv-checkov" / "bin" / "checkov")
# What Kubernetes would put in the place of $(NAME), so that parsers see what they will see.
PLACES = {
    "RUN_ID": "mine",
    "POD_IP": "10.0.0.7",
    "POD_NAMESPACE": "fmnist-dist",
    "JOB_NAME": "mine",
    OWNER_VARIABLE: "0a1b",
}


def everything() -> list[Manifest]:
    """Return each overlay alone, and one with all components, as they stand in `k8s/`."""
    folder = K8S / "overlays"
    others = [each for each in COMPONENTS if each != "rendezvous"]
    return [
        *(kustomize(folder / each, []) for each in OVERLAYS),
        kustomize(folder / "gke-spot", others),
    ]


def expanded(manifest: Manifest) -> tuple[list[str], dict[str, str]]:
    """Return the trainer's arguments and environment as its container gets them."""
    known = {**PLACES, **manifest.environment()}

    def fill(text: str) -> str:
        while re.search(r"\$\([A-Z_]+\)", text):
            text = re.sub(r"\$\(([A-Z_]+)\)", lambda found: known[found[1]], text)
        return text

    return [fill(each) for each in manifest.args], {n: fill(v) for n, v in known.items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_overlay_fits_the_strict_schemas(version: str) -> None:
    documents = [each for manifest in everything() for each in manifest.documents]
    documents += [each for name in OVERLAYS for each in rendered(name).documents]
    documents += yaml.safe_load_all((K8S / "namespace.yaml").read_text())
    for each in documents:
        if each["kind"] not in FOREIGN:
            kubernetes_validate.validate(each, version, strict=True)


def test_a_field_that_does_not_exist_would_be_found() -> None:
    job = rendered("gke-spot").job
    wrong = {**job, "spec": {**job["spec"], "backoffLimitPerIndx": 3}}
    with pytest.raises(kubernetes_validate.ValidationError, match="backoffLimitPerIndx"):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@pytest.mark.skipif(not Path(CHECKOV).exists(), reason="checkov is not installed (.ci/run does it)")
def test_checkov_finds_nothing(tmp_path: Path) -> None:
    for number, manifest in enumerate([*everything(), *map(rendered, OVERLAYS)]):
        (tmp_path / f"{number}.yaml").write_text(manifest.dump())
    command = [CHECKOV, "--skip-download", "--framework=kubernetes", "--output=json", "--compact"]
    checked = subprocess.run(
        [*command, f"--directory={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    summary = json.loads(checked.stdout)["summary"]
    failed = [each["check_id"] for each in json.loads(checked.stdout)["results"]["failed_checks"]]
    assert failed == []
    assert summary["passed"] > 500, checked.stderr


def test_the_exit_codes_in_yaml_are_those_of_the_table_in_the_documents() -> None:
    """The table says what to do with each code; codes of no rule are counted."""
    table = (K8S / "README.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \|.*\| (\w[\w ]*) \|$", table, flags=re.MULTILINE))
    assert {int(code) for code in rows} == set(map(int, ExitCode))
    wanted = {code: rows[str(code)] for code in map(int, ExitCode)}
    assert sorted(c for c, what in wanted.items() if what == "fail the Job") == ends.FAIL_CODES
    assert sorted(c for c, what in wanted.items() if what == "ignore") == ends.IGNORED_CODES
    assert sorted(c for c, what in wanted.items() if what == "count") == [1, 75]
    rules: list[Document] = rendered("gke-spot").spec["podFailurePolicy"]["rules"]
    found = [r["onExitCodes"]["values"] for r in rules if "onExitCodes" in r]
    assert found == [ends.FAIL_CODES, ends.IGNORED_CODES]


def argparse_torchrun(args: list[str]) -> Any:
    own = ("--metrics-port=", "--termination-log=", "--crash-loop-budget=")
    return torchrun.get_args_parser().parse_args([a for a in args if not a.startswith(own)])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_argument_is_parsed_by_the_parser_of_torchrun_and_of_the_training(
    overlay: str,
) -> None:
    args, environ = expanded(rendered(overlay))
    found = argparse_torchrun(args)
    assert (found.nnodes, found.nproc_per_node, found.rdzv_id) == ("2:4", "1", "mine")
    assert found.rdzv_endpoint.endswith(":29500")
    assert found.local_addr == PLACES["POD_IP"]
    assert (found.module, found.training_script) == (True, "fmnist_dist.train")
    ours = {n: v for n, v in environ.items() if n.startswith(PREFIX)}
    config = load(found.training_script_args, ours).config
    assert config.run_dir == "s3://bucket/runs/mine"
    conf = torchrun._parse_rendezvous_config(found.rdzv_conf) if found.rdzv_conf else {}
    assert conf["join_timeout"] == "600"
    assert ("is_host" in conf) == (overlay != "cpu-local")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_argument_is_parsed_by_the_agents_parser(overlay: str) -> None:
    args, environ = expanded(rendered(overlay))
    found = parse(args, environ)
    assert (found.metrics_port, str(found.termination_log)) == (9400, "/dev/termination-log")
    assert found.crash_loop_budget == 10
    assert (found.launch.min_nodes, found.launch.max_nodes) == (2, 4)


def test_the_stores_arguments_are_parsed_by_its_parser() -> None:
    (deployment,) = rendered("gke-spot").of_kind("Deployment")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["tini", "--", "python", "-m", store.__name__]
    _, bound, _ = store.make_app().parse_args(container["args"])
    assert bound.arguments == {"port": int(flag_in(container["args"], "port"))}


NUMBERS = {"FMNIST_DIST_DRAIN_SECONDS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}


def read_by_torch(name: str) -> bool:
    """Whether torch, or what it compiles with, reads a variable of this name."""
    site = Path(torch.__file__).parent
    folders = [site / "distributed", site / "_inductor", site.parent / "triton"]
    files = (each for folder in folders for each in folder.rglob("*.py"))
    return any(name in each.read_text(errors="replace") for each in files)


OTHERS = {  # whoever reads it
    "HOME": "the shell's, and os.path.expanduser: place.py",
    "XDG_CACHE_HOME": "data/cache.py",
    "XDG_STATE_HOME": "checkpoint/place.py",
    "AWS_ROLE_ARN": "botocore",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "botocore",
    "AWS_SHARED_CREDENTIALS_FILE": "botocore",
}


def test_every_variable_that_is_set_is_read() -> None:
    manifests = everything()
    names = {name for each in manifests for name in each.environment()}
    names |= {env["name"] for each in manifests for env in each.trainer["env"]}
    used = " ".join(
        text
        for each in manifests
        for text in [*each.args, *(env.get("value", "") for env in each.trainer["env"])]
    )
    for name in sorted(names):
        if f"$({name})" in used or name in OTHERS:
            continue
        if name.startswith(PREFIX):
            if name not in NOT_SETTINGS:
                load([], {name: next(filter(None, (m.environment().get(name) for m in manifests)))})
            continue
        assert read_by_torch(name), f"nobody reads {name}"


def test_what_others_read_is_read() -> None:
    for name, where in OTHERS.items():
        if where == "botocore":
            package = importlib.util.find_spec("botocore")
            assert package is not None
            assert package.origin is not None
            files = Path(package.origin).parent.glob("*.py")
            # `config_file` entries are prefixed: AWS_ and the name in upper case.
            assert any(name in each.read_text() for each in files), name
        elif where.endswith(("cache.py", "/place.py")):
            assert name in (ROOT / "fmnist_dist" / where).read_text()


# Read by our programs and set by no manifest, each for a reason.
LEFT_UNSET = {
    "AWS_ENDPOINT_URL": "--env; AWS's own without",
    "AWS_ENDPOINT_URL_S3": "--env; AWS's own without",
    "AWS_REGION": "--env",
    "FMNIST_DIST_FAULTS": "for tests alone",
    "GLOO_SOCKET_IFNAME": "the trainer finds the interface of its address",
    "PET_TERMINATION_LOG": "--termination-log is in the arguments",
    "TERM": "a pod has no terminal",
    "TORCH_CPP_LOG_LEVEL": "for whoever wants torch's own warnings",
}


def variables_read(files: list[Path]) -> set[str]:
    """Return the names that are looked up in something called `environ`, constants resolved."""
    trees = [ast.parse(each.read_text()) for each in files]
    constants: dict[str, list[str]] = {}
    for node in (node for tree in trees for node in tree.body if isinstance(node, ast.Assign)):
        named = [each for each in ast.walk(node.value) if isinstance(each, ast.Constant)]
        for target in node.targets:
            found = [each.value for each in named if isinstance(each.value, str)]
            constants.setdefault(ast.unparse(target), []).extend(found)
    keys = [key for tree in trees for node in ast.walk(tree) if (key := looked_up(node))]
    literal = {key.value for key in keys if isinstance(key, ast.Constant)}
    named = {each for key in keys for each in constants.get(ast.unparse(key), ())}
    return literal | named


def looked_up(node: ast.AST) -> ast.expr | None:
    """Return the key of `environ.get(key)`, `environ[key]` and `key in environ`."""
    match node:
        case ast.Call(func=ast.Attribute(value=place), args=[key, *_]):
            pass
        case ast.Subscript(value=place, slice=key, ctx=ast.Load()):
            pass
        case ast.Compare(left=key, comparators=[place]):
            pass
        case _:
            return None
    return key if ast.unparse(place).rpartition(".")[2] == "environ" else None


def test_every_variable_that_is_read_is_set_or_left_for_a_reason() -> None:
    ours = [*(ROOT / "fmnist_dist").rglob("*.py"), *(ROOT / "launch" / "agent").rglob("*.py")]
    read = variables_read([*ours, ROOT / "launch" / "store.py"])
    # Two loops over names: settings have their own test, and place.py's are these.
    read |= {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"}
    read -= {"PATH_INFO"}  # of WSGI, for each request
    manifests = everything()
    given = {name for each in manifests for name in each.environment()}
    given |= {env["name"] for each in manifests for env in each.trainer["env"]}
    elastic = (Path(torch.__file__).parent / "distributed" / "elastic").rglob("*.py")
    text = " ".join(each.read_text() for each in elastic)
    torchs = {*re.findall(r'"([A-Z_]{4,})"(?::|\] =)', text)}
    assert {"RANK", "MASTER_ADDR"} <= torchs, "what torch's agent sets for its workers"
    assert read - given - torchs == {*LEFT_UNSET}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_variable_that_should_be_set_is_set(overlay: str) -> None:
    manifest = rendered(overlay)
    names = {*manifest.environment(), *(each["name"] for each in manifest.trainer["env"])}
    # What the read-only root needs, what bounds the drain, and what torch 2.14.1 needs.
    wanted = {
        "HOME",
        "XDG_CACHE_HOME",
        "XDG_STATE_HOME",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
    }
    wanted |= {"FMNIST_DIST_DRAIN_SECONDS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", OWNER_VARIABLE}
    assert wanted | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE"} <= names
    mounts = [each["mountPath"] for each in manifest.trainer["volumeMounts"]]
    for name in (wanted & manifest.environment().keys()) - NUMBERS | {"FMNIST_DIST_LOCAL_TIER"}:
        path = manifest.environment()[name]
        assert any(f"{path}/".startswith(f"{mount}/") for mount in mounts), (
            f"{name} is not writable"
        )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_grace_shutdown_and_drain_are_nested_as_the_programs_read_them(overlay: str) -> None:
    args, environ = expanded(rendered(overlay))
    ours = {n: v for n, v in environ.items() if n.startswith(PREFIX)}
    drain = load(argparse_torchrun(args).training_script_args, ours).config.drain_seconds
    shutdown = int(environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])  # as launcher/api.py reads it
    grace = rendered(overlay).pod["terminationGracePeriodSeconds"]
    assert grace > shutdown > drain > 0


HOSTS = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
10.9.8.7\tmine-0.mine.fmnist-dist.svc.cluster.local\tmine-0
"""  # managedHostsFileContent of pkg/kubelet/kubelet_pods.go, for a pod with hostname and subdomain
ASK = """
import socket, sys
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname
socket.sethostname(sys.argv[1])
print(_matches_machine_hostname(sys.argv[2]))
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="a host name of its own needs root"
)
def test_index_0_knows_that_it_hosts_the_store_before_dns_knows_it(tmp_path: Path) -> None:
    args, _ = expanded(rendered("cpu-local"))
    host = flag_in(args, "rdzv-endpoint").rpartition(":")[0]
    for index, expected in ((0, "True"), (1, "False")):
        hosts = tmp_path / f"hosts-{index}"
        hosts.write_text(HOSTS.replace("mine-0", f"mine-{index}"))
        script = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'
        python = [sys.executable, "-c", ASK, f"mine-{index}", host]
        asked = subprocess.run(
            ["unshare", "--uts", "--mount", "sh", "-c", script, "sh", str(hosts), *python],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if "unshare" in asked.stderr or "mount:" in asked.stderr:
            pytest.skip(f"no namespaces here: {asked.stderr.strip()}")
        assert asked.stdout.strip() == expected, asked.stderr
