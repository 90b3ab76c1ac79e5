"""A launch has an agent on each host: it is known by any of them, whichever has the first rank."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from memory_storage import MemoryStorage
from run_builders import begin, snapshot

from fmnist_dist.checkpoint.fold import OWNERS_REMEMBERED
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.distributed.roster import OWNER_VARIABLE, Roster, call_roll
from fmnist_dist.errors import ExitCode, FencedError, OvertakenError
from fmnist_dist.takeover import owner_of


def owner(storage: MemoryStorage, *agents: str) -> str:
    return owner_of(RunLog(storage).read().head, agents)


def had_by(*owners: str) -> MemoryStorage:
    storage = MemoryStorage()
    for each in owners:
        begin(storage, each)
    return storage


@pytest.mark.parametrize(
    ("owners", "agents", "expected"),
    [
        ([], ["a", "b"], "a"),
        (["a"], ["a", "b"], "a"),
        (["b"], ["a", "b"], "b"),  # a has come to a launch that b had begun
        (["a", "b"], ["a", "b"], "b"),  # a is back, which was cut off
        (["a"], ["b", "c"], "b"),  # a is lost
        (["a", "b"], ["a", "c"], "c"),  # a is back, and b is lost
        (["a", "x"], ["b"], "b"),  # another launch, which this one supersedes
    ],
)
def test_a_launch_keeps_its_name_while_the_agent_is_there_that_gave_it(
    owners: list[str], agents: list[str], expected: str
) -> None:
    storage = had_by(*owners)
    name = owner(storage, *agents)
    assert name == expected
    assert begin(storage, name).attempt == len(owners) + 1


def test_a_launch_of_which_every_agent_was_superseded_does_not_come_back() -> None:
    storage = had_by("a", "b", "x")
    with pytest.raises(FencedError, match="another launch has taken this run over"):
        begin(storage, owner(storage, "a", "b"))


def test_taking_a_run_over_costs_no_more_reads_however_many_launches_it_has_had() -> None:
    storage, reads = MemoryStorage(), list[int]()
    for number in range(OWNERS_REMEMBERED + 2):
        storage.reads = 0
        begin(storage, f"launch {number}")
        reads.append(storage.reads)
    # To find the newest record, as `test_run_log` has it; a walk would be one for each launch.
    assert max(reads) <= 6 * math.ceil(math.log2(len(reads) + 1)) + 9
    for number in (1, OWNERS_REMEMBERED // 2, OWNERS_REMEMBERED):
        with pytest.raises(FencedError):
            begin(storage, f"launch {number}")
    begin(storage, "launch 0")  # nobody remembers it
    assert len(RunLog(storage).read().head.superseded) == OWNERS_REMEMBERED


def follow(storage: MemoryStorage, *agents: str) -> RunWriter:
    """Return the writer of a rank of the first attempt."""
    return RunWriter.follow(storage, RunLog(storage), attempt=1, parent=None, kin=agents)


def test_whoever_its_own_launch_has_left_behind_commits_nothing_and_is_to_join_it() -> None:
    storage = had_by("a")
    rank = follow(storage, "a", "b")
    begin(storage, "b")
    before = dict(storage.objects)
    with pytest.raises(OvertakenError, match="this launch went on without this worker") as caught:
        rank.save(snapshot(10))
    assert caught.value.exit_code == ExitCode.TRANSIENT == 75
    with pytest.raises(OvertakenError):
        follow(storage, "a", "b")
    assert storage.objects == before


def test_whoever_another_launch_has_superseded_is_not_to_come_back() -> None:
    storage = had_by("a")
    rank = follow(storage, "a", "b")
    begin(storage, "x")
    with pytest.raises(FencedError) as caught:
        rank.save(snapshot(10))
    assert caught.value.exit_code == ExitCode.FENCED == 76


def rosters(**environ: str) -> list[Roster]:
    """Return what a roll call of two ranks comes to, in an agent's store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "run", **environ}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    with ThreadPoolExecutor() as threads:
        calls = [
            threads.submit(call_roll, {**common, "RANK": str(rank)}, fork=lambda _: 0)
            for rank in range(2)
        ]
        return [each.result(60) for each in calls]


def test_the_pods_of_one_job_are_of_one_owner_however_often_they_are_replaced() -> None:
    first, second = rosters(**{OWNER_VARIABLE: "uid-1"})
    assert first.agents == second.agents == ("uid-1",)
    storage = had_by("uid-1")
    assert owner(storage, *first.agents) == "uid-1"  # other pods, the same Job
    with pytest.raises(FencedError):
        begin(had_by("uid-1", "uid-2"), owner(had_by("uid-1", "uid-2"), *first.agents))


def test_an_agent_that_nobody_has_named_is_known_by_itself() -> None:
    (agent,) = rosters()[0].agents
    assert agent.startswith("run-")
