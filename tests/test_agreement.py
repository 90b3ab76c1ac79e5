"""What a launch may ask of a run that exists."""

from typing import Any

import pytest

from fmnist_dist.agreement import settings_of, wanted_changes
from fmnist_dist.config import IDENTITY, OVERRIDABLE, Config, to_json
from fmnist_dist.errors import ExitCode, IncompatibleError

RUN = Config(lr=0.4, ema=0.99, seed=3)


def changes(
    explicit: dict[str, Any],
    *,
    previous: dict[str, Any] | None = None,
    pending: dict[str, Any] | None = None,
    current: Config = RUN,
) -> dict[str, Any]:
    return wanted_changes(
        base=to_json(RUN),
        current=settings_of(current),
        previous_explicit=previous or {},
        pending=pending or {},
        explicit=explicit,
    )


def other(value: Any) -> Any:
    """Return another value of the same type."""
    return f"{value}x" if isinstance(value, str) else value + 1


def test_a_launch_that_says_nothing_changes_nothing() -> None:
    assert changes({}) == {}


@pytest.mark.parametrize("name", sorted(OVERRIDABLE - {"ema"}))
def test_a_new_word_changes_a_setting_that_may_change(name: str) -> None:
    value = other(getattr(RUN, name))
    assert changes({name: value}) == {name: value}


@pytest.mark.parametrize("name", sorted(OVERRIDABLE - {"ema"}))
def test_the_word_of_the_launch_before_is_not_new(name: str) -> None:
    value = other(getattr(RUN, name))
    assert changes({name: value}, previous={name: value}) == {}


def test_a_word_that_says_what_holds_changes_nothing() -> None:
    assert changes({"lr": 0.4}) == {}


def test_a_rescheduled_launch_undoes_nothing_that_was_changed_since() -> None:
    now = Config(lr=0.1)
    assert changes({"lr": 0.4}, previous={"lr": 0.4}, current=now) == {}
    assert changes({"lr": 0.4}, previous={}, current=now) == {"lr": 0.4}


def test_what_a_killed_launch_asked_for_is_still_wanted() -> None:
    assert changes({}, pending={"lr": 0.1}) == {"lr": 0.1}
    assert changes({"lr": 0.1}, previous={"lr": 0.1}, pending={"lr": 0.1}) == {"lr": 0.1}


def test_a_newer_word_beats_what_a_killed_launch_asked_for() -> None:
    assert changes({"lr": 0.2}, previous={"lr": 0.1}, pending={"lr": 0.1}) == {"lr": 0.2}
    assert changes({"lr": 0.4}, previous={"lr": 0.1}, pending={"lr": 0.1}) == {}


@pytest.mark.parametrize("name", sorted(IDENTITY))
def test_another_identity_is_refused_with_old_and_new(name: str) -> None:
    old, new = getattr(RUN, name), other(getattr(RUN, name))
    with pytest.raises(IncompatibleError) as caught:
        changes({name: new})
    assert f"{name} is {old!r} in the run and {new!r} now" in str(caught.value)
    assert caught.value.exit_code == ExitCode.INCOMPATIBLE == 78


@pytest.mark.parametrize("name", sorted(IDENTITY))
def test_the_same_identity_is_no_change(name: str) -> None:
    assert changes({name: getattr(RUN, name)}) == {}


def test_another_identity_is_refused_even_if_the_launch_before_said_the_same() -> None:
    with pytest.raises(IncompatibleError):
        changes({"seed": 4}, previous={"seed": 4})


def test_all_that_differs_is_told_at_once() -> None:
    with pytest.raises(IncompatibleError, match=r"logical_shards .*; seed .*; ema .*--run-dir"):
        changes({"seed": 4, "logical_shards": 4, "ema": 0.0})


def test_averaging_may_change_its_decay_and_not_begin_or_end() -> None:
    assert changes({"ema": 0.5}) == {"ema": 0.5}
    with pytest.raises(IncompatibleError, match="on or off"):
        changes({"ema": 0.0})


def test_settings_of_one_launch_are_none_of_the_runs_business() -> None:
    assert changes({"max_steps": 5, "run_dir": "x", "keep_last": 1}) == {}
