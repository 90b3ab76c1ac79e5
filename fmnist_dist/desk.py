"""What a trainer begins with: what was prepared for every one of them, and its keeper's memory."""

from dataclasses import dataclass

from fmnist_dist.checkpoint.place import Place
from fmnist_dist.data.dataset import Dataset
from fmnist_dist.data.feed import TrainingFeed
from fmnist_dist.distributed.generation import Lost
from fmnist_dist.distributed.roster import Roster
from fmnist_dist.faults import Faults
from fmnist_dist.handover.board import Board
from fmnist_dist.handover.slots import Slots
from fmnist_dist.settings import Launch
from fmnist_dist.state import TrainState
from fmnist_dist.telemetry.phases import Phases


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Done once, however many trainers follow. It crosses forks, so it holds no device."""

    launch: Launch
    place: Place
    dataset: Dataset
    faults: Faults
    roster: Roster

    @property
    def num_samples(self) -> int:
        return len(self.dataset.train.images)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """Built ahead: what a trainer loads its state into, whatever step it is of, and its feed."""

    state: TrainState
    feed: TrainingFeed


@dataclass(slots=True, kw_only=True)
class Desk:
    """What one trainer finds: memory shared with its keeper, and word of its predecessor's end."""

    board: Board
    slots: Slots | None = None  # None: no keeper
    lost: Lost | None = None
    died_at: float = 0.0  # when it did, on the monotonic clock
    rehearsed: Rehearsed | None = None
    suspect: int | None = None  # record of a checkpoint that must not be chosen
    phases: Phases | None = None  # of the first trainer only
