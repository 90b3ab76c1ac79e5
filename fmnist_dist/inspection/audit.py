"""What `runs ledger` finds: a proof for each epoch, where a failed one points, repeated work."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fmnist_dist import config as configuration
from fmnist_dist.agreement import settings_of
from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.history import AttemptStory, History
from fmnist_dist.checkpoint.ledger import EpochProof, prove
from fmnist_dist.checkpoint.lineage import Commit
from fmnist_dist.checkpoint.suspect import Suspect, locate
from fmnist_dist.data.order import epoch_order
from fmnist_dist.errors import DataDamagedError, IncompatibleError, UsageError
from fmnist_dist.inspection.foundrun import FoundRun
from fmnist_dist.inspection.page import columns, path
from fmnist_dist.inspection.summary import own_settings
from fmnist_dist.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The verdict on a run's committed line. Epochs are counted from 0, as in the metrics."""

    run: str
    num_samples: int
    proofs: tuple[EpochProof, ...]
    suspects: dict[int, Suspect]  # by epoch, where a proof failed and the plan knows better
    repeated: tuple[AttemptStory, ...]  # attempts that lost steps, or may have

    @property
    def unproved(self) -> list[EpochProof]:
        return [each for each in self.proofs if each.finished and not each.exactly_once]

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "num_samples": self.num_samples,
            "proved": not self.unproved,
            "epochs": [
                {
                    **dataclasses.asdict(each),
                    "suspect": dataclasses.asdict(self.suspects[each.epoch])
                    if each.epoch in self.suspects
                    else None,
                }
                for each in self.proofs
            ],
            "repeated": [
                {
                    "attempt": each.attempt,
                    "first_step": each.first_step,
                    "last_step": each.last_step,
                    "lost_steps": each.lost_steps,
                }
                for each in self.repeated
            ],
        }

    def page(self) -> str:
        """Return the page that `runs ledger` prints."""
        epochs = [(f"epoch {each.epoch}", self._verdict(each)) for each in self.proofs]
        repeated = [(f"attempt {each.attempt}", _loss(each)) for each in self.repeated]
        return columns(
            [
                ("run", path(self.run)),
                *(epochs or [("epochs", "no checkpoint holds a sample yet")]),
                *(repeated or [("repeated work", "none known")]),
            ]
        )

    def _verdict(self, proof: EpochProof) -> str:
        if not proof.finished:
            return f"in progress: {proof.consumed} of {proof.expected} samples"
        if proof.exactly_once:
            return f"proved: each of {proof.expected} samples exactly once"
        counts = f"consumed {proof.consumed}, expected {proof.expected}"
        if proof.consumed == proof.expected:
            counts += ", and not each of them once"
        return f"NOT PROVED: {counts}{_pointing(self.suspects.get(proof.epoch))}"


def audit(run: FoundRun, history: History) -> Audit:
    """Prove every finished epoch.

    Raises `DataDamagedError` where the line is broken, `UsageError` for a run that has not begun.
    """
    line = lineage.line(run.log, history.head)
    if history.status == "new":
        raise UsageError(f"run {run.place}: has not begun, its log is empty; nothing to prove yet")
    if history.num_samples is None:
        raise DataDamagedError(
            f"run {run.place}: no attempt's record is intact, and with them the number of samples "
            "of an epoch is lost"
        )
    if history.head.committed and not line:
        raise DataDamagedError(
            f"run {run.place}: all its checkpoints are in quarantine, so no line is left to prove"
        )
    done = int(line[-1].checkpoint.epoch) if line else 0
    proofs = prove(line, num_samples=history.num_samples, finished_epochs=done)
    failed = [each.epoch for each in proofs if each.finished and not each.exactly_once]
    *earlier, _ = history.attempts
    return Audit(
        run=str(run.place),
        num_samples=history.num_samples,
        proofs=tuple(proofs),
        suspects=_suspects(run, history, line, failed) if failed else {},
        repeated=tuple(each for each in earlier if each.lost_steps != 0),
    )


def _suspects(
    run: FoundRun, history: History, line: Sequence[Commit], epochs: Sequence[int]
) -> dict[int, Suspect]:
    assert history.num_samples is not None
    try:
        config = configuration.from_json(own_settings(history))
        plan = Plan(
            settings_of(config),
            num_samples=history.num_samples,
            overrides=[(each["step"], each["settings"]) for each in history.overrides],
        )
    except (IncompatibleError, ValueError):
        return {}  # what was planned is unknown: the proof stands without a pointer
    found: dict[int, Suspect] = {}
    for epoch in epochs:
        order = epoch_order(seed=config.seed, epoch=epoch, num_samples=history.num_samples)
        suspect = locate(run.storage, line, epoch=epoch, plan=plan, order=order)
        if suspect is not None:
            found[epoch] = suspect
    return found


def _loss(attempt: AttemptStory) -> str:
    if attempt.lost_steps is None:
        known = attempt.first_step if attempt.last_step is None else attempt.last_step
        return f"lost an unknown number of steps after step {known or 0}"
    return f"lost {attempt.lost_steps} steps, which the next attempt did again"


def _pointing(suspect: Suspect | None) -> str:
    if suspect is None:
        return ""
    first, last = suspect.first_step, suspect.last_step
    steps = f"step {first}" if first == last else f"one of the steps {first} to {last}"
    return f"; first wrong: {steps}: {suspect.why}"
