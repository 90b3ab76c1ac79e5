"""What step does what: pure arithmetic from (settings, overrides, step), for every world size.

A run is a sequence of *legs*. A leg begins at step 0 or where an override takes effect, and holds
one set of settings. Epoch, position in the epoch and learning rate of any step follow from the legs
alone, so that nothing of them is ever saved.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

Schedule = Literal["triangular", "cosine", "constant"]

WARM_UP = 0.2  # share of a triangular or cosine schedule in which the learning rate rises


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What may change while a run goes on."""

    epochs: int
    batch_size: int  # global
    lr: float  # the schedule's peak
    schedule: Schedule
    weight_decay: float
    label_smoothing: float
    ema: float  # decay per step; 0: no averaged weights
    augment: str
    on_non_finite: str = "stop"  # | skip | rollback


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    settings: Settings
    start_step: int
    start_epoch: int
    start_position: int  # samples of that epoch already consumed
    schedule_start: int  # step at which the learning rate's schedule began


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step: the global batch is samples [position, position + size) of the order."""

    step: int
    epoch: int
    position: int
    size: int
    lr: float
    settings: Settings
    learns: bool = True  # False: after a rollback its samples are consumed, and nothing is learnt

    def ends_epoch(self, num_samples: int) -> bool:
        return self.position + self.size == num_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Between two steps: `step` optimizer steps are done."""

    step: int
    epoch: int
    position: int


class Plan:
    """The whole run, from its first settings and the overrides made so far."""

    def __init__(
        self,
        settings: Settings,
        *,
        num_samples: int,
        overrides: Sequence[tuple[int, Mapping[str, Any]]] = (),
        passed_over: Sequence[tuple[int, int]] = (),
    ) -> None:
        """`overrides` are (effective step, changed settings), in the order in which they were made.

        In the steps [from, until) of `passed_over` nothing is learnt: a rollback has decided so.

        Raises ValueError when a batch size changes elsewhere than at an epoch's boundary.
        """
        self.num_samples = num_samples
        self._passed_over = tuple(passed_over)
        first = Leg(
            settings=settings, start_step=0, start_epoch=0, start_position=0, schedule_start=0
        )
        self._legs = [first]
        for step, changed in _in_effect(overrides):
            self._change(step, changed)

    @property
    def settings(self) -> Settings:
        """The newest settings."""
        return self._legs[-1].settings

    @property
    def total_steps(self) -> int:
        return self._end(self._legs[-1])

    def point(self, step: int) -> Point:
        """Return where training stands after `step` optimizer steps."""
        leg = self._leg(step)
        epoch, position = self._walk(leg, step)
        return Point(step=step, epoch=epoch, position=position)

    def at(self, step: int) -> Step:
        """Return the step that leads from point `step` to `step` + 1."""
        leg = self._leg(step)
        epoch, position = self._walk(leg, step)
        return Step(
            step=step,
            epoch=epoch,
            position=position,
            size=min(leg.settings.batch_size, self.num_samples - position),
            lr=leg.settings.lr * self._shape(leg, step),
            settings=leg.settings,
            learns=not any(first <= step < until for first, until in self._passed_over),
        )

    def epochs_done(self, step: int) -> float:
        point = self.point(step)
        return point.epoch + point.position / self.num_samples

    def _change(self, step: int, changed: Mapping[str, Any]) -> None:
        last = self._legs[-1]
        point_epoch, position = self._walk(last, step)
        settings = replace(last.settings, **changed)
        if settings.batch_size != last.settings.batch_size and position != 0:
            raise ValueError(
                f"batch size {last.settings.batch_size} can become {settings.batch_size} at an "
                f"epoch's boundary only, and step {step} is {position} samples into epoch "
                f"{point_epoch + 1}; keep --batch-size {last.settings.batch_size} until then"
            )
        anew = {"epochs", "schedule", "batch_size"} & {
            name for name in changed if getattr(settings, name) != getattr(last.settings, name)
        }
        self._legs.append(
            Leg(
                settings=settings,
                start_step=step,
                start_epoch=point_epoch,
                start_position=position,
                schedule_start=step if anew else last.schedule_start,
            )
        )

    def _leg(self, step: int) -> Leg:
        return next(leg for leg in reversed(self._legs) if leg.start_step <= step)

    def _walk(self, leg: Leg, step: int) -> tuple[int, int]:
        """Return (epoch, position) at `step` of a leg."""
        size = leg.settings.batch_size
        steps = step - leg.start_step
        in_first = self._steps_left_in_first_epoch(leg)
        if steps < in_first:
            return leg.start_epoch, leg.start_position + steps * size
        epochs, rest = divmod(steps - in_first, math.ceil(self.num_samples / size))
        return leg.start_epoch + 1 + epochs, rest * size

    def _steps_left_in_first_epoch(self, leg: Leg) -> int:
        return math.ceil((self.num_samples - leg.start_position) / leg.settings.batch_size)

    def _end(self, leg: Leg) -> int:
        epochs = leg.settings.epochs - leg.start_epoch
        if epochs <= 0:
            return leg.start_step
        per_epoch = math.ceil(self.num_samples / leg.settings.batch_size)
        return leg.start_step + self._steps_left_in_first_epoch(leg) + (epochs - 1) * per_epoch

    def _shape(self, leg: Leg, step: int) -> float:
        """Return the learning rate's share of its peak, in (0, 1]."""
        total = max(1, self._end(leg) - leg.schedule_start)
        return shape(leg.settings.schedule, step - leg.schedule_start, total)


def _in_effect(
    overrides: Sequence[tuple[int, Mapping[str, Any]]],
) -> list[tuple[int, dict[str, Any]]]:
    """Return the overrides by rising step, each setting as the newest word has it.

    Steps rise by themselves, unless training fell back to an older checkpoint: then a word that was
    given later may take effect earlier, and takes the same setting away from those after it.
    """
    settled: list[tuple[int, dict[str, Any]]] = []
    for step, changed in overrides:
        for later in (each for each_step, each in settled if each_step >= step):
            for name in changed:
                later.pop(name, None)
        settled.append((step, dict(changed)))
    return sorted((each for each in settled if each[1]), key=lambda each: each[0])


def shape(schedule: Schedule, step: int, total: int) -> float:
    """Return the share of the peak learning rate at `step` of `total`, in (0, 1]."""
    if schedule == "constant":
        return 1.0
    rising = max(1, round(WARM_UP * total))
    if step < rising:
        return (step + 1) / rising
    falling = (step - rising) / max(1, total - rising)  # 0 at the peak, below 1 at the last step
    if schedule == "triangular":
        return max(1 - falling, 0.5 / total)
    return max((1 + math.cos(math.pi * min(falling, 1.0))) / 2, 0.5 / total)


def shard_bounds(size: int, *, logical_shards: int) -> list[tuple[int, int]]:
    """Split `size` samples into contiguous shards [start, stop) that differ by at most one sample.

    Shard 0 is never empty. It depends on (size, logical_shards) only: never on the world size.
    """
    short, longer = divmod(size, logical_shards)
    starts = [shard * short + min(shard, longer) for shard in range(logical_shards + 1)]
    return list(pairwise(starts))


def shards_of_rank(rank: int, *, world_size: int, logical_shards: int) -> range:
    """Return a rank's contiguous logical shards; never empty for world_size <= logical_shards."""
    return range(rank * logical_shards // world_size, (rank + 1) * logical_shards // world_size)
