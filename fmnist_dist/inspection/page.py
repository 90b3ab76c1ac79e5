"""The pages that `runs` prints for people: aligned columns without colours, the same in a pipe."""

import statistics
from collections.abc import Sequence
from typing import Any

from fmnist_dist.inspection.summary import Summary
from fmnist_dist.interval import duration
from fmnist_dist.usage import shown

_NOT_MEASURED = {"epoch", "samples"}  # of the newest metric row, and above already
_UNFINISHED = "not finished: running, or stopped on the way"  # no log tells which
_DIGITS = 12  # of a SHA-256: enough to tell checkpoints apart


def show_page(summary: Summary) -> str:
    """Return the page of `runs show`."""
    same = "yes" if summary["same_bits"] else "no: an attempt ran on a machine with other kernels"
    facts = [
        ("run", path(summary["run"])),
        ("status", _UNFINISHED if summary["status"] == "running" else summary["status"]),
        ("step", str(summary["step"])),
        ("epoch", number(summary["epoch"])),
        ("same bits", same),
        *_interval(summary),
    ]
    sections = [
        columns(facts),
        _section("metrics", _metrics(summary)),
        _section("attempts", _attempts(summary)),
        _section("heals", _heals(summary)),
        _section("checkpoints", _checkpoints(summary)),
        _section("copies in local tiers", _copies(summary)),
        _section("changes of settings", _overrides(summary)),
        _section("settings", [(k, shown(v)) for k, v in summary["config"].items()]),
    ]
    return "\n".join(each for each in sections if each)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines whose columns begin below each other."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)


def number(value: float | None) -> str:
    """Return a number with the digits that are worth reading."""
    return "unknown" if value is None else f"{value:.6g}"


def path(text: str) -> str:
    """Return a path whole, and on one line whatever its name holds."""
    return text if text.isprintable() else ascii(text)


def _section(title: str, rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    indented = "".join(f"  {line}\n" for line in columns(rows).splitlines())
    return f"{title}\n{indented}"


def _interval(summary: Summary) -> list[tuple[str, str]]:
    chosen = summary["save_interval"]
    if chosen is None:
        return []
    return [("saving", f"every {duration(chosen['seconds'])} (auto): {chosen['why']}")]


def _metrics(summary: Summary) -> list[tuple[str, str]]:
    return [
        (name, number(value))
        for name, value in sorted(summary["metrics"].items())
        if name not in _NOT_MEASURED
    ]


def _attempts(summary: Summary) -> list[tuple[str, ...]]:
    if not summary["attempts"]:
        return []
    heading = ("attempt", "workers", "started at (UTC)", "steps", "lost", "ended", "owner")
    return [heading, *map(_attempt, summary["attempts"])]


def _attempt(attempt: dict[str, Any]) -> tuple[str, ...]:
    steps = [_known(attempt[name]) for name in ("first_step", "last_step")]
    return (
        str(attempt["attempt"]),
        str(attempt["world_size"]),
        attempt["started_at"],
        " to ".join(steps),
        _known(attempt["lost_steps"]),
        attempt["ended"] or "-",
        path(attempt["owner"]),
    )


def _heals(summary: Summary) -> list[tuple[str, ...]]:
    """Return one row for each reason: a run on spot nodes may have healed hundreds of times."""
    if not summary["heals"]:
        return []
    reasons: dict[str, list[dict[str, Any]]] = {}
    for each in summary["heals"]:
        reasons.setdefault(each["reason"], []).append(each)
    heading = ("reason", "times", "median seconds", "lost steps", "last at step")
    rows = [
        (
            path(reason),
            str(len(heals)),
            number(statistics.median(each["seconds"] for each in heals)),
            str(sum(each["lost_steps"] for each in heals)),
            str(heals[-1]["step"]),
        )
        for reason, heals in sorted(reasons.items())
    ]
    return [heading, *rows]


def _checkpoints(summary: Summary) -> list[tuple[str, ...]]:
    if not summary["checkpoints"]:
        return []
    heading = ("step", "epoch", "reason", "bytes", "attempt", "model SHA-256")
    rows = [
        (
            str(each["step"]),
            number(each["epoch"]),
            each["reason"],
            str(each["bytes"]),
            str(each["attempt"]),
            (each["model_sha256"] or "none")[:_DIGITS],
        )
        for each in summary["checkpoints"]
    ]
    return [heading, *rows]


def _copies(summary: Summary) -> list[tuple[str, str]]:
    kept = [each for each in summary["checkpoints"] if each["copies"]]
    return [(f"step {each['step']}", path(place)) for each in kept for place in each["copies"]]


def _overrides(summary: Summary) -> list[tuple[str, str]]:
    return [
        (f"from step {each['step']}", f"{name} = {shown(value)}")
        for each in summary["overrides"]
        for name, value in sorted(each["settings"].items())
    ]


def _known(value: int | None) -> str:
    return "unknown" if value is None else str(value)
