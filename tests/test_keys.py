"""Random keys with bits of our own, and the sums that prove what was gathered."""

from itertools import product
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fmnist_dist import digest, keys
from fmnist_dist.digest import EpochDigest
from fmnist_dist.keys import Stream

# The first outputs of SplitMix64 seeded with 0, as in the reference (prng.di.unimi.it).
REFERENCE = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_the_mixing_is_splitmix64() -> None:
    counters = [(each + 1) * keys._GAMMA & keys._MASK for each in range(3)]
    assert [keys._mix_int(each) for each in counters] == REFERENCE
    assert keys._mix_array(np.array(counters, np.uint64)).tolist() == REFERENCE


def test_keys_are_the_same_in_every_release() -> None:
    """A run that resumes after an upgrade must see the rest of its epoch in the same order."""
    assert keys.key(Stream.INIT, 0) == 0x6EF0F0B7AAB9A420
    assert keys.key(Stream.DROPOUT, 0, 117, 7) == 0xF019D8ACB111C2B7
    augment = keys.keys(Stream.AUGMENT, 1, 0, ids=np.arange(2))
    assert augment.dtype == np.uint64
    assert augment.tolist() == [0x14FBBF02083128D3, 0x1C27B22DFCF482C2]
    assert keys.identity_table(2).tolist() == [
        [7099196304891340675, 5489574816782564317],
        [1078230842061914391, -6574371761866159307],
    ]


@given(st.sampled_from(Stream), st.lists(st.integers(0, 2**64 - 1), max_size=3))
def test_a_key_fits_into_64_bits_and_repeats(stream: Stream, parts: list[int]) -> None:
    key = keys.key(stream, *parts)
    assert 0 <= key < 2**64
    assert key == keys.key(stream, *parts)


def test_streams_seeds_and_steps_do_not_share_keys() -> None:
    few = range(20)
    parts = [(), *product(few), *product(few, few), *product(few, few, few)]
    seen = {keys.key(stream, *each) for stream in Stream for each in parts}
    assert len(seen) == len(Stream) * len(parts)


def test_a_samples_keys_do_not_depend_on_who_else_is_in_the_batch() -> None:
    everything = keys.keys(Stream.DROPOUT, 7, ids=np.arange(1000))
    assert len(set(everything.tolist())) == 1000
    some = np.array([999, 5, 5, 0])
    assert keys.keys(Stream.DROPOUT, 7, ids=some).tolist() == everything[some].tolist()


def lanes_of(ids: list[int], num_samples: int) -> digest.Lanes:
    sums = keys.identity_table(num_samples)[ids].sum(axis=0)
    return int(sums[0]), int(sums[1])


@given(st.integers(1, 60), st.randoms(use_true_random=False), st.integers(1, 20))
@settings(deadline=None)
def test_an_epoch_adds_up_whatever_its_order_and_its_steps(
    num_samples: int, place: Random, batch_size: int
) -> None:
    ids = list(range(num_samples))
    place.shuffle(ids)
    ledger: tuple[EpochDigest, ...] = ()
    for start in range(0, num_samples, batch_size):
        batch = ids[start : start + batch_size]
        ledger = digest.add(ledger, epoch=3, count=len(batch), digest=lanes_of(batch, num_samples))
    assert ledger == (EpochDigest(epoch=3, count=num_samples, digest=digest.of_all(num_samples)),)


def test_a_sample_in_the_place_of_another_shows() -> None:
    for missing in range(20):
        for twice in range(20):
            ids = [each for each in range(20) if each != missing] + [twice]
            assert (lanes_of(ids, 20) == digest.of_all(20)) == (missing == twice)


def test_a_new_epoch_begins_a_new_entry() -> None:
    first = digest.add((), epoch=0, count=2, digest=(1, 2))
    both = digest.add(first, epoch=1, count=3, digest=(5, 6))
    assert both == (
        EpochDigest(epoch=0, count=2, digest=(1, 2)),
        EpochDigest(epoch=1, count=3, digest=(5, 6)),
    )


def test_sums_wrap_around_as_64_bit_integers_do() -> None:
    top, bottom = 2**63 - 1, -(2**63)
    ledger = digest.add((), epoch=0, count=1, digest=(top, bottom))
    ledger = digest.add(ledger, epoch=0, count=1, digest=(1, -1))
    assert ledger[0].digest == (bottom, top)
