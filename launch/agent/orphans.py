"""As PID 1 the agent inherits the children of workers that have died, and has to bury them."""

import os
from collections.abc import Collection


def reap(own: Collection[int]) -> None:
    """Bury one child that is nobody's; the exit statuses of `own` stay for `subprocess`."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # there is none
        return
    if found is not None and found.si_pid not in own:
        os.waitpid(found.si_pid, os.WNOHANG)
