"""From settings to a running job: the composition root. START READING HERE.

    join the world -> load the data -> take the run over -> build the model -> restore -> train

Everything below this file gets what it needs handed in; nothing below it reads the environment.
"""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from fmnist_dist import loop
from fmnist_dist.build import initial_state, make_evaluation
from fmnist_dist.checkpoint.hint import ProgressHint
from fmnist_dist.config import Config
from fmnist_dist.data.dataset import load_dataset
from fmnist_dist.data.feed import TrainingFeed
from fmnist_dist.distributed import stop, world
from fmnist_dist.distributed.step import ShardedStep
from fmnist_dist.distributed.world import World
from fmnist_dist.opening import Run, open_run, run_folder
from fmnist_dist.plan import Plan
from fmnist_dist.saves import Saves
from fmnist_dist.settings import Launch
from fmnist_dist.state import TrainState
from fmnist_dist.telemetry import events
from fmnist_dist.telemetry.events import EventLog
from fmnist_dist.telemetry.extent import Extent
from fmnist_dist.telemetry.phases import Phases
from fmnist_dist.telemetry.progress import Progress, is_terminal, make_progress

_events = EventLog("fmnist_dist.job")


def run(launch: Launch, environ: Mapping[str, str], phases: Phases) -> None:
    """Run one attempt to its end. Raises what `errors` holds."""
    config = launch.config
    root = run_folder(config.run_dir)
    with ExitStack() as stack:
        stopping = stack.enter_context(stop.listen())
        joined = stack.enter_context(
            world.join(environ, device=config.device, step_timeout=config.step_timeout)
        )
        phases.ended("rendezvous")
        dataset = load_dataset(config.dataset, data_dir=config.data_dir)
        phases.ended("data")
        found = open_run(launch, joined, root, environ, num_samples=len(dataset.train.images))
        if found is None:
            _events.info("already finished", run=str(root))
            return
        config = found.resumption.terms.config(launch)
        plan = found.resumption.terms.plan(launch, len(dataset.train.images))
        torch.set_num_threads(config.threads_per_worker)
        state = initial_state(config, dataset, joined.device)
        if found.files:
            found.resumption.restore(state, found.files)
        phases.ended("restore")

        step = ShardedStep(
            state.model,
            joined,
            logical_shards=config.logical_shards,
            precision=config.precision,
            seed=config.seed,
        )
        stack.callback(step.close)
        progress = _progress(config, plan, joined, state)
        stack.callback(progress.close)
        hint = _hint(root, found, state)
        if hint is not None:
            stack.callback(hint.close)
        phases.ended("model")
        _say_start(config, plan, joined, found, state, root)
        if environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
            _events.warning(
                "torchrun will not restart lost workers: give it --max-restarts=100 "
                "(its default is 0), or start the same command again by hand"
            )
        stack.enter_context(world.naming_lost_peers())
        loop.train(
            loop.Parts(
                plan=plan,
                state=state,
                step=phases.time_first(step),
                gather=TrainingFeed(dataset, seed=config.seed, device=joined.device),
                evaluate=make_evaluation(config, dataset, joined, state),
                progress=progress,
                stop=stopping,
                saves=Saves(found.writer, config, plan, progress) if found.writer else None,
                hint=hint,
                eval_every_epochs=config.eval_every_epochs,
                max_steps=config.max_steps,
                finish_seconds=config.max_unsaved_seconds,
            )
        )
    _events.info("finished", run=str(root), step=state.step, **_shares(state.metrics))


def _hint(root: Path, found: Run, state: TrainState) -> ProgressHint | None:
    if found.writer is None:
        return None
    try:
        return ProgressHint(root, attempt=found.writer.attempt, first_step=state.step)
    except OSError as error:
        _events.warning("lost steps will not be counted", why=str(error))
        return None


def _progress(config: Config, plan: Plan, joined: World, state: TrainState) -> Progress:
    return make_progress(
        log_format=config.log_format,
        rank=joined.rank,
        stream=sys.stderr,
        stream_is_terminal=is_terminal(sys.stderr),
        extent=Extent(
            first_step=state.step,
            total_steps=min(plan.total_steps, config.max_steps or plan.total_steps),
            num_epochs=plan.settings.epochs,
        ),
    )


def _say_start(
    config: Config, plan: Plan, joined: World, found: Run, state: TrainState, root: Path
) -> None:
    events.set_context(attempt=found.resumption.attempt)
    _events.info(
        "training",
        run=str(root),
        attempt=found.resumption.attempt,
        model=config.model,
        dataset=config.dataset,
        workers=joined.size,
        logical_shards=config.logical_shards,
        device=joined.device.type,
        from_step=state.step,
        to_step=min(plan.total_steps, config.max_steps or plan.total_steps),
    )


def _shares(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: round(metrics[name], 4) for name in ("test_accuracy",) if name in metrics}
