"""From settings to a running job: the composition root. START READING HERE.

    join the world -> load the data -> take the run over -> build the model -> restore -> train

Everything below this file gets what it needs handed in; nothing below it reads the environment.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from fsspec.core import url_to_fs

from fmnist_dist import keys, loop
from fmnist_dist.agreement import settings_of
from fmnist_dist.checkpoint.disk import FAULTS_VARIABLE, Disk, disk_from
from fmnist_dist.checkpoint.hint import ProgressHint, read_hints
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import DamagedRecordError
from fmnist_dist.checkpoint.restore import Restored
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.config import Config
from fmnist_dist.data.dataset import Dataset, load_dataset
from fmnist_dist.data.feed import TrainingFeed
from fmnist_dist.data.split import Split
from fmnist_dist.distributed import stop, world
from fmnist_dist.distributed.evaluation import Score, evaluate
from fmnist_dist.distributed.fingerprint import fingerprint
from fmnist_dist.distributed.share import share_files
from fmnist_dist.distributed.step import ShardedStep
from fmnist_dist.distributed.world import World
from fmnist_dist.errors import FmnistDistError, IncompatibleError, PeerFailedError, UsageError
from fmnist_dist.models import make_model
from fmnist_dist.plan import Plan
from fmnist_dist.saves import Saves
from fmnist_dist.settings import Launch
from fmnist_dist.state import TrainState
from fmnist_dist.takeover import Resumption, read_terms, take_over
from fmnist_dist.telemetry import events
from fmnist_dist.telemetry.events import EventLog
from fmnist_dist.telemetry.phases import Phases
from fmnist_dist.telemetry.progress import Extent, Progress, is_terminal, make_progress

_events = EventLog("fmnist_dist.job")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The run's folder and what this rank holds of it; only rank 0 has a writer."""

    root: Path
    log: RunLog
    writer: RunWriter | None
    resumption: Resumption
    files: Mapping[str, bytes]  # of the checkpoint to go on from; empty: from the initial weights


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
        found = _open_run(launch, joined, root, environ, num_samples=len(dataset.train.images))
        if found is None:
            _events.info("already finished", run=str(root))
            return
        config = found.resumption.terms.config(launch)
        plan = found.resumption.terms.plan(launch, len(dataset.train.images))
        torch.set_num_threads(config.threads_per_worker)
        state = _restore(config, dataset, joined, found)
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
        stack.enter_context(world.naming_lost_peers())
        loop.train(
            loop.Parts(
                plan=plan,
                state=state,
                step=phases.time_first(step),
                gather=TrainingFeed(dataset, seed=config.seed, device=joined.device),
                evaluate=_evaluation(config, dataset, joined, state),
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


def run_folder(url: str) -> Path:
    """Return the local folder that a run URL names."""
    _, path = url_to_fs(url)
    folder = Path(path)
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    if not existing.is_dir():
        raise IncompatibleError(
            f"--run-dir {url}: {existing} is a file; expected a folder or a new name"
        )
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise IncompatibleError(
            f"--run-dir {url}: {existing} cannot be read and written by this user (uid "
            f"{os.getuid()}); change its permissions, or take another folder"
        )
    return folder


def _open_run(
    launch: Launch, joined: World, root: Path, environ: Mapping[str, str], *, num_samples: int
) -> Run | None:
    """Take the run over on rank 0 and tell the others; None when nothing is left to do."""
    storage = LocalStorage(
        root, single_writer=launch.config.single_writer, disk=_disk(environ, joined)
    )
    log = RunLog(storage)
    if not joined.is_main:
        text = joined.hear("resumption")
        if text.startswith("failed "):
            raise PeerFailedError(int(text.removeprefix("failed ")))
        if text == "done":
            return None
        resumption = Resumption.from_json(text)
        _check_shared(log, root, resumption)
        files = share_files(joined, None) if resumption.step else {}
        return Run(root=root, log=log, writer=None, resumption=resumption, files=files)
    try:
        taken = _take_over(launch, joined, storage, log, root, num_samples=num_samples)
    except FmnistDistError as error:
        joined.tell("resumption", f"failed {int(error.exit_code)}")
        joined.await_heard("resumption")
        raise
    if taken is None:
        joined.tell("resumption", "done")
        joined.await_heard("resumption")
        return None
    writer, resumption, restored = taken
    joined.tell("resumption", resumption.to_json())
    files = share_files(joined, restored.files) if restored else {}
    return Run(root=root, log=log, writer=writer, resumption=resumption, files=files)


def _disk(environ: Mapping[str, str], joined: World) -> Disk:
    faults = environ.get(FAULTS_VARIABLE)
    if faults is None or not joined.is_main:
        return Disk()
    try:
        disk = disk_from(faults)
    except ValueError as error:
        raise UsageError(str(error)) from error
    _events.warning("faults are armed", faults=faults)
    return disk


def _take_over(
    launch: Launch,
    joined: World,
    storage: LocalStorage,
    log: RunLog,
    root: Path,
    *,
    num_samples: int,
) -> tuple[RunWriter, Resumption, Restored | None] | None:
    if read_terms(log, log.read().head, launch, num_samples=num_samples).done:
        return None

    def lost_steps(attempt: int, step: int) -> int | None:
        reached = read_hints(root).get(attempt)
        return None if reached is None else max(0, reached.last_step - step)

    return take_over(
        storage,
        log,
        launch,
        owner=joined.owner,
        world_size=joined.size,
        num_samples=num_samples,
        fingerprint=fingerprint(joined.device),
        lost_steps=lost_steps,
    )


def _check_shared(log: RunLog, root: Path, resumption: Resumption) -> None:
    """Refuse a run folder that is private to this node: it would be another run."""
    try:
        if log.record(resumption.attempt_index).nonce == resumption.nonce:
            return
    except DamagedRecordError:
        pass
    raise IncompatibleError(
        f"--run-dir {root}: this node does not see what rank 0 wrote there; all nodes need the "
        "same folder (a network file system or object storage)"
    )


def _restore(config: Config, dataset: Dataset, joined: World, found: Run) -> TrainState:
    """Return the state to go on from, the same on every rank."""
    # The top bit is dropped: torch takes seeds up to 2**63 - 1 on every device.
    torch.manual_seed(keys.key(keys.Stream.INIT, config.seed) >> 1)
    model = make_model(
        config.model,
        image_shape=dataset.spec.image_shape,
        num_classes=dataset.spec.num_classes,
        dropout=config.dropout,
    )
    model.to(memory_format=torch.channels_last)  # up to twice as fast on CPUs
    model.to(joined.device)
    state = TrainState(model, optimizer=config.optimizer, settings=settings_of(config))
    resumption = found.resumption
    if found.files:
        state.load(
            found.files,
            step=resumption.step,
            ledger=resumption.ledger,
            metrics=resumption.metrics,
            evaluated=resumption.evaluated,
        )
    return state


def _hint(root: Path, found: Run, state: TrainState) -> ProgressHint | None:
    if found.writer is None:
        return None
    try:
        return ProgressHint(root, attempt=found.writer.attempt, first_step=state.step)
    except OSError as error:
        _events.warning("lost steps will not be counted", why=str(error))
        return None


def _evaluation(
    config: Config, dataset: Dataset, joined: World, state: TrainState
) -> loop.Evaluate:
    split = Split(dataset.test, dataset.spec, device=joined.device)

    def score() -> Score:
        return evaluate(
            state.model,
            state.weights(),
            joined,
            num_samples=split.num_samples,
            gather=lambda ids: split.gather(ids, None),
            precision=config.precision,
        )

    return score


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
