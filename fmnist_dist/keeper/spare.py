"""A trainer in waiting: forked ahead and ready to go, so that a heal waits for neither.

Copying the page tables of a process that has loaded torch takes 10 to 20 ms, building a model as
long, and a first step some 30 ms more than a later one. A spare has done all that, and sleeps until
its keeper calls it. It holds no connection.
"""

import json
import os
import select
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict

from fmnist_dist import limits
from fmnist_dist.distributed.generation import Lost
from fmnist_dist.distributed.process import name_process
from fmnist_dist.errors import ExitCode
from fmnist_dist.keeper.deaths import cause_of
from fmnist_dist.keeper.fork import NoRoomError, end_of, fork
from fmnist_dist.telemetry.events import EventLog

_events = EventLog("fmnist_dist.keeper")


class Spare:
    """One trainer in waiting."""

    def __init__(
        self,
        rehearse: Callable[[Callable[[], bool]], Callable[[Lost, float], int]],
        *,
        close: Iterable[int],
    ) -> None:
        """Fork it. `rehearse` runs there at once; what it returns runs when the spare is called.

        `rehearse` is given a look at whether that is so, to leave out what it need not do.
        Raises `NoRoomError`, and OSError where there is no descriptor left.
        """
        readable, writable = os.pipe2(os.O_CLOEXEC)

        def wait_for_call() -> int:
            be_trainer = rehearse(lambda: bool(select.select([readable], [], [], 0)[0]))
            told = os.read(readable, 65536)
            if not told:  # the keeper needs no trainer any more
                return ExitCode.FINISHED
            name_process("fmnist-trainer")
            lost, died_at = json.loads(told)
            return be_trainer(Lost(**lost), died_at)

        try:
            self.process = fork(wait_for_call, name="fmnist-spare", close=(*close, writable))
        except NoRoomError:
            os.close(writable)
            raise
        finally:
            os.close(readable)
        self._writable = writable

    def call(self, lost: Lost, *, died_at: float) -> bool:
        """Make it the trainer; False if it is gone."""
        told = json.dumps([asdict(lost), died_at]).encode()
        status = self._status()
        try:
            if status is None:
                os.write(self._writable, told)
                return True
        except BrokenPipeError:  # killed since: nobody else has the other end
            status = end_of(self.process, time.monotonic() + limits.KILL_SECONDS)
        finally:
            os.close(self._writable)
        why = cause_of(status)[0] if status is not None else "it closed its pipe"
        _events.warning("the spare worker was lost too", why=why)
        return False

    def _status(self) -> int | None:
        done, status = os.waitpid(self.process, os.WNOHANG)
        return status if done else None
