"""What a launch may ask of a run that exists: which settings must agree, which become overrides."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fmnist_dist.config import IDENTITY, OVERRIDABLE, Config
from fmnist_dist.errors import IncompatibleError
from fmnist_dist.plan import Settings


def settings_of(config: Config) -> Settings:
    """Return the settings that may change while the run goes on."""
    return Settings(**{each.name: getattr(config, each.name) for each in fields(Settings)})


def wanted_changes(
    *,
    base: Mapping[str, Any],
    current: Settings,
    previous_explicit: Mapping[str, Any],
    pending: Mapping[str, Any],
    explicit: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the settings that this launch changes.

    Only what its user wrote counts, and of that only what the user of the *previous* launch did not
    write alike: a rescheduled pod that still carries its old `--lr` undoes nothing that was changed
    since. `pending` is what an earlier launch asked for and died before it could make effective.
    Raises `IncompatibleError` where identity settings disagree with `base`, the run's own.
    """
    different = [
        f"{name} is {base[name]!r} in the run and {explicit[name]!r} now"
        for name in sorted(IDENTITY & explicit.keys())
        if explicit[name] != base[name]
    ]
    if "ema" in explicit and (explicit["ema"] > 0) != (base["ema"] > 0):
        different.append(f"ema is {base['ema']} in the run and {explicit['ema']} now (on or off)")
    if different:
        raise IncompatibleError(
            f"this run has other settings: {'; '.join(different)}; take the run's, or start "
            "another run with --run-dir"
        )
    said = {
        name: explicit[name]
        for name in OVERRIDABLE & explicit.keys()
        if name not in previous_explicit or explicit[name] != previous_explicit[name]
    }
    asked = {**pending, **said}
    return {name: asked[name] for name in sorted(asked) if asked[name] != getattr(current, name)}
