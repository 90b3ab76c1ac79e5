"""The pods of a Job as processes of this machine: what a kubelet makes of a pod template, in small.

Environment, arguments, grace period and exit codes are those of the manifest, word for word, but:

- a pod's address is 127.0.0.1 + its index, and so is the name of the one that hosts the rendezvous;
  its port is a free one, nobody serves metrics, and `is_host` says what addresses cannot say here
- what is mounted there is a folder of the pod here
- the run is where the caller says

Not here: the image, its user and root file system, limits of memory, networks and their policies.
"""

import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.k8s.controller import Ended, Pod
from launch.k8s.manifest import COMPONENT, INDEX, JOB_NAME, STORE, Document, Manifest, flag_in
from launch.launched import DEAD, LIMIT_SECONDS, children, kill, state

_ROOT = Path(__file__).resolve().parents[2]
_CONTROLLER_UID = "batch.kubernetes.io/controller-uid"
_FIELD = re.compile(r"metadata\.labels\['(?P<label>.+)'\]")
_REFERENCE = re.compile(r"\$\((?P<name>[A-Za-z_][A-Za-z0-9_.-]*)\)|\$\$")
_FIRST_ADDRESS = ipaddress.IPv4Address("127.0.0.1")


@dataclass(slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    folder: Path
    disrupted: bool = False  # the condition DisruptionTarget
    killed_at: float | None = None  # when the grace period is over


class LocalPods:
    """A `Kubelet` of this machine. `flags` are added to those of the training."""

    def __init__(
        self, manifest: Manifest, *, run: str, flags: list[str], folder: Path, uid: str
    ) -> None:
        self.manifest = manifest
        self._run = run
        self._flags = flags
        self._folder = folder
        self._uid = uid
        self._port = _free_port()
        self._pods: dict[Pod, _Running] = {}
        self._store: subprocess.Popen[bytes] | None = None
        self.codes: dict[str, int] = {}  # of every pod that has ended, by name

    @property
    def has_store(self) -> bool:
        """Whether the manifest has the rendezvous in a pod of its own, not of the Job."""
        return any(
            template["metadata"]["labels"].get(COMPONENT) == STORE
            for _, template in self.manifest.pods()
        )

    def keep_store(self) -> None:
        """Run the store, again where it has died, as its Deployment does."""
        if not self.has_store or (self._store is not None and self._store.poll() is None):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "store.log").open("ab") as output:
            self._store = subprocess.Popen(
                [sys.executable, "-m", "launch.store", f"--port={self._port}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_inherited(),
                start_new_session=True,
            )

    def kill_store(self) -> bool:
        """Kill the store; return whether there was one."""
        if self._store is None or self._store.poll() is not None:
            return False
        self._store.kill()
        return self._store.wait(LIMIT_SECONDS) == -signal.SIGKILL

    def start(self, pod: Pod) -> None:
        """Run the trainer's container of a pod."""
        folder = self._folder / pod.name
        folder.mkdir(parents=True)
        environ = self.environment(pod, folder)
        with (folder / "log").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.agent", *self.arguments(environ, folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**_inherited(), **environ},
                start_new_session=True,
            )
        self._pods[pod] = _Running(process, folder)

    def end_of(self, pod: Pod) -> Ended | None:
        """Return how a pod has ended; its grace period ends here too."""
        running = self._pods[pod]
        status = running.process.poll()
        if status is None:
            if running.killed_at is not None and time.monotonic() > running.killed_at:
                running.process.kill()
            return None
        code = status if status >= 0 else 128 - status
        self.codes[pod.name] = code
        message = running.folder / "termination-log"
        said = message.read_text() if message.exists() else ""
        return Ended(code, running.disrupted, said)

    def stop(self, pod: Pod) -> None:
        """Ask a pod to end, within its grace period."""
        grace = float(self.manifest.pod["terminationGracePeriodSeconds"])
        running = self._pods[pod]
        if running.killed_at is None:
            running.killed_at = time.monotonic() + grace
            kill(running.process.pid, signal.SIGTERM)

    def evict(self, pod: Pod) -> None:
        """Ask a pod to end and say that it was disrupted, as the eviction API does."""
        self._pods[pod].disrupted = True
        self.stop(pod)

    def destroy(self, pod: Pod, *, disrupted: bool) -> bool:
        """Kill all that runs in a pod, at once; return whether something did."""
        running = self._pods[pod]
        running.disrupted = disrupted
        everything = self.processes(pod)
        kill(running.process.pid, signal.SIGSTOP)  # or it would see its workers die
        for process in reversed(everything):
            kill(process, signal.SIGKILL)
        return bool(everything)

    def processes(self, pod: Pod) -> list[int]:
        """Return the living processes of a pod, its agent first."""
        found = [self._pods[pod].process.pid]
        for process in found:
            found += children(process)
        return [each for each in found if state(each) not in DEAD]

    def running(self) -> list[Pod]:
        return [pod for pod, each in self._pods.items() if each.process.poll() is None]

    def tail(self) -> str:
        """Return the last lines of the pods that run, or ran last."""
        shown = self.running() or list(self._pods)[-2:]
        logs = {pod: (self._pods[pod].folder / "log").read_text(errors="replace") for pod in shown}
        return "\n".join(
            f"{pod.name}: {line}" for pod in shown for line in logs[pod].splitlines()[-8:]
        )

    def end(self) -> None:
        """Leave nothing behind."""
        for pod in self.running():
            self.destroy(pod, disrupted=False)
            self._pods[pod].process.wait(LIMIT_SECONDS)
        self.kill_store()

    def environment(self, pod: Pod, folder: Path) -> dict[str, str]:
        """Return what the container gets: `envFrom`, then `env` in its order."""
        trainer = self.manifest.trainer
        written = self.manifest.environment()
        given = {each["name"]: each for each in trainer["env"]}
        found = {
            name: _here(text, self._mounts, folder)
            for name, text in written.items()
            if name not in given
        }
        for name, each in given.items():
            text = each.get("value")
            if text is None:
                text = self._field(each["valueFrom"]["fieldRef"]["fieldPath"], pod)
            found[name] = _here(_expanded(text, found), self._mounts, folder)
        host = flag_in(self.manifest.args, "rdzv-endpoint").rpartition(":")[0]
        if (reference := _REFERENCE.fullmatch(host)) is not None:
            found[reference["name"]] = str(_FIRST_ADDRESS)
        return found

    def arguments(self, environ: Mapping[str, str], folder: Path) -> list[str]:
        arguments = [_expanded(each, environ) for each in self.manifest.args]
        conf = flag_in(arguments, "rdzv-conf")
        if "is_host=" not in conf:  # index 0 would know by its name; here all names lead here
            is_host = int(environ["POD_IP"] == str(_FIRST_ADDRESS))
            conf = ",".join(filter(None, [conf, f"is_host={is_host}"]))
        replaced = {
            "--rdzv-endpoint": f"{_FIRST_ADDRESS}:{self._port}",
            "--rdzv-conf": conf,
            "--metrics-port": "0",
            "--termination-log": str(folder / "termination-log"),
            "--run-dir": self._run,
        }
        pairs = [(each.partition("=")[0], each) for each in arguments]
        kept = [f"{name}={replaced[name]}" if name in replaced else each for name, each in pairs]
        return [*kept, *self._flags]

    def _field(self, path: str, pod: Pod) -> str:
        metadata = self.manifest.job["metadata"]
        labels = {
            **self.manifest.template["metadata"]["labels"],
            JOB_NAME: metadata["name"],
            INDEX: str(pod.index),
            _CONTROLLER_UID: self._uid,
        }
        if (label := _FIELD.fullmatch(path)) is not None:
            return str(labels[label["label"]])
        fields: dict[str, str] = {
            "status.podIP": str(_FIRST_ADDRESS + pod.index),
            "metadata.namespace": metadata.get("namespace", "default"),
            "metadata.name": pod.name,
        }
        return fields[path]

    @property
    def _mounts(self) -> list[str]:
        return [each["mountPath"] for each in self.manifest.trainer["volumeMounts"]]


def _here(text: str, mounts: list[str], folder: Path) -> str:
    """Return where a path on a mount is on this machine; another text as it is."""
    if any(Path(text).is_relative_to(each) for each in mounts):
        return f"{folder}{text}"
    return text


def _expanded(text: str, environ: Mapping[str, str]) -> str:
    """Replace `$(NAME)`, and `$$` by `$`; an unknown name stays (k8s.io/kubernetes expand.go)."""

    def value(reference: re.Match[str]) -> str:
        name = reference["name"]
        return "$" if name is None else environ.get(name, reference[0])

    return _REFERENCE.sub(value, text)


def _inherited() -> Document:
    """Return what a process needs of this machine, without what steers a training or a launch."""
    steering = ("FMNIST_DIST_", "PET_", "TORCH", "OMP_NUM_THREADS")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(steering)}
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
