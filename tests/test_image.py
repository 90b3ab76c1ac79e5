"""The image and the compose file, run: three nodes in containers, of which some are lost.

The short version builds the Dockerfile up to `runtime`, the system with Python, user and entry
point, and binds into it what the later stages would copy there: this environment's packages, this
tree's code, and SeaweedFS. So it does not show that pip finds the pinned packages, that they
suffice without those of the tests, that the compiled code is what runs, that the S3 image works,
or that a node which was cut off comes back. The slow version builds both images in full, binds
nothing, and does all of it.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import seaweed
from containers import Composed, Engine, missing
from dockerfiles import stages
from jobs import ROOT, ledger, show, wait_for

from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.place import Place
from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.errors import ExitCode

RUN = "s3://runs/compose"
KILLED = 137
NODES = ("node-1", "node-2", "node-3")
SHORT_STEPS = 6  # of `trained_run`
STEPS = 60

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
    "rights": [int(status["Cap" + each], 16) for each in ("Inh", "Prm", "Eff", "Bnd", "Amb")],
    "no_new_rights": status["NoNewPrivs"].strip(),
    "writable": [f for f in ("/", "/app", "/etc", "/home", "/opt", "/opt/venv", "/root", "/usr",
        "/var", "/tmp", "/scratch", "/dev/shm") if writable(f)],
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
    for name, _, value in (each.partition("=") for each in for_storage(compose)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{compose.address('s3')}:8333")
    monkeypatch.setenv("XDG_STATE_HOME", str(compose.engine.folder / "state"))


def for_storage(compose: Composed) -> list[str]:
    """Return what the compose file sets for a node to reach its storage, as NAME=VALUE."""
    told = json.loads(compose.engine.inspect(compose.container("node-1"), "json .Config.Env"))
    return [each for each in told if each.startswith("AWS_")]


def beside(compose: Composed, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run another container on the network of the nodes."""
    options = [f"--env={each}" for each in for_storage(compose)]
    options += [f"--network={compose.network}", "--rm", "--read-only", "--tmpfs=/tmp"]
    return compose.engine.try_podman("run", *options, *words)


def shown(compose: Composed) -> dict[str, Any]:
    """Return `runs show --json` as the first node says it: rank 0 knows how far attempts got."""
    node = compose.container("node-1")
    image = compose.engine.inspect(node, ".ImageName")
    ask = ["-m", "fmnist_dist.runs", "show", RUN, "--json"]
    done = beside(compose, f"--volumes-from={node}", "--entrypoint=python", image, *ask)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def await_training(compose: Composed, *, world: int, after: int = -1) -> int:
    """Wait for an attempt of so many workers with a checkpoint past a step; return that step."""

    log = RunLog(Place.of(RUN).storage())

    def there() -> int | None:
        time.sleep(0.1)  # each look is some requests, and the cores are the nodes'
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


def flags(steps: int, *, slow: float = 0.0) -> dict[str, str]:
    """Return the environment of a run whose every step takes so many seconds more."""
    faults = {"FMNIST_DIST_FAULTS": f"update:slow={slow}"} if slow else {}
    return {
        "FMNIST_DIST_BATCH_SIZE": "64",
        "FMNIST_DIST_MAX_STEPS": str(steps),
        "FMNIST_DIST_SAVE_EVERY_STEPS": "1",
        "FMNIST_DIST_DEVICE": "cpu",
        **faults,
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
        # Short: a peer goes, and for seconds the name server with it; the store is still found.
        "environment": {**flags(SHORT_STEPS, slow=1.5), "FMNIST_DIST_DRAIN_SECONDS": "12"},
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

    story = shown(compose)
    assert bits(story) == bits(show(trained_run))
    assert bits(story)[0] == SHORT_STEPS
    assert [each["lost_steps"] for each in story["attempts"]] == [0] * len(story["attempts"])
    assert (story["attempts"][0]["world_size"], story["attempts"][-1]["world_size"]) == (3, 1)
    assert post_mortem(compose, "node-3")["exit_code"] == ExitCode.DRAINED


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_three_nodes_are_stopped_killed_cut_off_and_come_back_and_end_with_the_same_bits(
    full_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = full_engine
    engine.build("Dockerfile", "fmnist-dist:local")
    engine.build("s3.Dockerfile", "fmnist-dist-s3:local")
    node = {"restart": "no", "environment": flags(STEPS, slow=1.0)}
    name = f"full{os.getpid()}"
    compose = Composed(engine, name, {"services": dict.fromkeys(NODES, node)})
    compose.up()
    reach(compose, monkeypatch)
    await_training(compose, world=3)
    for each in NODES:
        confined(compose, each)
    assert "fmnist_dist_world_size 3.0" in scraped(compose, "node-1")

    with compose.stop("node-3") as stopping:
        stopping.wait(90)
    assert compose.await_exit("node-3") == ExitCode.DRAINED, compose.logs()
    assert post_mortem(compose, "node-3")["exit_code"] == ExitCode.DRAINED
    step = await_training(compose, world=2)
    compose.start("node-3")
    step = await_training(compose, world=3, after=step)

    compose.kill("node-2")
    assert compose.await_exit("node-2") == KILLED
    step = await_training(compose, world=2, after=step)
    compose.start("node-2")
    step = await_training(compose, world=3, after=step)

    compose.cut("node-3")
    assert compose.address("node-3") == ""
    assert compose.python("node-3", "import os; print(len(os.listdir('/sys/class/net')))") == 1
    step = await_training(compose, world=2, after=step)
    assert compose.is_running("node-3")
    compose.mend("node-3")
    assert compose.address("node-3")
    await_training(compose, world=3, after=step)

    assert [compose.await_exit(each) for each in NODES] == [ExitCode.FINISHED] * 3, compose.logs()
    story = shown(compose)
    worlds = [each["world_size"] for each in story["attempts"]]
    assert without_repeats(worlds) == [3, 2, 3, 2, 3, 2, 3], story["attempts"]
    lost = [each["lost_steps"] for each in story["attempts"]]
    assert lost == [0] * len(lost)
    assert ledger(RUN).returncode == 0

    calm = f"{RUN}-calm"
    run_alone(compose, calm)
    assert bits(show(calm)) == bits(story)


@pytest.mark.slow
def test_the_image_says_whose_fault_it_is(engine: Engine, tmp_path: Path) -> None:
    """Bad input, a signal before any other node has come, folders that nobody may write to."""
    engine.build("Dockerfile", "fmnist-dist:runtime", target="runtime")
    packages = sysconfig.get_path("purelib")
    command = ["run", "--rm", "--read-only", "--network=none", "--tmpfs=/tmp"]
    command += [f"--volume={packages}:/opt/torch/lib/python3.11/site-packages:ro"]
    command += [f"--volume={ROOT / each}:/app/{each}:ro" for each in ("fmnist_dist", "launch")]
    image, train = "localhost/fmnist-dist:runtime", ["-m", "fmnist_dist.train"]

    helped = engine.try_podman(*command, image)
    assert helped.returncode == 0
    assert "--crash-loop-budget" in helped.stdout

    wrong = engine.try_podman(*command, image, "--standalone", *train, "--learning-rate=1")
    assert wrong.returncode == ExitCode.USAGE
    assert "--learning-rate" in wrong.stderr

    # Without a volume at /scratch there is nowhere for a run but /tmp, and no cache.
    refused = engine.try_podman(*command, image, "--standalone", *train, "--run-dir=/scratch/run")
    assert refused.returncode == ExitCode.INCOMPATIBLE, refused.stderr
    short = ["--run-dir=/tmp/run", "--batch-size=64", "--max-steps=1"]
    trained = engine.try_podman(*command, image, "--standalone", *train, *short)
    assert trained.returncode == ExitCode.FINISHED, trained.stderr
    assert "no cache" in trained.stdout + trained.stderr

    waiting = f"waiting{os.getpid()}"
    lonely = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29500"]
    engine.podman(
        *command[:1], "--detach", f"--name={waiting}", *command[2:], image, *lonely, *train
    )
    wait_for(lambda: listening(engine, waiting), "the rendezvous")
    engine.podman("stop", "--time=60", waiting)
    assert engine.podman("wait", waiting) == str(int(ExitCode.DRAINED))


def listening(engine: Engine, container: str) -> bool:
    """Whether something listens on the port of the rendezvous, 29500, in a container."""
    tables = engine.try_podman("exec", container, "cat", "/proc/net/tcp", "/proc/net/tcp6").stdout
    return any(":733C" in line and " 0A " in line for line in tables.splitlines())


def scraped(compose: Composed, service: str) -> str:
    """Return what Prometheus would get from a node."""
    with urllib.request.urlopen(
        f"http://{compose.address(service)}:9400/metrics", timeout=10
    ) as it:
        return it.read().decode()


def run_alone(compose: Composed, run: str) -> None:
    """Train undisturbed, in one container of the same image."""
    words = [f"--env={name}={text}" for name, text in flags(STEPS).items()]
    agent = ["--standalone", "--nproc-per-node=1", "-m", "fmnist_dist.train", f"--run-dir={run}"]
    done = beside(
        compose, *words, "--tmpfs=/scratch:mode=1777", "localhost/fmnist-dist:local", *agent
    )
    assert done.returncode == ExitCode.FINISHED, done.stderr[-3000:]


def bits(story: dict[str, Any]) -> tuple[int, str]:
    newest = story["checkpoints"][-1]
    return newest["step"], newest["model_sha256"]


def without_repeats(items: list[int]) -> list[int]:
    return [each for each, before in zip(items, [None, *items], strict=False) if each != before]
