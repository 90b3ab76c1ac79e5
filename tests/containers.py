"""Containers for tests: images from this project's Dockerfiles, run by its own compose file.

Nothing is pulled: debootstrap makes the base, which gets the name that the Dockerfiles ask for.
Images, containers, volumes and networks lie in a folder of the test's own, which may be in memory;
nobody else's are seen or touched. It needs root.
"""

import json
import os
import resource
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from jobs import ROOT

BASE_IMAGE = "docker.io/library/debian:bookworm-slim"
COMPOSE = ROOT / "docker" / "compose.yaml"
_TOOLS = ("podman", "buildah", "debootstrap", "runc")
_COMPOSE = shutil.which("podman-compose", path=sysconfig.get_path("scripts"))
# Whom this machine trusts besides the usual ones, say a proxy between it and the registries. Debian
# reads it when it installs `ca-certificates`.
_TRUSTED = Path("/usr/local/share/ca-certificates")
_BUILD_SECONDS = 1200.0
_COMMAND_SECONDS = 180.0
# One runtime for all machines; no container may have more open files than this process, which not
# every machine lets root exceed. All state is in `folder`.
_CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{folder}/libpod"
[network]
network_config_dir = "{folder}/networks"
"""
_STORAGE_CONF = """
[storage]
driver = "overlay"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""
_MOST_FILES, _MOST_PROCESSES = 65_536, 30_000


def missing() -> str:
    """Return what this machine lacks for containers of its own; "" for nothing."""
    if os.geteuid() != 0:
        return "making a base image needs root"
    absent = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install {' '.join(absent)})"
    return "" if _COMPOSE else "not installed: podman-compose (pip install podman-compose)"


class Engine:
    """podman and buildah with a storage of their own. A context; all is removed at its end."""

    def __init__(self, folder: Path, *, in_memory: str = "") -> None:
        """Use an empty folder; `in_memory` is the size of what is mounted there, if anything."""
        self.folder = folder
        if in_memory:
            options = f"size={in_memory},mode=0755"
            _run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)])
        self.environ = {
            **os.environ,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        }
        files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], _MOST_FILES)
        processes = min(resource.getrlimit(resource.RLIMIT_NPROC)[1], _MOST_PROCESSES)
        conf = _CONTAINERS_CONF.format(folder=folder, files=files, processes=processes)
        (folder / "containers.conf").write_text(conf)
        (folder / "storage.conf").write_text(_STORAGE_CONF.format(folder=folder))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.podman("pod", "rm", "--all", "--force", "--time=0")
        self.podman("rm", "--all", "--force", "--time=0")
        for name in self.podman("network", "ls", "--format={{.Name}}").split():
            if name != "podman":  # of every engine; nothing of it exists before it is used
                self.podman("network", "rm", name)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted(mounts, reverse=True):  # deepest first
            if mount == str(self.folder) or mount.startswith(f"{self.folder}/"):
                _run(["umount", mount])

    def podman(self, *words: str, seconds: float = _COMMAND_SECONDS) -> str:
        return _run(["podman", *words], environ=self.environ, seconds=seconds).stdout.strip()

    def try_podman(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run it, whatever its exit code."""
        return _run(["podman", *words], environ=self.environ, check=False)

    def inspect(self, container: str, form: str) -> str:
        return self.podman("inspect", container, f"--format={{{{{form}}}}}")

    def make_base(self, workshop: Path) -> None:
        """Make the base image, with Debian's newest packages."""
        root = workshop / "base"
        _run(["debootstrap", "--variant=minbase", "bookworm", str(root)], seconds=_BUILD_SECONDS)
        # As in the published image: a build that is cut off is repeated, so nothing is synced.
        (root / "etc" / "dpkg" / "dpkg.cfg.d" / "unsafe-io").write_text("force-unsafe-io\n")
        packed = workshop / "base.tar"
        _run(["tar", "--create", f"--file={packed}", f"--directory={root}", "."])
        self.podman("import", '--change=CMD ["bash"]', str(packed), BASE_IMAGE)
        shutil.rmtree(root)
        packed.unlink()

    def build(self, dockerfile: str, tag: str, *, target: str = "") -> None:
        """Build an image of this project."""
        command = ["buildah", "bud", "--isolation=chroot", "--network=host", "--layers"]
        command += [f"--file={ROOT / 'docker' / dockerfile}", f"--tag={tag}"]
        command += [f"--target={target}"] if target else []
        command += [f"--volume={_TRUSTED}:{_TRUSTED}:ro"] if _TRUSTED.is_dir() else []
        began = time.monotonic()
        _run([*command, str(ROOT)], environ=self.environ, seconds=_BUILD_SECONDS)
        print(f"{tag}: built in {time.monotonic() - began:.0f} s")
        print(self.podman("history", tag, "--format={{.Size}} {{.CreatedBy}}"))


class Composed:
    """The project's compose file, as `podman-compose` runs it, with what a test changes in it."""

    def __init__(self, engine: Engine, name: str, changes: Mapping[str, Any]) -> None:
        """`changes` are merged over `compose.yaml`, as a second file."""
        self.engine = engine
        self.name = name
        self._second = engine.folder / f"{name}.json"  # JSON is YAML
        self._second.write_text(json.dumps(changes))
        self.network = f"{name}_nodes"

    def up(self, *services: str) -> None:
        command = self._command("up", "--detach", "--no-build", *services)
        _run(command, environ=self.engine.environ)

    def _command(self, *words: str) -> list[str]:
        assert _COMPOSE is not None, missing()
        files = ["--file", str(COMPOSE), "--file", str(self._second)]
        return [_COMPOSE, "--project-name", self.name, *files, *words]

    def container(self, service: str) -> str:
        return f"{self.name}_{service}_1"

    def address(self, service: str) -> str:
        """Return the address that this machine reaches a service at; "" while it is cut off."""
        form = "range .NetworkSettings.Networks}}{{.IPAddress}}{{end"
        return self.engine.inspect(self.container(service), form)

    def log(self, service: str) -> str:
        found = self.engine.try_podman("logs", self.container(service))
        return found.stdout + found.stderr

    def logs(self) -> str:
        names = self.engine.podman("ps", "--all", "--format={{.Names}}").split()
        services = [name.removeprefix(f"{self.name}_").removesuffix("_1") for name in names]
        nodes = [each for each in sorted(services) if each.startswith("node")]
        return "\n".join(f"=== {each}\n{self.log(each)[-3000:]}" for each in nodes)

    def is_running(self, service: str) -> bool:
        return self.engine.inspect(self.container(service), ".State.Running") == "true"

    def await_exit(self, service: str) -> int:
        """Wait for the end of a container; return its exit code."""
        return int(self.engine.podman("wait", self.container(service)))

    def start(self, service: str) -> None:
        """Start a container again that has ended; its volumes are still there."""
        self.engine.podman("start", self.container(service))

    def stop(self, service: str) -> "subprocess.Popen[bytes]":
        """Ask a node to stop, within the grace that the compose file gives it; do not wait."""
        command = self._command("stop", service)
        return subprocess.Popen(command, env=self.engine.environ, stderr=subprocess.DEVNULL)

    def kill(self, service: str) -> None:
        self.engine.podman("kill", self.container(service))

    def cut(self, service: str) -> None:
        """Take a node off the network while it runs."""
        self.engine.podman("network", "disconnect", self.network, self.container(service))

    def mend(self, service: str) -> None:
        """Put it back, under the same name, at whatever address is free."""
        words = ["network", "connect", f"--alias={service}", self.network]
        self.engine.podman(*words, self.container(service))

    def python(self, service: str, program: str) -> Any:
        """Run a Python program in a node, as its user; return the JSON that it prints."""
        done = self.engine.podman("exec", self.container(service), "python", "-c", program)
        return json.loads(done)


def _run(
    command: Sequence[str],
    *,
    environ: Mapping[str, str] | None = None,
    seconds: float = _COMMAND_SECONDS,
    check: bool = True,
) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=seconds, check=False
    )
    said = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{said}"
    return done
