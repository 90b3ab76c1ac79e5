"""What can go wrong, as exceptions, and the exit code that each becomes.

An exit code says whose fault it was, so that torchrun, the agent in `launch/` and a Kubernetes
`podFailurePolicy` can decide whether to try again. The table is in `docs/failures.md`.
"""

from enum import IntEnum

INTERRUPTED = 130  # the exit code after a second SIGINT, as a shell has it


class ExitCode(IntEnum):
    """Every exit code of every command of this package."""

    FINISHED = 0  # final checkpoint and `finish` record are durable
    BUG = 1  # an exception nobody foresaw, printed with its traceback
    USAGE = 64  # wrong flag, key, environment name or value
    DATA_DAMAGED = 65  # no valid checkpoint where one must be, damage beyond fall back
    NO_PROGRESS = 70  # repeats itself: no progress over several attempts, or a non-finite loss
    TRANSIENT = 75  # retries of something that may pass (storage, rendezvous) are used up
    FENCED = 76  # another owner has taken the run over
    INCOMPATIBLE = 78  # configuration, checkpoint or storage lay-out do not fit together
    PEER_LOST = 79  # a peer is gone for good, the state is saved; wants a new rendezvous
    DRAINED = 143  # stopped on a signal, the state is saved


class FmnistDistError(Exception):
    """Foreseen: printed as one line without a traceback, and the process ends with `exit_code`."""

    exit_code = ExitCode.BUG


class UsageError(FmnistDistError):
    """The user wrote something that cannot be meant. A restart cannot help."""

    exit_code = ExitCode.USAGE


class DataDamagedError(FmnistDistError):
    """What was saved, or the data set, is damaged, and nothing older is left."""

    exit_code = ExitCode.DATA_DAMAGED


class NoProgressError(FmnistDistError):
    """The same bits would fail in the same way again. A restart cannot help."""

    exit_code = ExitCode.NO_PROGRESS


class TransientError(FmnistDistError):
    """Something outside did not answer within its limit. A restart may help."""

    exit_code = ExitCode.TRANSIENT


class PeerLostError(FmnistDistError):
    """Another rank is gone. It may come back: then all meet again; if not, a restart is needed."""

    exit_code = ExitCode.PEER_LOST


class FencedError(FmnistDistError):
    """A newer attempt stands in the run log: this one may neither commit nor delete any more."""

    exit_code = ExitCode.FENCED


class OvertakenError(FencedError):
    """The newer attempt is one of this same launch, which goes on elsewhere: a restart joins it."""

    exit_code = ExitCode.TRANSIENT


class IncompatibleError(FmnistDistError):
    """The run, the settings and the storage do not fit together. A restart cannot help."""

    exit_code = ExitCode.INCOMPATIBLE


class PeerFailedError(Exception):
    """Rank 0 has failed and says why; this rank ends with the same code and says nothing."""

    def __init__(self, code: int) -> None:
        super().__init__(f"rank 0 ends with exit code {code}")
        self.code = code


class Drained(FmnistDistError):  # noqa: N818 - no error: it did what it was asked to
    """A signal asked the job to stop; everything up to the last finished step is durable."""

    exit_code = ExitCode.DRAINED
