"""Train: `torchrun --nproc_per_node=N -m fmnist_dist.train [flags]`, or plain `python -m`.

The same command starts a run and goes on with it. What a user wrote is checked before torch is
imported, so that a wrong flag answers at once.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO, cast

from fmnist_dist import limits, settings
from fmnist_dist.checkpoint.disk import disk_from
from fmnist_dist.distributed.interface import interface_towards
from fmnist_dist.distributed.process import die_with_parent, end_launcher, name_process
from fmnist_dist.distributed.stop import leaving_at_once
from fmnist_dist.errors import (
    INTERRUPTED,
    Drained,
    ExitCode,
    FmnistDistError,
    PeerFailedError,
    UsageError,
)
from fmnist_dist.faults import FAULTS_VARIABLE, Faults
from fmnist_dist.handover.board import Board
from fmnist_dist.settings import Launch
from fmnist_dist.telemetry import events
from fmnist_dist.telemetry.events import EventLog
from fmnist_dist.telemetry.lastwords import VARIABLE, LastWords, leave
from fmnist_dist.telemetry.ownline import OwnLine
from fmnist_dist.telemetry.phases import Phases
from fmnist_dist.telemetry.progress import is_terminal

_FINAL = {
    ExitCode.USAGE,
    ExitCode.DATA_DAMAGED,
    ExitCode.NO_PROGRESS,
    ExitCode.FENCED,
    ExitCode.INCOMPATIBLE,
}  # a restart would end in the same way

_events = EventLog("fmnist_dist.train")


def main() -> int:
    """Run one attempt; return its exit code."""
    code = _run()
    if code in _FINAL:
        end_launcher(os.environ)
    return code


def _run() -> int:
    phases = Phases()
    rank = int(os.environ.get("RANK", "0"))
    events.configure(log_format="text", rank=rank, stream=sys.stderr)
    try:
        die_with_parent(os.environ)
        launch = settings.load(sys.argv[1:], os.environ)
        faults = _faults(rank)
    except FmnistDistError as error:
        if (words := _words_file()) is not None:
            leave(words, str(error), exit_code=error.exit_code)
        if rank == 0:  # the same line from each rank would not help
            print(f"fmnist_dist.train: {error}", file=sys.stderr)
        else:
            time.sleep(limits.SAY_SECONDS)
        return error.exit_code
    log_format = launch.config.log_format
    has_bar = log_format == "text" and is_terminal(sys.stderr)
    stream = cast("TextIO", OwnLine(sys.stderr)) if has_bar else sys.stderr
    events.configure(log_format=log_format, rank=rank, stream=stream)
    if (words := _words_file()) is not None:
        logging.getLogger().addHandler(LastWords(words))
    # Before torch and NumPy are imported: threads must not cross the keeper's fork.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A page of C++ frames for each lost connection is a warning of torch's. We say it in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's, at its import; it has nothing to multiply
    return _code_of(lambda: _keep(launch, faults, phases))


def _words_file() -> Path | None:
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


def _faults(rank: int) -> Faults:
    text = os.environ.get(FAULTS_VARIABLE)
    try:
        faults = Faults.parse(text, rank=rank)
        disk_from(text)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if text:
        _events.warning("faults are armed", faults=text)
    return faults


def _keep(launch: Launch, faults: Faults, phases: Phases) -> int:
    """Import what is slow, prepare, and train: in children of a keeper, or in this process."""
    with leaving_at_once(_say_drained):
        import torch._dynamo  # noqa: F401, PLC0415 - else every trainer's first optimizer does, in 1 s

        from fmnist_dist import job  # noqa: PLC0415 - torch takes seconds
        from fmnist_dist.desk import Desk  # noqa: PLC0415
        from fmnist_dist.distributed.roster import call_roll  # noqa: PLC0415
        from fmnist_dist.keeper import fork, keep  # noqa: PLC0415
        from fmnist_dist.opening import noting_failures  # noqa: PLC0415

        phases.ended("imports")
        is_kept = not launch.config.no_keeper and fork.is_supported()
        roster = call_roll(os.environ, fork=lambda serve: fork.fork(serve, name="fmnist-store"))
        phases.ended("roll_call")
        if roster.address is not None and (name := interface_towards(*roster.address)) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # what a user has set, stays
        prepared = job.prepare(launch, roster, faults, phases)
    if roster.rank == 0:
        _warn_of_the_launcher(os.environ)

    def train(desk: Desk) -> int:
        try:
            job.train(prepared, desk)
        except Exception as error:
            desk.board.error = f"{type(error).__name__}: {error}"
            raise
        return ExitCode.FINISHED

    if is_kept:
        name_process("fmnist-keeper")
        return keep.keep(prepared, lambda desk: _code_of(lambda: train(desk)), phases)
    board = Board.create()
    with noting_failures(prepared.place, board):
        return train(Desk(board=board, phases=phases))


def _warn_of_the_launcher(environ: Mapping[str, str]) -> None:
    if environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
        _events.warning(
            "torchrun will not restart what cannot be healed in place: give it --max-restarts=100 "
            "(its default is 0), or start the same command again by hand"
        )
    shares = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares and int(environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        _events.warning(
            "a node that is added or comes back would end the launch (a fault of torchrun, torch "
            "2.14.1): set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of every agent"
        )


def _say_drained(drained: Drained) -> None:
    _events.info(str(drained), exit_code=int(drained.exit_code))


def _code_of(action: Callable[[], int]) -> int:
    """Return the exit code of what `action` returns or raises; tell what it raises."""
    try:
        return action()
    except PeerFailedError as error:
        time.sleep(limits.SAY_SECONDS)
        return error.code
    except Drained as drained:
        _say_drained(drained)
        return drained.exit_code
    except FmnistDistError as error:
        _events.error(str(error), exit_code=int(error.exit_code))
        return error.exit_code
    except KeyboardInterrupt:
        said = "interrupted: steps since the newest checkpoint are lost"
        _events.error(said, exit_code=INTERRUPTED)
        return INTERRUPTED
    except Exception:  # noqa: BLE001 - the entry point: the last one who can tell
        _events.exception("a bug: please report it with this traceback")
        return ExitCode.BUG


if __name__ == "__main__":
    sys.exit(main())
