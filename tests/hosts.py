"""Several hosts on one machine: network namespaces on one bridge, whose packets can be dropped.

A namespace of its own holds the bridge and the other ends of all cables, so nothing appears in the
network of the machine and tests that run side by side do not see each other. It needs root.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from in_process import clean_environ
from jobs import LIMIT_SECONDS, ROOT, alive, reached, wait_for

_NAMES = "fmnist-hosts"  # namespaces: <this>-<process of the tests>-<nonce>-<host>
_STORE = 250  # the number of a host that runs nothing but the store of the rendezvous
_PORT = 29500  # in namespaces of its own it is always free
_TOOLS = ("ip", "iptables", "unshare")
# Of torchrun's agents: a lost one is given up after 5 s instead of 15, a rendezvous waits 1 s for
# more nodes instead of 30, and no answer of the store takes longer than 10 s instead of 60.
SHORT_RENDEZVOUS = (
    "keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=1,read_timeout=10"
)
SHORT_LIMITS = (
    "SILENT_SECONDS=4 ALIVE_SECONDS=0.5 ANSWER_SECONDS=2 EARLY_SAVE_SECONDS=1 STORE_SECONDS=20"
)
RULES = {"in": ["INPUT"], "out": ["OUTPUT"], "both": ["INPUT", "OUTPUT"]}


def missing() -> str:
    """Return what this machine lacks for hosts of its own; "" for nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install iproute2 iptables)"
    name = f"{_NAMES}-{os.getpid()}-probe"
    try:
        _ip("netns", "add", name)
        _ip("netns", "exec", name, "iptables", "-w", "-L", "-n")
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    finally:
        with suppress(subprocess.CalledProcessError):
            _ip("netns", "del", name)
    return ""


@dataclass
class Host:
    """One network namespace with an address."""

    name: str
    address: str
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    log: Path | None = None

    def start(
        self, command: list[str], *, log: Path, environ: Mapping[str, str]
    ) -> "subprocess.Popen[bytes]":
        self.log = log
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=ROOT,
                env={**clean_environ(), **environ},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    @property
    def in_url(self) -> str:
        """Its address, as it stands before a port."""
        return f"[{self.address}]" if ":" in self.address else self.address

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log is not None else ""

    def run(self, *command: str) -> str:
        """Return what a short command prints here."""
        return _ip("netns", "exec", self.name, *command)

    def pids(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def kill(self) -> list[int]:
        """SIGKILL all that runs here at once, as a power switch does; return what was there."""
        pids = self.pids()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(map(alive, pids)), f"{self.name} to be dead")
        self.reap()
        return pids

    def reap(self) -> None:
        for process in self.processes:
            process.wait(LIMIT_SECONDS)

    def cut(self, direction: str) -> None:
        """Drop every packet that comes `in`, goes `out`, or `both`."""
        for chain in RULES[direction]:
            self._iptables("-A", chain, "!", _DIRECTION[chain], "lo", "-j", "DROP")

    def dropped(self) -> int:
        """Return how many packets the rules of `cut` have dropped."""
        listed = "".join(self._iptables("-L", each, "-n", "-v", "-x") for each in RULES["both"])
        return sum(map(int, re.findall(r"^\s*(\d+)\s+\d+\s+DROP", listed, re.MULTILINE)))

    def mend(self) -> None:
        """Let all packets pass again."""
        self._iptables("-F")

    def _iptables(self, *words: str) -> str:
        return self.run("iptables", "-w", *words)


_DIRECTION = {"INPUT": "-i", "OUTPUT": "-o"}


class Network:
    """Hosts on one bridge. A context; what runs on them is killed, and all is removed, at its end.

    Addresses are 10.77.0.N, or fd77::N where hosts have IPv6 alone: torchrun's agents have the rank
    of their address.
    """

    def __init__(self, *, ipv6: bool = False) -> None:
        self._ipv6 = ipv6
        self._prefix = f"{_NAMES}-{os.getpid()}-{secrets.token_hex(3)}"
        self._switch = f"{self._prefix}-switch"
        self.hosts: list[Host] = []

    def __enter__(self) -> Self:
        _remove_leftovers()
        _ip("netns", "add", self._switch)
        try:
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.kill()
            _ip("netns", "del", host.name)
        _ip("netns", "del", self._switch)

    def add(self, number: int) -> Host:
        address = f"fd77::{number}" if self._ipv6 else f"10.77.0.{number}"
        name = f"{self._prefix}-{number}"
        cable = f"port{number}"
        _ip("netns", "add", name)
        host = Host(name, address)
        self.hosts.append(host)
        switch = ["-n", self._switch, "link"]
        _ip(*switch, "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip(*switch, "set", cable, "master", "bridge", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        if self._ipv6:  # at once, and not after it was looked for on all others
            _ip("-n", name, "address", "add", f"{address}/64", "dev", "eth0", "nodad")
        else:
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        return host


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout


def _remove_leftovers() -> None:
    """Remove the hosts of tests that were killed before they could."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        found = re.match(rf"{_NAMES}-(\d+)-", name)
        if found is None or alive(int(found[1])):
            continue
        with suppress(subprocess.CalledProcessError):  # a test next to this one does the same
            for pid in _ip("netns", "pids", name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "del", name)


class Launch:
    """`torchrun --nnodes=1:4` of one run on several hosts of a network."""

    def __init__(
        self,
        network: Network,
        run: Path,
        *flags: str,
        limits: str = SHORT_LIMITS,
        rendezvous: str = SHORT_RENDEZVOUS,
        launcher: str = "torch.distributed.run",
        **environ: str,
    ) -> None:
        self.network = network
        self._launcher = launcher
        self.run = run
        self._flags = flags
        self._rendezvous = rendezvous
        self.brake = run.parent / f"{run.name}.brake"
        self.agents: list[subprocess.Popen[bytes]] = []
        self.store = network.add(_STORE)  # that of the rendezvous
        self._environ = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "TRAIN_SMALL_BRAKE": str(self.brake),
            "TRAIN_SMALL_LIMITS": limits,
            **environ,
        }
        self.brake.touch()
        self.serve()

    def serve(self) -> None:
        """Start the store of the rendezvous, and see it serve: an empty one each time."""
        before = self.store.text().count("serving")
        serve = [sys.executable, "-m", "launch.store", f"--port={_PORT}"]
        self.store.start(serve, log=self.run.parent / "store.log", environ=self._environ)
        wait_for(lambda: self.store.text().count("serving") > before, "the store")

    def start(self, host: Host, *, before: str = "") -> "subprocess.Popen[bytes]":
        """Start an agent with one worker on a host; `before` is what its shell does first."""
        command = [sys.executable, "-m", self._launcher, "--nnodes=1:4"]
        command += ["--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-id={self.run.name}"]
        command += [
            f"--rdzv-endpoint={self.store.in_url}:{_PORT}",
            f"--rdzv-conf=is_host=0,{self._rendezvous}",
        ]
        command += [f"--local-addr={host.address}", "--max-restarts=100"]
        command += ["-m", "train_small", "--run-dir", str(self.run), *self._flags]
        if before:
            command = ["sh", "-ec", f'{before}; exec "$@"', "sh", *command]
        log = self.run.parent / f"{host.address}.log"
        self.agents.append(host.start(command, log=log, environ=self._environ))
        return self.agents[-1]

    def release(self) -> None:
        """Let steps take what they take."""
        self.brake.unlink()

    def text(self) -> str:
        return "".join(f"=== {each.address}\n{each.text()}" for each in self.network.hosts)

    def await_step(self, step: int, *, attempt: int = 0) -> int:
        """Wait until an attempt after `attempt` has finished a step; return that attempt."""

        def there() -> int:
            now, last = reached(self.run)
            if now > attempt and last >= step:
                return now
            assert any(each.poll() is None for each in self.agents), self.text()[-8000:]
            return 0

        return wait_for(there, f"step {step} after attempt {attempt}")
