"""How long steps take, beside a save and without one: what a save in the background costs them."""

import math
import statistics
from collections import deque

_KEPT = 64  # of each kind, the newest
_FEWEST = 8  # of each kind; before that nothing is said
_SIGMAS = 2.0  # a difference within so many standard errors may be none
# Of a sample of normal noise: its standard deviation from the median of deviations, and the
# standard error of its median. One evaluation or hiccup among the steps moves neither.
_SIGMA_OF_MAD = 1.4826
_ERROR_OF_MEDIAN = 1.2533


class StepTimes:
    """The newest steps' seconds, of two kinds."""

    def __init__(self) -> None:
        self._alone: deque[float] = deque(maxlen=_KEPT)
        self._beside: deque[float] = deque(maxlen=_KEPT)

    def add(self, seconds: float, *, beside_save: bool) -> None:
        (self._beside if beside_save else self._alone).append(seconds)

    @property
    def step_seconds(self) -> float | None:
        """What a step takes without a save; None while no step is known."""
        known = self._alone or self._beside
        return statistics.median(known) if known else None

    @property
    def slowdown_seconds(self) -> float:
        """What a step takes longer beside a save: 0 unless that stands out from the noise."""
        if min(len(self._alone), len(self._beside)) < _FEWEST:
            return 0.0
        difference = statistics.median(self._beside) - statistics.median(self._alone)
        error = math.hypot(_median_error(self._alone), _median_error(self._beside))
        return difference if difference > _SIGMAS * error else 0.0


def _median_error(seconds: deque[float]) -> float:
    middle = statistics.median(seconds)
    deviation = statistics.median(abs(each - middle) for each in seconds)
    return _SIGMA_OF_MAD * _ERROR_OF_MEDIAN * deviation / math.sqrt(len(seconds))
