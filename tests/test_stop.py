"""A signal that comes when a process has nothing left to do but end."""

import signal
import subprocess
import sys

import pytest

from fmnist_dist.distributed.stop import SIGNALS
from fmnist_dist.errors import ExitCode

# Modules are taken down after the interpreter has given its handlers back to the system.
_ENDING = """
import os, signal, sys
from contextlib import nullcontext
from fmnist_dist.distributed.stop import listen

class Last:
    def __del__(self, say=os.write, kill=os.kill, process=os.getpid()):
        kill(process, {number})
        say(1, b"signalled")

last = Last()
with {context}:
    pass
sys.exit({code})
"""


def ends(context: str, number: signal.Signals) -> tuple[int, str]:
    """Return the exit code and output of a process that gets a signal at its very end."""
    code = _ENDING.format(context=context, number=int(number), code=int(ExitCode.FINISHED))
    child = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    return child.returncode, child.stdout


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_at_the_very_end_does_not_take_the_exit_codes_place(
    number: signal.Signals,
) -> None:
    """Else a worker that torchrun signals just then, since another one ended, would end by it."""
    assert ends("listen()", number) == (ExitCode.FINISHED, "signalled")


def test_without_it_the_signal_would_be_the_end() -> None:
    assert ends("nullcontext()", signal.SIGTERM) == (-signal.SIGTERM, "")
