"""How often to save so that the least time is lost: the interval of Young and Daly.

A save costs training some seconds each time; an interruption costs what was done since the newest
checkpoint. The more often a run saves, the more of the one and the less of the other. The sum is
least near sqrt(2 · cost · mean time between interruptions): J. W. Young, Communications of the ACM
17 (1974) 530. Where the cost is not small against that time, the higher-order formula holds: J. T.
Daly, Future Generation Computer Systems 22 (2006) 303.

How long a save takes until it is durable does not move the optimum: each interruption loses that
much more, whatever the interval is. It is only a bound, for saves come one at a time.
"""

import math
from dataclasses import dataclass

FIRST_SECONDS = 10.0  # until a save has been measured: soon, for only a save tells what it costs
# More often gains nothing: an interruption costs a restart of that order anyway (seconds, not
# steps), while every save leaves a record that is kept for ever, and requests that may cost money.
LEAST_SECONDS = 5.0
# What is assumed before anything was seen, and weighs as much as that much experience: one
# interruption in four hours, as on a spot node whose end comes without notice.
ASSUMED_SECONDS = 4 * 3600.0
_ASSUMED = 1
_NEWEST_WEIGHT = 0.3  # of the newest save among those measured: it follows in some three saves


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a run has seen: interruptions that lost work, and the seconds it was training."""

    interruptions: int = 0
    seconds: float = 0.0

    @property
    def mtbf_seconds(self) -> float:
        """The mean time between interruptions, of evidence and assumption together.

        It is one over the mean of the rate's posterior, from a gamma prior (the conjugate one).
        """
        return (self.seconds + ASSUMED_SECONDS) / (self.interruptions + _ASSUMED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a save takes: of training, and until it is durable."""

    pause_seconds: float  # of training time: while nothing is computed, and by slowing steps down
    save_seconds: float  # from the snapshot to the checkpoint's record

    def after(self, before: "Cost | None") -> "Cost":
        """Return what saves cost by now; single ones vary more than their mean."""
        if before is None:
            return self
        return Cost(
            pause_seconds=_smoothed(before.pause_seconds, self.pause_seconds),
            save_seconds=_smoothed(before.save_seconds, self.save_seconds),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """How often to save, and why: as told to people, and recorded with each checkpoint.

    `seconds` run from the end of one save's pause to the next snapshot. `steps`, at least 1, is
    what they amount to at `step_seconds` a step.
    """

    seconds: float
    steps: int
    step_seconds: float
    cost_seconds: float | None  # None: no save has been measured yet
    save_seconds: float | None
    mtbf_seconds: float
    interruptions: int
    trained_seconds: float
    why: str

    @property
    def cost(self) -> Cost | None:
        if self.cost_seconds is None or self.save_seconds is None:
            return None
        return Cost(pause_seconds=self.cost_seconds, save_seconds=self.save_seconds)


def choose(*, cost: Cost | None, evidence: Evidence, step_seconds: float) -> Interval:
    """Return the interval that loses least, within its bounds."""
    if cost is None:
        seconds, why = FIRST_SECONDS, "no save has been measured yet"
    else:
        optimum = daly_seconds(cost=cost.pause_seconds, mtbf=evidence.mtbf_seconds)
        seconds, why = optimum, _reason(cost, evidence)
        bounds = (
            (LEAST_SECONDS, "more often would gain nothing"),
            (cost.save_seconds, f"a save takes {duration(cost.save_seconds)}, one at a time"),
        )
        for bound, because in bounds:
            if bound > seconds:
                seconds = bound
                why = f"{_reason(cost, evidence)}: best {duration(optimum)}, but {because}"
    return Interval(
        seconds=max(seconds, step_seconds),
        steps=max(1, round(seconds / step_seconds)) if step_seconds > 0 else 1,
        step_seconds=step_seconds,
        cost_seconds=cost.pause_seconds if cost else None,
        save_seconds=cost.save_seconds if cost else None,
        mtbf_seconds=evidence.mtbf_seconds,
        interruptions=evidence.interruptions,
        trained_seconds=evidence.seconds,
        why=why,
    )


def daly_seconds(*, cost: float, mtbf: float) -> float:
    """Return the seconds of training between two saves that lose least (Daly 2006)."""
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def duration(seconds: float) -> str:
    """Return a time as people read it: 12 ms, 51 s, 6.4 h."""
    for unit, size, below in (("ms", 0.001, 1.0), ("s", 1.0, 180.0), ("min", 60.0, 7200.0)):
        if seconds < below:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds / 3600)} h"


def _reason(cost: Cost, evidence: Evidence) -> str:
    return (
        f"a save costs {duration(cost.pause_seconds)}, an interruption loses work every "
        f"{duration(evidence.mtbf_seconds)} ({evidence.interruptions} in "
        f"{duration(evidence.seconds)} seen, {_ASSUMED} in {duration(ASSUMED_SECONDS)} assumed)"
    )


def _smoothed(before: float, now: float) -> float:
    return before + _NEWEST_WEIGHT * (now - before)


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004 - three digits
