"""How an attempt takes a run over: rank 0 decides everything once, the other ranks are told.

In this order, so that each step can be killed: settings are checked against the run *before*
anything is written; the attempt is appended; only then is a checkpoint chosen, from the head that
was folded; overrides become durable before a step runs with them; orphans are swept.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fmnist_dist import config as configuration
from fmnist_dist.agreement import settings_of, wanted_changes
from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import Attempt
from fmnist_dist.checkpoint.restore import Restored
from fmnist_dist.checkpoint.storage import Storage
from fmnist_dist.checkpoint.tier import LocalTier
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.config import IDENTITY, OVERRIDABLE, Config
from fmnist_dist.digest import EpochDigest
from fmnist_dist.errors import IncompatibleError, UsageError
from fmnist_dist.plan import Plan
from fmnist_dist.settings import Launch
from fmnist_dist.state import TrainState
from fmnist_dist.telemetry.events import EventLog

_events = EventLog("fmnist_dist.takeover")
_OF_THE_RUN = IDENTITY | OVERRIDABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The run that a launch finds: its own settings, what changed since, what changes now."""

    base: dict[str, Any]
    overrides: tuple[tuple[int, dict[str, Any]], ...]
    wanted: dict[str, Any]
    passed_over: tuple[tuple[int, int], ...]  # steps [from, until) of rollbacks
    done: bool  # finished, and this launch asks for nothing more

    def config(self, launch: Launch) -> Config:
        """Return the settings to train with: the run's where the run has a say."""
        return dataclasses.replace(launch.config, **{name: self.base[name] for name in _OF_THE_RUN})

    def plan(self, launch: Launch, num_samples: int) -> Plan:
        try:
            return Plan(
                settings_of(self.config(launch)),
                num_samples=num_samples,
                overrides=self.overrides,
                passed_over=self.passed_over,
            )
        except ValueError as error:
            raise IncompatibleError(str(error)) from error
        except TypeError as error:
            raise IncompatibleError(
                f"the run's settings were changed by another version: {error}; use that one"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """Where training goes on: what every rank must know besides the bytes of the state."""

    terms: Terms
    attempt: int
    attempt_index: int  # of its record, which every node must see
    nonce: str
    step: int
    ledger: tuple[EpochDigest, ...]
    metrics: dict[str, float]
    evaluated: bool
    parent: int | None  # index of the checkpoint's record; None: from the initial weights

    def restore(self, state: TrainState, files: Mapping[str, bytes | memoryview]) -> None:
        """Make `state` the one to go on from."""
        state.load(
            files,
            step=self.step,
            ledger=self.ledger,
            metrics=self.metrics,
            evaluated=self.evaluated,
            parent=self.parent,
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "Resumption":
        fields = json.loads(text)
        fields["terms"] = Terms(
            **{
                **fields["terms"],
                "overrides": tuple(
                    (step, changed) for step, changed in fields["terms"]["overrides"]
                ),
                "passed_over": tuple(
                    (first, until) for first, until in fields["terms"]["passed_over"]
                ),
            }
        )
        fields["ledger"] = tuple(
            EpochDigest(**{**each, "digest": tuple(each["digest"])}) for each in fields["ledger"]
        )
        return Resumption(**fields)


def read_terms(log: RunLog, head: Head, launch: Launch, *, num_samples: int) -> Terms:
    """Compare a launch with the run that it finds. Raises `IncompatibleError`, `UsageError`."""
    newest = next(lineage.attempts(log, head), None)
    if newest is None:
        return Terms(
            base={name: configuration.to_json(launch.config)[name] for name in _OF_THE_RUN},
            overrides=(),
            wanted={},
            passed_over=(),
            done=False,
        )
    configuration.from_json(newest.attempt.config)  # refuses what this version does not know
    terms = Terms(
        base={**configuration.to_json(Config()), **newest.attempt.config},
        overrides=tuple((each.step, each.settings) for each in lineage.overrides(log, head)),
        wanted={},
        passed_over=head.passed_over,
        done=False,
    )
    plan = terms.plan(launch, num_samples)
    wanted = wanted_changes(
        base=terms.base,
        current=plan.settings,
        previous_explicit=newest.attempt.explicit,
        pending=head.wanted,
        explicit=launch.explicit,
    )
    terms = dataclasses.replace(terms, wanted=wanted)
    step = head.newest_step or 0
    settings = with_wanted(terms, step).plan(launch, num_samples).settings
    if settings.batch_size % terms.base["logical_shards"]:
        raise UsageError(
            f"--batch-size {settings.batch_size}: expected a multiple of this run's "
            f"{terms.base['logical_shards']} logical shards"
        )
    finished = head.finished_step
    end = min(plan.total_steps, launch.config.max_steps or plan.total_steps)
    return dataclasses.replace(terms, done=not wanted and finished is not None and finished >= end)


def with_wanted(terms: Terms, step: int) -> Terms:
    """Return the terms with what this launch wants as an override at `step`."""
    if not terms.wanted:
        return terms
    return dataclasses.replace(terms, overrides=(*terms.overrides, (step, terms.wanted)), wanted={})


def take_over(
    storage: Storage,
    log: RunLog,
    launch: Launch,
    terms: Terms,
    *,
    owner: str,
    agents: Sequence[str],
    world_size: int,
    num_samples: int,
    fingerprint: dict[str, str],
    lost_steps: Callable[[int, int], int | None],
    suspect: int | None = None,
    tier: LocalTier | None = None,
) -> tuple[RunWriter, Resumption, Restored | None]:
    """Append an attempt and find where it goes on.

    `terms` are those that the caller read; they are read again for the head that is appended to.
    `lost_steps(attempt, step)` returns how many steps an attempt had got past `step`, if known.
    `suspect` is the record of a checkpoint that goes into quarantine first. `owner` is one of
    `agents`, those of this launch (`owner_of`).
    Raises `FencedError`, `IncompatibleError`, `UsageError`, `DataDamagedError`, `StorageError`.
    """

    def make(head: Head) -> Attempt:
        nonlocal terms
        terms = read_terms(log, head, launch, num_samples=num_samples)
        shards = terms.config(launch).logical_shards
        if world_size > shards:
            raise UsageError(
                f"{world_size} workers for {shards} logical shards: each needs at least one; "
                f"start at most {shards} (--nproc_per_node), or a new run with --logical-shards "
                f"{world_size} or more"
            )
        before = next(lineage.attempts(log, head), None)
        return Attempt(
            owner=owner,
            world_size=world_size,
            fingerprint=fingerprint,
            config={name: terms.base[name] for name in sorted(_OF_THE_RUN)},
            explicit=dict(launch.explicit),
            wanted=terms.wanted,
            num_samples=num_samples,
            same_bits=before is None or before.attempt.fingerprint == fingerprint,
        )

    writer = RunWriter.begin(storage, log, owner=owner, make=make, kin=agents, tier=tier)
    head = writer.head
    if not head.same_bits:
        _events.warning(
            "this machine computes other bits than an earlier attempt of this run", **fingerprint
        )
    for retained in writer.head.checkpoints:
        if retained.index == suspect:
            writer.quarantine(retained, why="restoring it has crashed the worker again and again")
            _events.warning("a checkpoint is not used any more", step=retained.step)
    if (adopted := writer.adopt()) is not None:
        _events.info("committed what only the local tier had", step=adopted)
    restored = writer.choose(report=lambda line: _events.warning("fell back", why=line))
    step = restored.commit.checkpoint.step if restored else 0
    changed = terms.wanted
    terms = with_wanted(terms, step)
    try:
        terms.plan(launch, num_samples)
    except IncompatibleError:
        # It fitted the newest checkpoint, which was damaged. Not wanted any more: or every later
        # launch would inherit it, and end here too.
        writer.override(step=step, settings={})
        raise
    if changed:
        writer.override(step=step, settings=changed)
        _events.info("settings changed", step=step, **changed)
    _sweep(writer)
    if head.attempt > 1:
        _events.info(
            "resumed",
            checkpoint=f"step {step}" if restored else "none",
            attempt=head.attempt,
            lost_steps=_shown(lost_steps(head.attempt - 1, step)),
            **({"files_from_local_tier": restored.nearby} if restored and tier else {}),
        )
    checkpoint = restored.commit.checkpoint if restored else None
    assert head.attempt_index is not None
    resumption = Resumption(
        terms=terms,
        attempt=head.attempt,
        attempt_index=head.attempt_index,
        nonce=log.record(head.attempt_index).nonce,
        step=step,
        ledger=checkpoint.ledger if checkpoint else (),
        metrics=checkpoint.metrics if checkpoint else {},
        evaluated=checkpoint.evaluated if checkpoint else False,
        parent=restored.commit.index if restored else None,
    )
    return writer, resumption, restored


def owner_of(head: Head, agents: Sequence[str]) -> str:
    """Return the name under which this launch has the run: that of one of its agents.

    Agents come and go, and the first rank is not always the same one's. While the agent that gave
    the name is among them, the launch keeps it. Where it is not, another one that has had the run
    before was superseded, by this launch or by another one, which nobody can tell any more.
    """
    if head.owner is None or head.owner in agents:
        return head.owner or agents[0]
    superseded = {*head.superseded, head.owner}
    return next((each for each in agents if each not in superseded), agents[0])


def _sweep(writer: RunWriter) -> None:
    swept = writer.sweep()
    if swept.suspended is not None:
        _events.warning("not swept: a damaged record may name a folder", why=swept.suspended)
    for folder in swept.orphans:
        _events.info("removed what a killed save left behind", folder=folder)


def _shown(lost: int | None) -> int | str:
    return "unknown" if lost is None else lost
