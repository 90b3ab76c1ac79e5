"""Each fault that can be asked for really happens, where and when it was asked for, and says so."""

import errno
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import fork, running_child, status_of

from fmnist_dist.checkpoint.disk import FaultyDisk, disk_from
from fmnist_dist.faults import ACTIONS, FAULTS_VARIABLE, POINTS, Faults

LIMIT_SECONDS = 60


def answer(value: int = 42) -> int:
    return value


def told_of(capfd: pytest.CaptureFixture[str]) -> list[str]:
    lines = capfd.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("fault: ")]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("action", "number"), [("crash", signal.SIGKILL), ("segv", signal.SIGSEGV)]
)
def test_a_process_ends_by_the_signal_that_was_asked_for(
    action: str, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    faults = Faults.parse(f"data:{action}", rank=1)
    status = status_of(faults.wrap("data", answer))
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == number
    assert told_of(capfd) == [f"fault: {action} at data, call 1, rank 1"]


def test_an_exit_is_an_exception_that_nobody_foresaw(capfd: pytest.CaptureFixture[str]) -> None:
    wrapped = Faults.parse("update:exit").wrap("update", answer)
    with pytest.raises(RuntimeError, match="fault: exit at update"):
        wrapped()
    assert os.waitstatus_to_exitcode(status_of(wrapped)) == 1
    told = told_of(capfd)
    assert told == [f"fault: exit at update, call {call}, rank 0" for call in (1, 2)]


def test_an_error_is_one_of_the_operating_system() -> None:
    with pytest.raises(OSError, match="fault: error at save") as caught:
        Faults.parse("save:error").wrap("save", answer)()
    assert caught.value.errno == errno.EIO


def test_a_stopped_process_is_stopped_and_goes_on_when_told_to() -> None:
    pid = fork(Faults.parse("forward:stop").wrap("forward", answer))
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert os.WSTOPSIG(status) == signal.SIGSTOP
    os.kill(pid, signal.SIGCONT)
    assert os.waitpid(pid, 0)[1] == 0


def processor_ticks(pid: int) -> int:
    """Return what a process has used, in 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_spinning_process_uses_the_processor_and_does_not_come_back() -> None:
    with running_child(Faults.parse("forward:spin").wrap("forward", answer)) as pid:
        wait_until(lambda: processor_ticks(pid) >= 20)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)


def test_a_hanging_process_sleeps_and_still_answers_signals(
    capfd: pytest.CaptureFixture[str],
) -> None:
    hang = Faults.parse("collective:hang").wrap("collective", answer)

    def child() -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        hang()

    pid = fork(child)
    told: list[str] = []

    def hangs() -> bool:
        told.extend(told_of(capfd))
        return bool(told) and state_of(pid) == "S"

    wait_until(hangs)
    os.kill(pid, signal.SIGTERM)
    status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 1, "the handler ran: SystemExit, not the signal"
    assert told == ["fault: hang at collective, call 1, rank 0"]


def test_a_slow_call_takes_so_long_and_returns_what_it_did() -> None:
    began = time.monotonic()
    assert Faults.parse("evaluate:slow=0.05").wrap("evaluate", answer)(7) == 7
    assert time.monotonic() - began >= 0.05


def test_a_result_is_spoilt_by_the_hook_of_its_caller() -> None:
    faults = Faults.parse("forward:nan:2,update:corrupt")
    loss = faults.wrap("forward", lambda: 0.5, spoil={"nan": lambda _: math.nan})
    assert loss() == 0.5
    assert math.isnan(loss())
    assert faults.wrap("update", answer, spoil={"corrupt": lambda value: value ^ 1})() == 43


def test_a_fault_that_the_point_cannot_have_is_refused_before_anything_runs() -> None:
    for entry, where in (("data:nan", "forward"), ("save:corrupt", "update")):
        with pytest.raises(ValueError, match=f"={entry}: .* at {where} and nowhere else"):
            Faults.parse(entry)


@pytest.mark.parametrize(
    ("when", "calls"),
    [("", [1, 2, 3, 4, 5]), (":3", [3]), (":3+", [3, 4, 5]), (":3x2", [3, 4]), (":1x1", [1])],
)
def test_a_fault_happens_at_the_calls_that_were_asked_for(
    when: str, calls: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    wrapped = Faults.parse(f"data:error{when}").wrap("data", answer)
    failed = []
    for call in range(1, 6):
        try:
            assert wrapped() == 42
        except OSError:
            failed.append(call)
    assert failed == calls
    assert told_of(capfd) == [f"fault: error at data, call {call}, rank 0" for call in calls]


def test_a_process_that_is_forked_again_does_not_start_counting_again() -> None:
    wrapped = Faults.parse("data:crash:3").wrap("data", answer)

    def trainer() -> None:
        wrapped()
        wrapped()

    statuses = [status_of(trainer) for _ in range(4)]
    assert [os.WIFSIGNALED(status) for status in statuses] == [False, True, False, False]


def test_a_fault_happens_on_its_rank_only() -> None:
    for rank in range(3):
        faults = Faults.parse("save:error@1", rank=rank)
        assert faults.armed == (rank == 1)
        assert (faults.wrap("save", answer) is answer) == (rank != 1)


def test_two_faults_at_one_point_count_for_themselves(capfd: pytest.CaptureFixture[str]) -> None:
    wrapped = Faults.parse("data:slow=0:1x2, data:error:3").wrap("data", answer)
    assert (wrapped(), wrapped()) == (42, 42)
    with pytest.raises(OSError, match="fault"):
        wrapped()
    assert [line.split(",")[0] for line in told_of(capfd)] == [
        "fault: slow at data",
        "fault: slow at data",
        "fault: error at data",
    ]


@pytest.mark.parametrize("text", [None, "", "disk:kill:3", "update:crash"])
def test_a_point_without_faults_is_the_function_itself(text: str | None) -> None:
    assert Faults.parse(text).wrap("data", answer) is answer


def test_nothing_is_armed_without_the_variable() -> None:
    assert not Faults.parse(None).armed
    assert not Faults.parse("disk:kill:3").armed
    assert Faults.parse("data:hang").armed


def test_a_disk_fault_among_others_reaches_the_disk() -> None:
    disk = disk_from("data:crash:3@1, disk:full:2:5")
    assert isinstance(disk, FaultyDisk)
    assert (disk._action, disk._at, disk._last) == ("full", 2, 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data", "=data: expected disk:"),
        ("data:crash,", "=: expected disk:"),
        ("dta:crash", "=dta:crash: expected .*point one of .*; did you mean data[?]"),
        ("data:crsh", "=data:crsh: expected .*action one of .*; did you mean crash[?]"),
        ("data:zzz", "action one of .*corrupt$"),
        ("data:crash:0", "=data:crash:0: expected .*when as 3, 3[+] or 3x2"),
        ("data:crash:x2", "when as"),
        ("data:crash:2x0", "when as"),
        ("data:crash:3@first", "expected disk:"),
        ("data:slow", "seconds with slow"),
        ("data:slow=nan", "expected disk:"),
        ("data:crash=1", "seconds with slow and with nothing else"),
        ("disk:kill:1,disk:full:2", "expected one disk fault, not 2"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        Faults.parse(text)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(FAULTS_VARIABLE)


def test_every_action_of_the_table_is_shown_to_happen_here() -> None:
    source = Path(__file__).read_text()
    shown = set(re.findall(rf"(?:{'|'.join(POINTS)}):([a-z]+)", source))
    assert set(ACTIONS) - {"crash", "segv"} <= shown
