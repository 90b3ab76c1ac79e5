"""The agent on hosts of their own, whose rendezvous store is cut off, killed, and comes back.

What torchrun's agents do there is in `test_hosts.py`: they hang, or they die.
"""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hosts
import jobs
import pytest
from alone import FLAGS, files_of_undisturbed
from hosts import Host, Launch, Network
from jobs import files_of_newest, ledger, reached, show, wait_for
from run_files import assert_sound, checkpoints

MORE_FLAGS = [f"--max-steps={100}", "--dropout=0.2"]
_READ = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode(), end='')"
SILENT_SECONDS = 10.0  # of a store: twice the 5 s of `SHORT_RENDEZVOUS`
AWAY = "the rendezvous store is away"

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def needs_hosts() -> None:
    if missing := hosts.missing():
        pytest.skip(missing)


@pytest.fixture(autouse=True)
def shorter_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LIMIT_SECONDS", 120.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return files_of_undisturbed(tmp_path_factory.mktemp("undisturbed"), *MORE_FLAGS)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Two hosts that train together, slowly, and a third one with the store."""
    with Network() as network:
        launch = Launch(network, tmp_path / "run", *FLAGS, *MORE_FLAGS, launcher="launch.agent")
        for host in hosts_of(launch):
            launch.start(host)
        wait_for(lambda: worlds(launch.run) == [2] and reached(launch.run)[1] >= 2, "both to train")
        yield launch


def hosts_of(launch: Launch) -> list[Host]:
    if len(launch.network.hosts) == 1:
        for number in (1, 2):
            launch.network.add(number)
    return launch.network.hosts[1:]


def worlds(run: Path) -> list[int]:
    return [each["world_size"] for each in show(run)["attempts"]] if run.exists() else []


def await_away(launch: Launch) -> None:
    wait_for(lambda: all(AWAY in host.text() for host in hosts_of(launch)), "both to see it")


def finish(launch: Launch, undisturbed: dict[str, str]) -> None:
    """See it end with the bits of an undisturbed run, and nothing lost."""
    launch.release()
    for agent in launch.agents:
        assert agent.wait(jobs.LIMIT_SECONDS) == 0, launch.text()
    assert files_of_newest(launch.run) == undisturbed
    attempts = show(launch.run)["attempts"]
    assert [each["lost_steps"] for each in attempts] == [0] * len(attempts)
    assert_sound(launch.run)
    proof = ledger(launch.run)
    assert proof.returncode == 0, proof.stdout + proof.stderr


def test_hosts_with_ipv6_alone_are_probed_lose_one_and_go_on(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    """As pods have on a cluster of that kind: their kubelet asks for /healthz there, too."""
    with Network(ipv6=True) as network:
        launch = Launch(
            network,
            tmp_path / "run",
            *FLAGS,
            *MORE_FLAGS,
            launcher="launch.agent",
            PET_METRICS_PORT="9400",
        )
        one, other = hosts_of(launch)
        for host in (one, other):
            launch.start(host)
        wait_for(lambda: worlds(launch.run) == [2] and reached(launch.run)[1] >= 2, "both to train")
        for host in (one, other):
            page = f"http://{host.in_url}:9400/healthz"
            assert launch.store.run(sys.executable, "-c", _READ, page) == "training\n"
        assert one.kill()
        launch.await_step(reached(launch.run)[1] + 2, attempt=1)
        launch.agents.pop(0)
        finish(launch, undisturbed)


def test_workers_train_on_while_the_store_is_cut_off_and_all_meet_when_it_is_back(
    launch: Launch, undisturbed: dict[str, str]
) -> None:
    launch.store.cut("both")
    wait_for(lambda: launch.store.dropped() > 0, "a packet to be dropped")
    await_away(launch)
    launch.await_step(reached(launch.run)[1] + 2)
    assert worlds(launch.run) == [2]
    launch.store.mend()
    launch.await_step(reached(launch.run)[1] + 1, attempt=1)
    finish(launch, undisturbed)
    assert worlds(launch.run) in ([2, 2], [2, 1, 2])  # the first one back may be alone for a moment


def test_the_end_of_the_run_needs_no_store(launch: Launch, undisturbed: dict[str, str]) -> None:
    launch.store.cut("both")
    await_away(launch)
    finish(launch, undisturbed)
    assert worlds(launch.run) == [2]


def test_a_store_that_was_killed_comes_back_empty_and_all_meet_in_it(
    launch: Launch, undisturbed: dict[str, str]
) -> None:
    assert launch.store.kill()
    await_away(launch)
    launch.await_step(reached(launch.run)[1] + 2)
    launch.serve()
    launch.await_step(reached(launch.run)[1] + 1, attempt=1)
    finish(launch, undisturbed)


def test_an_agent_cut_off_from_the_store_drains_in_its_time(launch: Launch) -> None:
    """Whether or not it has seen yet that the store is silent."""
    launch.store.cut("both")
    wait_for(lambda: launch.store.dropped() > 0, "a packet to be dropped")
    began = time.monotonic()
    for agent in launch.agents:
        agent.send_signal(signal.SIGTERM)
    codes = [agent.wait(jobs.LIMIT_SECONDS) for agent in launch.agents]
    assert codes == [143, 143], launch.text()
    assert time.monotonic() - began < SILENT_SECONDS
    assert checkpoints(launch.run)[-1].step == reached(launch.run)[1]
