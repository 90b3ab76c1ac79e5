"""No `except` hides an error: it is raised on, handed on, or logged; or a reviewer said why not.

A handler tells of its error when, on every path through it, it raises, or logs, or does something
with the error itself. All others stand below, with the reason why their silence is right.
"""

import ast
from collections import Counter
from collections.abc import Iterator, Mapping

import pytest
from program import called, nodes, sources

# Reviewed: so many silent handlers in this function, and why each may be silent.
SILENT: dict[str, tuple[int, str]] = {
    # The caller is told by the value that is returned.
    "fmnist_dist/checkpoint/interruptions.py::last_interval": (1, "an older record, or none"),
    "fmnist_dist/checkpoint/interruptions.py::_newest_records": (1, "readers of the run list it"),
    "fmnist_dist/checkpoint/lineage.py::_intact": (1, "None is the answer, and what callers ask"),
    "fmnist_dist/checkpoint/local.py::LocalStorage.list": (1, "a folder not made yet is empty"),
    "fmnist_dist/checkpoint/hint.py::read_hints": (1, "none are known: hints are no truth"),
    "fmnist_dist/checkpoint/objects.py::ObjectStorage.list": (1, "a folder not made yet is empty"),
    "fmnist_dist/checkpoint/s3.py::S3Storage._do": (1, "every case raises"),
    "fmnist_dist/checkpoint/s3bucket.py::Bucket.read": (1, "an object of no bytes; else it raises"),
    "fmnist_dist/checkpoint/s3bucket.py::Bucket._exists": (1, "the answer is no; else it raises"),
    "fmnist_dist/checkpoint/log.py::RunLog.is_intact": (1, "the answer is no"),
    "fmnist_dist/checkpoint/log.py::RunLog._is": (1, "damaged: it is not the own record"),
    "fmnist_dist/checkpoint/log.py::RunLog.read": (1, "listed as damaged, which `opening` logs"),
    "fmnist_dist/checkpoint/log.py::RunLog._advance": (1, "it occupies its index; readers list it"),
    "fmnist_dist/checkpoint/log.py::RunLog._present": (1, "the answer to whether it is there"),
    "fmnist_dist/checkpoint/history.py::read_history": (1, "listed as damaged, which `runs` tells"),
    "fmnist_dist/checkpoint/localcopy.py::read_copy": (1, "no copy without an intact record"),
    "fmnist_dist/checkpoint/tier.py::LocalTier._since": (1, "None, which refuses the copy"),
    "fmnist_dist/checkpoint/verify.py::_is_whole": (1, "among the damaged records already"),
    "fmnist_dist/checkpoint/suspect.py::_training_rows": (1, "`its metric rows cannot be read`"),
    "fmnist_dist/inspection/audit.py::_suspects": (1, "a pointer less; the proof itself stands"),
    "fmnist_dist/keeper/deaths.py::_signal_name": (1, "the number is named instead"),
    "fmnist_dist/rule.py::_from_tokens": (1, "stays text, which the rule refuses by name"),
    "fmnist_dist/opening.py::_exists": (1, "opening the place says why it cannot"),
    "fmnist_dist/opening.py::_check_shared": (1, "what follows raises"),
    "fmnist_dist/opening.py::_answer": (1, "a rank that has left has answered before"),
    "fmnist_dist/data/cache.py::folder_of": (1, "None: `load` warns that there is no home"),
    "launch/drill.py::_worlds": (1, "what follows raises, with what was found"),
    "launch/k8s/live.py::_line_of": (1, "the end of a log: no post-mortem, and shown as it is"),
    # Tried again, or done otherwise; what fails then tells.
    "fmnist_dist/checkpoint/folder.py::write_file": (
        2,
        "its own after a lost answer; else it raises",
    ),
    "fmnist_dist/checkpoint/probe.py::_keeps_the_first": (2, "the answer: the second was refused"),
    "fmnist_dist/checkpoint/probe.py::_reads": (1, "the answer: a sweep has taken it"),
    "fmnist_dist/checkpoint/s3bucket.py::Bucket.create": (1, "sent without the condition"),
    "fmnist_dist/checkpoint/s3bucket.py::Bucket._upload": (1, "after a conflict sent again"),
    "fmnist_dist/checkpoint/s3bucket.py::Bucket._upload_once": (
        1,
        "a sweep finds it; it raises on",
    ),
    "fmnist_dist/checkpoint/s3bucket.py::Bucket._unfinished": (1, "the bucket's rules end them"),
    "fmnist_dist/checkpoint/folder.py::give_back": (1, "no record names it: a sweep finds it"),
    "fmnist_dist/checkpoint/log.py::RunLog.append": (1, "its own record, or the next index"),
    "fmnist_dist/checkpoint/restore.py::read_newest": (1, "damage, or retired: read head again"),
    "fmnist_dist/checkpoint/writer.py::RunWriter._intact_commits": (1, "quarantined, or retired"),
    "fmnist_dist/data/apt.py::download": (1, "most containers have no lists; the second try tells"),
    "fmnist_dist/data/cache.py::load": (1, "looked at again under the lock, where it is logged"),
    "fmnist_dist/distributed/generation.py::meet": (1, "goes on in the newer generation"),
    "fmnist_dist/distributed/interface.py::interface_towards": (1, "gloo finds its own, or tells"),
    "fmnist_dist/distributed/interface.py::_ipv4_address": (1, "an interface without an address"),
    "fmnist_dist/distributed/roster.py::_parent_identity": (1, "no /proc: named without its start"),
    "fmnist_dist/inspection/foundrun.py::_names": (1, "somebody else's folder is no candidate"),
    "fmnist_dist/committer.py::Committer.publish": (1, "rows are saved twice; the next save tells"),
    "fmnist_dist/committer.py::Committer._retire": (1, "given up for a newer save, which retires"),
    "fmnist_dist/checkpoint/s3names.py::LastingResolver._look_up": (
        1,
        "the last addresses count, and whether they are good is seen when they are tried",
    ),
    "fmnist_dist/saves.py::Saves.secure": (1, "the save that follows tells"),
    "fmnist_dist/committer.py::Committer._commit": (1, "the save's own error is raised on"),
    "fmnist_dist/trainer.py::Trainer._secure": (1, "all may save: the log admits one"),
    "fmnist_dist/trainer.py::Trainer._join.has_failed": (1, "failed; the main thread finds why"),
    # The work is done already, by whomever.
    "fmnist_dist/checkpoint/hint.py::forget": (1, "the next hint fails likewise, and tells"),
    "fmnist_dist/checkpoint/objects.py::ObjectStorage.delete": (1, "gone already"),
    "fmnist_dist/checkpoint/objects.py::ObjectStorage.delete_folder": (1, "gone already"),
    "fmnist_dist/checkpoint/s3bucket.py::Bucket._delete_one": (1, "gone already; else it raises"),
    "fmnist_dist/checkpoint/s3bucket.py::Bucket._abort": (1, "gone already; else it raises"),
    "fmnist_dist/checkpoint/local.py::LocalStorage.create": (1, "no leftover there to remove"),
    "fmnist_dist/checkpoint/local.py::LocalStorage._create": (1, "no temporary file to remove"),
    "fmnist_dist/checkpoint/local.py::LocalStorage.delete": (1, "gone already"),
    "fmnist_dist/checkpoint/local.py::LocalStorage._publish": (
        1,
        "a promise of one writer: renamed",
    ),
    "fmnist_dist/keeper/spare.py::Spare.call": (1, "warned of below, with how it ended"),
    "fmnist_dist/checkpoint/local.py::LocalStorage._delete_folder": (
        3,
        "gone already, or the caller asks why",
    ),
    "fmnist_dist/checkpoint/local.py::LocalStorage._make_folders": (
        2,
        "somebody else made it, or owns it",
    ),
    "fmnist_dist/trainer.py::Trainer.train": (1, "the run is finished; else it raises"),
    "fmnist_dist/trainer.py::Trainer._meet": (1, "the run is finished; else it raises"),
    "fmnist_dist/distributed/world.py::World.break_off": (1, "closed meanwhile: nothing to break"),
    "fmnist_dist/distributed/process.py::open_sockets": (1, "closed meanwhile: not open"),
    "fmnist_dist/keeper/keep.py::_is_stopped": (1, "it has ended, which waitpid tells"),
    "fmnist_dist/lookout.py::Lookout._run": (1, "a pipe that closing has closed; else it raises"),
    "launch/k8s/kubectl.py::Kubectl.seen": (1, "the answer: not there, or not for this user"),
    "launch/agent/orphans.py::reap": (1, "there is no child to bury"),
    "launch/agent/workers.py::Workers.signal": (1, "ended meanwhile: `ended` sees how"),
    "launch/agent/workers.py::_last_words": (1, "the answer: it has said nothing about its end"),
    "fmnist_dist/telemetry/lastwords.py::LastWords.emit": (1, "`handleError` prints it"),
    "launch/launched.py::kill": (1, "the answer: nobody was there"),
    "launch/launched.py::children": (1, "the answer: it has ended, and has none"),
    "launch/launched.py::_read": (1, "the answer: ended while it was looked at"),
    # Nothing to read in a pipe that does not block.
    "fmnist_dist/distributed/stop.py::StopRequest.read": (1, "no signal has come"),
    "fmnist_dist/keeper/keep.py::Keeper._hear": (1, "no signal has come"),
    # Nobody is left to be told, or somebody else tells.
    "fmnist_dist/keeper/keep.py::Keeper._say_left": (1, "the store is gone, and with it the peers"),
    "fmnist_dist/checkpoint/failure.py::note_failure": (1, "the noted error itself is raised on"),
    "fmnist_dist/checkpoint/failure.py::_read": (1, "none, or cut off by a kill: no verdict"),
    "fmnist_dist/telemetry/bar.py::BarProgress._draw": (1, "the terminal has gone, not the run"),
    "fmnist_dist/telemetry/bar.py::BarProgress._end": (1, "the terminal has gone, not the run"),
    "fmnist_dist/command.py::run_command": (2, "exit codes: reader gone, interrupted"),
    "fmnist_dist/inspection/export.py::_write": (1, "leftovers: the error itself is raised on"),
}

# Where `except Exception` or more may stand without raising on: where a process or a thread begins.
ENTRIES = {
    "launch/agent/aside.py::aside.act": "a thread: raised on by its future",
    "launch/agent/life.py::live": "a process: traceback printed, exit code 1",
    "fmnist_dist/train.py::_code_of": "a process: logged with its traceback, exit code 1",
    "fmnist_dist/checkpoint/besteffort.py::BestEffort.do.act": "a thread: raised on, or told",
    "fmnist_dist/keeper/fork.py::fork": "a forked process: traceback printed, exit code 1",
    "fmnist_dist/distributed/reduce.py::GradientTree._scatter.finish": "a thread: the step raises",
    "fmnist_dist/saver.py::Saver._run": "a thread: raised at the next step, or told at the end",
    "fmnist_dist/checkpoint/objects.py::ObjectStorage._do": "packages raise what they like: told",
}

_LOGS = ("_events.", "_log.", "print", "sys.stderr.write", "traceback.print_exc", "self._warn")
_TELLS_ITSELF = ("_say_drained", "self._say_store_lost", "_code_of")


def told(handler: ast.ExceptHandler) -> bool:
    """Whether every path through a handler raises, logs, or does something with the error."""
    for statement in handler.body:
        if _tells(statement, handler.name):
            return True
        if any(
            isinstance(node, ast.Return | ast.Break | ast.Continue) for node in ast.walk(statement)
        ):
            return False  # a path that ends before anything was told
    return False


def _tells(statement: ast.stmt, name: str | None) -> bool:
    match statement:
        case ast.Raise():
            return True
        case ast.If(body=body, orelse=orelse):
            return all(any(_tells(each, name) for each in part) for part in (body, orelse))
        case ast.Try() | ast.For() | ast.While() | ast.With() | ast.Match():
            return False  # it may not come to what stands there
        case _:
            inside = list(ast.walk(statement))
            calls = [called(node) for node in inside if isinstance(node, ast.Call)]
            uses = any(isinstance(node, ast.Name) and node.id == name for node in inside)
            return uses or any(call.startswith(_LOGS) or call in _TELLS_ITSELF for call in calls)


def silent(texts: Mapping[str, str]) -> Counter[str]:
    """Count the handlers in each place that tell nobody of their error."""
    return Counter(
        place
        for place, node in nodes(texts)
        if (isinstance(node, ast.ExceptHandler) and not told(node)) or _suppresses(node)
    )


def _suppresses(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    ignores = any(
        each.arg in {"ignore_errors", "onerror"} or ast.unparse(each.value) == "'ignore'"
        for each in node.keywords
    )
    return ignores or called(node).rpartition(".")[2] == "suppress"


def broad(texts: Mapping[str, str]) -> Iterator[str]:
    """Yield where everything is caught and not raised on as the last thing."""
    for place, node in nodes(texts):
        if isinstance(node, ast.ExceptHandler):
            kinds = {"BaseException"} if node.type is None else _names(node.type)
            ends = node.body[-1]
            goes_on = isinstance(ends, ast.Raise) and ends.exc is None
            if kinds & {"Exception", "BaseException"} and not goes_on:
                yield place
        elif _suppresses(node):
            assert isinstance(node, ast.Call)
            if {name for each in node.args for name in _names(each)} & {
                "Exception",
                "BaseException",
            }:
                yield place


def _names(kinds: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(kinds) if isinstance(node, ast.Name)}


def test_every_handler_tells_of_its_error_or_a_reviewer_said_why_not() -> None:
    found = silent(sources())
    assert found == {place: count for place, (count, _) in SILENT.items()}


def test_every_review_gives_a_reason() -> None:
    assert all(len(reason.split()) > 1 for _, reason in SILENT.values())


def test_everything_is_caught_only_where_a_process_or_a_thread_begins() -> None:
    assert sorted(broad(sources())) == sorted(ENTRIES)


def within(handler: str) -> dict[str, str]:
    body = handler.replace("\n", "\n    ")
    return {"m.py": f"def f():\n    try:\n        g()\n    {body}\n"}


@pytest.mark.parametrize(
    "handler",
    [
        "except OSError:\n    pass",
        "except OSError:\n    return None",
        "except OSError as error:\n    if late:\n        raise",
        "except OSError as error:\n    while late():\n        raise error",
        "except OSError as error:\n    try:\n        h(error)\n    finally:\n        pass",
        "except OSError:\n    count += 1",
        "except OSError as error:\n    if late:\n        return\n    raise",
    ],
)
def test_a_handler_that_hides_its_error_is_found(handler: str) -> None:
    assert silent(within(handler)) == {"m.py::f": 1}


@pytest.mark.parametrize(
    "handler",
    [
        "except OSError:\n    clear()\n    raise",
        "except OSError as error:\n    raise ValueError from error",
        "except OSError as error:\n    found.append(str(error))",
        "except OSError:\n    _events.warning('storage is away')",
        "except OSError:\n    if late:\n        raise\n    else:\n        _log.info('again')",
    ],
)
def test_a_handler_that_tells_of_its_error_is_not(handler: str) -> None:
    assert silent(within(handler)) == {}


def test_errors_that_are_ignored_without_a_handler_are_found() -> None:
    hidden = (
        "def f():\n    with suppress(OSError):\n        g()\n    rmtree(a, ignore_errors=True)\n"
    )
    assert silent({"m.py": hidden}) == {"m.py::f": 2}


@pytest.mark.parametrize(
    "handler",
    [
        "except:\n    pass",
        "except Exception as error:\n    _events.error(str(error))",
        "except (OSError, BaseException):\n    raise ValueError",
    ],
)
def test_a_handler_that_catches_everything_is_found(handler: str) -> None:
    assert list(broad(within(handler))) == ["m.py::f"]


def test_everything_that_is_suppressed_is_found() -> None:
    hidden = "def f():\n    with contextlib.suppress(Exception):\n        g()\n"
    assert list(broad({"m.py": hidden})) == ["m.py::f"]


def test_a_mistake_that_was_mended_is_found_when_it_is_put_back() -> None:
    path = "fmnist_dist/keeper/keep.py"
    mended = "except NoRoomError as error:  # checkpoints stay as they are\n"
    text = sources()[path]
    assert text.count(mended) == 1
    before, _, after = text.partition(mended)
    line, _, rest = after.partition("\n")
    assert "_events.error(" in line
    put_back = f"{before}except NoRoomError:\n{rest}"
    extra = silent({path: put_back}) - silent({path: text})
    assert extra == {f"{path}::Keeper._give_up": 1}
