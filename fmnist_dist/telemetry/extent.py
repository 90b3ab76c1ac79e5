"""How much there is to do, as progress displays need it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """What there is to do: the run goes from `first_step` (not 0 on resume) to `total_steps`."""

    first_step: int
    total_steps: int
    num_epochs: int
