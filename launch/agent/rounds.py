"""The agent's loop: meet, start workers, watch them, judge how they ended, and again.

    meet ── start ── watch ──┬─ finished, or a final code ──────────────────→ the agent's own code
     ↑                       ├─ signalled: drain within the shutdown time-out ──→ 143, or 0
     └───────────────────────┴─ failed, peer lost, nodes wait, the store is back

Nothing here waits for anything but time, so that a signal is taken at any moment.
"""

import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import Future

from torch.distributed import DistNetworkError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from fmnist_dist.errors import INTERRUPTED, ExitCode, TransientError, UsageError
from fmnist_dist.telemetry.events import EventLog
from launch.agent import limits, outcome
from launch.agent.arguments import Arguments
from launch.agent.aside import aside
from launch.agent.budget import Budget
from launch.agent.connection import Connection
from launch.agent.notices import Notices
from launch.agent.orphans import reap
from launch.agent.outcome import Ended, Ending, Next
from launch.agent.progress import Progress
from launch.agent.rendezvous import failure
from launch.agent.workers import Workers

_MEETINGS = 3  # for so many of torch's `join_timeout` a rendezvous is tried

_events = EventLog("launch.agent")


class Rounds:
    """One host's part of a launch."""

    def __init__(self, arguments: Arguments, notices: Notices, progress: Progress | None) -> None:
        launch = arguments.launch
        self._arguments = arguments
        self._notices = notices
        self._progress = progress
        self._budget = Budget(
            crash_loop=arguments.crash_loop_budget, max_restarts=launch.max_restarts
        )
        self._meet_seconds = _MEETINGS * int(
            launch.rdzv_configs.get("join_timeout", limits.JOIN_SECONDS)
        )
        self._nodes = f"{launch.min_nodes}:{launch.max_nodes}"
        self._connection = Connection(launch)
        self._workers: Workers | None = None  # of this round, or the last one
        self._number = 0  # of rounds whose workers were started
        self.is_training = False
        self.restarts: Counter[str] = Counter()  # by reason
        self.ticked_at = time.monotonic()

    @property
    def world_size(self) -> int:
        """The workers that train together; 0 between rounds."""
        return self._workers.world_size if self._workers is not None and self.is_training else 0

    @property
    def generation(self) -> int:
        return self._workers.link.generation if self._workers is not None else 0

    def run(self) -> Ending:
        """Return how it ended, with no worker left."""
        try:
            self._budget.best = self._furthest()
            ending = None
            while ending is None:
                ending = self._meet() or self._train()
        finally:
            if self._workers is not None:
                self._workers.close()
        self._leave()
        return ending

    def _meet(self) -> Ending | None:
        """Take part in a rendezvous, however often that fails, within its limit."""
        deadline = time.monotonic() + self._meet_seconds
        begin_at = time.monotonic() + self._budget.pause_seconds()
        why = "not enough nodes have come"
        workers: Workers | None = None
        meeting: Future[None] | None = None
        while time.monotonic() < deadline:
            if (notice := self._tick()) is not None:
                said = f"stopped on {notice.name}, no worker was running"
                return Ending(code=ExitCode.DRAINED, reason=said)
            link = self._connection.link
            if workers is None or meeting is None or workers.link is not link:
                if link is not None and time.monotonic() >= begin_at:
                    if self._arguments.launch.max_nodes > 1:
                        _events.info("meeting the other agents", nodes=self._nodes)
                    workers = Workers(self._arguments, link)
                    meeting = aside(workers.meet, name="rendezvous")
            elif meeting.done():
                if not (why := failure(meeting)):
                    self._workers = workers
                    return None
                _events.warning("no rendezvous, it is tried again", why=why)
                if isinstance(meeting.exception(), RendezvousConnectionError | DistNetworkError):
                    self._connection.drop(why)
                workers, meeting = None, None
                begin_at = time.monotonic() + limits.RETRY_SECONDS * random.uniform(0.25, 1.0)
        said = f"no rendezvous with the other agents within {self._meet_seconds} s: "
        return Ending(code=ExitCode.TRANSIENT, reason=said + (self._connection.why or why))

    def _train(self) -> Ending | None:
        """Have workers train until all have ended; return how the agent ends, if it does."""
        workers = self._started()
        began = time.monotonic()
        again = ""
        while not again and workers.processes and not any(each.status for each in workers.ended()):
            if (notice := self._tick()) is not None:
                return self._stop(workers, notice)
            again = self._reason_to_meet(workers, since=began)
        if again:
            _events.info(f"{again}: workers are asked to stop, and all meet")
        elif (notice := self._settle(workers)) is not None:
            return self._stop(workers, notice)
        if (ending := self._stop(workers, None)) is not None:
            return ending
        return self._judge(workers, again=bool(again), seconds=time.monotonic() - began)

    def _settle(self, workers: Workers) -> signal.Signals | None:
        """Let workers that fail together end by themselves: one of them may know why."""
        deadline = time.monotonic() + limits.SETTLE_SECONDS
        notice = None
        while workers.processes and time.monotonic() < deadline and notice is None:
            notice = self._tick()
            workers.ended()
        return notice

    def _started(self) -> Workers:
        """Start the workers of a round. Raises UsageError, TransientError."""
        workers = self._workers
        assert workers is not None
        try:
            workers.start(self._number)
        except (FileNotFoundError, PermissionError) as error:
            raise UsageError(f"the program cannot be started: {error}") from error
        except OSError as error:
            raise TransientError(f"no worker can be started: {error}") from error
        self._number += 1
        self.is_training = True
        numbers = {"nodes": workers.nodes, "world_size": workers.world_size}
        _events.info("workers are started", round=self._number, **numbers)
        return workers

    def _reason_to_meet(self, workers: Workers, *, since: float) -> str:
        """Return why workers that train have to stop: others can be met; "" for no reason."""
        link = self._connection.link
        if link is None:  # workers do not need the store: while it is away they train
            return ""
        if link is not workers.link:
            return "the store of the rendezvous is back"
        return "nodes wait to join" if link.waiting_since(since) else ""

    def _judge(self, workers: Workers, *, again: bool, seconds: float) -> Ending | None:
        """Return how the agent ends after a round, if it does."""
        ended = workers.ended()
        worst = outcome.most_telling(ended)
        follows = outcome.judge(ended, in_doubt=again or self._is_out_of_touch(workers))
        said = f"worker {worst.rank} ended with {worst.code}"
        if follows is Next.FINISHED:
            return Ending(code=ExitCode.FINISHED, reason="finished")
        if follows is Next.FINAL:
            return Ending(code=worst.code, reason=said, worker=worst)
        if not again:
            step = self._furthest()
            if not self._notices.are_waiting:  # else that was not waited for, and all is over
                self._budget.round_ended(step, seconds=seconds)
            if self._budget.is_crash_loop:
                said = f"{self._budget.in_vain} rounds without a newer step, in the last one {said}"
                return Ending(code=outcome.verdict(worst), reason=said, worker=worst)
        if follows is Next.RESTART and not self._budget.may_restart():
            said += f", and none of {self._budget.max_restarts} restarts is left"
            return Ending(code=worst.code, reason=said, worker=worst)
        self.restarts[outcome.reason(follows, worst, again=again)] += 1
        if not again:
            _events.warning(f"{said}, a new round begins")
        return None

    def _stop(self, workers: Workers, notice: signal.Signals | None) -> Ending | None:
        """End all workers within the shutdown time-out; with a notice, return how the agent ends.

        A notice that comes meanwhile counts as well; a second SIGINT is handed on, as it means now.
        """
        deadline = time.monotonic() + self._arguments.shutdown_seconds
        if notice is not None:
            _events.info(f"{notice.name}: workers are asked to stop")
        workers.signal(signal.SIGTERM)
        while workers.processes and time.monotonic() < deadline:
            another = self._tick()
            if another == signal.SIGINT and notice is not None:
                workers.signal(another)
            notice = notice or another
            workers.ended()
        if workers.processes:
            _events.error("workers did not stop in time and are killed")
        in_doubt = self._is_out_of_touch(workers)
        workers.close()
        self.is_training = False
        return None if notice is None else _stopped(workers.ended(), notice, in_doubt=in_doubt)

    def _is_out_of_touch(self, workers: Workers) -> bool:
        """Whether the others may have met without this agent."""
        return self._connection.link is not workers.link

    def _tick(self) -> signal.Signals | None:
        """Let a moment pass, and see to all that goes on beside; return a notice that has come."""
        time.sleep(limits.TICK_SECONDS)
        self.ticked_at = time.monotonic()
        self._connection.look()
        if self._progress is not None:
            self._progress.look()
        if os.getpid() == 1:
            reap(self._workers.processes if self._workers is not None else ())
        return self._notices.take()

    def _furthest(self) -> int | None:
        """Return the newest step of any attempt; None where that cannot be read in its time.

        A notice ends the wait.
        """
        progress = self._progress
        if progress is None:
            return None
        deadline = time.monotonic() + limits.READ_SECONDS
        is_read = progress.look(now=True)
        while not is_read and time.monotonic() < deadline and not self._notices.are_waiting:
            time.sleep(limits.TICK_SECONDS)
            is_read = progress.look()
        latest = progress.latest if is_read and progress.is_known else None
        return latest.furthest if latest is not None else None

    def _leave(self) -> None:
        """Tell the others that this node is gone, if that takes no time."""
        link = self._connection.link
        if link is None:
            return
        leaving = link.leave()
        deadline = time.monotonic() + limits.LEAVE_SECONDS
        while not leaving.done() and time.monotonic() < deadline:
            time.sleep(limits.TICK_SECONDS)


def _stopped(ended: list[Ended], notice: signal.Signals, *, in_doubt: bool) -> Ending:
    code = outcome.after_notice(ended, in_doubt=in_doubt)
    if code == ExitCode.FINISHED:
        return Ending(code=code, reason="finished")
    said = f"stopped on {notice.name}"
    if code in {ExitCode.DRAINED, INTERRUPTED}:
        return Ending(code=code, reason=said)
    worst = outcome.most_telling(ended)
    said += f", but worker {worst.rank} ended with {worst.code}"
    return Ending(code=code, reason=said, worker=worst)
