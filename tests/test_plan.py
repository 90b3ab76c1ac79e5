"""What step does what: every sample once an epoch, whatever was changed on the way."""

import math
from dataclasses import asdict, replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmnist_dist.plan import Plan, Schedule, Settings, Step, shape, shard_bounds, shards_of_rank

FIRST = Settings(
    epochs=4,
    batch_size=8,
    lr=0.4,
    schedule="triangular",
    weight_decay=0.0,
    label_smoothing=0.0,
    ema=0.9,
    augment="none",
)
SCHEDULES = get_args(Schedule)


def plan_of(num_samples: int, *overrides: tuple[int, dict[str, Any]], **changed: Any) -> Plan:
    return Plan(replace(FIRST, **changed), num_samples=num_samples, overrides=overrides)


def steps_of(plan: Plan) -> list[Step]:
    return [plan.at(step) for step in range(plan.total_steps)]


def assert_every_epoch_is_whole(plan: Plan) -> None:
    """Check that each epoch's steps cover [0, n) in order, without a gap or an overlap."""
    expected = (0, 0)
    for each in steps_of(plan):
        assert (each.epoch, each.position) == expected
        assert 0 < each.size <= each.settings.batch_size
        point = plan.point(each.step)
        assert (point.step, point.epoch, point.position) == (each.step, *expected)
        end = each.position + each.size
        assert each.ends_epoch(plan.num_samples) == (end == plan.num_samples)
        expected = (each.epoch + 1, 0) if end == plan.num_samples else (each.epoch, end)
    assert expected[1] == 0  # the last epoch is whole too


def test_the_last_batch_of_an_epoch_is_what_is_left() -> None:
    steps = steps_of(plan_of(20, epochs=2))
    assert [(each.epoch, each.position, each.size) for each in steps] == [
        (0, 0, 8), (0, 8, 8), (0, 16, 4), (1, 0, 8), (1, 8, 8), (1, 16, 4)
    ]  # fmt: skip


def test_epochs_done_counts_samples() -> None:
    plan = plan_of(20)
    assert [plan.epochs_done(step) for step in (0, 1, 3, 5)] == [0.0, 0.4, 1.0, 1.8]


@given(num_samples=st.integers(1, 200), batch_size=st.integers(1, 250), epochs=st.integers(1, 4))
@settings(deadline=None)
def test_a_plan_without_overrides_covers_every_epoch(
    num_samples: int, batch_size: int, epochs: int
) -> None:
    plan = plan_of(num_samples, batch_size=batch_size, epochs=epochs)
    assert plan.total_steps == epochs * math.ceil(num_samples / batch_size)
    assert_every_epoch_is_whole(plan)


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "epochs": st.integers(1, 6),
        "batch_size": st.integers(1, 25),
        "lr": st.floats(0.001, 1.0),
        "schedule": st.sampled_from(SCHEDULES),
        "weight_decay": st.floats(0.0, 1.0),
        "augment": st.sampled_from(["none", "flip"]),
    },
)


@given(num_samples=st.integers(1, 40), batch_size=st.integers(1, 25), data=st.data())
@settings(deadline=None, max_examples=150)
def test_any_changes_made_on_the_way_leave_every_epoch_whole(
    num_samples: int, batch_size: int, data: st.DataObject
) -> None:
    """Launches go on from any checkpoint, older ones too, and change settings there."""
    made: list[tuple[int, dict[str, Any]]] = []
    plan = plan_of(num_samples, batch_size=batch_size)
    for _ in range(data.draw(st.integers(0, 5), label="launches")):
        step = data.draw(st.integers(0, plan.total_steps), label="step")
        changed = data.draw(CHANGES, label="changed")
        middle = plan.point(step).position != 0
        other_size = changed.get("batch_size", size_at(plan, step)) != size_at(plan, step)
        if middle and other_size:
            with pytest.raises(ValueError, match="at an epoch's boundary only"):
                plan_of(num_samples, *made, (step, changed), batch_size=batch_size)
            continue
        made.append((step, changed))
        plan = plan_of(num_samples, *made, batch_size=batch_size)
        assert_settings_are_the_newest_word(plan, made, replace(FIRST, batch_size=batch_size))
    assert_every_epoch_is_whole_until_the_epochs_were_cut(plan)


def size_at(plan: Plan, step: int) -> int:
    """Return the batch size that holds before anything that is changed at `step`."""
    return plan.at(step).settings.batch_size


def assert_settings_are_the_newest_word(
    plan: Plan, made: list[tuple[int, dict[str, Any]]], first: Settings
) -> None:
    steps = range(plan.total_steps + 3)
    expected = [asdict(first) for _ in steps]
    for since, changed in made:
        for fields in expected[since:]:
            fields.update(changed)
    assert [asdict(plan.at(step).settings) for step in steps] == expected


def assert_every_epoch_is_whole_until_the_epochs_were_cut(plan: Plan) -> None:
    """As above; a change to fewer epochs than were begun ends the run where it stands."""
    if plan.point(plan.total_steps).position == 0:
        assert_every_epoch_is_whole(plan)
    else:
        assert plan.point(plan.total_steps).epoch >= plan.settings.epochs


def test_the_batch_size_changes_at_the_boundary_of_an_epoch() -> None:
    plan = plan_of(20, (3, {"batch_size": 10}), epochs=2)
    assert [each.size for each in steps_of(plan)] == [8, 8, 4, 10, 10]
    with pytest.raises(ValueError, match="step 4 is 8 samples into epoch 2"):
        plan_of(20, (4, {"batch_size": 10}))


def test_naming_the_same_batch_size_in_mid_epoch_changes_nothing() -> None:
    assert steps_of(plan_of(20, (4, {"batch_size": 8}))) == steps_of(plan_of(20))


def test_a_learning_rate_changed_in_mid_run_scales_the_rest_of_the_schedule() -> None:
    before, after = steps_of(plan_of(64)), steps_of(plan_of(64, (10, {"lr": 0.1})))
    assert after[:10] == before[:10]
    assert [each.lr for each in after[10:]] == pytest.approx([each.lr / 4 for each in before[10:]])


def test_more_epochs_are_a_new_leg_of_the_schedule_from_that_step() -> None:
    first = plan_of(64)
    longer = plan_of(64, (first.total_steps, {"epochs": 6}))
    assert steps_of(longer)[: first.total_steps] == steps_of(first)
    new_leg = [each.lr for each in steps_of(longer)[first.total_steps :]]
    alone = [each.lr for each in steps_of(plan_of(64, epochs=2))]
    assert new_leg == alone
    assert longer.total_steps == 6 * 8


def test_more_epochs_in_mid_run_begin_their_schedule_there() -> None:
    plan = plan_of(64, (13, {"epochs": 9}))
    rates = [each.lr for each in steps_of(plan)[13:]]
    assert rates == [0.4 * shape("triangular", step, 9 * 8 - 13) for step in range(9 * 8 - 13)]
    assert_every_epoch_is_whole(plan)


@pytest.mark.parametrize("changed", [{"lr": 0.1}, {"weight_decay": 0.1}, {"augment": "flip"}])
def test_other_changes_do_not_begin_the_schedule_anew(changed: dict[str, Any]) -> None:
    plan = plan_of(64, (13, {"epochs": 9}), (20, changed))
    peak = changed.get("lr", 0.4)
    assert plan.at(20).lr == peak * shape("triangular", 20 - 13, 9 * 8 - 13)


@pytest.mark.parametrize("schedule", ["triangular", "cosine"])
@pytest.mark.parametrize("total", [50, 117, 938, 100_000])
def test_a_schedule_rises_once_falls_once_and_ends_near_zero(
    schedule: Schedule, total: int
) -> None:
    shares = [shape(schedule, step, total) for step in range(total)]
    top = shares.index(max(shares))
    assert shares[top] == 1.0
    assert shares[: top + 1] == sorted(shares[: top + 1])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert 0.15 * total < top < 0.25 * total
    assert 0 < shares[-1] < 1.5 / (0.8 * total)
    assert 0 < shares[0] <= 5.1 / total


@given(st.sampled_from(SCHEDULES), st.integers(1, 400), st.integers(0, 500))
def test_a_share_of_the_peak_is_above_zero_and_at_most_one(
    schedule: Schedule, total: int, step: int
) -> None:
    assert 0 < shape(schedule, step, total) <= 1


def test_a_constant_schedule_is_constant() -> None:
    assert {each.lr for each in steps_of(plan_of(64, schedule="constant"))} == {0.4}


def test_a_run_that_fell_back_takes_the_newest_word() -> None:
    """At step 10 the rate became 0.1; then the run fell back to 6, and was told 0.2."""
    plan = plan_of(
        64, (10, {"lr": 0.1, "weight_decay": 0.5}), (6, {"lr": 0.2}), schedule="constant"
    )
    assert [plan.at(step).lr for step in (5, 6, 9, 10, 31)] == [0.4, 0.2, 0.2, 0.2, 0.2]
    assert [plan.at(step).settings.weight_decay for step in (9, 10)] == [0.0, 0.5]


def test_a_run_that_fell_back_without_another_word_repeats_what_was_changed() -> None:
    plan = plan_of(64, (10, {"lr": 0.1}), schedule="constant")
    assert [plan.at(step).lr for step in (9, 10)] == [0.4, 0.1]


def test_two_words_at_one_step_are_both_heard_and_the_later_wins() -> None:
    plan = plan_of(64, (10, {"lr": 0.1, "ema": 0.5}), (10, {"lr": 0.2}), schedule="constant")
    assert (plan.at(10).lr, plan.at(10).settings.ema) == (0.2, 0.5)
    assert plan.at(9).lr == 0.4


def test_fewer_epochs_than_are_done_end_the_run() -> None:
    assert plan_of(64, (20, {"epochs": 1})).total_steps == 20


@given(st.integers(0, 2000), st.integers(1, 64))
def test_shards_cover_a_batch_and_differ_by_at_most_one_sample(size: int, shards: int) -> None:
    bounds = shard_bounds(size, logical_shards=shards)
    assert len(bounds) == shards
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == size
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1
    assert size == 0 or sizes[0] > 0
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 64), st.data())
def test_ranks_share_the_shards_in_order_and_none_goes_without(
    shards: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, shards))
    ranges = [
        shards_of_rank(rank, world_size=world_size, logical_shards=shards)
        for rank in range(world_size)
    ]
    assert [shard for each in ranges for shard in each] == list(range(shards))
    assert {len(each) for each in ranges} <= {shards // world_size, -(-shards // world_size)}
