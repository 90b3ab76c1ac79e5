"""Be the agent. Signals are heard from the first line on, long before torch is imported."""

import os
import sys

from launch.agent.notices import Notices

notices = Notices()
# Without it torch 2.14.1 tells a newcomer no address (docs/decisions/0007-several-hosts.md). Read
# from the environment, here and by workers.
os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
# A page of C++ frames for each lost connection is a warning of torch's. We say it in a line.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from launch.agent.life import live  # noqa: E402 - after the handlers stand

if __name__ == "__main__":
    code = live(sys.argv[1:], notices)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a thread may hang in torch's store, and would crash in a dying interpreter.
    os._exit(code)
