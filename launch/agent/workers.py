"""One host's worker processes, started as torch's elastic agent starts them.

From `LocalElasticAgent` come ranks, environment, log files and the processes themselves; not its
loop, which would ask the store on the main thread, take the signals for itself and forget the exit
codes.
"""

import contextlib
import json
import os
import signal
from pathlib import Path

from torch.distributed.elastic.agent.server.api import WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from launch.agent import limits
from launch.agent.arguments import Arguments
from launch.agent.outcome import Ended
from launch.agent.rendezvous import Link

# torch takes signals for itself when it starts workers, `TORCHELASTIC_SIGNALS_TO_HANDLE`: it gets
# one that nobody sends.
_NEVER_SENT = "SIGRTMAX"


class Workers(LocalElasticAgent):
    """The workers of one round after the other, over one connection to the rendezvous."""

    def __init__(self, arguments: Arguments, link: Link) -> None:
        config = arguments.launch
        self.link = link
        spec = WorkerSpec(
            role=config.role,
            local_world_size=config.nproc_per_node,
            entrypoint=arguments.program,
            args=arguments.program_args,
            rdzv_handler=link,
            max_restarts=config.max_restarts,
            monitor_interval=config.monitor_interval,
            local_addr=config.local_addr,
            event_log_handler=config.event_log_handler,
            numa_options=config.numa_options,
            duplicate_stdout_filters=config.duplicate_stdout_filters,
            duplicate_stderr_filters=config.duplicate_stderr_filters,
            virtual_local_rank=config.virtual_local_rank,
        )
        assert config.logs_specs is not None
        super().__init__(
            spec,
            config.logs_specs,
            start_method=config.start_method,
            log_line_prefix_template=config.log_line_prefix_template,
        )
        self._ended: dict[int, Ended] = {}

    def meet(self) -> None:
        """Take part in the next round. It may take for ever, and raises what torch raises."""
        self._rendezvous(self._worker_group)

    def start(self, number: int) -> None:
        """Start the workers of this agent's round `number`; on the main thread: they die with it.

        Raises OSError.
        """
        self._ended = {}
        # What torch tells workers as their restart count, and names their log files by.
        self._remaining_restarts = self._worker_group.spec.max_restarts - number
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = _NEVER_SENT
        for local_rank, process in self._start_workers(self._worker_group).items():
            self._worker_group.workers[local_rank].id = process
        self._worker_group.state = WorkerState.HEALTHY

    @property
    def world_size(self) -> int:
        return int(self._worker_group.workers[0].world_size) if self._worker_group.workers else 0

    @property
    def nodes(self) -> int:
        return int(self._worker_group.group_world_size or 0)

    @property
    def processes(self) -> set[int]:
        """The workers that have not been seen to end."""
        context = self._context()
        return (
            set()
            if context is None
            else {
                handler.proc.pid
                for rank, handler in context.subprocess_handlers.items()
                if rank not in self._ended
            }
        )

    def ended(self) -> list[Ended]:
        """Return those that have ended, in the order in which that was seen."""
        context = self._context()
        for local_rank, handler in context.subprocess_handlers.items() if context else ():
            if local_rank in self._ended or (status := handler.proc.poll()) is None:
                continue
            assert context is not None
            rank = self._worker_group.workers[local_rank].global_rank
            ended = Ended(rank=rank, status=status)
            line = _last_words(context.error_files[local_rank], ended.code)
            self._ended[local_rank] = Ended(rank=rank, status=status, line=line)
        return list(self._ended.values())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process group of each worker that has not ended."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):  # it has just ended: `ended` will see it
                os.killpg(process, number)

    def close(self) -> None:
        """End what is left of a round's workers, and close their log files."""
        if (context := self._context()) is not None:
            self._shutdown(signal.SIGKILL, limits.KILL_SECONDS)  # and torch's timers, if it has any
            self.ended()
            # Those that the kernel keeps even so are not waited for: killed is what they are.
            for local_rank in context.subprocess_handlers.keys() - self._ended.keys():
                rank = self._worker_group.workers[local_rank].global_rank
                self._ended[local_rank] = Ended(rank=rank, status=-signal.SIGKILL)
            self._pcontext = None

    def _context(self) -> SubprocessContext | None:
        assert self._pcontext is None or isinstance(self._pcontext, SubprocessContext)
        return self._pcontext


def _last_words(path: str, code: int) -> str:
    """Return what a worker wrote last about its end with this code; "" for nothing."""
    try:
        words = json.loads(Path(path).read_text())
        if words.get("exit_code", code) != code:
            return ""
        message = words["message"]
        # A program of somebody else's, with torch's `record`, has its traceback beside the line.
        return str(message["message"] if isinstance(message, dict) else message)
    except (OSError, ValueError, LookupError, AttributeError):  # it has said nothing, or half of it
        return ""
