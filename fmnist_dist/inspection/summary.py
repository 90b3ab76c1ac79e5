"""What a run amounts to, as `runs show --json` tells it. Keys are relied on from outside."""

import dataclasses
from typing import Any

from fmnist_dist.checkpoint.history import History
from fmnist_dist.checkpoint.lineage import Commit
from fmnist_dist.config import IDENTITY, OVERRIDABLE, Config, to_json
from fmnist_dist.filenames import MODEL
from fmnist_dist.inspection.foundrun import FoundRun

Summary = dict[str, Any]


def summarise(run: FoundRun, history: History) -> Summary:
    """Return every key of `runs show --json`, in its order."""
    newest = history.newest
    return {
        "run": str(run.place),
        "status": history.status,
        "step": history.head.newest_step or 0,
        "epoch": newest.checkpoint.epoch if newest else None if history.head.newest_step else 0.0,
        "same_bits": history.head.same_bits,
        "attempts": [dataclasses.asdict(each) for each in history.attempts],
        "heals": [dataclasses.asdict(each) for each in history.heals],
        "checkpoints": [
            _checkpoint(each, copies=_copies(each, history)) for each in history.retained
        ],
        "overrides": [dict(each) for each in history.overrides],
        "config": settings_in_force(history),
        "metrics": history.metrics,
        "save_interval": _interval(history),
    }


def own_settings(history: History) -> dict[str, Any]:
    """Return the settings that the run remembers, as it began; {} while nothing is known."""
    if not history.config:
        return {}
    settings = {**to_json(Config()), **history.config}
    return {name: settings[name] for name in sorted(IDENTITY | OVERRIDABLE)}


def settings_in_force(history: History) -> dict[str, Any]:
    """Return the run's settings with what changed since; the newest word on each counts."""
    settings = own_settings(history)
    for each in history.overrides:
        settings |= each["settings"]
    return settings


def _copies(commit: Commit, history: History) -> list[str]:
    """Return where a checkpoint was copied to, if a local tier still keeps it.

    It keeps the newest one only, and none of a run that is finished.
    """
    is_kept = commit == history.newest and history.finish is None
    return list(commit.checkpoint.copies) if is_kept else []


def _interval(history: History) -> dict[str, Any] | None:
    """Return what the newest attempt has chosen with `--save-every-steps auto`, None without."""
    for commit in reversed(history.retained):
        if commit.attempt == history.head.attempt and commit.checkpoint.interval is not None:
            return dataclasses.asdict(commit.checkpoint.interval)
    return None


def _checkpoint(commit: Commit, *, copies: list[str]) -> dict[str, Any]:
    files = commit.checkpoint.files
    return {
        "step": commit.checkpoint.step,
        "epoch": commit.checkpoint.epoch,
        "reason": commit.checkpoint.reason,
        "bytes": sum(file.size for file in files.values()),
        "model_sha256": files[MODEL].sha256 if MODEL in files else None,
        "attempt": commit.attempt,
        "copies": copies,
    }
