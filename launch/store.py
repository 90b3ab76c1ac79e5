"""The rendezvous store alone: `python -m launch.store --port 29500`, until SIGTERM.

On a node that nobody preempts, it outlives every node of the training. It holds nothing that must
survive: agents that lose it meet again in the next one. Whoever reaches its port runs code in the
agents, which unpickle what they read here: keep a NetworkPolicy before it.
"""

import signal
import sys
from typing import Annotated

from cyclopts import App, Parameter

from fmnist_dist.command import run_command
from fmnist_dist.errors import TransientError, UsageError
from fmnist_dist.usage import new_app

_PORTS = range(1, 65536)


def serve(
    *, port: Annotated[int, Parameter(help="to listen on, on all addresses", negative="")] = 29500
) -> int:
    """Serve the store of torchrun's c10d rendezvous until SIGTERM or SIGINT."""
    if port not in _PORTS:
        raise UsageError(f"flag --port: found {port}, expected a number from 1 to 65535")
    # First, so that a signal while torch is imported ends this as well; blocked, it waits for
    # `sigwait` in threads that torch starts, too.
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    import torch.distributed as dist  # noqa: PLC0415 - 1.5 s

    try:
        server = dist.TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False)  # noqa: S104
    except RuntimeError as error:  # torch's own carries its stack
        reason = str(error).partition("\n")[0]
        raise TransientError(f"port {port}: cannot be listened on: {reason}") from error
    print(f"serving the rendezvous on port {server.port}", flush=True)
    number = signal.sigwait(ends)
    print(f"ended by {signal.Signals(number).name}", flush=True)
    return 0


def make_app() -> App:
    return new_app(
        "launch.store",
        usage=r"Usage: python -m launch.store \[flags]",
        default_command=serve,
    )


def main() -> int:
    return run_command(make_app(), sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
