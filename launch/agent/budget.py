"""How often it is tried again: a crash loop is no training, and ends with 70."""

import random
from dataclasses import dataclass

from launch.agent import limits


@dataclass(kw_only=True)
class Budget:
    """Rounds in a row that ended badly and left the run where it was."""

    crash_loop: int  # so many are a verdict
    max_restarts: int  # torchrun's: restarts for a fault of this node's workers, in all
    best: int | None = None  # the newest step that any round has finished
    in_vain: int = 0
    restarts: int = 0

    def round_ended(self, step: int | None, *, seconds: float) -> None:
        """Count a round that did not finish the run; `step` is the newest one, None: not known."""
        is_sound = seconds >= limits.SOUND_SECONDS
        if step is not None:
            is_sound = self.best is None or step > self.best
            self.best = step if self.best is None else max(step, self.best)
        self.in_vain = 0 if is_sound else self.in_vain + 1

    @property
    def is_crash_loop(self) -> bool:
        return self.in_vain >= self.crash_loop

    def may_restart(self) -> bool:
        """Take one restart, and return whether there was one left."""
        self.restarts += 1
        return self.restarts <= self.max_restarts

    def pause_seconds(self) -> float:
        """Return how long to wait before the next round: longer, the more were in vain."""
        if self.in_vain == 0:
            return 0.0
        return min(limits.LONGEST_PAUSE_SECONDS, 2.0**self.in_vain / 2) * random.uniform(0.5, 1.0)
