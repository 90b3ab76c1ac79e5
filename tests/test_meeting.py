"""How ranks find each other in a store full of what dead attempts left behind."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from fmnist_dist import limits
from fmnist_dist.distributed.meeting import KeyValue, host_meeting, join_meeting, names_at
from fmnist_dist.errors import ExitCode, TransientError

WORLD = 4
ENOUGH_SECONDS = 30.0
SHORT_SECONDS = 0.05

Join = Callable[..., str]


class Killed(BaseException):
    pass


@dataclass
class Store:
    """A store that outlives attempts, as torchrun's does."""

    values: dict[str, str] = field(default_factory=dict)

    def get(self, key: str) -> str | None:
        return self.values.get(key)

    def set(self, key: str, value: str) -> None:
        self.values[key] = value


@dataclass
class Mortal:
    """A rank's access to the store; the rank dies instead of its n-th operation."""

    store: Store
    operations_left: int

    def get(self, key: str) -> str | None:
        self._use()
        return self.store.get(key)

    def set(self, key: str, value: str) -> None:
        self._use()
        self.store.set(key, value)

    def _use(self) -> None:
        if not self.operations_left:
            raise Killed
        self.operations_left -= 1


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROLL_CALL_POLL_SECONDS", 0.0005)


def attempt(
    accesses: list[KeyValue],
    *,
    join: Join = join_meeting,
    limit_seconds: float = ENOUGH_SECONDS,
) -> list[str]:
    """Let all ranks meet; return the nonces with which those left that were not killed."""
    left: list[str] = []
    errors: list[Exception] = []

    def be(rank: int, keys: KeyValue) -> None:
        try:
            if rank == 0:
                left.append(
                    host_meeting(
                        keys,
                        world_size=len(accesses),
                        limit_seconds=limit_seconds,
                    )
                )
            else:
                left.append(join(keys, rank=rank, limit_seconds=limit_seconds))
        except Killed:
            pass
        except Exception as error:  # noqa: BLE001 - told by the main thread
            errors.append(error)

    ranks = [threading.Thread(target=be, args=each) for each in enumerate(accesses)]
    random.shuffle(ranks)
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert errors == []
    return left


def drill(seed: int, *, join: Join = join_meeting, limit_seconds: float = ENOUGH_SECONDS) -> None:
    """Kill some attempts anywhere in their meeting; then the living must meet each other."""
    place, store = random.Random(seed), Store()
    dead: set[str] = set()
    for _ in range(place.randrange(1, 4)):
        mortals = [Mortal(store, place.randrange(0, 40)) for _ in range(WORLD)]
        dead.update(attempt(list(mortals)))
    left = attempt([store] * WORLD, join=join, limit_seconds=limit_seconds)
    assert left == [left[0]] * WORLD
    assert left[0] not in dead


def test_all_ranks_leave_with_the_nonce_of_the_living_host() -> None:
    for seed in range(60):
        drill(seed)


@pytest.mark.slow
def test_all_ranks_leave_with_the_nonce_of_the_living_host_many_times() -> None:
    for seed in range(1000, 2000):
        drill(seed)


def test_the_drill_finds_a_rank_that_leaves_on_any_confirmation() -> None:
    def careless(keys: KeyValue, *, rank: int, limit_seconds: float) -> str:
        for _ in range(10_000):
            nonce = keys.get("invitation")
            if nonce is not None:
                keys.set(f"answer/{nonce}/{rank}", "somebody")
                if keys.get(f"confirmed/{nonce}") is not None:
                    return nonce
            time.sleep(limits.ROLL_CALL_POLL_SECONDS)
        raise TransientError("nobody")

    with pytest.raises(AssertionError):
        drill_often(careless)


def drill_often(join: Join) -> None:
    for seed in range(60):
        drill(seed, join=join, limit_seconds=2.0)


def test_two_meetings_in_one_store_have_different_names() -> None:
    store = Store()
    first = attempt([store] * 2)
    second = attempt([store] * 2)
    assert first[0] != second[0]


def test_whoever_leaves_knows_the_names_of_all_in_their_order() -> None:
    store = Store()
    attempt([store] * 3)  # of others, whose answers are still there
    guests = [
        threading.Thread(
            target=join_meeting,
            args=[store],
            kwargs={"rank": rank, "limit_seconds": ENOUGH_SECONDS, "name": f"name of {rank}"},
        )
        for rank in (1, 2)
    ]
    for guest in guests:
        guest.start()
    nonce = host_meeting(store, world_size=3, limit_seconds=ENOUGH_SECONDS, name="the host")
    for guest in guests:
        guest.join()
    assert names_at(store, nonce) == ("the host", "name of 1", "name of 2")


def test_a_world_of_one_does_not_wait() -> None:
    assert host_meeting(Store(), world_size=1, limit_seconds=0.0)


def join_in_vain(store: Store) -> None:
    with pytest.raises(TransientError):
        join_meeting(store, rank=1, limit_seconds=4 * SHORT_SECONDS)


def test_a_rank_that_does_not_come_is_named_in_time() -> None:
    store = Store()
    guest = threading.Thread(target=lambda: join_in_vain(store))
    guest.start()
    began = time.monotonic()
    with pytest.raises(TransientError, match=r"ranks \[2\] of 3 did not come") as caught:
        host_meeting(store, world_size=3, limit_seconds=SHORT_SECONDS)
    assert time.monotonic() - began < SHORT_SECONDS + 5
    assert caught.value.exit_code == ExitCode.TRANSIENT == 75
    guest.join()


@pytest.mark.parametrize("left_behind", ["nothing", "an invitation", "a whole meeting"])
def test_a_rank_whose_host_does_not_come_says_so_in_time(left_behind: str) -> None:
    store = Store()
    if left_behind == "an invitation":
        attempt([Mortal(store, 1), Mortal(store, 30)])
        assert "invitation" in store.values
    if left_behind == "a whole meeting":
        attempt([store] * 2)
        assert any(key.startswith("confirmed/") for key in store.values)
    began = time.monotonic()
    with pytest.raises(TransientError, match="did not call rank 1 to a meeting") as caught:
        join_meeting(store, rank=1, limit_seconds=SHORT_SECONDS)
    assert time.monotonic() - began < SHORT_SECONDS + 5
    assert caught.value.exit_code == ExitCode.TRANSIENT


def test_answers_of_dead_ranks_do_not_make_a_living_host_leave() -> None:
    store = Store()
    attempt([store] * 3)  # a whole meeting, with all its answers
    with pytest.raises(TransientError, match=r"ranks \[1, 2\] of 3"):
        host_meeting(store, world_size=3, limit_seconds=SHORT_SECONDS)
