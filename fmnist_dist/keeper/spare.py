"""A trainer in waiting: forked ahead and ready to go, so that a heal waits for neither.

Copying the page tables of a process that has loaded torch takes 10 to 20 ms, building a model as
long, and a first step some 30 ms more than a later one. A spare has done all that, and sleeps until
its keeper calls it. It holds no connection.
"""

import json
import os
import select
from collections.abc import Callable, Iterable
from dataclasses import asdict

from fmnist_dist.distributed.generation import Lost
from fmnist_dist.distributed.process import name_process
from fmnist_dist.errors import ExitCode
from fmnist_dist.keeper.fork import fork


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
        Raises OSError where there is no room for another process.
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
        except OSError:
            os.close(writable)
            raise
        finally:
            os.close(readable)
        self._writable = writable

    def call(self, lost: Lost, *, died_at: float) -> bool:
        """Make it the trainer; False if it is gone."""
        told = json.dumps([asdict(lost), died_at]).encode()
        try:
            gone, _ = os.waitpid(self.process, os.WNOHANG)
            if gone:
                return False
            os.write(self._writable, told)
        except BrokenPipeError:  # killed since
            os.waitpid(self.process, 0)
            return False
        finally:
            os.close(self._writable)
        return True
