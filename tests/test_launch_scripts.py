"""The scripts that people start, with a stand-in for training: nothing is installed here."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fmnist_dist.errors import ExitCode

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.s*")), ROOT / ".ci" / "run"]

# Stands in for a finished environment: real Python, but for the modules that local.sh runs.
FAKE_ENVIRONMENT = """#!/bin/bash
case "$*" in
"-m fmnist_dist.settings"*) printf '%s  # default\\n' 'run_dir = "my \\"runs\\""' \
  'logical_shards = 3' 'epochs = 8' "max_steps = ${MAX_STEPS:-\\"none\\"}" ;;
"-m fmnist_dist.runs show my \\"runs\\" --json")
  echo '{"run": "r", "status": "finished", "step": 940, "metrics": {"test_accuracy": 0.91239}}' ;;
"-m launch.agent"*)
  echo "OMP_NUM_THREADS=$OMP_NUM_THREADS agent ${*:3}"
  [[ -z ${WAITS:-} ]] || exec "$REAL_PYTHON" -c "$WAITS"
  exit "${TRAIN_CODE:-0}" ;;
-c*) exec "$REAL_PYTHON" "$@" ;;
*) exit 99 ;;
esac
"""
WAITS = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: sys.exit(100 + number))
print("leads its group:", os.getpgid(0) == os.getpid(), flush=True)
while True:
    signal.pause()
"""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    command = ["shellcheck", "--external-sources", str(script)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.stdout + checked.stderr == ""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def local(tmp_path: Path) -> "Local":
    return Local(tmp_path)


class Local:
    """`launch/local.sh` in an environment that is there already, called from somewhere else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = executable(folder / "python", FAKE_ENVIRONMENT)

    def start(self, *flags: str, **environment: str) -> subprocess.Popen[str]:
        fixed = {"LAUNCH_PYTHON": str(self.python), "REAL_PYTHON": sys.executable}
        inherited = {key: os.environ[key] for key in os.environ if not key.startswith("FMNIST_")}
        return subprocess.Popen(
            [str(ROOT / "launch" / "local.sh"), *flags],
            cwd=self.folder,
            env=inherited | fixed | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Whoever runs the tests in the background may have it ignored, and a shell script
            # cannot take back what was ignored when it began.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )

    def run(self, *flags: str, **environment: str) -> tuple[int, list[str], list[str]]:
        with self.start(*flags, **environment) as process:
            output, errors = process.communicate(timeout=120)
        return process.returncode, output.splitlines(), errors.splitlines()


def test_a_bad_flag_is_one_line_and_64_before_anything_starts(local: Local) -> None:
    code, output, errors = local.run("--lr", "nope", LAUNCH_PYTHON=sys.executable)
    assert (code, output, len(errors)) == (64, [], 1)
    assert "nope" in errors[0]


def test_help_is_that_of_train(local: Local) -> None:
    code, output, errors = local.run("--epochs", "2", "--help", LAUNCH_PYTHON=sys.executable)
    assert (code, errors) == (0, [])
    assert "--logical-shards" in "\n".join(output)


def test_training_gets_the_flags_on_one_worker_per_core_but_no_more_than_shards(
    local: Local,
) -> None:
    nproc = executable(local.folder / "nproc", "#!/bin/bash\necho 64\n")
    _, output, _ = local.run("--lr", "0.1 2", PATH=f"{nproc.parent}:{os.environ['PATH']}")
    assert output[0].startswith("OMP_NUM_THREADS=1 agent --standalone")
    assert "--nproc-per-node=3 --max-restarts=100 -m fmnist_dist.train --lr 0.1 2" in output[0]
    _, output, _ = local.run(NPROC_PER_NODE="2")
    assert "--nproc-per-node=2 " in output[0]


@pytest.mark.parametrize(
    ("flags", "max_steps", "continued"),
    [
        (["--epochs", "8", "--data-dir", "a b"], '"none"', ["--data-dir", "a b", "--epochs", "16"]),
        (["--lr=1", "--max-steps=940", "--epochs=8"], "940", ["--lr=1", "--epochs=8"]),
    ],
)
def test_the_end_says_where_the_run_is_how_good_it_is_and_how_to_go_on(
    local: Local, flags: list[str], max_steps: str, continued: list[str]
) -> None:
    code, output, _ = local.run(*flags, MAX_STEPS=max_steps)
    assert code == 0
    assert output[1] == f'run            {local.folder}/my "runs" (finished, step 940)'
    assert output[2] == "test accuracy  0.9124"
    assert shlex.split(output[3])[2:] == ["on", str(ROOT / "launch" / "local.sh"), *continued]


def test_the_exit_code_of_training_is_passed_through_with_one_line_of_advice(local: Local) -> None:
    code, output, errors = local.run(TRAIN_CODE="78")
    assert (code, len(output), len(errors)) == (78, 1, 2)
    assert "failed (exit code 78)" in errors[1]


def test_an_agent_that_somebody_has_stopped_has_saved(local: Local) -> None:
    code, _, errors = local.run(TRAIN_CODE=str(int(ExitCode.DRAINED)))
    assert code == ExitCode.DRAINED
    assert errors[-1].endswith(
        "stopped on a signal; the same command goes on with the last finished step"
    )


def test_an_agent_that_was_killed_is_not_looked_for_among_the_errors(local: Local) -> None:
    waits = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    code, _, errors = local.run(WAITS=waits)
    assert code == 128 + signal.SIGKILL
    assert (
        "the agent was ended by SIGKILL, with its workers; the same command goes on" in errors[-1]
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_script_alone_reaches_training_once(
    local: Local, number: signal.Signals
) -> None:
    with local.start(WAITS=WAITS) as process:
        assert process.stdout is not None
        # A terminal signals the group of the script: training in it would hear Ctrl-C twice.
        assert [process.stdout.readline() for _ in range(2)][1] == "leads its group: True\n"
        process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()  # else leaving the block would wait for ever
            raise
    assert process.returncode == 100 + number
    assert f"stopped on {number.name}; the same command goes on" in errors
