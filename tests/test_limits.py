"""Every wait has a limit, and all limits stand in one place; what has none was reviewed.

What may wait for ever, unless it is given a limit, is found in the program's text. What is found
stands below, with what ends the wait all the same.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from types import ModuleType

import pytest
from program import called, nodes, sources

import launch.agent.limits
from fmnist_dist import limits

# Reviewed: waits without a limit of their own, and what ends them.
ENDED_OTHERWISE: dict[str, tuple[int, str]] = {
    # Turns that cannot go on for ever.
    "fmnist_dist/loop.py::train": (1, "ends at the last step; the watchdog looks at each one"),
    "fmnist_dist/checkpoint/s3client.py::S3Client.attempt": (1, "its patience"),
    "fmnist_dist/checkpoint/deadline.py::within": (1, "a variable is no wait"),
    "fmnist_dist/checkpoint/deadline.py::deadline": (1, "a variable is no wait"),
    "fmnist_dist/checkpoint/s3client.py::together": (1, "the group of tasks has ended"),
    "fmnist_dist/checkpoint/restore.py::read_checkpoint": (1, "a checksum of bytes in memory"),
    "fmnist_dist/checkpoint/restore.py::read_newest": (1, "each turn leaves a checkpoint out"),
    "fmnist_dist/keeper/keep.py::Keeper.run": (1, "`deaths` gives up without progress"),
    "fmnist_dist/keeper/keep.py::Keeper._watch": (1, "the watchdog, then DEATH_SECONDS"),
    "fmnist_dist/keeper/fork.py::end_of": (1, "its deadline"),
    "fmnist_dist/saves.py::Saves._until": (1, "its deadline"),
    "fmnist_dist/distributed/generation.py::meet": (1, "`pause` raises after MEETING_SECONDS"),
    "fmnist_dist/distributed/generation.py::await_keys": (1, "`pause` raises after its limit"),
    # Children that wait for their keeper, and die with it.
    "fmnist_dist/keeper/spare.py::Spare.__init__.wait_for_call": (1, "the end of its keeper"),
    "fmnist_dist/distributed/roster.py::_serve_store": (3, "its whole work, till its keeper's end"),
    "launch/store.py::serve": (
        2,
        "its whole work, till SIGTERM; a store that serves waits for none",
    ),
    # A thread that waits for work.
    "fmnist_dist/saver.py::Saver._run": (1, "the word to end, and the end of its process"),
    # The agent's threads, which it asks for nothing before they are done.
    "launch/agent/connection.py::Connection.look": (1, "it is done"),
    "launch/agent/connection.py::_abandon": (1, "it is done: its own callback"),
    "launch/agent/progress.py::Progress.look": (1, "it is done"),
    "launch/agent/orphans.py::reap": (1, "WNOHANG"),
    # Pipes that do not block.
    "fmnist_dist/keeper/keep.py::Keeper._hear": (1, "the pipe is O_NONBLOCK"),
    "fmnist_dist/distributed/stop.py::StopRequest.read": (1, "the pipe is O_NONBLOCK"),
    # Collectives: the time-out of their group, COLLECTIVE_SECONDS, and the watchdog long before.
    "fmnist_dist/distributed/reduce.py::PendingSums.wait": (1, "its group's limit"),
    "fmnist_dist/distributed/reduce.py::GradientTree._scatter.finish": (1, "its group's limit"),
    "fmnist_dist/distributed/step.py::ShardedStep.__call__": (1, "its group's limit"),
    # Locks, each held for work that ends.
    "fmnist_dist/distributed/connection.py::Connection.__init__": (
        1,
        "held for one connect: STORE_SECONDS",
    ),
    "fmnist_dist/lookout.py::Lookout.watching": (2, "held for one store call: ANSWER_SECONDS"),
    "fmnist_dist/lookout.py::Lookout._break_off": (1, "held while the two lines above assign"),
    "fmnist_dist/committer.py::Committer.writer": (
        1,
        "held for reads of the log: the storage's limits",
    ),
    "fmnist_dist/checkpoint/writer.py::RunWriter._append": (1, "held for appends: the same"),
    "fmnist_dist/checkpoint/writer.py::RunWriter.save": (1, "held for its append: the same"),
    # The system's own limits.
    "fmnist_dist/distributed/interface.py::interface_towards": (1, "the resolver's own time-out"),
    "fmnist_dist/data/apt.py::_run": (1, "the process group was killed by then"),
    # Faults, which are there to be found by those limits.
    "fmnist_dist/faults.py::_happen": (1, "a fault: hangs on purpose"),
}
STATE_LOCK = "held while the state changes or is copied: memory only"

# Numbers of seconds elsewhere, and why they are no limit of a wait, or must stand there.
NUMBERS = {
    "fmnist_dist/telemetry/progress.py": "between two lines of progress",
    "fmnist_dist/telemetry/bar.py": "between two frames of the bar",
    "fmnist_dist/config.py": "defaults of settings",
    "fmnist_dist/interval.py": "bounds and prior of an estimate",
    "fmnist_dist/keeper/watchdog.py": "the watchdog's table",
    "fmnist_dist/limits.py": "the place",
    "fmnist_dist/faults.py": "a fault hangs on purpose",
    "launch/agent/limits.py": "the agent's place",
    "launch/k8s/doctor.py": "how late a pod must be to be told of",
    "launch/k8s/kubectl.py": "of one call of kubectl, here and not in a pod",
    "launch/k8s/status.py": "between two looks at a Job",
    "launch/launched.py": "the drill's own, which are not the program's",
    "launch/drill.py": "the drill's schedule of faults",
    "launch/jobdrill.py": "between two looks of the drill, and its haste",
    "launch/k8s/controller.py": "the back-off of Kubernetes",
}

_WITHOUT_ARGUMENTS = {"join", "wait", "acquire", "result", "communicate", "get", "recv", "accept"}
_NEVER_LIMITED = {"os.read", "signal.pause", "signal.sigwait", "os.wait", "os.system", "os.wait3"}
_NEVER_LIMITED |= {"fcntl.flock", "fcntl.lockf", "socket.getaddrinfo", "input"}
_WITH_TIMEOUT = {"subprocess.run", "subprocess.call", "subprocess.check_call", "os.waitid"}
_WITH_TIMEOUT |= {"subprocess.check_output", "urllib.request.urlopen", "filelock.FileLock"}
_WITH_TIMEOUT |= {"socket.create_connection", "dist.TCPStore", "dist.init_process_group"}
_WITH_TIMEOUT |= {"dist.new_group"}
_LOCKS = {"threading.Lock", "threading.RLock", "threading.Condition", "threading.Semaphore"}


def unlimited(texts: Mapping[str, str]) -> Counter[str]:
    """Count the waits of each place that nothing in their own text limits."""
    everything = list(nodes(texts))
    locks = {(place.partition("::")[0], name) for place, name in _locks(everything)}
    found: Counter[str] = Counter()
    for place, node in everything:
        match node:
            case ast.Call():
                found[place] += _waits(node)
            case ast.While(test=ast.Constant()):
                found[place] += 1
            case ast.While():
                found[place] += _sleeps_without_deadline(node)
            case ast.withitem(context_expr=held):
                path = place.partition("::")[0]
                found[place] += (path, ast.unparse(held)) in locks
                found[place] += ast.unparse(held).startswith("subprocess.Popen(")
            case _:
                pass
    return +found


def _locks(everything: list[tuple[str, ast.AST]]) -> Iterator[tuple[str, str]]:
    for place, node in everything:
        is_call = isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        if is_call and called(node.value) in _LOCKS:
            yield place, ast.unparse(node.targets[0])


def _waits(call: ast.Call) -> bool:
    name = called(call)
    method = name.rpartition(".")[2]
    keywords = {each.arg for each in call.keywords}
    if name == "select.select":
        return len(call.args) < 4
    if name == "os.waitpid":
        return ast.unparse(call.args[1]) != "os.WNOHANG"
    if name in _WITH_TIMEOUT:
        return "timeout" not in keywords
    if method in _WITHOUT_ARGUMENTS and isinstance(call.func, ast.Attribute):
        return not call.args and not keywords
    return name in _NEVER_LIMITED


def _sleeps_without_deadline(loop: ast.While) -> bool:
    text = ast.unparse(loop)
    return "time.sleep(" in text and not re.search(r"(deadline|patience)\b", text)


def numbers(texts: Mapping[str, str]) -> set[str]:
    """Return the modules with numbers of seconds: named so, or given to what waits."""
    return {place.partition("::")[0] for place, node in nodes(texts) if _has_seconds(node)}


def _has_seconds(node: ast.AST) -> bool:
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return name.endswith("_SECONDS") and _is_number(value)
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            return name.lower().endswith(("_seconds", "timeout")) and _is_number(value)
        case ast.Call() if called(node) in {"time.sleep", "select.select"}:
            return _is_number(node.args[-1])
        case ast.keyword(arg="timeout" | "seconds" | "milliseconds" | "minutes", value=value):
            return _is_number(value)
        case ast.Call(func=ast.Attribute(attr="join" | "wait" | "result"), args=[value]):
            return _is_number(value)
        case _:
            return False


def _is_number(value: ast.expr) -> bool:
    """Whether a value is a number, or computed from numbers alone; 0 is no wait."""
    names = [node for node in ast.walk(value) if isinstance(node, ast.Name)]
    constants = [node.value for node in ast.walk(value) if isinstance(node, ast.Constant)]
    return not names and any(type(each) in {int, float} and each for each in constants)


def test_every_wait_has_a_limit_or_a_reviewer_said_what_ends_it() -> None:
    found = unlimited(sources())
    for place in [place for place in found if place.startswith("fmnist_dist/state.py::")]:
        del found[place]  # STATE_LOCK
    assert found == {place: count for place, (count, _) in ENDED_OTHERWISE.items()}


def test_the_states_lock_is_held_for_work_in_memory_only() -> None:
    """It is the one lock of many places; what they do under it cannot wait."""
    text = sources()["fmnist_dist/state.py"]
    assert "with self._lock:" in text, STATE_LOCK
    assert not re.search(r"\bimport (os|time|socket|subprocess|threading\.Event)\b", text)
    names = {called(node) for _, node in nodes({"state.py": text}) if isinstance(node, ast.Call)}
    assert not {name for name in names if name.startswith(("dist.", "open", "time.", "os."))}


@pytest.mark.parametrize(
    ("module", "folder"), [(limits, "fmnist_dist/"), (launch.agent.limits, "launch/agent/")]
)
def test_every_limit_is_used(module: ModuleType, folder: str) -> None:
    texts = [text for path, text in sources().items() if path.startswith(folder)]
    own = {name for name in vars(module) if name.isupper()}
    assert len(own) > 10
    used = set(re.findall(r"\blimits\.([A-Z_]+)", "".join(texts)))
    assert used == own


def test_seconds_stand_in_one_place() -> None:
    assert numbers(sources()) == set(NUMBERS)


@pytest.mark.parametrize(
    "line",
    [
        "self._thread.join()",
        "process.wait()",
        "self._lock.acquire()",
        "future.result()",
        "queue.get()",
        "os.waitpid(child, 0)",
        "os.read(readable, 1)",
        "select.select([a], [], [])",
        "signal.pause()",
        "subprocess.run(command, check=True)",
        "urllib.request.urlopen(url)",
        "dist.new_group()",
        "while True:\n    pass",
        "while not there():\n    time.sleep(pause)",
        "lock = threading.Lock()\nwith lock:\n    pass",
        "with subprocess.Popen(command) as process:\n    pass",
    ],
)
def test_a_wait_without_a_limit_is_found(line: str) -> None:
    assert unlimited({"m.py": line}) == {"m.py::": 1}


@pytest.mark.parametrize(
    "line",
    [
        "self._thread.join(limits.FAREWELL_SECONDS)",
        "','.join(names)",
        "os.waitpid(child, os.WNOHANG)",
        "select.select([a], [], [], limits.KEEPER_SECONDS)",
        "subprocess.run(command, check=True, timeout=limits.APT_SECONDS)",
        "while not there():\n    require(time.monotonic() < deadline)\n    time.sleep(pause)",
    ],
)
def test_a_wait_with_a_limit_is_not(line: str) -> None:
    assert unlimited({"m.py": line}) == {}


@pytest.mark.parametrize(
    "line",
    [
        "_WAIT_SECONDS = 5.0",
        "LOCK_SECONDS = 15 * 60",
        "class Patience:\n    total_seconds: float = 300.0",
        "time.sleep(0.1)",
        "timedelta(seconds=30)",
        "process.wait(timeout=5)",
        "self._thread.join(5)",
    ],
)
def test_a_number_of_seconds_in_another_place_is_found(line: str) -> None:
    assert numbers({"m.py": line}) == {"m.py"}


def test_a_mistake_that_was_mended_is_found_when_it_is_put_back() -> None:
    path = "fmnist_dist/keeper/rescue.py"
    text = sources()[path]
    mended = "end_of(child, time.monotonic() + limits.KILL_SECONDS)"
    assert text.count(mended) == 1
    put_back = text.replace(mended, "os.waitpid(child, 0)")
    assert unlimited({path: put_back}) - unlimited({path: text}) == {f"{path}::rescue": 1}
