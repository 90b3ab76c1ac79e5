"""From settings to a running job: the composition root. START READING HERE.

    prepare: load the data                                             (once, in the keeper)
    train:   meet the other ranks -> open the run -> agree on the state -> train
                  ^_________________ a peer is lost ________________________|

`keeper` calls both and forks in between; `trainer` goes round; `loop` orders what a step consists
of. Everything below this file gets what it needs handed in; nothing below reads the environment.
"""

from contextlib import ExitStack

import torch

from fmnist_dist.build import initial_state
from fmnist_dist.config import Config
from fmnist_dist.data.dataset import Dataset, load_dataset
from fmnist_dist.desk import Desk, Prepared
from fmnist_dist.distributed import stop
from fmnist_dist.distributed.roster import Roster
from fmnist_dist.faults import Faults
from fmnist_dist.lookout import Lookout
from fmnist_dist.opening import check_tier, open_place
from fmnist_dist.settings import Launch
from fmnist_dist.telemetry.phases import Phases
from fmnist_dist.trainer import Trainer


def prepare(launch: Launch, roster: Roster, faults: Faults, phases: Phases) -> Prepared:
    """Do once what all trainers of this rank need. Raises what `errors` holds."""
    place = open_place(launch.config.run_dir)
    if launch.config.local_tier is not None:
        check_tier(launch.config.local_tier, place)
    dataset = load_dataset(launch.config.dataset, data_dir=launch.config.data_dir)
    torch.set_num_threads(1)  # a keeper has one
    _warm_up(launch.config, dataset)
    phases.ended("data")
    return Prepared(launch=launch, place=place, dataset=dataset, faults=faults, roster=roster)


def train(prepared: Prepared, desk: Desk) -> None:
    """Be one trainer, to the end of the run. Raises what `errors` holds."""
    config = prepared.launch.config
    torch.set_num_threads(config.threads_per_worker)
    with ExitStack() as stack:
        stopping = stack.enter_context(stop.listen())
        lookout = Lookout(desk.board, stopping, drain_seconds=config.drain_seconds)
        stack.enter_context(lookout.running())
        trainer = Trainer(prepared, desk, stopping, lookout)
        stack.callback(trainer.close)
        trainer.train()


def _warm_up(config: Config, dataset: Dataset) -> None:
    """Have torch do what it does once, so that no trainer does it again: 20 ms of each heal."""
    state = initial_state(config, dataset, torch.device("cpu"))
    with torch.no_grad():
        state.model(torch.zeros(2, *dataset.spec.image_shape))
    state.digest()
