"""The agent's life: from the command line to the exit code and the post-mortem."""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from fmnist_dist.checkpoint.place import Place
from fmnist_dist.errors import ExitCode, FmnistDistError, IncompatibleError
from fmnist_dist.masking import masked
from fmnist_dist.telemetry import events
from fmnist_dist.telemetry.events import EventLog, LogFormat
from launch.agent import limits
from launch.agent.notices import Notices
from launch.agent.outcome import Ending
from launch.agent.postmortem import PostMortem, termination_log_of, write
from launch.agent.progress import Progress

_events = EventLog("launch.agent")


def live(argv: Sequence[str], notices: Notices) -> int:
    """Do what `argv` asks for; return the exit code, with the post-mortem written."""
    _speak("text")
    life = _Life(termination_log_of(argv, os.environ))
    notices.tell_before_leaving(life.leave)
    try:
        ending = life.live(argv, notices)
    except FmnistDistError as error:
        ending = Ending(code=error.exit_code, reason=str(error))
    except Exception as error:  # noqa: BLE001 - the entry point: the last one who can tell
        traceback.print_exc()
        ending = Ending(code=ExitCode.BUG, reason=f"{type(error).__name__}: {error}")
    return life.end(ending)


class _Life:
    def __init__(self, termination_log: Path | None) -> None:
        self._termination_log = termination_log
        self._progress: Progress | None = None

    def live(self, argv: Sequence[str], notices: Notices) -> Ending:
        try:
            from launch.agent.arguments import parse  # noqa: PLC0415 - torch takes seconds
            from launch.agent.rounds import Rounds  # noqa: PLC0415 - as above
        except ImportError as error:  # names of torch's own, that no release promises to keep
            raise IncompatibleError(f"the agent cannot use this torch: {error}") from error

        arguments = parse(argv, os.environ)
        self._termination_log = arguments.termination_log
        config, launch = arguments.config, arguments.launch
        if config is not None:
            _speak(config.log_format)
            self._progress = Progress(Place.of(config.run_dir))
            if config.drain_seconds >= arguments.shutdown_seconds:
                _events.warning(
                    "workers may be killed while they save: give them less time than the agent has",
                    drain_seconds=config.drain_seconds,
                    shutdown_timeout=arguments.shutdown_seconds,
                )
        rounds = Rounds(arguments, notices, self._progress)
        if arguments.metrics_port:
            from launch.agent.metrics import Metrics, serve  # noqa: PLC0415 - an extra

            numbers = Metrics(rounds, notices, self._progress, min_nodes=launch.min_nodes)
            serve(arguments.metrics_port, numbers, rounds, notices)
        notices.hear(arguments.signals)
        notices.keep()
        return rounds.run()

    def leave(self, notice: signal.Signals) -> None:
        """Say that the agent ends before it has begun."""
        said = f"stopped on {notice.name}, no worker was running"
        self.end(Ending(code=ExitCode.DRAINED, reason=said))

    def end(self, ending: Ending) -> int:
        """Say how it ends, and leave the post-mortem; return the exit code."""
        reason = masked(ending.reason)
        if ending.code in {ExitCode.FINISHED, ExitCode.DRAINED}:
            _events.info(reason, exit_code=int(ending.code))
        else:
            _events.error(reason, exit_code=int(ending.code))
        if self._termination_log is not None:
            self._look()
            latest = self._progress.latest if self._progress is not None else None
            try:
                write(self._termination_log, PostMortem.of(ending, latest))
            except OSError as error:  # the exit code says as much as it can
                _events.warning("the post-mortem cannot be written", why=str(error))
        return int(ending.code)

    def _look(self) -> None:
        """Have the last word on how far the run is, unless its storage takes too long."""
        if self._progress is None:
            return
        deadline = time.monotonic() + limits.LAST_LOOK_SECONDS
        is_known = self._progress.look(now=True)
        while not is_known and time.monotonic() < deadline:
            time.sleep(limits.TICK_SECONDS)
            is_known = self._progress.look()


def _speak(log_format: LogFormat) -> None:
    events.configure(log_format=log_format, rank=0, stream=sys.stderr)
    logging.getLogger("launch.agent").setLevel(logging.INFO)
