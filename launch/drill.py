"""Try to kill it: `python -m launch.drill`. Run it before you believe a word of the README.

Trains once undisturbed and once while parts of the job are killed, stopped and asked to stop at
random moments of a seeded schedule; compares the two, and prints a verdict with the evidence. With
`--job` it is the pods of a rendered Kubernetes Job that are preempted, see `launch.jobdrill`.
"""

import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Protocol

from cyclopts import Parameter

from fmnist_dist.checkpoint.place import Place
from fmnist_dist.command import run_command
from fmnist_dist.errors import ExitCode, UsageError
from fmnist_dist.usage import new_app
from launch.launched import DEAD, HangError, Launched, advanced, has_passed, kill, reached, state
from launch.verdict import Struck, judge, show, tell

_FENCED = f"exit_code={int(ExitCode.FENCED)}"

# What happens, and how often.
FAULTS = {
    "kill a trainer": 5,
    "kill all trainers": 2,
    "kill a keeper": 3,
    "kill the agent": 2,
    "term a trainer": 1,
    "term a keeper": 1,
    "term the agent": 2,
    "stop a trainer": 2,
    "freeze the launch": 2,  # another one takes its place; then it goes on, too late
}
_NUMBERS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "stop": signal.SIGSTOP,
    "freeze": signal.SIGSTOP,
}


class Subject(Protocol):
    """A training to disturb."""

    def start(self) -> None: ...
    def strike(self) -> Struck | None: ...
    def finish(self) -> None: ...
    def problems(self) -> list[str]: ...
    def end(self) -> None: ...


class Drill:
    """The disturbed training: launches of torchrun, one after the other."""

    def __init__(
        self, run: Place, flags: list[str], *, log: Path, seed: int, worlds: list[int]
    ) -> None:
        self.run = run
        self.log = log
        self._flags = flags
        self._worlds = worlds
        self._draw = random.Random(seed)

    def start(self) -> None:
        self.job = self._launch()

    def _launch(self) -> Launched:
        workers = self._draw.choice(self._worlds)
        return Launched(self.run, self._flags, workers=workers, log=self.log)

    def strike(self) -> Struck | None:
        """Do one fault at a random moment; None if the training ended before."""
        (what,) = self._draw.choices(list(FAULTS), weights=list(FAULTS.values()))
        steps = self._draw.randrange(1, 6)
        attempt, step = reached(self.run)
        job = self.job
        job.wait_for(lambda: job.has_ended or has_passed(self.run, attempt, step + steps), "steps")
        time.sleep(self._draw.random() * 0.2)
        victims = self._victims(what)
        before, began = reached(self.run), time.monotonic()
        hit = [process for process in victims if kill(process, _NUMBERS[what.split()[0]])]
        if not hit:
            return None if job.has_ended else self.strike()
        if what.startswith("kill"):
            job.wait_for(lambda: all(state(each) in DEAD for each in hit), "the deaths")
        if what.endswith("agent"):
            job.await_end("the agent's end")
            time.sleep(0.1)  # its workers die with it; a fenced one would do no harm
            self.job = self._launch()
        elif what.startswith("freeze"):
            job.wait_for(lambda: all(state(each) in {"T", ""} for each in hit), "the stops")
            self.job = self._launch()
        before = max(before, reached(self.run))
        restarts = what.startswith("term") or not what.endswith(("trainer", "trainers"))
        self._await_next(before, restarts=restarts)
        seconds = time.monotonic() - began
        if what.startswith("stop"):
            self.job.wait_for(lambda: all(state(each) != "T" for each in hit), "its replacement")
        elif what.startswith("freeze"):
            self._thaw(job, hit)
        level = "launched anew" if job is not self.job else "restarted"
        return Struck(
            what=what,
            at_step=before[1],
            workers=job.workers,
            level="healed" if reached(self.run)[0] == before[0] else level,
            seconds=seconds,
            leaves_nobody=what in {"kill the agent", "freeze the launch"}
            or (what == "kill a keeper" and job.workers == 1),
        )

    def _thaw(self, job: Launched, frozen: list[int]) -> None:
        """Let a launch go on that another one has replaced: it must find that out, and end."""
        said = job.log.read_text().count(_FENCED)
        for process in frozen:
            kill(process, signal.SIGCONT)
        job.await_end("the end of the replaced launch")
        if job.log.read_text().count(_FENCED) == said:
            raise HangError(f"the replaced launch ended, but not as fenced:\n{job.tail()}")

    def _await_next(self, before: tuple[int, int], *, restarts: bool) -> None:
        """Wait for a step of a later attempt, or, where none is due, past the same one's last."""
        job = self.job

        def goes_on() -> bool:
            attempt, step = reached(self.run)
            if attempt > before[0]:
                return advanced(self.run)
            return not restarts and step >= before[1] + 2

        job.wait_for(lambda: job.has_ended or goes_on(), "the next finished step")

    def finish(self) -> None:
        """Let the training end, launching it again where it was the last fault that ended it."""
        for _ in range(3):
            self.job.await_end("the end of the training")
            if show(self.run)["status"] == "finished":
                return
            self.job = self._launch()

    def problems(self) -> list[str]:
        """Return what is wrong besides the run; here all evidence is in the run."""
        return []

    def end(self) -> None:
        self.job.end()

    def _victims(self, what: str) -> list[int]:
        if what.endswith("agent"):
            return [] if self.job.has_ended else [self.job.agent.pid]
        if what.endswith("launch"):
            return [] if self.job.has_ended else self.job.processes()
        found = self.job.keepers() if what.endswith("keeper") else self.job.trainers()
        if not found or " all " in what:
            return found
        return [self._draw.choice(found)]


def drill(
    *,
    faults: Annotated[int, Parameter(help="how many must happen")] = 20,
    seed: Annotated[int, Parameter(help="of the schedule")] = 0,
    steps: Annotated[int, Parameter(help="of the training, at least")] = 300,
    batch_size: Annotated[int, Parameter(help="small, so that steps are quick")] = 64,
    workers: Annotated[str, Parameter(help="world sizes to move between")] = "1,2,3,4",
    job: Annotated[
        Path | None, Parameter(help="of Kubernetes, rendered: its pods in torchrun's place")
    ] = None,
    keep: Annotated[Path | None, Parameter(help="folder for runs and logs")] = None,
    run_dir: Annotated[str | None, Parameter(help="URL of a new folder for the runs")] = None,
) -> int:
    """Disturb a training, and say whether anything was lost."""
    worlds = _worlds(workers)
    for name, value in (("faults", faults), ("steps", steps), ("batch-size", batch_size)):
        if value < 1:
            raise UsageError(f"flag --{name}: found {value}, expected a whole number above 0")
    folder = keep or Path(tempfile.mkdtemp(prefix="drill-"))
    folder.mkdir(parents=True, exist_ok=True)
    calm_run, run = (_run_in(run_dir or str(folder), name) for name in ("calm", "disturbed"))
    common = [f"--batch-size={batch_size}", f"--max-steps={steps}", "--save-every-seconds=10"]
    common += ["--eval-every-epochs=99", "--step-timeout=10", "--device=cpu"]
    subject: Subject
    if job is None:
        subject = Drill(run, common, log=folder / "disturbed.log", seed=seed, worlds=worlds)
    else:
        from launch.jobdrill import JobDrill  # noqa: PLC0415 - PyYAML, of the extra `k8s`

        subject = JobDrill(job, run, common, folder=folder, seed=seed)
    print(f"undisturbed: {steps} steps of {batch_size} images, 2 workers", flush=True)
    calm = Launched(calm_run, common, workers=2, log=folder / "calm.log")
    struck: list[Struck] = []
    problems: list[str] = []
    try:
        calm.await_end("the undisturbed training")
        print(f"disturbed: {faults} faults, schedule of seed {seed}", flush=True)
        subject.start()
        while len(struck) < faults:
            hit = subject.strike()
            if hit is None:
                break
            struck.append(hit)
            print(hit.line(len(struck)), flush=True)
        subject.finish()
    except HangError as hang:
        problems.append(f"it hangs: {hang}")
    finally:
        calm.end()
        subject.end()
    problems += judge(calm_run, run, struck, faults=faults)
    problems += subject.problems()
    tell(struck, problems, show(run))
    if keep is None and not problems:
        shutil.rmtree(folder)
    else:
        print(f"runs and logs: {folder}")
    return 1 if problems else 0


def _run_in(folder: str, name: str) -> Place:
    """Return where one of the two runs is to be. Raises `UsageError` where there is one already."""
    run = Place.of(f"{folder.rstrip('/')}/{name}")
    if run.storage().list("log"):
        raise UsageError(f"there is a run at {run}: take a new folder")
    return run


def _worlds(text: str) -> list[int]:
    try:
        worlds = [int(each) for each in text.split(",")]
    except ValueError:
        worlds = []
    if not worlds or min(worlds) < 1 or max(worlds) > 8:  # noqa: PLR2004 - default logical shards
        raise UsageError(f"flag --workers: found '{text}', expected numbers from 1 to 8, as in 1,2")
    return worlds


def main() -> int:
    usage = r"Usage: python -m launch.drill \[flags]"
    app = new_app("launch.drill", usage=usage, default_command=drill)
    return run_command(app, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
