"""The training loop: the only place that orders step, measure, save and stop."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

from fmnist_dist.checkpoint.hint import ProgressHint
from fmnist_dist.distributed.comparison import Comparison
from fmnist_dist.distributed.evaluation import Score
from fmnist_dist.distributed.step import Gather, Outcome, Wishes
from fmnist_dist.distributed.stop import StopRequest
from fmnist_dist.errors import Drained, NoProgressError
from fmnist_dist.handover.board import Board, Section
from fmnist_dist.handover.kept import KeptCopy
from fmnist_dist.plan import Plan, Step
from fmnist_dist.saves import Saves
from fmnist_dist.state import Durable, StepResult, TrainState
from fmnist_dist.telemetry.events import EventLog
from fmnist_dist.telemetry.progress import Progress

SKIPS_IN_A_ROW = 10  # steps without a loss; then the weights are broken, not the samples

_events = EventLog("fmnist_dist.loop")


Evaluate = Callable[[], Score]


class Commit(Protocol):
    """`TrainState.advance`."""

    def __call__(self, step: Step, result: StepResult, *, durable: Durable | None) -> None: ...


class RunStep(Protocol):
    """`ShardedStep`, possibly timed."""

    def __call__(self, step: Step, gather: Gather, *, wishes: Wishes) -> Outcome: ...


class RollbackError(Exception):
    """A loss is no number, and the user wants to go on from before it."""

    def __init__(self, bad_step: int, why: str) -> None:
        super().__init__(why)
        self.bad_step = bad_step  # the one that has no loss, from 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the loop runs with, in one generation. `hint` is None on every rank but 0."""

    plan: Plan
    state: TrainState
    step: RunStep
    gather: Gather
    commit: Commit
    evaluate: Evaluate
    agree: Callable[[str, int], None]  # raises unless all ranks give this digest, of this step
    comparison: Comparison | None  # of copies, beside the steps; None in a world of one
    progress: Progress
    stop: StopRequest
    board: Board
    kept: KeptCopy
    saves: Saves
    hint: ProgressHint | None
    is_main: bool
    stepped: Callable[[int], None]  # after each finished step
    finished: Callable[[], None]  # once the `finish` record stands
    peers_are_there: Callable[[], None]  # raises `PeerLostError` when they are not
    eval_every_epochs: int
    max_steps: int | None
    drain_seconds_left: Callable[[], float]
    finish_seconds: float


def train(parts: Parts) -> None:
    """Train from where the state stands to the end. Every rank takes the same turns.

    Raises `Drained` when a rank was asked to stop, `PeerLostError` when one is gone,
    `NoProgressError` or `RollbackError` for a loss that is no number, `FencedError` and
    `StorageError` from saving. Whatever it raises, the state is that of the last finished step.
    """
    plan, state, board, saves = parts.plan, parts.state, parts.board, parts.saves
    last_step = min(plan.total_steps, parts.max_steps or plan.total_steps)
    clock = time.monotonic()
    compares: Comparison | None = None  # not yet: whoever met has shown what it holds
    due = parts.is_main
    while True:
        point = plan.point(state.step)
        ends_epoch = point.position == 0 and state.step > 0
        ends = state.step >= last_step
        if ends or (ends_epoch and point.epoch % parts.eval_every_epochs == 0):
            _evaluate(parts)
        if ends:
            break
        if due and parts.is_main and state.step > 0:
            saves.offer(state, ends_epoch=ends_epoch, comparison=compares)
        elif due and compares is not None:
            saves.show(state, compares)
        saves.prepare(state)

        step = plan.at(state.step)
        wishes = _wishes(parts, step)
        board.enter(Section.COMPUTE)
        outcome = parts.step(step, parts.gather, wishes=wishes)
        board.enter(Section.UPDATE)
        result, wishes = outcome.result, outcome.wishes
        if step.learns and math.isfinite(result.loss):
            parts.commit(step, result, durable=wishes.durable)
        else:
            if step.learns:
                _consider(parts, step, result.loss)
            state.pass_over(step, result, durable=wishes.durable)
        now = time.monotonic()
        _tell(parts, step, result.loss, seconds=now - clock)
        clock = now
        if wishes.differs:
            parts.agree(*saves.shown)
            saves.differs = False
        if wishes.stop and state.step < last_step:
            parts.agree(state.digest(), state.step)
            board.enter(Section.SAVE)
            saves.secure(state, reason="drain", seconds=parts.drain_seconds_left())
            raise Drained(f"asked to stop: step {state.step} is saved, the same command goes on")
        due, compares = wishes.save, parts.comparison
    _finish(parts)


def _wishes(parts: Parts, step: Step) -> Wishes:
    """Return what this rank tells the others with a step. Rank 0 alone saves, and decides."""
    if not parts.is_main:
        return Wishes(stop=parts.stop.requested)
    saves = parts.saves
    # First: what it finds out about the last save is told, too.
    save = saves.wants(step.step + 1, ends_epoch=step.ends_epoch(parts.plan.num_samples))
    return Wishes(stop=parts.stop.requested, save=save, differs=saves.differs, durable=saves.newest)


def _tell(parts: Parts, step: Step, loss: float, *, seconds: float) -> None:
    """Tell everybody who wants to know that a step is done: the keeper first."""
    state, board = parts.state, parts.board
    board.step = state.step
    board.step_took(seconds)
    parts.kept.keep(state.position, state.image, step_seconds=board.step_seconds)
    if parts.hint is not None:
        parts.hint.reached(state.step)
    parts.stepped(state.step)
    parts.progress.update(
        epoch=step.epoch + 1,
        step=state.step,
        loss=loss,
        images_per_second=step.size / seconds,
        ends_epoch=step.ends_epoch(parts.plan.num_samples),
    )


def _finish(parts: Parts) -> None:
    """End with a durable final state and the `finish` record, on every rank.

    Rank 0 writes; the others leave when they see it in the log. Should rank 0 die on the way, they
    are still there to meet its successor.
    """
    state, saves = parts.state, parts.saves
    parts.agree(state.digest(), state.step)
    parts.board.enter(Section.FINISH)
    if parts.is_main:
        reason = "epochs" if state.step >= parts.plan.total_steps else "max-steps"
        saves.insist(state, reason="finish", seconds=parts.finish_seconds, hurry=False)
        saves.finish(state, reason=reason, seconds=parts.finish_seconds)
    else:
        saves.await_finish(state, seconds=2 * parts.finish_seconds, meanwhile=parts.peers_are_there)
    parts.finished()


def _evaluate(parts: Parts) -> None:
    state = parts.state
    if state.evaluated:
        return
    parts.board.enter(Section.EVALUATE)
    score = parts.evaluate()
    if not math.isfinite(score.loss):
        _give_up(parts, f"the test loss after step {state.step} is {score.loss}")
    state.score(
        epoch=parts.plan.epochs_done(state.step),
        test_loss=score.loss,
        test_accuracy=score.accuracy,
    )
    parts.kept.keep(state.position, state.image, step_seconds=parts.board.step_seconds)
    if parts.is_main:
        _events.info(
            "evaluated",
            step=state.step,
            test_accuracy=round(score.accuracy, 4),
            test_loss=round(score.loss, 4),
        )


def _consider(parts: Parts, step: Step, loss: float) -> None:
    """Decide about a step from which nothing can be learnt; every rank decides alike."""
    what = f"the loss of step {step.step + 1} is {loss}"
    match step.settings.on_non_finite:
        case "skip" if parts.state.skipped < SKIPS_IN_A_ROW:
            if parts.is_main:
                _events.warning(f"{what}: skipped, as --on-non-finite skip has it")
        case "rollback":
            raise RollbackError(step.step, what)
        case _:
            _give_up(parts, what)


def _give_up(parts: Parts, what: str) -> NoReturn:
    """End on a loss that is no number, and take back a checkpoint of the weights that gave it."""
    where = "from the newest checkpoint"
    if parts.is_main:
        step = parts.saves.take_back(parts.state, why=what)
        where = f"from the checkpoint of step {step}" if step else "from the beginning"
    raise NoProgressError(
        f"{what}: it would be so again, bit for bit; lower --lr (or see --on-non-finite) and start "
        f"again, it goes on {where}"
    )
