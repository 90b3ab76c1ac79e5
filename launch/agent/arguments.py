"""torchrun's own flags, read by torchrun's own parser, and a few of the agent's."""

import argparse
import re
import signal
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed import run as torchrun
from torch.distributed.argparse_util import env
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig

from fmnist_dist import settings
from fmnist_dist.config import Config
from fmnist_dist.errors import IncompatibleError, UsageError
from launch.agent.rendezvous import parameters

CRASH_LOOP = 5
_TRAIN = "fmnist_dist.train"
_STANDALONE = "localhost:0"
_PORTS = range(65536)
_NEWEST = {"numa_options", "signals_to_handle", "virtual_local_rank", "shutdown_timeout"}
_UNHEARD = {signal.SIGKILL, signal.SIGSTOP}
# Of --rdzv-conf: torch reads them when it connects, which is on a thread and later.
_NUMBERS = ["join_timeout", "last_call_timeout", "close_timeout", "heartbeat_timeout"]
_NUMBERS += ["keep_alive_interval", "keep_alive_max_attempt", "read_timeout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What one launch asks of this agent."""

    launch: LaunchConfig
    program: str
    program_args: tuple[str, ...]
    config: Config | None  # of the training; None for another program
    signals: tuple[signal.Signals, ...]
    metrics_port: int  # 0: none
    termination_log: Path | None
    crash_loop_budget: int

    @property
    def shutdown_seconds(self) -> float:
        """How long workers have to stop: torchrun's flag, or its variable, or its default."""
        return float(self.launch.shutdown_timeout or 0)


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Arguments:
    """Return what flags and `PET_*` variables ask for.

    Raises UsageError and IncompatibleError, with one line, before anything is started; `--help`
    raises SystemExit.
    """
    _check_torch()
    parser = torchrun.get_args_parser()
    parser.prog = "launch.agent"
    parser.usage = "python -m launch.agent [flags of torchrun and of the agent] -m MODULE [args]"
    parser.error = _refuse  # type: ignore[method-assign] # one line and 64, not a page and 2
    _add_own(parser)
    found = parser.parse_args(list(argv))
    if found.run_path:
        raise UsageError("flag --run-path: expected a script or -m MODULE, which can be signalled")
    _choose_rendezvous(found)
    _check(found)
    try:
        launch, program, args = torchrun.config_from_args(found)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UsageError(f"torchrun's flags: {error}") from error
    assert isinstance(program, str)
    _check_rendezvous(launch)
    is_training = found.module and found.training_script == _TRAIN
    config = settings.load(found.training_script_args, environ).config if is_training else None
    return Arguments(
        launch=launch,
        program=program,
        program_args=tuple(args),
        config=config,
        signals=_signals(found.signals_to_handle),
        metrics_port=found.metrics_port,
        termination_log=Path(found.termination_log) if found.termination_log else None,
        crash_loop_budget=found.crash_loop_budget,
    )


def _check_torch() -> None:
    """See that torch's launcher has what is asked of it here."""
    if missing := sorted(_NEWEST - {each.name for each in fields(LaunchConfig)}):
        raise IncompatibleError(
            f"the agent needs a newer torch: the launcher of {torch.__version__} has no "
            f"{', '.join(missing)}; torchrun itself works with it"
        )


def _add_own(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("agent")
    group.add_argument(
        "--metrics-port",
        "--metrics_port",
        action=env,
        type=int,
        default=0,
        help="Port of /metrics (Prometheus) and /healthz. 0: none.",
    )
    group.add_argument(
        "--termination-log",
        "--termination_log",
        action=env,
        type=str,
        default=None,
        help="File that gets a post-mortem at the end; /dev/termination-log in Kubernetes.",
    )
    group.add_argument(
        "--crash-loop-budget",
        "--crash_loop_budget",
        action=env,
        type=int,
        default=CRASH_LOOP,
        help="So many rounds in a row without a newer step end with 70, or 75 for what may pass.",
    )


def _signals(names: str) -> tuple[signal.Signals, ...]:
    known = {each.name: each for each in signal.Signals if each not in _UNHEARD}
    words = [name.strip() for name in names.split(",") if name.strip()]
    if wrong := [word for word in words if word not in known]:
        raise UsageError(f"flag --signals-to-handle: {wrong[0]} is no signal that can be handled")
    return tuple(known[word] for word in words)


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"{message}; see --help")


def _check(found: argparse.Namespace) -> None:
    conf = dict(each.partition("=")[::2] for each in found.rdzv_conf.split(",") if each)
    if found.rdzv_backend != "c10d" or conf.get("store_type", "tcp").strip().lower() != "tcp":
        raise UsageError(
            f"flag --rdzv-backend: found {found.rdzv_backend} {found.rdzv_conf}".rstrip()
            + ", expected c10d on its TCP store (torchrun itself has the others)"
        )
    if found.metrics_port not in _PORTS:
        raise UsageError(
            f"flag --metrics-port: found {found.metrics_port}, expected a port up to {_PORTS[-1]}"
        )
    if found.crash_loop_budget < 1:
        raise UsageError(
            f"flag --crash-loop-budget: found {found.crash_loop_budget}, "
            f"expected a whole number above 0"
        )


def _check_rendezvous(launch: LaunchConfig) -> None:
    """Read the settings of the rendezvous as torch will."""
    found = parameters(launch, launch.run_id)
    try:
        parse_rendezvous_endpoint(found.endpoint, default_port=0)
    except ValueError as error:
        raise UsageError(f"flag --rdzv-endpoint: {error}") from error
    try:
        found.get_as_bool("is_host")
        numbers = {name: found.get_as_int(name, 1) or 0 for name in _NUMBERS}
    except ValueError as error:
        raise UsageError(f"flag --rdzv-conf: {error}") from error
    if wrong := [name for name, number in numbers.items() if number < 1]:
        raise UsageError(
            f"flag --rdzv-conf: found {wrong[0]}={numbers[wrong[0]]}, "
            "expected a whole number above 0"
        )


def _choose_rendezvous(found: argparse.Namespace) -> None:
    """Do as `torchrun.run` does before it reads the rest: it has no function of its own for it."""
    if re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", found.nnodes) is None:
        raise UsageError(f"flag --nnodes: found {found.nnodes}, expected NUMBER or MIN:MAX")
    is_static = found.rdzv_backend == "static" and not found.rdzv_endpoint
    alone = is_static and found.master_port is None and found.nnodes.rpartition(":")[2] == "1"
    if found.standalone or alone:
        found.rdzv_backend, found.rdzv_endpoint = "c10d", _STANDALONE
        found.rdzv_id = str(uuid.uuid4())
    if found.master_port is None:
        found.master_port = 29500
