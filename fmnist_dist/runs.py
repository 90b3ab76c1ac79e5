"""Look at runs: `python -m fmnist_dist.runs show|verify|prune|ledger|export RUN`, without torch.

Nothing here takes a run over, so every command may run beside a training. `prune` alone deletes,
and only what no reader and no living writer can want.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Group, Parameter

from fmnist_dist.checkpoint.sweep import CHECKPOINTS, prune
from fmnist_dist.checkpoint.verify import Findings, verify
from fmnist_dist.command import run_command
from fmnist_dist.errors import DataDamagedError, ExitCode
from fmnist_dist.inspection.foundrun import FoundRun, find_run
from fmnist_dist.inspection.page import columns as aligned
from fmnist_dist.inspection.page import path, show_page
from fmnist_dist.inspection.summary import summarise
from fmnist_dist.usage import new_app

Run = Annotated[str, Parameter(help="path or URL of the run's folder")]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="for machines")]


def make_app() -> App:
    app = new_app(
        "fmnist_dist.runs",
        usage="Usage: python -m fmnist_dist.runs COMMAND RUN",
        help="Look at runs of fmnist_dist.train.",
        group_commands=Group("Commands"),
    )
    for command, usage in (
        (show, r"show RUN \[--json]"),
        (verify_, "verify RUN"),
        (prune_, "prune RUN"),
        (ledger, r"ledger RUN \[--json]"),
        (export_, "export RUN OUT"),
    ):
        app.command(
            command,
            name=usage.partition(" ")[0],
            usage=f"Usage: python -m fmnist_dist.runs {usage}",
        )
    return app


def show(run: Run, /, *, as_json: AsJson = False) -> None:
    """Tell what a run is, what happened to it and which checkpoints it has."""
    found = find_run(run)
    history = found.history()
    summary = summarise(found, history)
    if as_json:
        _print_json(summary)
    else:
        print(show_page(summary), end="")
    if history.damaged:
        records = ", ".join(map(str, history.damaged))
        sys.stderr.write(f"warning: damaged records of the log are left out: {records}\n")


def verify_(run: Run, /) -> None:
    """Read every byte that a run retains again; exit code 65 if any is damaged."""
    found = find_run(run)
    findings = verify(found.storage, found.log)
    print(_verify_page(found, findings), end="")
    if findings.damage:
        newest = findings.valid_steps[-1:]
        use = f"step {newest[0]} would be used" if newest else "no valid checkpoint is left"
        raise DataDamagedError(f"run {run}: found {len(findings.damage)} damages; {use}")


def prune_(run: Run, /) -> None:
    """Delete what no reader can choose; nothing of the newest attempt of an unfinished run."""
    found = find_run(run)
    before = _stored(found)
    swept = prune(found.storage, found.log, found.log.read().head)
    if swept.suspended is not None:
        raise DataDamagedError(
            f"run {run}: nothing was deleted, since a damaged record may name any folder: "
            f"{swept.suspended}"
        )
    after = _stored(found)
    gone = [name for name in before if name not in after]
    for name in gone:
        print(f"deleted {path(name)}")
    print(f"{len(gone)} files deleted, {len(after)} kept")


def ledger(run: Run, /, *, as_json: AsJson = False) -> None:
    """Prove that each finished epoch consumed every sample exactly once; else exit code 65."""
    from fmnist_dist.inspection.audit import audit  # noqa: PLC0415 - sample orders, for this command only

    found = find_run(run)
    verdict = audit(found, found.history())
    if as_json:
        _print_json(verdict.to_json())
    else:
        print(verdict.page(), end="")
    if verdict.unproved:
        epochs = "; ".join(
            f"epoch {each.epoch}: consumed {each.consumed}, expected {each.expected}"
            for each in verdict.unproved
        )
        raise DataDamagedError(f"run {run}: not every sample exactly once: {epochs}")


def export_(run: Run, out: Annotated[Path, Parameter(help="folder, new or empty")], /) -> None:
    """Write the evaluated weights and how to load them into a folder of their own."""
    from fmnist_dist.inspection.export import export  # noqa: PLC0415 - data sets, likewise

    config = export(find_run(run), out)
    print(f"exported step {config['step']} ({config['weights']} weights) to {path(str(out))}")


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _stored(run: FoundRun) -> list[str]:
    """Return the path of every file of every checkpoint."""
    folders = (f"{CHECKPOINTS}/{name}" for name in run.storage.list(CHECKPOINTS))
    return [f"{folder}/{name}" for folder in folders for name in run.storage.list(folder)]


def _verify_page(run: FoundRun, findings: Findings) -> str:
    steps = ", ".join(map(str, findings.valid_steps)) or "none"
    return aligned(
        [
            ("run", path(str(run.place))),
            ("read", f"{findings.records} records, {findings.files} files"),
            ("bytes", str(findings.bytes)),
            ("valid", f"{len(findings.valid_steps)} of {findings.checkpoints}: steps {steps}"),
            *(("note", each) for each in findings.quarantined),
            *(("damage", each) for each in findings.damage or ("none",)),
        ]
    )


def main() -> int:
    """Run one command; return its exit code."""
    app = make_app()
    if sys.argv[1:]:
        return run_command(app, sys.argv[1:])
    return run_command(app, ["--help"]) or ExitCode.USAGE


if __name__ == "__main__":
    sys.exit(main())
