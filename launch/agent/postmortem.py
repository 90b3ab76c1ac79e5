"""What is left of an agent that has ended: one line of JSON, which Kubernetes shows with the pod.

The kubelet mounts the file into the container, so it cannot be replaced, only written: in one
write, of no more than what the kubelet reads.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fmnist_dist.masking import masked
from launch.agent import outcome
from launch.agent.outcome import Ending
from launch.agent.progress import Reached

LIMIT_BYTES = 4096  # of a termination message
_CUT_MARK = "..."


@dataclass(frozen=True, slots=True, kw_only=True)
class PostMortem:
    reason: str
    exit_code: int
    fault: str  # whose it was
    attempt: int | None = None  # of the run
    last_step: int | None = None  # that it has finished
    worker: int | None = None  # the rank whose end says most
    error: str = ""  # its last words

    @staticmethod
    def of(ending: Ending, reached: Reached | None) -> "PostMortem":
        worker = ending.worker
        return PostMortem(
            reason=ending.reason,
            exit_code=ending.code,
            fault=outcome.fault(ending.code),
            attempt=reached.attempt if reached is not None else None,
            last_step=reached.step if reached is not None else None,
            worker=worker.rank if worker is not None else None,
            error=worker.line if worker is not None else "",
        )

    def text(self) -> str:
        """Return it as JSON that fits, without anything that can be a secret."""
        fields = {**asdict(self), "reason": masked(self.reason), "error": masked(self.error)}
        text = json.dumps(fields)
        for name in ("error", "reason"):
            while (over := len(text) - LIMIT_BYTES) > 0 and fields[name] != _CUT_MARK:
                # An escape is up to six characters for one, so that this may take a few turns.
                kept = max(0, len(fields[name]) - len(_CUT_MARK) - max(1, over // 6))
                fields[name] = fields[name][:kept] + _CUT_MARK
                text = json.dumps(fields)
        return text


def termination_log_of(argv: Sequence[str], environ: Mapping[str, str]) -> Path | None:
    """Return the file for the post-mortem as far as it is known before torch is there."""
    found = environ.get("PET_TERMINATION_LOG")
    words = list(argv)
    for number, word in enumerate(words):
        if word in {"-m", "--module", "--"}:
            break
        name, mark, value = word.partition("=")
        if name in {"--termination-log", "--termination_log"}:
            found = value if mark else next(iter(words[number + 1 :]), None)
    return Path(found) if found else None


def write(path: Path, post_mortem: PostMortem) -> None:
    """Write it over what stands in the file. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, post_mortem.text().encode())
    finally:
        os.close(descriptor)
