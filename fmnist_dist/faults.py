"""Faults on purpose, for tests and drills: `FMNIST_DIST_FAULTS` says which, where and when.

`data:crash:3@1` kills rank 1 at its third call of the point `data`. Entries have commas between
them; one is `<point>:<action>[:<when>][@<rank>]`, and `disk:…` belongs to `checkpoint/disk.py`.
`when` is `3` (the third call), `3+` (from it on), `3x2` (it and the next) or absent (every call).

Calls are counted in memory that a fork shares: a trainer that is forked again goes on counting. A
fault announces itself on stderr before it happens: a test asserts that it really did.
"""

import difflib
import errno
import math
import mmap
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ParamSpec, Self, TypeVar

FAULTS_VARIABLE = "FMNIST_DIST_FAULTS"
DISK_FORM = "disk:kill|tear|stop|full:<n>[:<times>]"
_FORM = f"{DISK_FORM} or <point>:<action>[:<when>][@<rank>]"
_TRAINING = ("data", "forward", "collective", "update", "evaluate", "save")
POINTS = ("open", "meeting", "restore", *_TRAINING, "finish")
ACTIONS = ("crash", "segv", "stop", "exit", "error", "slow", "hang", "spin", "nan", "corrupt")
_SIGNALS = {"crash": signal.SIGKILL, "segv": signal.SIGSEGV, "stop": signal.SIGSTOP}
_SPOILING = {"nan": "forward", "corrupt": "update"}  # done to the result of a point, by a hook
_ENTRY = re.compile(
    r"(?P<point>[a-z]+):(?P<action>[a-z]+)(=(?P<seconds>\d+(\.\d+)?))?"
    r"(:(?P<first>[1-9]\d*)((?P<on>\+)|x(?P<times>[1-9]\d*))?)?(@(?P<rank>\d+))?"
)
_WORD = 8

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fault:
    point: str
    action: str
    seconds: float  # of slow
    first: int  # the calls that it happens at, from 1
    last: float
    rank: int | None  # None: every rank


class Faults:
    """What is armed on this rank. Made before the keeper forks."""

    def __init__(self, faults: Iterable[_Fault], *, rank: int, disk: str | None) -> None:
        self._faults = tuple(fault for fault in faults if fault.rank in {None, rank})
        self._calls = memoryview(mmap.mmap(-1, _WORD * max(1, len(self._faults)))).cast("Q")
        self._rank = rank
        self.disk = disk  # the `disk:` entry, for `checkpoint/disk.py`

    @classmethod
    def parse(cls, text: str | None, *, rank: int = 0) -> Self:
        """Return what `FMNIST_DIST_FAULTS` asks for. Raises ValueError, one line."""
        entries = [entry.strip() for entry in text.split(",")] if text else []
        disks = [entry for entry in entries if entry.startswith("disk:")]
        if len(disks) > 1:
            raise ValueError(f"{FAULTS_VARIABLE}={text}: expected one disk fault, not {len(disks)}")
        named = [_parse(entry) for entry in entries if entry not in disks]
        return cls(named, rank=rank, disk=disks[0] if disks else None)

    @property
    def armed(self) -> bool:
        """Whether any fault of `wrap` may happen on this rank."""
        return bool(self._faults)

    def wrap(
        self,
        point: str,
        function: Callable[_P, _R],
        *,
        spoil: Mapping[str, Callable[[_R], _R]] | None = None,
    ) -> Callable[_P, _R]:
        """Return `function` with the faults of a point; itself where there are none.

        `spoil` says how `nan` and `corrupt` change the result, at the points that have them.
        """
        assert point in POINTS, point
        hooks = spoil or {}
        mine = [(at, fault) for at, fault in enumerate(self._faults) if fault.point == point]
        if not mine:
            return function

        def faulty(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            due = [fault for at, fault in mine if self._is_due(at, fault)]
            for fault in due:
                _happen(fault)
            result = function(*args, **kwargs)
            for fault in due:
                if fault.action in _SPOILING:
                    result = hooks[fault.action](result)
            return result

        return faulty

    def _is_due(self, at: int, fault: _Fault) -> bool:
        """Count a call; announce the fault if it happens at this one."""
        self._calls[at] += 1
        call = self._calls[at]
        due = fault.first <= call <= fault.last
        if due:
            where = f"{fault.point}, call {call}, rank {self._rank}"
            sys.stderr.write(f"fault: {fault.action} at {where}\n")
            sys.stderr.flush()
        return due


def _happen(fault: _Fault) -> None:
    if fault.action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault.action])
    if fault.action == "exit":
        raise RuntimeError(f"fault: exit at {fault.point}")
    if fault.action == "error":
        raise OSError(errno.EIO, os.strerror(errno.EIO), f"fault: error at {fault.point}")
    if fault.action == "slow":
        time.sleep(fault.seconds)
    while fault.action == "hang":
        time.sleep(3600)
    while fault.action == "spin":
        pass


def _parse(entry: str) -> _Fault:
    wrong = f"{FAULTS_VARIABLE}={entry}: expected {_FORM}"
    found = _ENTRY.fullmatch(entry)
    if found is None:
        raise ValueError(f"{wrong}, when as 3, 3+ or 3x2")
    for kind, names in (("point", POINTS), ("action", ACTIONS)):
        if found[kind] not in names:
            near = difflib.get_close_matches(found[kind], names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{wrong}, {kind} one of {', '.join(names)}{hint}")
    if (found["action"] == "slow") != (found["seconds"] is not None):
        raise ValueError(f"{wrong}, seconds with slow and with nothing else, as in slow=0.5")
    where = _SPOILING.get(found["action"], found["point"])
    if where != found["point"]:
        raise ValueError(f"{wrong}, {found['action']} at {where} and nowhere else")
    first = int(found["first"] or 1)
    always = found["on"] or not found["first"]
    return _Fault(
        point=found["point"],
        action=found["action"],
        seconds=float(found["seconds"] or 0),
        first=first,
        last=math.inf if always else first + int(found["times"] or 1) - 1,
        rank=None if found["rank"] is None else int(found["rank"]),
    )
