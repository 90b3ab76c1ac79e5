"""Claims about the settings themselves: their list, limits, roles and their form in a run's log."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmnist_dist.config import IDENTITY, LAUNCH, OVERRIDABLE, Config, from_json, rules, to_json
from fmnist_dist.errors import ExitCode, IncompatibleError
from fmnist_dist.rule import InvalidSettingError

# Flags, variables and keys that people have written down. Only add; a name that goes breaks them.
FROZEN = [
    "run_dir",
    "max_steps",
    "seed",
    "log_format",
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "schedule",
    "weight_decay",
    "label_smoothing",
    "ema",
    "on_non_finite",
    "model",
    "dropout",
    "precision",
    "dataset",
    "data_dir",
    "augment",
    "eval_every_epochs",
    "device",
    "logical_shards",
    "threads_per_worker",
    "step_timeout",
    "drain_seconds",
    "no_keeper",
    "save_every_steps",
    "save_every_seconds",
    "keep_last",
    "keep_every",
    "max_unsaved_seconds",
    "local_tier",
    "single_writer",
]


def refused(**settings: Any) -> str:
    with pytest.raises(InvalidSettingError) as caught:
        Config(**settings)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_list_of_settings_is_frozen() -> None:
    assert [field.name for field in dataclasses.fields(Config)] == FROZEN
    assert list(rules()) == FROZEN


def test_every_public_class_attribute_is_a_field() -> None:
    public = {name for name in vars(Config) if not name.startswith("_")}
    assert public == set(FROZEN)


def test_every_setting_has_exactly_one_role() -> None:
    assert sorted([*IDENTITY, *OVERRIDABLE, *LAUNCH]) == sorted(FROZEN)


def test_the_defaults_are_valid_and_have_their_own_types() -> None:
    config = Config()
    for name, rule in rules().items():
        value = getattr(config, name)
        assert value is None if rule.optional and value is None else isinstance(value, rule.kind)


@pytest.mark.parametrize("name", [n for n, rule in rules().items() if rule.kind in {int, float}])
@pytest.mark.parametrize("value", [-1, True, math.nan, math.inf, -math.inf, "1", [1], 10**400])
def test_no_number_is_negative_infinite_a_bool_or_text(name: str, value: object) -> None:
    assert refused(**{name: value}).startswith(f"{name}: found ")


@pytest.mark.parametrize(
    "name",
    [
        "epochs",
        "batch_size",
        "lr",
        "eval_every_epochs",
        "logical_shards",
        "threads_per_worker",
        "step_timeout",
        "drain_seconds",
        "max_steps",
        "save_every_steps",
        "save_every_seconds",
        "keep_last",
        "keep_every",
        "max_unsaved_seconds",
    ],
)
def test_what_must_be_positive_is_not_zero(name: str) -> None:
    assert "above 0" in refused(**{name: 0})


@pytest.mark.parametrize("name", ["seed", "weight_decay", "ema", "dropout", "label_smoothing"])
def test_what_may_be_zero_may_be_zero(name: str) -> None:
    assert getattr(from_json({name: 0}), name) == 0


@pytest.mark.parametrize("name", ["ema", "dropout", "label_smoothing"])
def test_a_fraction_is_below_one(name: str) -> None:
    assert (
        refused(**{name: 1.0}) == f"{name}: found 1.0, expected a number of at least 0 and below 1"
    )


def test_a_batch_that_the_shards_do_not_divide_is_refused() -> None:
    assert refused(batch_size=500).endswith("expected a multiple of logical_shards = 8")
    assert Config(batch_size=500, logical_shards=4).batch_size == 500


@pytest.mark.parametrize("url", ["file://", "s3://", "", "a\nb", "\udcff", "s3:///run?v=1", "://x"])
def test_what_can_name_no_run_is_refused(url: str) -> None:
    assert "expected a path or a URL as in s3://bucket/folder" in refused(run_dir=url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket",
        "s3://bucket/run",
        "gs://b/a/b",
        "memory://x",
        "file:///tmp/a?b",
        "abfs://container@account.dfs.core.windows.net/run",
        "sftp://host:22/run",
        "of/a:b@c?d",
    ],
)
def test_a_run_may_be_on_any_storage(url: str) -> None:
    assert Config(run_dir=url).run_dir == url


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEYPLANTED:SECRETPLANTED@bucket/run",
        "s3://KEYPLANTED:SECRET/PLANTED@bucket/run",
        "s3://KEYPLANTED:SECRETPLANTED/bucket/run",
        "s3://bucket/run?secret=SECRETPLANTED",
        "s3://KEYPLANTED:SECRETPLANTED@bucket/run?x=SECRETPLANTED#SECRETPLANTED",
        "https://user:SECRETPLANTED@host:80/run",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_shown(url: str) -> None:
    said = refused(run_dir=url)
    assert "AWS_ACCESS_KEY_ID" in said  # where they belong
    assert "PLANTED" not in said


def test_whole_numbers_for_fractional_settings_become_floats() -> None:
    # Otherwise two equal configurations would be written differently into the run's log.
    assert json.dumps(to_json(Config(lr=1))) == json.dumps(to_json(Config(lr=1.0)))


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 0.1  # type: ignore[misc]


def test_replacing_a_setting_checks_it_again() -> None:
    with pytest.raises(InvalidSettingError):
        dataclasses.replace(Config(), epochs=0)


@given(
    lr=st.floats(1e-12, 1e6),
    seed=st.integers(0, 2**63 - 1),
    shards=st.integers(1, 64),
    seconds=st.none() | st.floats(0.001, 1e6),
    data=st.none() | st.from_regex(r"[a-z/. é]+", fullmatch=True),
)
def test_a_configuration_survives_the_log(
    lr: float, seed: int, shards: int, seconds: float | None, data: str | None
) -> None:
    config = Config(
        lr=lr,
        seed=seed,
        logical_shards=shards,
        batch_size=shards * 3,
        save_every_seconds=seconds,
        data_dir=None if data is None else Path(data),
    )
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_a_log_without_a_setting_means_its_default() -> None:
    assert from_json({"lr": 0.1}) == Config(lr=0.1)


def test_a_log_with_a_setting_of_another_version_is_incompatible() -> None:
    with pytest.raises(IncompatibleError, match=r"momentum = 0\.9 that this version does not know"):
        from_json({"momentum": 0.9})
    with pytest.raises(IncompatibleError, match="optimizer: found 'lion', expected sgd or adamw"):
        from_json({"optimizer": "lion"})
