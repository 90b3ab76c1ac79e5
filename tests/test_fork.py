"""What must not cross a keeper's fork, and what a keeper does where there is no room for one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alone import Alone
from in_process import SmallRun, clean_environ, small_run
from jobs import ROOT, alive, reached, wait_for
from launcherless import Launcherless
from run_files import assert_sound, bodies, checkpoints

from fmnist_dist.checkpoint.record import Finish
from fmnist_dist.errors import ExitCode

LONG = ("--max-steps=100000", "--epochs=5000", "--eval-every-epochs=4999")
KEEPERS_OWN = ("fmnist-store", "fmnist-trainer", "fmnist-spare")


def run_python(code: str, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run a program that forks: pytest's own process has threads and handlers."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**clean_environ(), "PYTHONPATH": path, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def said_by(code: str) -> str:
    """Return what a program printed that ended well."""
    ended = run_python(code)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


# One fork, in programs of a few lines.

FORK = """
import errno, os, select, signal, socket, sys, time
from fmnist_dist.keeper import fork as module
from fmnist_dist.keeper.fork import NoRoomError, fork
def code_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def test_output_that_was_not_flushed_is_printed_once() -> None:
    text = said_by(
        f"{FORK}\nsys.stdout.write('the keeper was here ')\n"
        "print(code_of(fork(lambda: print('and its child', flush=True) or 5, name='child')))"
    )
    assert text == "the keeper was here and its child\n5\n"


def test_wake_up_descriptor_handlers_masks_and_group_are_the_childs_own() -> None:
    code = f"""{FORK}
readable, writable = os.pipe2(os.O_NONBLOCK)
signal.set_wakeup_fd(writable)
numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)
keeper = os.getpid()
for number in numbers:
    signal.signal(number, lambda *_: os.getpid() == keeper or print("the keeper's handler"))
def child():
    assert signal.set_wakeup_fd(-1) == -1
    for number in numbers:
        own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        assert signal.getsignal(number) == own, number
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(numbers)
    assert os.getpgid(0) == os.getpid() != os.getpgid(os.getppid())
    for descriptor in (readable, writable):
        try:
            os.fstat(descriptor)
        except OSError:
            continue
        return 7
    return 0
print(code_of(fork(child, name="child", close=(readable, writable))))
"""
    assert said_by(code) == "0\n"


def test_a_peer_sees_a_death_at_once_though_children_of_the_keeper_live_on() -> None:
    """The trainer's connection is its own, and no later child has the keeper's."""
    code = f"""{FORK}
server = socket.create_server(("127.0.0.1", 0))
here = server.getsockname()
own = socket.create_connection(here)
keepers, _ = server.accept()
def train():
    connection = socket.create_connection(here)
    time.sleep(600)
trainer = fork(train, name="trainer")
trainers, _ = server.accept()
others = [fork(lambda: time.sleep(600) or 0, name=name) for name in ("spare", "rescue")]
os.kill(trainer, signal.SIGKILL)
print(select.select([trainers], [], [], 30)[0] == [trainers] and trainers.recv(1) == b"")
own.close()
print(select.select([keepers], [], [], 30)[0] == [keepers] and keepers.recv(1) == b"")
print([os.waitpid(other, os.WNOHANG) for other in others] == [(0, 0)] * 2)
# A child that keeps what it inherits hides the end: what this test is there to find.
own = socket.create_connection(here)
keepers, _ = server.accept()
module.open_sockets = dict
hiding = fork(lambda: time.sleep(600) or 0, name="hiding")
own.close()
print(select.select([keepers], [], [], 0.5)[0])
"""
    assert said_by(code) == "True\nTrue\nTrue\n[]\n"


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    code = f"{FORK}\nprint(fork(lambda: time.sleep(600) or 0, name='child'), flush=True)\n"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"{code}time.sleep(600)"],
        env={**clean_environ(), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
    wait_for(lambda: not alive(child), "its child's death")


def test_a_child_whose_parent_died_before_it_could_ask_for_a_signal_dies_too() -> None:
    code = f"""{FORK}
readable, writable = os.pipe()
real = module.die_with
def too_late(parent):
    while os.getppid() == parent:
        time.sleep(0.001)
    os.write(writable, b"orphan")
    real(parent)
module.die_with = too_late
if os.fork() == 0:
    fork(lambda: os.write(writable, b" runs on"), name="child")
    os._exit(0)
os.close(writable)
told = b""
while piece := os.read(readable, 100):  # until nobody is left who could write
    told += piece
print(told.decode())
"""
    assert said_by(code) == "orphan\n"


def test_a_fork_that_fails_leaves_the_parent_as_it_was() -> None:
    code = f"""{FORK}
def fail():
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
signal.signal(signal.SIGTERM, lambda *_: print("the handler"))
before = signal.pthread_sigmask(signal.SIG_BLOCK, ()), len(os.listdir("/proc/self/fd"))
os.fork, real = fail, os.fork
try:
    fork(lambda: 0, name="child")
except NoRoomError as error:
    print(error, int(error.exit_code))
assert before == (signal.pthread_sigmask(signal.SIG_BLOCK, ()), len(os.listdir("/proc/self/fd")))
os.kill(os.getpid(), signal.SIGTERM)
os.fork = real
print(code_of(fork(lambda: 3, name="child")))
assert before[0] == signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""
    assert said_by(code) == (
        "no room for another process: Resource temporarily unavailable 75\nthe handler\n3\n"
    )


def test_what_a_child_raises_is_told_and_is_its_exit_code() -> None:
    ended = run_python(
        f"{FORK}\ndef fail(): raise ValueError('broken')\n"
        "for child in (fail, lambda: sys.exit('said'), lambda: sys.exit(4), lambda: sys.exit()):\n"
        "    print(code_of(fork(child, name='child')))\n"
    )
    assert ended.stdout == "1\n1\n4\n0\n"
    assert "ValueError: broken" in ended.stderr
    assert ended.stderr.endswith("said\n")


# A real job.


def links(pid: int, kind: str) -> set[str]:
    """Return the sockets or pipes that a process has open."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = path.readlink().name
        except OSError:
            continue  # closed since
        if target.startswith(f"{kind}:"):
            found.add(target)
    return found


def mask(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1], 16)


def assert_apart(keeper: int, child: int, *, pipes: int) -> None:
    """The child has no socket of its keeper's, no more pipes than told, and signals of its own."""
    assert links(keeper, "socket"), "the keeper is connected to the store"
    assert not links(keeper, "socket") & links(child, "socket")
    assert len(links(keeper, "pipe") & links(child, "pipe")) == pipes
    assert os.getpgid(child) == child
    assert os.getpgid(keeper) == keeper
    assert mask(child, "SigBlk") == 0


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Launcherless]:
    # Threads that a user asks for must not come to be in the keeper.
    threads = {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}
    environ = {
        **threads,
        "FORK_NOTES": str(tmp_path / "forks"),
        "FMNIST_DIST_FAULTS": "save:slow=3",
    }
    job = Launcherless(tmp_path / "run", *LONG, module="fork_witness", **environ)
    try:
        yield job
    finally:
        job.end()


def test_nothing_crosses_a_keepers_forks_and_a_peer_sees_a_death_whatever_they_left(
    job: Launcherless, tmp_path: Path
) -> None:
    keeper, other = (process.pid for process in job.processes)

    def progress(steps: int = 3) -> None:
        here = reached(job.run)[1]
        wait_for(
            lambda: reached(job.run)[1] >= here + steps or job.processes[0].poll() is not None,
            "progress",
        )
        assert job.processes[0].poll() is None, job.text()[-5000:]

    def child(name: str, rank: int = 0) -> int:
        return wait_for(lambda: job.child(name, rank=rank), name)

    progress()
    for _ in range(2):  # heals, by a spare: another one is forked for each
        killed = child("fmnist-trainer")
        child("fmnist-spare")
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: not alive(killed), "its death")  # noqa: B023 - called here
        progress()
    for name in KEEPERS_OWN:
        assert_apart(keeper, child(name), pipes=1 if name == "fmnist-spare" else 0)

    # Nobody but the dead trainer's own connection can tell: its keeper is stopped, and has children
    # that live on.
    spare, killed = child("fmnist-spare", 1), child("fmnist-trainer", 1)
    told = "meeting again"
    before = job.text(0).count(told)
    os.kill(other, signal.SIGSTOP)
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: job.text(0).count(told) > before, "its peer to see it")
    assert alive(spare)
    assert "no word of its host" not in job.text(0), "seen for another reason"
    os.kill(other, signal.SIGCONT)
    progress()

    # The last child of all: it saves in the place of a trainer that was lost on the way out.
    killed = child("fmnist-trainer")
    os.kill(killed, signal.SIGSTOP)
    os.kill(keeper, signal.SIGTERM)
    wait_for(lambda: mask(killed, "SigPnd") | mask(killed, "ShdPnd"), "the keeper to drain")
    os.kill(killed, signal.SIGKILL)
    assert_apart(keeper, child("fmnist-rescue"), pipes=2)  # for as long as it lives: see `rescue`
    assert job.processes[0].wait(60) == ExitCode.DRAINED, job.text(0)[-5000:]
    assert "Traceback" not in job.text()

    notes = [json.loads(line) for line in (tmp_path / "forks").read_text().splitlines()]
    forks = [note for note in notes if note["pid"] == keeper]
    assert len(forks) >= 1 + 1 + 3 + 1  # store, trainer, spares, rescue
    assert {note["pid"] for note in notes} == {keeper, other}
    for note in notes:
        assert (note["threads"], note["main"], note["cuda"]) == (1, True, False), notes


def test_a_terminals_interrupt_reaches_a_trainer_once(tmp_path: Path) -> None:
    """A terminal signals a whole group; twice would be a second Ctrl-C, which saves nothing."""
    with Alone(tmp_path / "run", *LONG) as job:
        job.await_steps(3)
        os.killpg(job.process.pid, signal.SIGINT)
        code, text = job.end()
    assert code == ExitCode.DRAINED, text[-3000:]
    assert checkpoints(job.run)[-1].step == reached(job.run)[1]


# No room, and other ends: a small run in a process of its own, with something else than usual.

SMALL = """
import errno, os, signal, sys, collections
from pathlib import Path
import in_process
from fmnist_dist import limits
from fmnist_dist.keeper import keep
{patch}
root, data, *flags = sys.argv[1:]
with in_process.small_run(Path(data).parent):
    run = in_process.SmallRun(root=Path(root), data=Path(data))
    ended = run.launch(*flags, environ=dict(os.environ), told=sys.__stderr__.write)
sys.exit(ended.code)
"""
# Forks that fail, by who wants one, from which call on.
FAILING = """
failing, calls, real = {failing}, collections.Counter(), os.fork
def fork():
    who = sys._getframe(2).f_code.co_qualname
    calls[who] += 1
    if calls[who] >= failing.get(who, 1 << 30):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return real()
os.fork = fork
"""
NO_SPARE = {"Spare.__init__": 1}
NO_HEAL = {**NO_SPARE, "Keeper._fork": 2}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[SmallRun]:
    with small_run(tmp_path) as run:
        yield run


def small(
    run: SmallRun, patch: str, *flags: str, faults: str = ""
) -> "subprocess.CompletedProcess[str]":
    environ = {"FMNIST_DIST_NO_KEEPER": "false"}
    if faults:
        environ["FMNIST_DIST_FAULTS"] = faults
    code = SMALL.format(patch=patch)
    return run_python(code, str(run.root), str(run.data), *flags, **environ)


def without_room(run: SmallRun, failing: dict[str, int], faults: str) -> tuple[int, str]:
    ended = small(run, FAILING.format(failing=failing), "--max-steps=12", faults=faults)
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stderr


def test_without_room_for_a_spare_training_goes_on_and_says_so(run: SmallRun) -> None:
    code, text = without_room(run, NO_SPARE, "data:slow=0.01:1+,forward:crash:8")
    assert code == ExitCode.FINISHED, text
    assert text.count("no room for a spare worker") >= 1
    assert "worker lost, a new one takes its place" in text
    assert [each.step for each in bodies(run.root, Finish)] == [12]


def test_without_room_for_another_trainer_the_keeper_saves_and_ends_with_75(run: SmallRun) -> None:
    code, text = without_room(run, NO_HEAL, "forward:crash:8")
    assert code == ExitCode.TRANSIENT, text
    assert "worker lost, and no new one can start" in text
    assert "no room for another process: Resource temporarily unavailable" in text
    assert "saved from the keeper's memory" in text
    assert 1 <= checkpoints(run.root)[-1].step <= 7
    assert_sound(run.root)
    again = run.launch("--max-steps=12")
    assert again.code == 0, again.lines


def test_without_room_for_any_process_the_keeper_says_that_nothing_was_saved(
    run: SmallRun,
) -> None:
    code, text = without_room(run, {**NO_HEAL, "rescue": 1}, "forward:crash:3")
    assert code == ExitCode.TRANSIENT, text
    assert "could not save from the keeper's memory" in text
    assert checkpoints(run.root) == []


def test_without_room_for_the_first_trainer_the_launch_ends_with_75_and_one_line(
    run: SmallRun,
) -> None:
    code, text = without_room(run, {"Keeper._fork": 1}, "")
    assert code == ExitCode.TRANSIENT, text
    (line,) = [line for line in text.splitlines() if " error: " in line]
    assert "no room for another process" in line


def test_a_trainer_that_no_kill_ends_is_left_to_the_kernel(run: SmallRun) -> None:
    """As one that waits for a dead disk is: here, the signal is not sent."""
    patch = """
class Sparing:
    def __getattr__(self, name): return getattr(os, name)
    def kill(self, pid, number):
        if number != signal.SIGKILL: os.kill(pid, number)
keep.os = Sparing()
limits.DEATH_SECONDS = 0.5
"""
    flags = ("--max-steps=12", "--step-timeout=1")
    ended = small(run, patch, *flags, faults="data:hang:41")
    assert ended.returncode == ExitCode.TRANSIENT, ended.stderr
    assert "worker was killed and does not die" in ended.stderr
    assert "saved from the keeper's memory" in ended.stderr
    assert checkpoints(run.root)[-1].step >= 1


def test_no_keeper_asks_whether_there_is_a_gpu(run: SmallRun, tmp_path: Path) -> None:
    """Asking may start CUDA, whatever the answer; a trainer may ask: it has been forked by then."""
    asked = tmp_path / "asked"
    patch = f"""
import torch
def ask():
    with open({str(asked)!r}, "a") as file:
        print(os.getpid(), Path("/proc/self/comm").read_text().strip(), file=file)
    return False
for name in ("is_available", "device_count", "init", "_lazy_init"):
    setattr(torch.cuda, name, ask)
"""
    ended = small(run, patch, "--max-steps=8", "--device=auto", faults="forward:crash:5")
    assert ended.returncode == 0, ended.stderr
    who = {line.split()[1] for line in asked.read_text().splitlines()}
    assert "fmnist-trainer" in who  # so the stand-in is seen
    assert who <= {"fmnist-trainer", "fmnist-spare"}


def test_a_system_without_forks_trains_without_a_keeper_and_says_so(run: SmallRun) -> None:
    patch = "from fmnist_dist.keeper import fork as module\nmodule.is_supported = lambda: False"
    ended = small(run, patch, "--max-steps=4")
    assert ended.returncode == 0, ended.stderr
    assert "keeper=no" in ended.stderr
