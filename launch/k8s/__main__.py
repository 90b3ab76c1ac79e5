"""Submit runs to Kubernetes and look after them: `python -m launch.k8s COMMAND`; see k8s/README.md.

Flags of the training stand after `--`, and are parsed here as the pods will parse them.
"""

import json
import sys
from typing import Annotated

from cyclopts import App, Group, Parameter

from fmnist_dist.command import run_command
from fmnist_dist.usage import new_app
from launch.k8s import doctor as examination
from launch.k8s import status as sight
from launch.k8s import submit as submission
from launch.k8s.kubectl import Kubectl
from launch.k8s.live import find_job
from launch.k8s.manifest import COMPONENT, INDEX, NAME, RUN_ID, TRAINER
from launch.k8s.render import render as rendered
from launch.k8s.request import Request

Run = Annotated[str, Parameter(help="its --run-id: the name of the Job")]
Namespace = Annotated[str, Parameter(help="of the Job")]
Asked = Annotated[Request, Parameter(name="*")]
Flags = Annotated[str, Parameter(help="of fmnist_dist.train, after --")]
_REQUEST = r"--overlay NAME --image IMAGE --run-dir URL \[flags] \[-- flags of train]"


def render(*flags: Flags, request: Asked) -> int:
    """Print the YAML of one run: an overlay with its parameters filled in."""
    sys.stdout.write(rendered(request, list(flags)).dump())
    return 0


def submit(*flags: Flags, request: Asked) -> int:
    """Bring a run into the cluster; a run that was there before goes on."""
    manifest = rendered(request, list(flags))
    print(submission.submit(Kubectl(namespace=request.namespace), manifest))
    return 0


def status(
    run: Run,
    /,
    *,
    namespace: Namespace = NAME,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="for machines")] = False,
) -> int:
    """Show the Job, its pods, and the head of the run's log."""
    job = find_job(Kubectl(namespace=namespace), run)
    told = sight.describe(job)
    print(json.dumps(told, indent=2) if as_json else sight.page(told, job.pods), end="\n" * as_json)
    return 0


def logs(
    run: Run,
    /,
    *,
    namespace: Namespace = NAME,
    index: Annotated[int | None, Parameter(help="of one pod; none = all")] = None,
    follow: Annotated[bool, Parameter(negative="", help="go on printing")] = False,
) -> int:
    """Print what the pods have written."""
    kubectl = Kubectl(namespace=namespace)
    find_job(kubectl, run)  # kubectl would find no pods of a wrong name, and exit 0
    selector = f"{RUN_ID}={run},{COMPONENT}={TRAINER}"
    if index is not None:
        selector += f",{INDEX}={index}"
    words = ["--selector", selector, "--prefix", "--tail=-1", "--max-log-requests=1000"]
    words.append("--ignore-errors")  # or the first pod that waits for a node would end it
    return kubectl.attach("logs", *words, *(["--follow"] if follow else []))


def wait(
    run: Run,
    /,
    *,
    namespace: Namespace = NAME,
    timeout: Annotated[float | None, Parameter(help="seconds; none = for ever")] = None,
) -> int:
    """Wait for the end of the Job, complete or failed, and exit with the training's code."""
    code, line = sight.wait(Kubectl(namespace=namespace), run, limit_seconds=timeout)
    print(line, file=sys.stderr if code else sys.stdout)
    return code


def scale(
    run: Run,
    /,
    *,
    nodes: Annotated[int, Parameter(help="pods, within the --nodes of the submission")],
    namespace: Namespace = NAME,
) -> int:
    """Change the number of pods of a run that goes on."""
    print(submission.scale(Kubectl(namespace=namespace), run, nodes))
    return 0


def suspend(run: Run, /, *, namespace: Namespace = NAME) -> int:
    """End all pods, which save; the Job stays."""
    print(submission.suspend(Kubectl(namespace=namespace), run, on=True))
    return 0


def resume(run: Run, /, *, namespace: Namespace = NAME) -> int:
    """Start the pods of a suspended Job again."""
    print(submission.suspend(Kubectl(namespace=namespace), run, on=False))
    return 0


def cancel(run: Run, /, *, namespace: Namespace = NAME) -> int:
    """Delete the Job and all that belongs to it; the run's folder stays."""
    print(submission.cancel(Kubectl(namespace=namespace), run))
    return 0


def doctor(run: Run, /, *, namespace: Namespace = NAME) -> int:
    """Look for what is known to go wrong on spot nodes; exit code 1 if any is found."""
    lines = examination.examine(Kubectl(namespace=namespace), run)
    print("\n".join(lines) if lines else f"{run}: nothing found")
    return 1 if lines else 0


def make_app() -> App:
    app = new_app(
        "launch.k8s",
        usage="Usage: python -m launch.k8s COMMAND",
        help="Submit runs to Kubernetes and look after them.",
        group_commands=Group("Commands"),
    )
    for command, usage in (
        (render, rf"render {_REQUEST}"),
        (submit, rf"submit {_REQUEST}"),
        (status, r"status RUN \[--json]"),
        (logs, r"logs RUN \[--index N] \[--follow]"),
        (wait, r"wait RUN \[--timeout SECONDS]"),
        (scale, "scale RUN --nodes N"),
        (suspend, "suspend RUN"),
        (resume, "resume RUN"),
        (cancel, "cancel RUN"),
        (doctor, "doctor RUN"),
    ):
        app.command(command, usage=f"Usage: python -m launch.k8s {usage}")
    return app


def main() -> int:
    return run_command(make_app(), sys.argv[1:] or ["--help"])


if __name__ == "__main__":
    sys.exit(main())
