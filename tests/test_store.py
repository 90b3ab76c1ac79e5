"""The rendezvous store alone, as a program: real agents meet in it, and it ends when asked to."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from jobs import ROOT, free_port

LIMIT_SECONDS = 120
SAYS = "import os; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], flush=True)"


@contextmanager
def store(*flags: str) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-m", "launch.store", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def agent(port: int, script: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=run"]
    command += ["--rdzv-conf=is_host=0,join_timeout=60", "--local-addr=127.0.0.1", str(script)]
    return subprocess.Popen(
        command,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_agents_that_host_nothing_meet_in_it_and_probes_do_it_no_harm(tmp_path: Path) -> None:
    port = free_port()
    script = tmp_path / "says.py"
    script.write_text(SAYS)
    with store(f"--port={port}") as process:
        assert line_of(process) == f"serving the rendezvous on port {port}"
        for _ in range(3):  # the kubelet's probes: connect, say nothing, leave
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
        agents = [agent(port, script) for _ in range(2)]
        said = [each.communicate(timeout=LIMIT_SECONDS) for each in agents]
        assert [each.returncode for each in agents] == [0, 0], said
        assert sorted(output.strip() for output, _ in said) == ["rank 0 of 2", "rank 1 of 2"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_SECONDS) == 0
        assert line_of(process) == "ended by SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_it_serves_ends_it_too(number: signal.Signals) -> None:
    with store(f"--port={free_port()}") as process:
        mask = f"/proc/{process.pid}/status"

        def blocks() -> bool:
            found = next(ln for ln in Path(mask).read_text().splitlines() if "SigBlk" in ln)
            return bool(int(found.split()[1], 16) >> (number - 1) & 1)

        while not blocks():  # it ends by itself, or the limit of the test does
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(LIMIT_SECONDS) == 0


def test_a_port_that_is_taken_is_one_line_and_75() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with store(f"--port={port}") as process:
            _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 75
    assert errors.splitlines()[-1].startswith(f"launch.store: port {port}: cannot be listened on")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--port=0", "flag --port: found 0, expected a number from 1 to 65535"),
        ("--port=http", "flag --port: found 'http', expected a whole number"),
        ("--prt=1", "flag --prt: there is no such flag; did you mean --port?"),
    ],
)
def test_a_wrong_flag_is_one_line(flag: str, said: str) -> None:
    with store(flag) as process:
        _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert (process.returncode, errors.splitlines()) == (64, [f"launch.store: {said}"])
