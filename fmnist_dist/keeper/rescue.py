"""Saving in a trainer's place: from the copy of the state that it has left with its keeper."""

import os
import signal
import time

from fmnist_dist import limits
from fmnist_dist.desk import Desk, Prepared
from fmnist_dist.distributed import world
from fmnist_dist.errors import ExitCode, FmnistDistError
from fmnist_dist.handover.board import Board
from fmnist_dist.handover.slots import Slots
from fmnist_dist.held import inherit
from fmnist_dist.keeper.deaths import cause_of
from fmnist_dist.keeper.fork import end_of, fork
from fmnist_dist.telemetry.events import EventLog

_events = EventLog("fmnist_dist.keeper")


def rescue(prepared: Prepared, board: Board, slots: Slots, *, reason: str, seconds: float) -> int:
    """Make durable what the dead trainer has left, in a child; return its exit code.

    The keeper itself touches no storage: clients of object stores have threads, which must not
    cross the next fork.
    """

    def save() -> int:
        device = world.device_of("cpu", local_rank=0)
        held = inherit(prepared, Desk(board=board, slots=slots), device)
        if held is None:
            _events.error("nothing to save: no whole state is left in the keeper's memory")
            return ExitCode.TRANSIENT
        try:
            held.saves.secure(held.state, reason=reason, seconds=seconds)
        except FmnistDistError as error:
            _events.error(str(error), exit_code=int(error.exit_code))
            return error.exit_code
        _events.info("saved from the keeper's memory", step=held.state.step)
        return ExitCode.FINISHED

    child = fork(save, name="fmnist-rescue")
    deadline = time.monotonic() + seconds + limits.KILL_SECONDS
    status = end_of(child, deadline)
    if status is None:
        os.kill(child, signal.SIGKILL)
        # Not for ever: one that waits for a dead disk cannot even be killed, and dies afterwards.
        end_of(child, time.monotonic() + limits.KILL_SECONDS)
        _events.error("could not save from the keeper's memory in time", seconds=round(seconds, 1))
        return ExitCode.TRANSIENT
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        _events.error("could not save from the keeper's memory", why=cause_of(status)[0])
        return ExitCode.TRANSIENT
    return code
