"""The set-up of a fresh machine, with a stand-in for Python: nothing is downloaded here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ["bash", "cat", "cksum", "cp", "dirname", "flock", "mkdir", "mv", "rm"]

# Stands in for python3.x: `-m venv` copies it to where the environment's python belongs, and all it
# is asked for is written down. pip waits for the file `gate`, where there is one, and may fail.
FAKE_PYTHON = """#!/bin/bash
echo "${0##*/} $*" >>"$CALLS"
case "$*" in
"-c import ensurepip, venv") exit "${ENSUREPIP_CODE:-0}" ;;
"-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
"-m pip install"*) [[ ! -p $GATE ]] || read -r <"$GATE"; exit "${PIP_CODE:-0}" ;;
"-c "*extra_of*) exec "$REAL_PYTHON" "$@" ;;
"-c import sys, tomllib"*run_dir) echo "$RUN_DIR" ;;
"-c import sys, tomllib"*) echo 2 ;;
esac
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


class Machine:
    """A bare machine: a copy of the scripts in a tree with a space, and few programs on PATH."""

    def __init__(self, folder: Path, pythons: dict[str, str]) -> None:
        self.tree = folder / "a tree"
        shutil.copytree(ROOT / "launch", self.tree / "launch")
        (self.tree / "pyproject.toml").write_text("first")
        programs = folder / "bin"
        programs.mkdir()
        for tool in TOOLS:
            (programs / tool).symlink_to(shutil.which(tool) or "/missing")
        for name, text in pythons.items():
            executable(programs / name, text)
        self.calls, self.gate = folder / "calls", folder / "gate"
        self.calls.touch()
        self.environment = {"PATH": str(programs), "CALLS": str(self.calls), "GATE": str(self.gate)}

    def start(self, extra: str = "run", **environment: str) -> subprocess.Popen[str]:
        script = f"set -euo pipefail; source launch/setup.sh; set_up {extra}"
        return subprocess.Popen(
            [str(shutil.which("bash")), "-c", script, "setup"],
            cwd=self.tree,
            env=self.environment | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def set_up(self, extra: str = "run", **environment: str) -> tuple[int, str]:
        with self.start(extra, **environment) as process:
            errors = process.communicate(timeout=60)[1]
        return process.returncode, errors

    def installs(self) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if "pip install" in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, {"python3.12": FAKE_PYTHON})


def test_a_second_call_installs_nothing_and_says_nothing(machine: Machine) -> None:
    assert machine.set_up()[0] == 0
    assert machine.set_up() == (0, "")
    (install,) = machine.installs()
    assert install.endswith(f"--editable {machine.tree}")


def test_a_changed_pyproject_or_a_moved_tree_installs_again(machine: Machine) -> None:
    machine.set_up()
    (machine.tree / "pyproject.toml").write_text("second")
    machine.set_up()
    assert len(machine.installs()) == 2
    machine.tree = machine.tree.rename(machine.tree.with_name("moved"))
    machine.set_up()
    assert len(machine.installs()) == 3


def test_what_suffices_for_the_tests_suffices_for_a_run_but_not_the_reverse(
    machine: Machine,
) -> None:
    machine.set_up("run")
    machine.set_up("test")
    machine.set_up("run")
    assert [line.endswith("[test]") for line in machine.installs()] == [False, True]


def test_what_suffices_for_the_tests_or_a_storage_suffices_for_a_run(machine: Machine) -> None:
    for extra in ("gcs", "run", "gcs", "test", "s3", "run"):
        machine.set_up(extra)
    assert [line.rpartition("[")[2] for line in machine.installs()] == ["gcs]", "test]"]


@pytest.mark.parametrize(
    ("run_dir", "extras"),
    [("s3://bucket/run", ["[s3]"]), ("abfs://box/run", ["[azure]"]), ("runs/s3", [])],
)
def test_a_training_gets_what_the_storage_of_its_run_needs(
    machine: Machine, run_dir: str, extras: list[str]
) -> None:
    real = {"REAL_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(shutil.which("bash")), str(machine.tree / "launch" / "local.sh")],
        env=machine.environment | {"RUN_DIR": run_dir, "NPROC_PER_NODE": "2"} | real,
        capture_output=True,
        text=True,
        check=False,
    )
    first, *more = machine.installs()
    assert first.endswith(str(machine.tree)), done.stderr
    assert [line.removeprefix(first) for line in more] == extras
    calls = machine.calls.read_text()
    assert calls.rindex("-m pip install") < calls.index("-m launch.agent")


def test_an_install_that_failed_leaves_no_stamp(machine: Machine) -> None:
    code, errors = machine.set_up(PIP_CODE="1")
    assert (code, errors.splitlines()[-1].count("pip could not install")) == (75, 1)
    machine.set_up()
    assert len(machine.installs()) == 2
    (machine.tree / "pyproject.toml").write_text("second")
    machine.set_up(PIP_CODE="1")
    (machine.tree / "pyproject.toml").write_text("first")  # nobody knows what pip left behind
    machine.set_up()
    assert len(machine.installs()) == 4


def test_an_install_that_was_killed_leaves_no_stamp(machine: Machine) -> None:
    machine.set_up()
    (machine.tree / "pyproject.toml").write_text("second")
    os.mkfifo(machine.gate)
    with machine.start() as process, machine.gate.open("w"):  # opens when pip has opened its end
        process.kill()
    machine.gate.unlink()
    machine.set_up()
    assert len(machine.installs()) == 3


def test_of_two_at_once_one_installs_and_one_waits(machine: Machine) -> None:
    os.mkfifo(machine.gate)
    with machine.start() as first, machine.gate.open("w") as gate, machine.start() as second:
        assert second.stderr is not None
        assert "waiting for another set-up" in second.stderr.readline()
        gate.write("go on\n")
        gate.flush()
        assert [process.wait(timeout=60) for process in (first, second)] == [0, 0]
    assert len(machine.installs()) == 1


def test_a_shim_of_a_python_that_is_not_there_is_passed_over(tmp_path: Path) -> None:
    shim = "#!/bin/bash\nexit 127\n"
    machine = Machine(tmp_path, {"python3.13": shim, "python3": FAKE_PYTHON})
    code, errors = machine.set_up()
    assert (code, errors.splitlines()[0].endswith(" with python3")) == (0, True)


def test_without_a_python_that_fits_one_line_names_the_package(tmp_path: Path) -> None:
    machine = Machine(tmp_path, {"python3": "#!/bin/bash\nexit 1\n"})  # too old
    code, errors = machine.set_up()
    assert (code, len(errors.splitlines())) == (64, 1)
    assert "no Python 3.11 or newer; on Debian: apt-get install python3 python3-venv" in errors


def test_a_python_without_ensurepip_names_its_own_package(machine: Machine) -> None:
    code, errors = machine.set_up(ENSUREPIP_CODE="1")
    assert (code, len(errors.splitlines())) == (64, 1)
    assert "apt-get install python3.12-venv" in errors
