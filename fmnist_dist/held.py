"""What a trainer holds from one generation to the next, once it knows the run."""

import sys
from dataclasses import dataclass

import torch

from fmnist_dist.build import initial_state
from fmnist_dist.checkpoint.hint import ProgressHint
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.config import Config
from fmnist_dist.data.feed import TrainingFeed
from fmnist_dist.desk import Desk, Prepared
from fmnist_dist.distributed import world
from fmnist_dist.handover.board import Board
from fmnist_dist.opening import Run, follow_run
from fmnist_dist.plan import Plan
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
        self.progress.close()
        if self.hint is not None:
            self.hint.close()


def hold(
    prepared: Prepared, run: Run, device: torch.device, *, state: TrainState | None = None
) -> Held:
    """Return what belongs to a run that is open: with `state`, or the initial one."""
    resumption, launch = run.resumption, prepared.launch
    config = resumption.terms.config(launch)
    plan = resumption.terms.plan(launch, prepared.num_samples)
    state = state or initial_state(config, prepared.dataset, device)
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
    return Held(
        resumption=resumption,
        config=config,
        plan=plan,
        state=state,
        saves=Saves(
            run.write,
            run.log,
            config,
            plan,
            progress,
            retires=prepared.roster.rank == 0,
            save=prepared.faults.wrap("save", RunWriter.save),
        ),
        feed=TrainingFeed(prepared.dataset, seed=config.seed, device=device),
        progress=progress,
    )


def inherit(prepared: Prepared, desk: Desk, device: torch.device) -> Held | None:
    """Return what the trainer before this one has left with the keeper; None for nothing whole."""
    slot = desk.slots.newest() if desk.slots is not None else None
    told = desk.board.resumption
    if slot is None or told is None:
        return None
    run = follow_run(prepared.launch, prepared.root, Resumption.from_json(told))
    held = hold(prepared, run, device, state=desk.state)
    held.state.load_image(slot.data)
    return held


def rehearse(prepared: Prepared, board: Board) -> TrainState | None:
    """Build ahead what a later trainer of this run loads its state into; None on a GPU.

    There it would take memory that is not to spare (not run here).
    """
    told = board.resumption
    if told is None or world.device_of(prepared.launch.config.device, local_rank=0).type != "cpu":
        return None
    config = Resumption.from_json(told).terms.config(prepared.launch)
    torch.set_num_threads(config.threads_per_worker)
    return initial_state(config, prepared.dataset, torch.device("cpu"))


def open_hint(prepared: Prepared, held: Held) -> ProgressHint | None:
    """Return where rank 0 notes how far it has got."""
    try:
        return ProgressHint(
            prepared.root, attempt=held.resumption.attempt, first_step=held.resumption.step
        )
    except OSError as error:
        _events.warning("lost steps will not be counted", why=str(error))
        return None
