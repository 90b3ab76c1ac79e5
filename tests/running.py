"""A launch as a context: ended on the way out, whatever became of the test."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from jobs import Job, alive


@contextmanager
def running(job: Job) -> Iterator[Job]:
    """Start `job`; leave no process of it and no open file behind."""
    with job.start().process as process:
        try:
            yield job
        finally:
            pids = job.worker_pids() if process.poll() is None else []
            process.kill()
            for pid in filter(alive, pids):  # they would follow by themselves, if all is well
                os.kill(pid, signal.SIGKILL)
