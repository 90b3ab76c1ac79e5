"""Evaluate a checkpoint on the test set: `python -m fmnist_dist.evaluate RUN`. It only reads."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Group, Parameter

from fmnist_dist import config as configuration
from fmnist_dist.checkpoint.restore import read_newest
from fmnist_dist.command import run_command
from fmnist_dist.config import Config
from fmnist_dist.errors import DataDamagedError, UsageError
from fmnist_dist.inspection.foundrun import FoundRun, find_run
from fmnist_dist.inspection.summary import settings_in_force
from fmnist_dist.rule import InvalidSettingError
from fmnist_dist.telemetry import events
from fmnist_dist.usage import new_app

_FLAGS = Group("Flags")


def make_app() -> App:
    return new_app(
        "fmnist_dist.evaluate",
        default_command=evaluate,
        usage=r"Usage: python -m fmnist_dist.evaluate RUN \[flags]",
        help="Evaluate a run's newest valid checkpoint on the test set.",
        group_commands=_FLAGS,
        group_parameters=_FLAGS,
    )


def evaluate(
    run: Annotated[str, Parameter(help="path or URL of the run's folder")],
    /,
    *,
    checkpoint: Annotated[int | None, Parameter(help="of this step", metavar="STEP")] = None,
    device: Annotated[str, Parameter(help="auto, cpu or cuda", metavar="NAME")] = "auto",
    data_dir: Annotated[
        Path | None, Parameter(help="folder of the data set's files", metavar="PATH")
    ] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="for machines")] = False,
) -> None:
    """Print accuracy and loss: the numbers that the run itself recorded at that step."""
    found = find_run(run)
    restored = read_newest(found.storage, found.log, step=checkpoint)
    config = _config(found, device=device, data_dir=data_dir)
    events.configure(log_format="text", rank=0, stream=sys.stderr)
    from fmnist_dist.inspection.rescore import rescore  # noqa: PLC0415 - torch takes seconds

    result = rescore(restored, config)
    if as_json:
        print(json.dumps({"run": str(found.place), **dataclasses.asdict(result)}, indent=2))
        return
    print(f"step           {result.step} ({result.weights} weights)")
    print(f"test accuracy  {result.test_accuracy:.4f} on {result.samples} samples")
    print(f"test loss      {result.test_loss:.4f}")


def _config(run: FoundRun, *, device: str, data_dir: Path | None) -> Config:
    """Return the run's settings with what this command's user wants."""
    settings = settings_in_force(run.history())
    if not settings:
        raise DataDamagedError(
            f"run {run.place}: no attempt's record is intact, and with them its settings are lost"
        )
    own: dict[str, Any] = {"device": device, "data_dir": data_dir}
    try:
        return dataclasses.replace(configuration.from_json(settings), **own)
    except InvalidSettingError as error:
        flag = error.name.replace("_", "-")
        raise UsageError(f"flag --{flag}: {error.problem}") from error


def main() -> int:
    """Run the command; return its exit code."""
    return run_command(make_app(), sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
