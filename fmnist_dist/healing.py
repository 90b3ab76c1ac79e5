"""What a lost trainer has cost: told and recorded by rank 0, when training goes on again."""

import time
from collections.abc import Callable
from dataclasses import replace

from fmnist_dist import limits
from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.distributed.generation import Lost, Meeting
from fmnist_dist.saves import Saves
from fmnist_dist.telemetry.events import EventLog

_events = EventLog("fmnist_dist.healing")


class Healing:
    """One trainer's account of losses, its predecessor's first of all."""

    def __init__(self, lost: Lost | None, *, died_at: float) -> None:
        self._lost = lost
        self._lost_at = died_at
        self._unrecorded: list[Callable[[], None]] = []
        self._retry_at = 0.0

    @property
    def lost(self) -> Lost | None:
        """What to say on arrival; until a step is finished, however many meetings that takes."""
        if self._lost is None:
            return None
        return replace(self._lost, seconds=time.monotonic() - self._lost_at)

    def recorder(
        self, meeting: Meeting, saves: Saves, *, step: int, is_main: bool
    ) -> Callable[[int], None]:
        """Return what to call after every step of a generation that begins at `step`."""
        met_at = time.monotonic()
        lost = {each.rank: each.lost for each in meeting.arrivals if each.lost is not None}

        def stepped(_: int) -> None:
            nonlocal lost
            if lost:
                if is_main:
                    for rank, each in lost.items():
                        seconds = each.seconds + time.monotonic() - met_at
                        self._note(saves, rank, each, step=step, seconds=seconds)
                lost = {}
                self._lost = None
            if self._unrecorded and time.monotonic() >= self._retry_at:
                self._record()

        return stepped

    def _note(self, saves: Saves, rank: int, lost: Lost, *, step: int, seconds: float) -> None:
        lost_steps = max(0, lost.reached - step)
        _events.info(
            "healed",
            rank=rank,
            why=lost.reason,
            step=step,
            seconds=round(seconds, 3),
            lost_steps=lost_steps,
        )
        self._unrecorded.append(
            lambda: saves.writer.heal(
                step=step,
                rank=rank,
                reason=lost.reason,
                seconds=round(seconds, 3),
                lost_steps=lost_steps,
            )
        )

    def _record(self) -> None:
        try:
            while self._unrecorded:
                self._unrecorded[0]()
                self._unrecorded.pop(0)
        except StorageError as error:
            self._retry_at = time.monotonic() + limits.SAVE_RETRY_SECONDS
            _events.warning("a heal was not recorded, trying again later", error=str(error))
