"""What ended an attempt by itself: a note for the attempts after it, so that they see a repetition.

A keeper tells a crash loop from kills (`keeper.deaths`). Without one, or where the keeper itself
fails, each attempt is a new process that knows nothing of the last one. So an exception leaves a
note beside the progress hint, and the next attempts of the same launch look for three alike.

Like the hint it is not part of the truth, and lost without harm. A process that is killed, or that
crashes in machine code, leaves none and counts for nothing: the launcher's restarts are limited.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fmnist_dist.checkpoint.hint import read_hints

ATTEMPTS = 3  # alike in a row; as many deaths of one trainer a keeper takes (`keeper.deaths`)
_ERROR_CHARACTERS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What an attempt ended with: the steps that it had finished, and the error in one line."""

    step: int
    error: str


def note_failure(notes: Path, *, attempt: int, step: int, error: Exception) -> None:
    """Leave word of an attempt's end; the first rank to fail says why. Raises nothing."""
    lines = str(error).splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"[:_ERROR_CHARACTERS]
    note = json.dumps(asdict(Failure(step=step, error=text)))
    # Whoever fails on storage fails here too, and has an error of its own to tell.
    with contextlib.suppress(OSError):
        path = _path(notes, attempt)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "w") as file:
            file.write(note)


def repeated_failure(notes: Path, attempts: Iterable[int]) -> Failure | None:
    """Return what the last attempts, given from the newest back, have ended with alike, if any.

    An attempt without a note was killed: it counts for nothing, unless it has got further.
    """
    reached = read_hints(notes)
    found: list[Failure] = []
    for attempt in attempts:
        failure = _read(_path(notes, attempt))
        if failure is None:
            if found and attempt in reached and reached[attempt].last_step > found[0].step:
                return None
            continue
        if found and failure != found[0]:
            return None
        found.append(failure)
        if len(found) == ATTEMPTS:
            return failure
    return None


def _path(notes: Path, attempt: int) -> Path:
    return notes / f"{attempt:06d}.failed"


def _read(path: Path) -> Failure | None:
    try:
        fields = json.loads(path.read_bytes())
        return Failure(step=int(fields["step"]), error=str(fields["error"]))
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that was cut off
        return None
