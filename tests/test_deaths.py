"""A trainer that crashes again and again is given up; one that is killed again and again is not."""

import os
import resource
import signal
import subprocess
import sys

import pytest
from forked import status_of

from fmnist_dist.errors import ExitCode
from fmnist_dist.handover.board import Section
from fmnist_dist.keeper.deaths import (
    ANY_DEATHS,
    QUARANTINES,
    RESTORE_DEATHS,
    SAME_STEP_DEATHS,
    Death,
    Deaths,
    GiveUp,
    Heal,
    Quarantine,
    cause_of,
)


def crash(step: int) -> Death:
    return Death(
        step=step,
        section=Section.DATA,
        cause="killed by SIGSEGV",
        own_fault=True,
        restoring=None,
    )


def kill(step: int) -> Death:
    return Death(
        step=step,
        section=Section.COMPUTE,
        cause="killed by SIGKILL",
        own_fault=False,
        restoring=None,
    )


def restoring(index: int, *, own_fault: bool = True, step: int = -1) -> Death:
    return Death(
        step=step,
        section=Section.RESTORE,
        cause="killed by SIGBUS",
        own_fault=own_fault,
        restoring=index,
    )


def test_crashes_at_the_same_step_are_given_up() -> None:
    deaths = Deaths()
    for _ in range(SAME_STEP_DEATHS - 1):
        assert deaths.add(crash(7)) == Heal()
    assert deaths.add(crash(7)) == GiveUp("3 times after step 7 in data: killed by SIGSEGV")


def test_crashes_before_the_first_step_are_given_up_too() -> None:
    deaths = Deaths()
    found = [deaths.add(crash(-1)) for _ in range(SAME_STEP_DEATHS)]
    assert found[-1] == GiveUp("3 times before the first step in data: killed by SIGSEGV")


def test_kills_from_outside_do_not_hide_crashes_between_them() -> None:
    deaths = Deaths()
    found = [deaths.add(death) for death in [crash(7), kill(7), crash(7), kill(7), crash(7)]]
    assert found[:-1] == [Heal()] * 4
    assert isinstance(found[-1], GiveUp)


def test_crashes_that_each_come_after_progress_are_healed_for_ever() -> None:
    deaths = Deaths()
    assert {deaths.add(crash(step)) for step in range(1000)} == {Heal()}


def test_kills_that_each_come_after_progress_are_healed_for_ever() -> None:
    deaths = Deaths()
    assert {deaths.add(kill(step)) for step in range(1000)} == {Heal()}


def test_kills_without_progress_are_given_up_with_more_patience() -> None:
    """The kernel's out-of-memory killer looks like anybody's SIGKILL."""
    deaths = Deaths()
    assert [deaths.add(kill(4)) for _ in range(ANY_DEATHS - 1)] == [Heal()] * (ANY_DEATHS - 1)
    found = deaths.add(kill(4))
    why = "10 deaths without progress, the last after step 4 in compute: killed by SIGKILL"
    assert found == GiveUp(why)


def test_steps_that_have_been_made_before_are_no_progress() -> None:
    deaths = Deaths()
    deaths.add(crash(100))
    found = [deaths.add(crash(step)) for step in range(50, 50 + ANY_DEATHS - 1)]
    assert found[:-1] == [Heal()] * (ANY_DEATHS - 2)
    assert isinstance(found[-1], GiveUp)


def test_progress_clears_all_counts() -> None:
    deaths = Deaths()
    for step in (7, 8):
        assert [deaths.add(crash(step)) for _ in range(SAME_STEP_DEATHS - 1)] == [Heal()] * 2


@pytest.mark.parametrize("own_fault", [True, False])
def test_a_checkpoint_that_kills_who_restores_it_goes_into_quarantine(own_fault: bool) -> None:  # noqa: FBT001
    deaths = Deaths()
    found = [deaths.add(restoring(12, own_fault=own_fault)) for _ in range(RESTORE_DEATHS)]
    assert found == [Heal(), Heal(), Quarantine(12)]


def test_the_checkpoint_before_is_tried_as_often() -> None:
    deaths = Deaths()
    for index in (12, 9):
        found = [deaths.add(restoring(index)) for _ in range(RESTORE_DEATHS)]
        assert found == [Heal(), Heal(), Quarantine(index)]


def test_deaths_elsewhere_are_no_checkpoints_fault() -> None:
    deaths = Deaths()
    found = [deaths.add(restoring(12)), deaths.add(kill(-1)), deaths.add(kill(-1))]
    assert found == [Heal()] * 3
    assert [deaths.add(restoring(12)), deaths.add(restoring(12))][-1] == Quarantine(12)


def test_where_every_checkpoint_kills_the_rest_are_left_alone() -> None:
    deaths = Deaths()
    found = [deaths.add(restoring(index)) for index in (12, 9, 6) for _ in range(RESTORE_DEATHS)]
    assert [each for each in found if isinstance(each, Quarantine)] == [
        Quarantine(12),
        Quarantine(9),
    ]
    assert QUARANTINES == 2
    why = "restoring fails with each of the checkpoints 12, 9, 6: killed by SIGBUS"
    assert found[-1] == GiveUp(why)


def test_a_quarantine_long_before_does_not_count() -> None:
    deaths = Deaths()
    for step, index in enumerate((12, 13, 14, 15)):
        found = [deaths.add(restoring(index, step=step)) for _ in range(RESTORE_DEATHS)]
        assert found[-1] == Quarantine(index)


def test_a_restore_without_a_checkpoint_is_counted_as_any_death() -> None:
    deaths = Deaths()
    death = Death(
        step=-1, section=Section.RESTORE, cause="exit code 1", own_fault=True, restoring=None
    )
    assert isinstance([deaths.add(death) for _ in range(SAME_STEP_DEATHS)][-1], GiveUp)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP", "SIGINT"])
def test_a_kill_from_outside_is_nobodys_own_fault(name: str) -> None:
    assert cause_of(ended_by(signal.Signals[name])) == (f"killed by {name}", False)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL"])
def test_a_crash_is_ones_own_fault(name: str) -> None:
    assert cause_of(ended_by(signal.Signals[name])) == (f"killed by {name}", True)


def ended_by(number: signal.Signals) -> int:
    """Return the wait status of a real process that a signal has killed."""

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    return status_of(child)


def test_a_signal_without_a_name_has_its_number() -> None:
    assert cause_of(signal.SIGRTMIN + 1) == (f"killed by signal {signal.SIGRTMIN + 1}", False)


def test_a_core_dump_is_said() -> None:
    assert cause_of(signal.SIGSEGV | 0x80) == ("killed by SIGSEGV (core dumped)", True)


@pytest.mark.parametrize(
    ("code", "text", "own_fault"),
    [
        (ExitCode.FINISHED, "exit code 0 (finished)", False),
        (ExitCode.BUG, "exit code 1 (bug)", True),
        (ExitCode.NO_PROGRESS, "exit code 70 (no_progress)", True),
        (ExitCode.TRANSIENT, "exit code 75 (transient)", False),
        (ExitCode.PEER_LOST, "exit code 79 (peer_lost)", False),
        (3, "exit code 3", True),
    ],
)
def test_an_exit_code_is_said_with_its_name(code: int, text: str, own_fault: bool) -> None:  # noqa: FBT001
    assert cause_of(status_of(lambda: os._exit(code))) == (text, own_fault)


def test_neither_deaths_nor_the_watchdog_need_torch() -> None:
    program = "import sys, fmnist_dist.keeper.deaths, fmnist_dist.keeper.watchdog;"
    program += (
        "import fmnist_dist.handover.slots, fmnist_dist.faults; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
