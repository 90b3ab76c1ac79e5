"""How the commands that read a run, and those of `launch/`, end.

With one line on stderr for what was foreseen, and an exit code.
"""

import os
import sys
from collections.abc import Sequence

from cyclopts import App

from fmnist_dist.errors import INTERRUPTED, ExitCode, FmnistDistError
from fmnist_dist.usage import run_app

_READER_GONE = 141  # as a shell shows SIGPIPE


def run_command(app: App, argv: Sequence[str]) -> int:
    """Run what `argv` asks for and return its exit code: 0 where the command returns none.

    A bug passes through with its traceback. What was printed before an error is flushed before the
    error's line.
    """
    try:
        code = _run(app, argv)
        print(end="", flush=True)  # noqa: T201 - a command prints
    except BrokenPipeError:
        # `| head` has seen enough. Python flushes once more at exit and must find an open end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _run(app: App, argv: Sequence[str]) -> int:
    try:
        code = run_app(app, argv)
    except FmnistDistError as error:
        print(end="", flush=True)  # noqa: T201 - a command prints
        sys.stderr.write(f"{app.name[0]}: {error}\n")
        return error.exit_code
    return int(code or ExitCode.FINISHED)
