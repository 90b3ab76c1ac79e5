"""What the user may ask for: every setting with its default, limits and role, as one flat value.

A `Config` that exists is valid: it checks and normalises its own fields, wherever they came from
(`settings` reads flags, environment and TOML; `from_json` a run's log). What follows from them
(steps, shards, learning rates) is the plan's, so no setting is ever patched in later.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from cyclopts import Group

from fmnist_dist.errors import IncompatibleError
from fmnist_dist.rule import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    URL,
    InvalidSettingError,
    Rule,
    flag,
    rule_of,
)
from fmnist_dist.usage import shown

Value = bool | int | float | str | None  # what a setting is in JSON

LogFormat = Literal["text", "json"]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["triangular", "cosine", "constant"]
Precision = Literal["fp32", "bf16"]
Augment = Literal["none", "flip", "crop-flip"]
Device = Literal["auto", "cpu", "cuda"]
OnNonFinite = Literal["stop", "skip", "rollback"]
Auto = Literal["auto"]
AUTO: Auto = "auto"

RUN = Group("Run", sort_key=1)

_run = partial(flag, RUN)
_training = partial(flag, Group("Training", sort_key=2))
_model = partial(flag, Group("Model", sort_key=3))
_data = partial(flag, Group("Data", sort_key=4))
_compute = partial(flag, Group("Compute", sort_key=5))
_saving = partial(flag, Group("Checkpoints", sort_key=6))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every setting of `fmnist_dist.train`; raises InvalidSettingError for the first wrong one.

    An optional setting is off when it is None, spelled `none` in flags, environment and TOML.
    """

    run_dir: Annotated[
        str, URL, _run("path or any fsspec URL; a run found there goes on", "URL")
    ] = "runs/default"
    max_steps: Annotated[int | None, POSITIVE, _run("stop here; schedule unchanged", "STEP")] = None
    seed: Annotated[int, NOT_NEGATIVE, _run("of all random choices", "N")] = 0
    log_format: Annotated[LogFormat, _run("log lines", "FORMAT")] = "text"

    epochs: Annotated[int, POSITIVE, _training("passes over the training set", "N")] = 8
    batch_size: Annotated[int, POSITIVE, _training("per step, all workers", "SAMPLES")] = 512
    optimizer: Annotated[Optimizer, _training("update rule", "NAME")] = "sgd"
    lr: Annotated[float, POSITIVE, _training("learning rate at its highest", "RATE")] = 0.2
    schedule: Annotated[Schedule, _training("learning rate over time", "NAME")] = "triangular"
    weight_decay: Annotated[float, NOT_NEGATIVE, _training("pull of weights to 0", "RATE")] = 0.0001
    label_smoothing: Annotated[float, FRACTION, _training("spread over all classes", "SHARE")] = 0.0
    ema: Annotated[float, FRACTION, _training("of averaged weights; 0 = off", "DECAY")] = 0.99
    on_non_finite: Annotated[OnNonFinite, _training("when the loss is no number", "WHAT")] = "stop"

    model: Annotated[Literal["cnn"], _model("network", "NAME")] = "cnn"
    dropout: Annotated[float, FRACTION, _model("units left out while training", "SHARE")] = 0.0
    precision: Annotated[Precision, _model("arithmetic", "TYPE")] = "fp32"

    dataset: Annotated[Literal["fashion-mnist"], _data("what to learn", "NAME")] = "fashion-mnist"
    data_dir: Annotated[Path | None, _data("folder of its files", "PATH")] = None
    augment: Annotated[Augment, _data("of training images", "NAME")] = "flip"
    eval_every_epochs: Annotated[int, POSITIVE, _data("between two evaluations", "EPOCHS")] = 1

    device: Annotated[Device, _compute("auto = a GPU if any", "NAME")] = "auto"
    logical_shards: Annotated[int, POSITIVE, _compute("parts of a batch; most workers", "N")] = 8
    threads_per_worker: Annotated[int, POSITIVE, _compute("CPU threads of each worker", "N")] = 1
    step_timeout: Annotated[
        float | None, POSITIVE, _compute("a worker without progress; none = 20 steps", "SECONDS")
    ] = None
    drain_seconds: Annotated[float, POSITIVE, _compute("to save after SIGTERM", "SECONDS")] = 20.0
    no_keeper: Annotated[
        bool, _compute("for debuggers: train without a keeper", has_negative=False)
    ] = False

    save_every_steps: Annotated[
        int | Auto | None, POSITIVE, _saving("between two saves; losing least time", "STEPS")
    ] = None
    save_every_seconds: Annotated[
        float | None, POSITIVE, _saving("between two saves; with auto none", "SECONDS")
    ] = 60.0
    keep_last: Annotated[int, POSITIVE, _saving("newest checkpoints to keep", "N")] = 3
    keep_every: Annotated[int | None, POSITIVE, _saving("also keep multiples", "STEPS")] = None
    max_unsaved_seconds: Annotated[float, POSITIVE, _saving("while storage is away", "SECONDS")] = (
        1800.0
    )
    local_tier: Annotated[Path | None, _saving("save here first: this node's disk", "DIR")] = None
    single_writer: Annotated[bool, _saving("promise: nothing else writes there")] = False

    def __post_init__(self) -> None:
        for name, rule in rules().items():
            # Once, before anybody can have seen the value.
            object.__setattr__(self, name, rule.accept(name, getattr(self, name)))
        if self.batch_size % self.logical_shards:
            raise InvalidSettingError(
                "batch_size",
                f"found {self.batch_size}, expected a multiple of logical_shards = "
                f"{self.logical_shards}",
                other="logical_shards",
            )


# Every setting has exactly one role.
# IDENTITY must agree with the run: another value would be another run with other bits.
IDENTITY = frozenset(
    {
        "seed",
        "logical_shards",
        "model",
        "dropout",
        "dataset",
        "precision",
        "threads_per_worker",
        "optimizer",
    }
)
# OVERRIDABLE may change while a run goes on; the run's log then holds from which step on.
OVERRIDABLE = frozenset(
    {
        "epochs",
        "batch_size",
        "lr",
        "schedule",
        "weight_decay",
        "label_smoothing",
        "ema",
        "augment",
        "on_non_finite",
    }
)
# LAUNCH belongs to one launch and is never remembered by the run.
LAUNCH = frozenset(
    {
        "run_dir",
        "max_steps",
        "log_format",
        "data_dir",
        "eval_every_epochs",
        "device",
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
    }
)


@cache
def rules() -> dict[str, Rule]:
    """Return the rule of each setting, in the order of the fields."""
    hints = get_type_hints(Config, include_extras=True)
    return {name: rule_of(hint) for name, hint in hints.items()}


def to_json(config: Config) -> dict[str, Value]:
    """Return every setting by field name, as JSON can hold it."""
    values = ((name, getattr(config, name)) for name in rules())
    return {name: str(value) if isinstance(value, Path) else value for name, value in values}


def from_json(settings: Mapping[str, Any]) -> Config:
    """Return the configuration that a run's log holds; what it lacks has its default.

    Raises IncompatibleError for a setting that this version does not know, or not with this value.
    """
    if unknown := sorted(settings.keys() - rules().keys()):
        raise IncompatibleError(
            f"the run has a setting {unknown[0]} = {shown(settings[unknown[0]])} that this version "
            "does not know; use the version that wrote it"
        )
    try:
        return Config(**settings)
    except InvalidSettingError as error:
        raise IncompatibleError(
            f"the run's settings: {error}; use the version that wrote it"
        ) from error
