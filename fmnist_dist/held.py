"""What a trainer holds from one generation to the next, once it knows the run."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fmnist_dist.build import initial_state
from fmnist_dist.checkpoint.hint import ProgressHint
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.config import Config
from fmnist_dist.data.feed import TrainingFeed
from fmnist_dist.desk import Desk, Prepared, Rehearsed
from fmnist_dist.distributed import world
from fmnist_dist.distributed.step import ShardedStep, Wishes
from fmnist_dist.handover.board import Board
from fmnist_dist.opening import Run, follow_run
from fmnist_dist.plan import Plan, shard_bounds
from fmnist_dist.saves import Saves
from fmnist_dist.state import TrainState
from fmnist_dist.takeover import Resumption
from fmnist_dist.telemetry.events import EventLog
from fmnist_dist.telemetry.extent import Extent
from fmnist_dist.telemetry.progress import Progress, is_terminal, make_progress

_events = EventLog("fmnist_dist.held")


@dataclass(slots=True, kw_only=True)
class Held:
    """The run, its plan, and the state; a trainer that holds nothing has none."""

    resumption: Resumption
    config: Config
    plan: Plan
    state: TrainState
    saves: Saves
    feed: TrainingFeed
    progress: Progress
    hint: ProgressHint | None = None

    def close(self) -> None:
        self.saves.close()
        self.progress.close()
        if self.hint is not None:
            self.hint.close()


def hold(
    prepared: Prepared,
    board: Board,
    run: Run,
    device: torch.device,
    *,
    rehearsed: Rehearsed | None = None,
) -> Held:
    """Return what belongs to a run that is open, at its initial state or what was rehearsed."""
    resumption, launch = run.resumption, prepared.launch
    config = resumption.terms.config(launch)
    plan = resumption.terms.plan(launch, prepared.num_samples)
    if rehearsed is None:
        rehearsed = Rehearsed(
            state=initial_state(config, prepared.dataset, device),
            feed=TrainingFeed(prepared.dataset, seed=config.seed, device=device),
        )
    progress = make_progress(
        log_format=config.log_format,
        rank=prepared.roster.rank,
        stream=sys.stderr,
        stream_is_terminal=is_terminal(sys.stderr),
        extent=Extent(
            first_step=resumption.step,
            total_steps=min(plan.total_steps, config.max_steps or plan.total_steps),
            num_epochs=plan.settings.epochs,
        ),
    )
    if resumption.parent is not None:
        progress.saved(resumption.step)
    return Held(
        resumption=resumption,
        config=config,
        plan=plan,
        state=rehearsed.state,
        saves=Saves(
            run.write,
            run.log,
            config,
            plan,
            progress,
            board,
            retires=prepared.roster.rank == 0,
            save=prepared.faults.wrap("save", RunWriter.save),
        ),
        feed=rehearsed.feed,
        progress=progress,
    )


def inherit(prepared: Prepared, desk: Desk, device: torch.device) -> Held | None:
    """Return what the trainer before this one has left with the keeper; None for nothing whole."""
    slot = desk.slots.newest() if desk.slots is not None else None
    told = desk.board.resumption
    if slot is None or told is None:
        return None
    run = follow_run(
        prepared.launch,
        prepared.place,
        Resumption.from_json(told),
        agents=prepared.roster.agents,
    )
    held = hold(prepared, desk.board, run, device, rehearsed=desk.rehearsed)
    held.state.load_image(slot.data)
    return held


def rehearse(
    prepared: Prepared, board: Board, *, is_called: Callable[[], bool]
) -> Rehearsed | None:
    """Build ahead what a later trainer of this run needs, and take one shard's step with it.

    The first step of a process costs twice a later one: memory, kernels, and gloo are set up in it.
    It is left out where `is_called` says that the trainer is wanted already. None on a GPU, where
    all this would take memory that is not to spare (not run here).
    """
    told = board.resumption
    if told is None or world.device_of(prepared.launch.config.device, local_rank=0).type != "cpu":
        return None
    terms = Resumption.from_json(told).terms
    config = terms.config(prepared.launch)
    torch.set_num_threads(config.threads_per_worker)
    cpu = torch.device("cpu")
    rehearsed = Rehearsed(
        state=initial_state(config, prepared.dataset, cpu),
        feed=TrainingFeed(prepared.dataset, seed=config.seed, device=cpu),
    )
    plan = terms.plan(prepared.launch, prepared.num_samples)
    if 0 <= board.step < plan.total_steps and not is_called():
        step = plan.at(board.step)
        _, shard = shard_bounds(step.size, logical_shards=config.logical_shards)[0]
        with world.alone(cpu) as joined:
            sharded = ShardedStep(
                rehearsed.state,
                joined,
                logical_shards=1,
                precision=config.precision,
                seed=config.seed,
            )
            sharded(replace(step, size=shard), rehearsed.feed, wishes=Wishes())
            sharded.close()
    return rehearsed


def open_hint(prepared: Prepared, held: Held) -> ProgressHint | None:
    """Return where rank 0 notes how far it has got."""
    try:
        return ProgressHint(
            prepared.place.notes, attempt=held.resumption.attempt, first_step=held.resumption.step
        )
    except OSError as error:
        _events.warning("lost steps will not be counted", why=str(error))
        return None
