"""Train: `torchrun --nproc_per_node=N -m fmnist_dist.train [flags]`, or plain `python -m`.

The same command starts a run and goes on with it. What a user wrote is checked before torch is
imported, so that a wrong flag answers at once.
"""

import os
import sys
import time

from fmnist_dist import settings
from fmnist_dist.distributed.process import die_with_parent, end_launcher
from fmnist_dist.errors import Drained, ExitCode, FmnistDistError, PeerFailedError
from fmnist_dist.telemetry import events
from fmnist_dist.telemetry.events import EventLog
from fmnist_dist.telemetry.phases import Phases

_PEER_SECONDS = 5.0  # rank 0 says what is wrong; time for it to do so before torchrun ends it

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


def _run() -> int:  # noqa: PLR0911 - one return for each way to end
    phases = Phases()
    rank = int(os.environ.get("RANK", "0"))
    events.configure(log_format="text", rank=rank, stream=sys.stderr)
    try:
        die_with_parent(os.environ)
        launch = settings.load(sys.argv[1:], os.environ)
    except FmnistDistError as error:
        if rank == 0:  # the same line from each rank would not help
            print(f"fmnist_dist.train: {error}", file=sys.stderr)
        else:
            time.sleep(_PEER_SECONDS)
        return error.exit_code
    events.configure(log_format=launch.config.log_format, rank=rank, stream=sys.stderr)
    try:
        from fmnist_dist import job  # noqa: PLC0415 - torch takes seconds

        phases.ended("imports")
        job.run(launch, os.environ, phases)
    except PeerFailedError as error:
        time.sleep(_PEER_SECONDS)
        return error.code
    except Drained as drained:
        _events.info(str(drained), exit_code=int(drained.exit_code))
        return drained.exit_code
    except FmnistDistError as error:
        _events.error(str(error), exit_code=int(error.exit_code))
        return error.exit_code
    except KeyboardInterrupt:
        _events.error("interrupted: steps since the newest checkpoint are lost", exit_code=130)
        return 130
    except Exception:  # noqa: BLE001 - the entry point: the last one who can tell
        _events.exception("a bug: please report it with this traceback")
        return ExitCode.BUG
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
