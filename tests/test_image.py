"""The image and the compose file, run: three nodes in containers, of which some are lost.

The short version builds the Dockerfile's first stage, the system with Python, user and entry point,
and binds into it what the later stages would copy there: this environment's packages, this tree's
code, and SeaweedFS. So it does not show that pip finds the pinned packages, that they suffice
without those of the tests, that the compiled code is what runs, or that the S3 image works. The
slow version builds both images in full and binds nothing.
"""

import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import seaweed
from containers import Composed, Engine, missing
from dockerfiles import stages
from jobs import ROOT, show, wait_for

from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.place import Place
from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.errors import ExitCode

RUN = "s3://runs/compose"
KILLED = 137
NODES = ("node-1", "node-2", "node-3")
SHORT_STEPS = 6  # of `trained_run`
STEPS = 150

# What a process of a node may do, seen from inside.
CONFINEMENT = """
import json, os, pathlib, tempfile
status = dict(line.split(":", 1) for line in open("/proc/1/status"))
def writable(folder):
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
def files(*folders):
    return [str(path) for each in folders for path in pathlib.Path(each).rglob("*")]
print(json.dumps({
    "ids": [os.getuid(), os.getgid(), *os.getgroups()],
    "rights": [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "no_new_rights": status["NoNewPrivs"].strip(),
    "writable": [f for f in ("/", "/app", "/etc", "/home", "/opt", "/opt/venv", "/root", "/usr", "/var",
        "/tmp", "/scratch", "/dev/shm") if writable(f)],
    "elsewhere": files("/var/tmp", "/run/lock"),  # podman mounts these writable beside ours
    "first": open("/proc/1/cmdline").read().split(chr(0))[:5],
    "cache": files("/scratch/cache") != [],
}))
"""

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
    pytest.mark.skipif(bool(seaweed.missing()), reason=seaweed.missing() or "-"),
]


@pytest.fixture
def workshop() -> Iterator[Path]:
    """Return a folder with a short name: sockets of podman lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="fmnist-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def engine(workshop: Path) -> Iterator[Engine]:
    """Return an engine in memory: a base image is thousands of small files that are synced."""
    (workshop / "engine").mkdir()
    with Engine(workshop / "engine", in_memory="3g") as engine:
        engine.make_base(engine.folder)
        yield engine


@pytest.fixture
def full_engine(workshop: Path) -> Iterator[Engine]:
    """Return an engine on the disk: the full image takes 6 GB, and building it twice as much."""
    (workshop / "engine").mkdir()
    with Engine(workshop / "engine") as engine:
        engine.make_base(workshop)
        yield engine


def reach(compose: Composed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process see the run: it reaches the S3 server's container at its address."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    told = json.loads(compose.engine.inspect(compose.container("node-1"), "json .Config.Env"))
    for name, _, value in (each.partition("=") for each in told):
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{compose.address('s3')}:8333")
    monkeypatch.setenv("XDG_STATE_HOME", str(compose.engine.folder / "state"))


def await_training(compose: Composed, *, world: int, after: int = -1) -> int:
    """Wait for an attempt of so many workers with a checkpoint past a step; return that step."""

    def there() -> int | None:
        log = RunLog(Place.of(RUN).storage())
        try:
            head = log.read().head
        except StorageError:  # the server makes the bucket with the first object
            return None
        body: Any = log.record(head.attempt_index).body if head.attempt else None
        if body is None or body.world_size != world or not head.checkpoints:
            return None
        newest = head.checkpoints[-1]
        is_own = newest.index > head.attempt_index
        return newest.step if is_own and newest.step > after else None

    step = wait_for(there, f"a checkpoint past step {after} of {world} workers:\n{compose.logs()}")
    assert step is not None
    return step


def flags(steps: int, *, slow: float) -> dict[str, str]:
    """Return the environment of a run that takes so many seconds for each of its steps."""
    return {
        "FMNIST_DIST_BATCH_SIZE": "64",
        "FMNIST_DIST_MAX_STEPS": str(steps),
        "FMNIST_DIST_SAVE_EVERY_STEPS": "1",
        "FMNIST_DIST_DEVICE": "cpu",
        "FMNIST_DIST_FAULTS": f"update:slow={slow}",
    }


def confined(compose: Composed, service: str) -> None:
    """A node has no rights, and writes nowhere but where the README says."""
    found = compose.python(service, CONFINEMENT)
    assert set(found["ids"]) == {10001}
    assert set(found["rights"]) == {0}
    assert found["no_new_rights"] == "1"
    assert found["writable"] == ["/tmp", "/scratch", "/dev/shm"]
    assert found["elsewhere"] == []
    assert found["cache"]  # where it was told to
    assert found["first"] == ["tini", "--", "python", "-m", "launch.agent"]
    inspect = compose.engine.inspect
    assert int(inspect(compose.container(service), ".HostConfig.Memory")) == 2 * 1024**3
    assert inspect(compose.container(service), ".HostConfig.ReadonlyRootfs") == "true"


def post_mortem(compose: Composed, service: str) -> dict[str, Any]:
    form = 'range .Mounts}}{{if eq .Destination "/scratch"}}{{.Source}}{{end}}{{end'
    folder = compose.engine.inspect(compose.container(service), form)
    return json.loads((Path(folder) / "post-mortem.json").read_text())


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="binds packages of this Python into Debian's 3.11"
)
def test_of_three_nodes_one_is_stopped_one_is_killed_and_one_ends_with_the_same_bits(
    engine: Engine, trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.build("Dockerfile", "fmnist-dist:runtime", target="runtime")
    packages = sysconfig.get_path("purelib")
    bound = [
        f"{packages}:/opt/torch/lib/python3.11/site-packages:ro",
        f"{ROOT / 'fmnist_dist'}:/app/fmnist_dist:ro",
        f"{ROOT / 'launch'}:/app/launch:ro",
    ]
    node = {
        "image": "localhost/fmnist-dist:runtime",
        "restart": "no",  # so that a node that has ended can be looked at
        "volumes": bound,
        "environment": flags(SHORT_STEPS, slow=1.5),
    }
    server = {
        "image": "localhost/fmnist-dist:runtime",
        "user": "0:0",  # this image has no /data that belongs to anybody
        "entrypoint": stages(ROOT / "docker" / "s3.Dockerfile")[-1].words("ENTRYPOINT"),
        "volumes": [f"{seaweed.program()}:/usr/local/bin/weed:ro"],
    }
    services: Mapping[str, Any] = {"s3": server, **dict.fromkeys(NODES, node)}
    compose = Composed(engine, f"short{os.getpid()}", {"services": services})
    compose.up()
    reach(compose, monkeypatch)
    await_training(compose, world=3)

    with compose.stop("node-3") as stopping:
        compose.kill("node-2")
        stopping.wait(90)
    assert compose.await_exit("node-3") == ExitCode.DRAINED, compose.logs()
    assert compose.await_exit("node-2") == KILLED
    assert compose.is_running("node-1")
    assert show(RUN)["status"] == "running"
    confined(compose, "node-1")
    assert compose.await_exit("node-1") == ExitCode.FINISHED, compose.logs()

    story, calm = show(RUN), show(trained_run)
    assert story["checkpoints"][-1]["step"] == calm["checkpoints"][-1]["step"] == SHORT_STEPS
    sums = {each["checkpoints"][-1]["model_sha256"] for each in (story, calm)}
    assert len(sums) == 1
    assert (story["attempts"][0]["world_size"], story["attempts"][-1]["world_size"]) == (3, 1)
    assert post_mortem(compose, "node-3")["exit_code"] == ExitCode.DRAINED
