"""`launch/slurm.sbatch` as Slurm runs it: with stand-ins for `srun` and `scontrol`, no cluster."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import free_port, reached, show, wait_for

from fmnist_dist.errors import ExitCode
from launch.agent.arguments import parse
from launch.launched import children

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
AGAIN = {ExitCode.BUG, ExitCode.TRANSIENT, ExitCode.PEER_LOST, ExitCode.DRAINED}

SRUN = """#!/bin/bash
printf '%s\\n' "$@" >"$TOLD/arguments"
while [[ -e $TOLD/wait ]]; do sleep 0.01; done
exit "$CODE"
"""
SCONTROL = """#!/bin/bash
case $1 in
show) printf 'node3\\nnode7\\n' ;;
requeue) echo "$2" >"$TOLD/requeued"; exit "${REFUSES:-0}" ;;
esac
"""


class Slurm:
    """What Slurm gives a batch script: an environment, and two programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", "#!/bin/sh\n")):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "TOLD": str(folder),
            "PYTHON": str(folder / "python"),
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "node[3,7]",
            "SLURM_JOB_NUM_NODES": "2",
        }

    def start(self, *flags: str, **environment: str) -> subprocess.Popen[str]:
        (self.folder / "requeued").unlink(missing_ok=True)
        # Slurm runs a copy, from its spool folder.
        copy = self.folder / "slurm_script"
        copy.write_bytes(SCRIPT.read_bytes())
        copy.chmod(0o755)
        return subprocess.Popen(
            [str(copy), *flags],
            cwd=self.folder,
            env={**self.environment, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *flags: str, **environment: str) -> tuple[int, str]:
        with self.start(*flags, **environment) as process:
            return process.wait(60), process.communicate()[1]

    @property
    def is_requeued(self) -> bool:
        """Whether the last run has asked for another one."""
        return (self.folder / "requeued").exists()

    def arguments(self) -> list[str]:
        return (self.folder / "arguments").read_text().splitlines()


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


@pytest.mark.parametrize("code", ExitCode)
def test_a_job_comes_back_unless_it_would_end_in_the_same_way(slurm: Slurm, code: ExitCode) -> None:
    ended, errors = slurm.run(CODE=str(int(code)))
    assert ended == code
    assert slurm.is_requeued == (code in AGAIN)
    assert len(errors.splitlines()) == (code != ExitCode.FINISHED)


def test_errors_are_counted_and_preemptions_are_not(slurm: Slurm) -> None:
    """Slurm's own count is that of both, and says nothing here."""
    often = {"SLURM_RESTART_COUNT": "5000", "MAX_REQUEUES": "2"}
    for code in ("137", "143", "143", "75", "143"):
        assert slurm.run(CODE=code, **often)[0] == int(code)
        assert slurm.is_requeued, code
    ended, errors = slurm.run(CODE="1", **often)
    assert (ended, slurm.is_requeued) == (1, False)
    assert "ended with 1; not requeued any more: MAX_REQUEUES is 2" in errors
    counted = slurm.folder / "slurm-42.errors"
    assert counted.read_text().split() == ["137", "75", "1"]
    assert slurm.run(CODE="0", **often)[0] == 0
    assert not counted.exists()


def test_errors_that_cannot_be_counted_do_not_requeue_it_for_ever(slurm: Slurm) -> None:
    (slurm.folder / "slurm-42.errors").mkdir()
    ended, errors = slurm.run(CODE="137")
    assert (ended, slurm.is_requeued) == (137, False)
    assert "slurm-42.errors: Is a directory" in errors


def test_a_job_whose_hosts_cannot_be_named_says_so(slurm: Slurm) -> None:
    (slurm.folder / "scontrol").write_text("#!/bin/bash\nexit 1\n")
    ended, errors = slurm.run(CODE="0")
    assert ended == 1
    assert "scontrol names no host of node[3,7]" in errors


def test_a_job_that_was_cancelled_does_not_come_back(slurm: Slurm) -> None:
    ended, errors = slurm.run(CODE="143", REFUSES="1")
    assert (ended, slurm.is_requeued) == (143, True)  # asked for, and refused
    assert "Slurm decides whether it comes back" in errors


def test_each_node_gets_an_agent_and_each_time_a_rendezvous_of_its_own(slurm: Slurm) -> None:
    given = ["--run-dir", "/shared/my runs", "--epochs=3"]
    slurm.run(*given, CODE="0", SLURM_RESTART_COUNT="3", SLURM_GPUS_ON_NODE="4")
    arguments = slurm.arguments()
    assert arguments[:3] == ["--no-kill", "--kill-on-bad-exit=0", str(slurm.folder / "python")]
    agent = arguments[arguments.index("launch.agent") + 1 :]
    assert agent[-len(given) - 2 :] == ["-m", "fmnist_dist.train", *given]
    assert {"--nnodes=1:2", "--nproc-per-node=4", "--rdzv-id=42-3"} < set(agent)
    assert "--rdzv-endpoint=node3:29500" in agent
    parsed = parse(agent, {})
    assert (parsed.launch.min_nodes, parsed.launch.max_nodes) == (1, 2)
    assert parsed.launch.nproc_per_node == 4
    assert parsed.config is not None
    assert parsed.config.run_dir == "/shared/my runs"


def test_a_signal_to_the_script_does_not_end_it_before_its_agents(slurm: Slurm) -> None:
    waits = slurm.folder / "wait"
    waits.touch()
    with slurm.start(CODE="143") as process:
        wait_for((slurm.folder / "arguments").exists, "srun")
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert process.stderr.readline() == "slurm.sbatch: asked to stop\n"
        assert process.poll() is None
        waits.unlink()
        assert process.wait(60) == 143
    assert slurm.is_requeued


def test_without_an_environment_it_says_what_to_do(slurm: Slurm) -> None:
    ended, errors = slurm.run(CODE="0", PYTHON="/nowhere/python")
    assert ended == ExitCode.USAGE
    assert errors == (
        "slurm.sbatch: /nowhere/python is no program: submit from the checkout after "
        "launch/local.sh, or set PYTHON\n"
    )


@pytest.mark.slow
def test_a_run_goes_on_where_its_job_was_preempted(slurm: Slurm, tmp_path: Path) -> None:
    """One node, and real agents and workers: `srun` runs what it is given."""
    (slurm.folder / "srun").write_text('#!/bin/bash\nexec "${@:3}"\n')
    (slurm.folder / "scontrol").write_text(SCONTROL.replace("node3\\nnode7", "127.0.0.1"))
    run = tmp_path / "run"
    flags = [f"--run-dir={run}", "--batch-size=64", "--device=cpu", "--eval-every-epochs=99"]
    environment = {"PYTHON": sys.executable, "SLURM_JOB_NUM_NODES": "1"}
    environment |= {"RENDEZVOUS_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    environment["SLURM_SUBMIT_DIR"] = str(ROOT)

    with slurm.start(*flags, "--max-steps=1000000", **environment) as process:
        wait_for(lambda: reached(run)[1] > 3, "some steps")
        (agent,) = children(process.pid)
        os.kill(agent, signal.SIGTERM)
        assert process.wait(60) == ExitCode.DRAINED
    assert slurm.is_requeued

    end = reached(run)[1] + 5
    code, errors = slurm.run(*flags, f"--max-steps={end}", SLURM_RESTART_COUNT="1", **environment)
    assert code == 0, errors
    story = show(run)
    assert (story["status"], story["step"]) == ("finished", end)
    assert [each["lost_steps"] for each in story["attempts"]] == [0, 0]
