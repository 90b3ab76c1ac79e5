"""The training loop: the only place that orders step, measure, save and stop."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

from fmnist_dist.checkpoint.hint import ProgressHint
from fmnist_dist.distributed.evaluation import Score
from fmnist_dist.distributed.step import Gather, Outcome
from fmnist_dist.distributed.stop import StopRequest
from fmnist_dist.errors import Drained, NoProgressError
from fmnist_dist.plan import Plan, Step
from fmnist_dist.saves import Saves
from fmnist_dist.state import TrainState
from fmnist_dist.telemetry.events import EventLog
from fmnist_dist.telemetry.progress import Progress

DRAIN_SECONDS = 20.0  # torchrun kills its workers 30 s after it has signalled them

_events = EventLog("fmnist_dist.loop")


Evaluate = Callable[[], Score]


class RunStep(Protocol):
    """`ShardedStep`, possibly timed."""

    def __call__(self, step: Step, gather: Gather, *, stop: bool) -> Outcome: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the loop runs with. `saves` and `hint` are None on every rank but 0."""

    plan: Plan
    state: TrainState
    step: RunStep
    gather: Gather
    evaluate: Evaluate
    progress: Progress
    stop: StopRequest
    saves: Saves | None
    hint: ProgressHint | None
    eval_every_epochs: int
    max_steps: int | None
    finish_seconds: float


def train(parts: Parts) -> None:
    """Train from where the state stands to the end. Every rank takes the same turns.

    Raises `Drained` when a rank was asked to stop, `NoProgressError` for a loss that is no number,
    `FencedError` and `StorageError` from saving.
    """
    plan, state, saves = parts.plan, parts.state, parts.saves
    last_step = min(plan.total_steps, parts.max_steps or plan.total_steps)
    clock = time.monotonic()
    while True:
        point = plan.point(state.step)
        ends_epoch = point.position == 0 and state.step > 0
        ends = state.step >= last_step
        if ends or (ends_epoch and point.epoch % parts.eval_every_epochs == 0):
            _evaluate(parts)
        if ends:
            break
        if saves is not None and state.step > 0:
            saves.offer(state, ends_epoch=ends_epoch)

        step = plan.at(state.step)
        outcome = parts.step(step, parts.gather, stop=parts.stop.requested)
        if not math.isfinite(outcome.result.loss):
            _give_up(parts, f"the loss of step {step.step + 1} is {outcome.result.loss}")
        state.advance(step, outcome.result)

        now = time.monotonic()
        parts.progress.update(
            epoch=step.epoch + 1,
            step=state.step,
            loss=outcome.result.loss,
            images_per_second=step.size / (now - clock),
            ends_epoch=step.ends_epoch(plan.num_samples),
        )
        clock = now
        if parts.hint is not None:
            parts.hint.reached(state.step)
        if outcome.stop and state.step < last_step:
            if saves is not None:
                saves.insist(state, reason="drain", limit_seconds=DRAIN_SECONDS)
            raise Drained(f"asked to stop: step {state.step} is saved, the same command goes on")
    if saves is not None:
        reason = "epochs" if state.step >= plan.total_steps else "max-steps"
        saves.insist(state, reason="finish", limit_seconds=parts.finish_seconds)
        saves.finish(state, reason=reason, limit_seconds=parts.finish_seconds)


def _evaluate(parts: Parts) -> None:
    state = parts.state
    if state.evaluated:
        return
    score = parts.evaluate()
    if not math.isfinite(score.loss):
        _give_up(parts, f"the test loss after step {state.step} is {score.loss}")
    state.measure(
        epoch=parts.plan.epochs_done(state.step),
        test_loss=score.loss,
        test_accuracy=score.accuracy,
    )
    state.evaluated = True
    _events.info(
        "evaluated",
        step=state.step,
        test_accuracy=round(score.accuracy, 4),
        test_loss=round(score.loss, 4),
    )


def _give_up(parts: Parts, what: str) -> NoReturn:
    """End on a loss that is no number, and take back a checkpoint of the weights that gave it."""
    where = "from the newest checkpoint"
    if parts.saves is not None:
        step = parts.saves.take_back(parts.state, why=what)
        where = f"from the checkpoint of step {step}" if step else "from the beginning"
    raise NoProgressError(
        f"{what}: it would be so again, bit for bit; lower --lr and start again, it goes on {where}"
    )
