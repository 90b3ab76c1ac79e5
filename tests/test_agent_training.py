"""The agent and the real training: signals at any moment, losses, and what others can ask of it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import jobs
import pytest
from agent import ALONE, SHORT, Agent, at, children_of
from alone import FLAGS, files_of_undisturbed
from jobs import ROOT, alive, files_of_newest, free_port, ledger, reached, show, wait_for
from run_files import assert_sound, checkpoints

from fmnist_dist.errors import ExitCode

STEPS = 40
WORKER = str(ROOT / "tests" / "agent_worker.py")
SMALL = ("-m", "train_small", *FLAGS, f"--max-steps={STEPS}")
SOON = 5.0  # seconds in which an agent without workers ends


def train(run: Path, *more: str) -> tuple[str, ...]:
    return ("--max-restarts=100", *SMALL, f"--run-dir={run}", *more)


def brake(tmp_path: Path) -> dict[str, str]:
    """Make steps slow until the file is removed."""
    (tmp_path / "brake").touch()
    return {"TRAIN_SMALL_BRAKE": str(tmp_path / "brake")}


def release(tmp_path: Path) -> None:
    (tmp_path / "brake").unlink()


@pytest.fixture(autouse=True)
def shorter_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that is in vain ends before the test's own limit."""
    monkeypatch.setattr(jobs, "LIMIT_SECONDS", 60.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return files_of_undisturbed(tmp_path_factory.mktemp("undisturbed"), f"--max-steps={STEPS}")


def assert_same(run: Path, undisturbed: dict[str, str], *, lost_steps: list[int | None]) -> None:
    """P1, P3 and P5: the bits of an undisturbed run, nothing lost, each sample once."""
    assert files_of_newest(run) == undisturbed
    assert [each["lost_steps"] for each in show(run)["attempts"]] == lost_steps
    assert_sound(run)
    proof = ledger(run)
    assert proof.returncode == 0, proof.stdout + proof.stderr


def get(port: int, page: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def loads_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_sigterm_while_torch_is_imported_ends_at_once_with_143(tmp_path: Path) -> None:
    with Agent(tmp_path, *ALONE, WORKER, "x", "0") as agent:
        wait_for(lambda: loads_torch(agent.process.pid), "torch to be imported")
        agent.signal()
        assert agent.seconds_to_end() < SOON
        assert agent.process.returncode == 143, agent.text()
        assert "Traceback" not in agent.text()
        told = agent.post_mortem()
    assert (told["exit_code"], told["reason"]) == (
        143,
        "stopped on SIGTERM, no worker was running",
    )


def test_sigterm_in_a_rendezvous_that_nobody_joins_ends_at_once_with_143(tmp_path: Path) -> None:
    with Agent(tmp_path, *at(free_port(), 1, nodes="2"), WORKER, "x", "0") as agent:
        agent.await_text("meeting the other agents")
        agent.signal()
        assert agent.seconds_to_end() < SOON
        assert agent.process.returncode == 143, agent.text()
        assert agent.post_mortem()["reason"] == "stopped on SIGTERM, no worker was running"


def test_sigterm_while_the_store_cannot_be_reached_ends_at_once_with_143(tmp_path: Path) -> None:
    with Agent(tmp_path, *at(free_port(), 2), WORKER, "x", "0") as agent:
        agent.await_text("opening the rendezvous store")
        agent.signal()
        assert agent.seconds_to_end() < SOON
        assert agent.process.returncode == 143, agent.text()


def test_a_store_that_never_comes_is_given_up_with_75(tmp_path: Path) -> None:
    flags = at(free_port(), 2, conf=f"{SHORT},join_timeout=1")
    with Agent(tmp_path, *flags, WORKER, "x", "0") as agent:
        assert agent.end() == ExitCode.TRANSIENT == 75, agent.text()
        assert agent.post_mortem()["fault"] == "storage, network or rendezvous"


@pytest.mark.slow
def test_a_drained_run_goes_on_to_the_same_bits_and_says_how_far_it_is(
    undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """SIGTERM in training, then metrics, a lost keeper and the end, all in the next launch."""
    run, port = tmp_path / "run", free_port()
    words = (*ALONE, "--nproc-per-node=2", f"--metrics-port={port}", *train(run))
    with Agent(tmp_path, *words, **brake(tmp_path)) as agent:
        agent.await_step(run, 3)
        assert get(port, "healthz") == (200, "training\n")
        agent.signal()
        assert agent.end() == ExitCode.DRAINED == 143, agent.text()
        attempt, last = reached(run)
        assert checkpoints(run)[-1].step == last
        assert agent.post_mortem()["reason"] == "stopped on SIGTERM"
    with Agent(tmp_path, *words, **brake(tmp_path)) as agent:
        agent.await_step(run, last + 2, attempt=attempt)
        killed = agent.workers()[1]
        os.kill(killed, signal.SIGKILL)
        agent.await_step(run, last + 3, attempt=attempt + 1)
        status, page = get(port, "metrics")
        release(tmp_path)
        assert agent.end() == 0, agent.text()
        assert agent.post_mortem()["fault"] == "nobody"
    assert status == 200
    for line in (
        'fmnist_dist_restarts_total{reason="worker_error"} 1.0',
        "fmnist_dist_world_size 2.0",
        "fmnist_dist_preemption_notices_total 0.0",
    ):
        assert line in page.splitlines(), page
    assert "worker 1 ended with 137, a new round begins" in agent.text()
    assert_same(run, undisturbed, lost_steps=[0, 0, 0])


def test_the_real_command_finishes_is_refused_and_tells_its_progress(tmp_path: Path) -> None:
    """`fmnist_dist.train` itself, whose run folder the agent knows."""
    run, port = tmp_path / "run", free_port()
    words = (*ALONE, f"--metrics-port={port}", "-m", "fmnist_dist.train", f"--run-dir={run}")
    words = (*words, *FLAGS, "--max-steps=100000", "--save-every-steps=3")
    with Agent(tmp_path, *words) as agent:
        agent.await_step(run, 12)

        def told() -> dict[str, float]:
            lines = [each for each in get(port, "metrics")[1].splitlines() if each[0] != "#"]
            numbers = {name: float(value) for name, _, value in (x.partition(" ") for x in lines)}
            return numbers if numbers.get("fmnist_dist_checkpoint_step", 0) >= 3 else {}

        numbers = wait_for(told, "metrics of the run")
        assert numbers["fmnist_dist_step"] >= numbers["fmnist_dist_checkpoint_step"]
        assert numbers["fmnist_dist_attempt"] == 1
        agent.signal()
        assert agent.end() == 143, agent.text()
        last = reached(run)[1]
        message = agent.post_mortem()
    assert (message["attempt"], message["last_step"]) == (1, last)
    with Agent(tmp_path, *words, "--seed=7") as agent:  # of a run that has another
        assert agent.end() == ExitCode.INCOMPATIBLE == 78, agent.text()
        message = agent.post_mortem()
    assert message["worker"] == 0
    assert "seed" in message["error"], message
    assert message["error"] in agent.text()


@pytest.mark.slow
def test_a_launch_that_another_one_has_superseded_ends_with_76(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saves = "--save-every-steps=1"  # it finds out when it commits
    with Agent(tmp_path, *ALONE, *train(run, saves), **brake(tmp_path)) as first:
        first.await_step(run, 2)
        with Agent(tmp_path, *ALONE, *train(run)) as second:
            assert first.end() == ExitCode.FENCED == 76, first.text()
            assert first.post_mortem()["fault"] == "another launch of the same run"
            assert second.end() == 0, second.text()


def test_the_host_of_the_store_is_killed_and_returns_and_the_survivor_rejoins_in_place(
    undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run, port = tmp_path / "run", free_port()
    slow = brake(tmp_path)
    with (
        Agent(tmp_path, *at(port, 1), *train(run), **slow) as first,
        Agent(tmp_path, *at(port, 2), *train(run), **slow) as second,
    ):
        wait_for(lambda: worlds(run) == [2] and reached(run)[1] >= 3, "both to train")
        workers = first.workers()
        first.process.kill()
        wait_for(lambda: not any(map(alive, workers)), "its workers to die with it")
        second.await_text("a new round begins")
        attempt, last = reached(run)
        assert checkpoints(run)[-1].step == last  # nothing is lost, before anybody is back
        with Agent(tmp_path, *at(port, 1), *train(run), **slow) as back:
            back.await_step(run, last + 1, attempt=attempt)
            release(tmp_path)
            assert (back.end(), second.end()) == (0, 0), back.text() + second.text()
    assert worlds(run) == [2, 2]
    assert_same(run, undisturbed, lost_steps=[0, 0])


def worlds(run: Path) -> list[int]:
    return [each["world_size"] for each in show(run)["attempts"]] if run.exists() else []


@pytest.mark.slow
def test_a_node_leaves_with_notice_and_the_other_one_goes_on_at_once(
    undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """It takes itself off the rendezvous: nobody waits until its heartbeats count as missing."""
    run, port = tmp_path / "run", free_port()
    slow = brake(tmp_path)
    patient = SHORT.replace("max_attempt=5", "max_attempt=600")
    with (
        Agent(tmp_path, *at(port, 1, conf=patient), *train(run), **slow) as first,
        Agent(tmp_path, *at(port, 2, conf=patient), *train(run), **slow) as second,
    ):
        wait_for(lambda: worlds(run) == [2] and reached(run)[1] >= 3, "both to train")
        second.signal()
        assert second.end() == 143, second.text()
        first.await_step(run, reached(run)[1] + 1, attempt=1)
        release(tmp_path)
        assert first.end() == 0, first.text()
    assert worlds(run) == [2, 1]
    assert_same(run, undisturbed, lost_steps=[0, 0])


def test_a_closed_rendezvous_is_followed_by_another_one(tmp_path: Path) -> None:
    """torchrun's own agents close it for ever when they fail; on a store that lives on."""
    port, notes = free_port(), str(tmp_path / "notes")
    with Agent(tmp_path, *at(port, 1, nodes="2"), WORKER, notes, "0,0") as host:
        host.await_text("meeting the other agents")
        close = (
            "import sys; from torch.distributed.elastic.rendezvous import RendezvousParameters\n"
            "from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler\n"
            "parameters = RendezvousParameters('c10d', f'127.0.0.1:{sys.argv[1]}', 'run', 1, 2,"
            " is_host=0)\n"
            "assert get_rendezvous_handler(parameters).shutdown()\n"
        )
        subprocess.run([sys.executable, "-c", close, str(port)], check=True, timeout=60)
        host.await_text("the rendezvous was closed, all meet in another  generation=1")
        with Agent(tmp_path, *at(port, 2, nodes="2"), WORKER, notes, "0,0") as other:
            assert (host.end(), other.end()) == (0, 0), host.text() + other.text()
    assert all("world_size=2" in each.text() for each in (host, other))


@pytest.mark.parametrize("moment", ["rendezvous", "training"])
def test_as_pid_1_it_hears_signals_and_buries_orphans(moment: str, tmp_path: Path) -> None:
    probe = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    if shutil.which("unshare") is None or subprocess.run(probe, check=False).returncode:
        pytest.skip("no process namespaces here")
    notes = tmp_path / "notes"
    nodes = "2" if moment == "rendezvous" else "1"
    words = (*at(free_port(), 1, nodes=nodes), WORKER, str(notes), "hang")
    with Agent(tmp_path, *words, before=tuple(probe[:-1])) as outer:
        (pid,) = wait_for(lambda: children_of(outer.process.pid), "the agent")
        assert Path(f"/proc/{pid}/status").read_text().partition("NSpid:")[2].split()[1] == "1"
        if moment == "rendezvous":
            outer.await_text("meeting the other agents")
        else:
            wait_for(lambda: any("hangs" in x.read_text() for x in tmp_path.glob("notes-*")), "it")
            (worker,) = children_of(pid)
            leave = ["sh", "-c", "sleep 999 & exec true"]  # a child that outlives its parent
            subprocess.run(["nsenter", "-t", str(pid), "-p", *leave], check=True, timeout=60)
            (orphan,) = wait_for(lambda: set(children_of(pid)) - {worker}, "an orphan")
            os.kill(orphan, signal.SIGKILL)
            wait_for(lambda: children_of(pid, dead=True) == [worker], "its burial")
        os.kill(pid, signal.SIGTERM)
        assert outer.seconds_to_end() < SOON
        assert outer.process.returncode == 143, outer.text()
        reason = json.loads(outer.message.read_text())["reason"]
    assert reason.startswith("stopped on SIGTERM")


def test_a_worker_that_does_not_stop_is_killed_in_time_and_the_code_says_so(
    tmp_path: Path,
) -> None:
    words = (*ALONE, "--shutdown-timeout=1", WORKER, str(tmp_path / "notes"), "deaf")
    with Agent(tmp_path, *words) as agent:
        wait_for(lambda: any("hangs" in x.read_text() for x in tmp_path.glob("notes-*")), "it")
        agent.signal()
        assert agent.seconds_to_end() < SOON
        assert agent.process.returncode == 137, agent.text()
        assert agent.post_mortem()["reason"] == "stopped on SIGTERM, but worker 0 ended with 137"


def test_a_port_that_is_taken_and_a_library_that_is_not_there_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError('not installed')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    words = (*ALONE, f"--metrics-port={free_port()}", WORKER, "x", "0")
    with Agent(tmp_path, *words, PYTHONPATH=path) as agent:
        assert agent.end() == ExitCode.USAGE == 64, agent.text()
    assert "pip install 'fmnist-dist[agent]'" in agent.text().splitlines()[-1]
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with Agent(tmp_path, *ALONE, f"--metrics-port={port}", WORKER, "x", "0") as agent:
            assert agent.end() == ExitCode.INCOMPATIBLE == 78, agent.text()
    assert f"port {port} is not free" in agent.text().splitlines()[-1]
