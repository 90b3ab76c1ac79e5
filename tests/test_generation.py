"""How trainers meet again after deaths: pinned pieces, and every state of small worlds.

Each scene is searched completely, in every order of everything that may happen; each mistake that
somebody might make again is put back and must be found: so the checks can fail.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from every_state import Violation, visit
from generations import CHUNKS, NOTHING, Desk, Process, Rules, Scene, chunk
from laws import Laws, search
from worlds import Name, Trainer, World

from fmnist_dist.distributed import generation
from fmnist_dist.distributed.generation import (
    NUMBER,
    Arrival,
    GenerationMovedError,
    KeyValue,
    Lost,
    Meeting,
    PeersLeftError,
    await_key,
    await_keys,
    has_arrived,
    leave,
    left,
    meet,
    move,
    number,
)
from fmnist_dist.distributed.roster import StoreKeys
from fmnist_dist.distributed.transfer import TornStateError, adopt, digest_of

ONE_HOLDS = ((1, bytes([1] * CHUNKS)), NOTHING)
EVERY_FAILURE = frozenset({"dies", "late", "for good", "drains", "cut", "regroup", "flip"})
PATIENCE = 30.0


# The pieces, one by one.


@dataclass
class Store:
    """A store of one thread. `then` runs after every look at a key that is not there."""

    values: dict[str, str] = field(default_factory=dict)
    then: Callable[[str], None] = lambda _: None

    def get(self, key: str) -> str | None:
        return self.values.get(key)

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        found = self.values.keys() >= set(keys)
        if not found:
            self.then(keys[0])
        return found

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        if self.values.get(key, "") == expected:
            self.values[key] = desired
        return self.values.get(key, expected)


class Impatient(Exception):  # noqa: N818 - no error
    pass


def give_up() -> None:
    raise Impatient


def arriving(rank: int, *, step: int = -1, digest: str = "", lost: Lost | None = None) -> Arrival:
    return Arrival(rank=rank, incarnation=f"{rank}.1", step=step, digest=digest, lost=lost)


def meeting(*states: tuple[int, str]) -> Meeting:
    arrivals = [arriving(rank, step=s, digest=d) for rank, (s, d) in enumerate(states)]
    return Meeting(generation=0, arrivals=tuple(arrivals))


def test_the_source_is_the_lowest_of_the_ranks_with_the_highest_step() -> None:
    found = meeting((6, "a"), (7, "b"), (-1, ""), (7, "b"))
    assert (found.source, found.behind(), found.conflicting()) == (1, (0, 2), ())


def test_where_nobody_holds_a_state_there_is_no_source() -> None:
    found = meeting((-1, ""), (-1, ""))
    assert (found.source, found.behind(), found.conflicting()) == (None, (), ())


def test_another_digest_at_the_same_step_is_a_conflict_and_at_another_step_is_none() -> None:
    assert meeting((7, "b"), (6, "a"), (7, "c")).conflicting() == (2,)


@pytest.mark.parametrize("lost", [None, Lost(reason="SIGKILL", reached=41, seconds=0.25)])
def test_an_arrival_reads_as_it_was_written(lost: Lost | None) -> None:
    written = arriving(3, step=40, digest="ab", lost=lost)
    assert Arrival.decode(written.encode()) == written


def test_a_generation_that_many_see_fail_is_followed_by_one() -> None:
    store = Store()
    assert number(store) == 0
    assert [move(store, failed=0) for _ in range(3)] == [1, 1, 1]
    assert [move(store, failed=failed) for failed in (1, 0, 1)] == [2, 2, 2]
    assert number(store) == 2


def test_why_a_rank_has_left_is_what_it_said_first() -> None:
    store = Store()
    leave(store, rank=1, reason="drained")
    leave(store, rank=0, reason="finished")
    leave(store, rank=1, reason="it died on the way out")
    assert left(store) == {0: "finished", 1: "drained"}


def test_ranks_that_leave_at_once_are_both_told() -> None:
    @dataclass
    class Slow(Store):
        """Another rank leaves just before the first compare-and-set."""

        overtaken: bool = False

        def compare_set(self, key: str, expected: str, desired: str) -> str:
            if not self.overtaken:
                self.overtaken = True
                leave(self, rank=2, reason="finished")
            return super().compare_set(key, expected, desired)

    store = Slow()
    leave(store, rank=0, reason="finished")
    assert left(store) == {0: "finished", 2: "finished"}


def test_a_world_of_one_meets_itself() -> None:
    told: list[int] = []
    store = Store()
    found = meet(store, size=1, arrival=arriving(0), announce=told.append, pause=give_up)
    assert (found.generation, found.arrivals, told) == (0, (arriving(0),), [0])
    assert has_arrived(store, generation=0, rank=0)
    assert not has_arrived(store, generation=1, rank=0)


def test_who_waits_alone_is_called_between_looks() -> None:
    store = Store()
    with pytest.raises(Impatient):
        meet(store, size=2, arrival=arriving(0), announce=lambda _: None, pause=give_up)


def test_a_meeting_goes_on_in_the_newer_generation_when_the_number_moves() -> None:
    told: list[int] = []
    store = Store()

    def pause() -> None:  # a peer died in generation 0; its successor comes to 1
        move(store, failed=0)
        store.set("g/1/here/1", arriving(1).encode())

    found = meet(store, size=2, arrival=arriving(0), announce=told.append, pause=pause)
    assert (found.generation, told) == (1, [0, 1])


def test_who_comes_after_a_rank_has_left_does_not_arrive() -> None:
    store = Store()
    leave(store, rank=1, reason="failed for good")
    with pytest.raises(PeersLeftError, match="rank 1 has left: failed for good") as caught:
        meet(store, size=2, arrival=arriving(0), announce=lambda _: None, pause=give_up)
    assert caught.value.left == {1: "failed for good"}
    assert not has_arrived(store, generation=0, rank=0)


def test_what_was_told_in_a_generation_that_has_failed_is_not_heard() -> None:
    store = Store({"g/0/plan": "old"})
    assert await_key(store, "g/0/plan", generation=0, pause=give_up) == "old"
    move(store, failed=0)
    with pytest.raises(GenerationMovedError, match="generation 0 has failed, 1 meets"):
        await_key(store, "g/0/plan", generation=0, pause=give_up)


def test_what_a_rank_told_just_before_it_left_is_heard() -> None:
    store = Store()

    def tell_and_leave(key: str) -> None:
        store.set(key, "the end")
        leave(store, rank=0, reason="finished")

    store.then = tell_and_leave
    pauses: list[None] = []
    heard = await_key(store, "g/0/text", generation=0, pause=lambda: pauses.append(None))
    assert (heard, len(pauses)) == ("the end", 1)


def test_what_a_rank_that_has_left_did_not_tell_is_not_waited_for() -> None:
    store = Store()
    leave(store, rank=0, reason="drained")
    with pytest.raises(PeersLeftError):
        await_key(store, "g/0/text", generation=0, pause=give_up)


def test_a_state_that_differs_from_its_digest_is_not_adopted() -> None:
    assert adopt(b"state", digest=digest_of(b"state")) == b"state"
    with pytest.raises(TornStateError, match=r"4 bytes.*not used"):
        adopt(b"stat", digest=digest_of(b"state"))


# The stores: what is searched through answers as torch's do.


@pytest.fixture
def real() -> dist.TCPStore:
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE)
    )


@dataclass
class Modelled:
    """The store of the worlds that are searched, as a `KeyValue`."""

    laws: Laws = field(default_factory=lambda: Laws(Scene(size=1, failures=9, once=False)))

    def __post_init__(self) -> None:
        self.world = self.laws.first()._replace(failures=0)  # so many have happened

    def get(self, key: str) -> Any:
        return self.laws.look(self.world, ("get", key))

    def check(self, keys: list[str]) -> Any:
        return self.laws.look(self.world, ("check", tuple(keys)))

    def set(self, key: str, value: str) -> None:
        self.world, _ = self.laws.write(self.world, ("set", key, value))

    def compare_set(self, key: str, expected: str, desired: str) -> Any:
        operation = ("compare_set", key, expected, desired)
        self.world, answer = self.laws.write(self.world, operation)
        return answer


def test_the_stores_of_these_tests_answer_as_torch_does(real: dist.TCPStore) -> None:
    def conversation(keys: KeyValue) -> list[object]:
        said: list[object] = [keys.get("a"), keys.compare_set("a", "x", "y"), keys.get("a")]
        said += [keys.compare_set("a", "", "1"), keys.compare_set("a", "", "2"), keys.get("a")]
        said += [keys.compare_set("a", "1", "2"), keys.compare_set("a", "1", "3"), keys.get("a")]
        keys.set("b", "4")
        said += [keys.check(["a"]), keys.check(["a", "b"]), keys.check(["a", "c"])]
        said += [move(keys, failed=0), move(keys, failed=0), move(keys, failed=1), number(keys)]
        leave(keys, rank=1, reason="finished")
        return [*said, left(keys)]

    torch_says = conversation(StoreKeys(real))
    assert conversation(Store()) == torch_says
    assert conversation(Modelled()) == torch_says


def test_ranks_meet_over_a_real_store(real: dist.TCPStore) -> None:
    found: dict[int, Meeting] = {}
    clock = threading.Event()

    def be(rank: int) -> None:
        keys = StoreKeys(dist.TCPStore("127.0.0.1", real.port, is_master=False))
        found[rank] = meet(
            keys,
            size=3,
            arrival=arriving(rank),
            announce=lambda _: None,
            pause=lambda: None if not clock.wait(0.001) else give_up(),
        )

    ranks = [threading.Thread(target=be, args=(rank,)) for rank in range(3)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(PATIENCE)
    clock.set()
    assert found == dict.fromkeys(range(3), found[0])
    assert [each.rank for each in found[0].arrivals] == [0, 1, 2]


# Every state of small worlds: who lives ends at the last step, or is told that a peer has left.

ALL_FINISH = {("finished", "finished"), ("finished", "told"), ("told", "finished")}


def test_ranks_that_live_finish_and_some_learn_it_from_the_others() -> None:
    assert search(Scene(size=2, failures=0)).ends == ALL_FINISH


def test_one_failure_of_any_kind_anywhere_is_healed_or_told() -> None:
    found = search(Scene(size=2, failures=1, kinds=EVERY_FAILURE))
    assert found.ends > ALL_FINISH | {("drained", "told"), ("told", "failed for good")}
    assert found.states > 10_000


def test_two_deaths_anywhere_are_healed() -> None:
    found = search(Scene(size=2, failures=2, last=1))
    assert found.ends == ALL_FINISH | {("told", "told")}  # it died having said that it finished


def test_a_second_failure_while_the_state_is_sent_is_healed() -> None:
    kinds = frozenset({"dies", "flip"})
    search(Scene(size=2, failures=2, last=1, held=ONE_HOLDS, kinds=kinds))


def test_with_slots_no_death_takes_a_step_back() -> None:
    search(Scene(size=2, failures=1, slots=True))


def test_three_ranks_heal_the_death_of_one() -> None:
    search(Scene(size=3, failures=1, last=1, mortal=frozenset({1})))


def test_what_the_search_leaves_out_finds_no_other_end() -> None:
    scene = Scene(size=2, failures=1, last=0, held=ONE_HOLDS)
    found, whole = search(scene), search(replace(scene, reduced=False))
    assert found.ends == whole.ends
    assert whole.states > 5 * found.states


@pytest.mark.slow
@pytest.mark.parametrize(
    "scene",
    [
        Scene(size=2, failures=2, last=1, kinds=EVERY_FAILURE),
        Scene(size=2, failures=2, slots=True),
        Scene(size=2, failures=3, last=1),
        Scene(size=2, failures=2, held=ONE_HOLDS, kinds=frozenset({"dies", "cut", "flip"})),
        Scene(size=3, failures=1, last=1, kinds=EVERY_FAILURE),
        Scene(size=3, failures=1, held=(*ONE_HOLDS, NOTHING)),
        Scene(size=2, failures=1, last=1, kinds=EVERY_FAILURE, reduced=False),
    ],
    ids=lambda scene: f"{scene.size}-ranks-{scene.failures}-failures-{len(scene.kinds)}-kinds",
)
def test_larger_worlds_heal_too(scene: Scene) -> None:
    assert search(scene).ends


# Mistakes, put back.


def receive_in_place(mine: Process, desk: Desk, meeting: Meeting) -> None:
    source = meeting.arrivals[meeting.source or 0]
    buffer = b""
    for each in range(CHUNKS):
        buffer += chunk(desk, mine, source, each)
        if mine.rank in meeting.behind():
            mine.step, mine.data = source.step, buffer
    if mine.rank in meeting.behind():
        mine.hold(desk, mine.step, adopt(mine.data, digest=source.digest))


def test_a_state_received_in_place_is_advertised_torn() -> None:
    rules = Rules(receive=receive_in_place)
    with pytest.raises(Violation, match="goes on from a torn state"):
        search(Scene(size=2, failures=1, held=ONE_HOLDS, rules=rules))


def receive_unseen(mine: Process, desk: Desk, meeting: Meeting) -> None:
    source = meeting.arrivals[meeting.source or 0]
    data = b"".join(chunk(desk, mine, source, each) for each in range(CHUNKS))
    if mine.rank in meeting.behind():
        mine.hold(desk, source.step, data)


def test_a_state_whose_digest_nobody_compares_is_torn_by_a_flipped_bit() -> None:
    rules = Rules(receive=receive_unseen)
    kinds = frozenset({"flip"})
    with pytest.raises(Violation, match="goes on from a torn state"):
        search(Scene(size=2, failures=1, held=ONE_HOLDS, kinds=kinds, rules=rules))


def test_a_meeting_that_takes_nobodys_state_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(size=2, failures=0, held=(NOTHING, (1, bytes([1] * CHUNKS))))
    search(scene)
    monkeypatch.setattr(Meeting, "source", property(lambda _: None))
    with pytest.raises(Violation, match="goes on from 0, and somebody holds 1"):
        search(scene)


def count_up(keys: KeyValue, *, failed: int) -> None:
    text = keys.get(NUMBER) or ""
    keys.compare_set(NUMBER, text, str(int(text or 0) + 1))


def test_observers_who_all_count_up_end_a_generation_that_had_not_failed() -> None:
    rules = Rules(move=count_up, retreat=count_up)
    with pytest.raises(Violation, match="the number moves from 1 to 2: 1 failures"):
        search(Scene(size=2, failures=1, rules=rules))


class Uncounted(Laws):
    """Does not mind how far the number moves."""

    def _check_number(self, world: World, before: int, after: int) -> None:
        pass


def test_counting_up_costs_generations_and_nothing_else() -> None:
    """Why the number is checked by itself: no other harm would show the mistake."""
    laws = Uncounted(
        Scene(size=2, failures=1, last=1, rules=Rules(move=count_up, retreat=count_up))
    )
    assert visit(laws.first(), laws.following, states_max=100_000)
    assert laws.ends >= ALL_FINISH


def await_in_vain(
    keys: KeyValue, names: list[str], *, generation: int, pause: Callable[[], None]
) -> None:
    while not keys.check(names):
        if left(keys):
            raise PeersLeftError(left(keys))
        pause()


def test_a_group_over_a_store_whose_waits_do_not_end_is_stuck_by_a_death() -> None:
    with pytest.raises(Violation, match="stuck"):
        search(Scene(size=2, failures=1, rules=Rules(await_keys=await_in_vain)))


def await_the_dead(
    keys: KeyValue, names: list[str], *, generation: int, pause: Callable[[], None]
) -> None:
    while not keys.check(names):
        if number(keys) != generation:
            raise GenerationMovedError
        pause()


@pytest.mark.parametrize("kind", ["drains", "for good"])
def test_a_wait_that_does_not_ask_who_has_left_is_stuck(kind: str) -> None:
    kinds = frozenset({kind})
    with pytest.raises(Violation, match="stuck"):
        search(Scene(size=2, failures=1, kinds=kinds, rules=Rules(await_keys=await_the_dead)))


def fork_first(desk: Desk, rules: Rules, failed: int) -> None:
    desk.ask("fork")
    rules.move(desk, failed=failed)


def only_fork(desk: Desk, rules: Rules, failed: int) -> None:
    desk.ask("fork")


@pytest.mark.parametrize("heal", [fork_first, only_fork])
def test_a_keeper_that_forks_before_it_moves_the_number_splits_the_generation(
    heal: Callable[[Desk, Rules, int], None],
) -> None:
    scene = Scene(size=2, failures=1, rules=Rules(heal=heal))
    with pytest.raises(Violation, match="here/0 is written twice"):
        search(scene)
    with pytest.raises(Violation, match="generation 0 is split"):
        search(replace(scene, once=False))


Arrive = Callable[[Any, int, Arrival, Callable[[int], None], Callable[[], None], int], None]


def meet_by(arrive: Arrive) -> Callable[..., Meeting]:
    """Return a meeting whose ranks arrive, and wait, in another way."""

    def meet_so(
        keys: Desk,
        *,
        size: int,
        arrival: Arrival,
        announce: Callable[[int], None],
        pause: Callable[[], None],
    ) -> Meeting:
        while True:
            if left(keys):
                raise PeersLeftError(left(keys))
            here = number(keys)
            try:
                arrive(keys, size, arrival, announce, pause, here)
            except GenerationMovedError:
                continue
            arrivals = [keys.get(f"g/{here}/here/{rank}") for rank in range(size)]
            if None in arrivals:
                raise Violation(f"all are said to be in {here}: {arrivals}")
            decoded = [Arrival.decode(each) for each in arrivals if each is not None]
            return Meeting(generation=here, arrivals=tuple(decoded))

    return meet_so


def announce_last(
    keys: Desk,
    size: int,
    arrival: Arrival,
    announce: Callable[[int], None],
    pause: Callable[[], None],
    here: int,
) -> None:
    everyone = [f"g/{here}/here/{rank}" for rank in range(size)]
    keys.set(everyone[arrival.rank], arrival.encode())
    announce(here)
    await_keys(keys, everyone, generation=here, pause=pause)


def test_an_arrival_that_is_announced_too_late_splits_the_generation() -> None:
    """Not the first one: the board says 0 before anything is announced."""
    scene = Scene(size=2, failures=2, last=0, once=False, rules=Rules(meet=meet_by(announce_last)))
    with pytest.raises(Violation, match="generation 1 is split"):
        search(scene)


def count_in(key: str) -> Arrive:
    def arrive(
        keys: Desk,
        size: int,
        arrival: Arrival,
        announce: Callable[[int], None],
        pause: Callable[[], None],
        here: int,
    ) -> None:
        announce(here)
        keys.set(f"g/{here}/here/{arrival.rank}", arrival.encode())
        counter = key.format(here)
        keys.add(counter)
        while int(keys.get(counter) or 0) < size:
            if number(keys) != here:
                raise GenerationMovedError
            if left(keys):
                raise PeersLeftError(left(keys))
            pause()

    return arrive


def test_a_counter_of_arrivals_over_all_generations_says_all_here_too_early() -> None:
    with pytest.raises(Violation, match="all are said to be in 1"):
        search(Scene(size=2, failures=1, rules=Rules(meet=meet_by(count_in("counter")))))


class Unsplit(Laws):
    """Does not mind who meets whom."""

    @staticmethod
    def _check_met(world: World, rank: int, trainer: Trainer, name: Name) -> None:
        pass


def test_a_counter_of_arrivals_counts_a_rank_twice_where_the_keeper_only_forks() -> None:
    rules = Rules(meet=meet_by(count_in("g/{}/counter")), heal=only_fork)
    laws = Unsplit(Scene(size=2, failures=1, once=False, rules=rules))
    with pytest.raises(Violation, match="all are said to be in 0"):
        visit(laws.first(), laws.following, states_max=100_000)


def test_a_counter_per_generation_does_no_harm_while_the_keeper_moves_the_number_first() -> None:
    rules = Rules(meet=meet_by(count_in("g/{}/counter")))
    assert search(Scene(size=2, failures=1, last=0, rules=rules)).ends >= ALL_FINISH


def stay(keys: KeyValue, *, failed: int) -> None:
    pass


def test_a_survivor_that_does_not_move_the_number_meets_the_same_failure_for_ever() -> None:
    scene = Scene(size=2, failures=1, kinds=frozenset({"cut"}), rules=Rules(retreat=stay))
    with pytest.raises(Violation, match="is written twice"):
        search(scene)
    with pytest.raises(Violation, match="goes round for ever"):
        search(replace(scene, once=False))


def say_nothing(keys: KeyValue, *, rank: int, reason: str) -> None:
    pass


def test_a_rank_that_finishes_without_saying_so_is_waited_for() -> None:
    laws = Uncounted(Scene(size=2, failures=0, rules=Rules(leave=say_nothing)))
    with pytest.raises(Violation, match="stuck"):
        visit(laws.first(), laws.following, states_max=100_000)


def test_the_production_code_is_what_is_searched() -> None:
    rules = Rules()
    assert rules.meet is generation.meet
    assert rules.move is rules.retreat is generation.move
    assert rules.await_keys is generation.await_keys
    assert rules.leave is generation.leave
