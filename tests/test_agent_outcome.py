"""What the agent makes of exit codes, and how it ends: each case as processes, none of torch's."""

import dataclasses
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import Mock

import pytest
from agent import ALONE, Agent, agent_code
from jobs import ROOT, free_port
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from fmnist_dist.checkpoint.place import Place
from fmnist_dist.checkpoint.storage import Storage
from fmnist_dist.errors import ExitCode, IncompatibleError
from launch.agent import arguments, limits, metrics, outcome
from launch.agent.arguments import parse
from launch.agent.budget import Budget
from launch.agent.notices import SIGNALS, Notices
from launch.agent.outcome import Ended, Ending, Next
from launch.agent.postmortem import LIMIT_BYTES, PostMortem, termination_log_of
from launch.agent.progress import Progress, Reached
from launch.agent.rendezvous import Link
from launch.agent.rounds import Rounds
from launch.agent.workers import Workers, _last_words

WORKER = str(ROOT / "tests" / "agent_worker.py")


def ended(*codes: int) -> list[Ended]:
    return [Ended(rank=rank, status=code) for rank, code in enumerate(codes)]


def run(folder: Path, *rounds: str, flags: tuple[str, ...] = ()) -> tuple[int, dict[str, object]]:
    """Return exit code and post-mortem of an agent with a worker for each word of a round."""
    size = len(rounds[0].split(","))
    words = (*ALONE, f"--nproc-per-node={size}", *flags, WORKER, str(folder / "notes"), *rounds)
    code = agent_code(folder, *words)
    return code, json.loads((folder / "message").read_text())


def num_rounds(folder: Path) -> int:
    (notes,) = folder.glob("notes-0-*")
    return notes.read_text().count("round")


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        *((f"{code}", code) for code in (0, 1, 42, *sorted(outcome.FINAL), 75)),
        ("-9", 137),
        ("-11", 139),
        ("0,65", 65),
        ("75,78", 78),  # the one that knows why
        ("hang,64", 64),  # and not the one that was asked to stop because of it
        ("hang,-9", 137),
    ],
)
def test_the_exit_code_of_workers_is_the_agents_own(
    rounds: str, expected: int, tmp_path: Path
) -> None:
    code, message = run(tmp_path, rounds)
    text = (tmp_path / "agent.log").read_text()
    assert code == message["exit_code"] == expected, text
    assert num_rounds(tmp_path) == 1
    assert text.count("exit_code=") == 1
    if code:
        rank = rounds.split(",").index(str(code if code < 128 else 128 - code))
        assert message["worker"] == rank
        assert message["reason"].startswith(f"worker {rank} ended with {code}")


@pytest.mark.parametrize("code", [64, 76])
def test_a_code_that_would_repeat_itself_is_not_tried_again(code: int, tmp_path: Path) -> None:
    assert run(tmp_path, f"{code}", "0", flags=("--max-restarts=9",))[0] == code
    assert num_rounds(tmp_path) == 1


@pytest.mark.parametrize("word", ["1", pytest.param("75", marks=pytest.mark.slow), "-9"])
def test_what_may_pass_is_tried_again_as_often_as_torchrun_would(word: str, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    once.mkdir()
    twice.mkdir()
    assert run(once, word, "0", flags=("--max-restarts=1",))[0] == 0
    assert num_rounds(once) == 2
    expected = int(word) if int(word) > 0 else 128 - int(word)
    assert run(twice, word, word, "0", flags=("--max-restarts=1",))[0] == expected
    assert num_rounds(twice) == 2


@pytest.mark.parametrize("code", [79, pytest.param(143, marks=pytest.mark.slow)])
def test_a_worker_that_lost_its_peers_or_was_drained_joins_again_free_of_charge(
    code: int, tmp_path: Path
) -> None:
    code, _ = run(tmp_path, f"{code}", f"{code}", "0", flags=("--max-restarts=0",))
    assert (code, num_rounds(tmp_path)) == (0, 3)


@pytest.mark.parametrize(
    ("word", "expected", "fault"),
    [
        ("1", 70, "the settings or the program"),
        ("79", 70, "the settings or the program"),
        ("75", 75, "storage, network or rendezvous"),  # which may come back: no end of the Job
    ],
)
def test_rounds_without_progress_end_with_a_verdict(
    word: str, expected: int, fault: str, tmp_path: Path
) -> None:
    flags = ("--max-restarts=100", "--crash-loop-budget=2")
    code, message = run(tmp_path, word, flags=flags)
    assert code == expected
    assert num_rounds(tmp_path) == 2
    assert str(message["reason"]).startswith("2 rounds without a newer step")
    assert message["fault"] == fault


def test_the_last_words_of_a_worker_reach_the_post_mortem_without_its_secrets(
    tmp_path: Path,
) -> None:
    code, message = run(tmp_path, "0,error")
    assert (code, message["worker"]) == (75, 1)
    assert message["error"] == "s3://***@bucket/run is away"
    assert "secret" not in (tmp_path / "message").read_text()


def test_last_words_about_another_end_are_not_told(tmp_path: Path) -> None:
    """What was said before the worker was healed, or by its trainer, is not why it was killed."""
    code, message = run(tmp_path, "0,-9")
    assert (code, message["error"]) == (137, "")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--nnodes=many", WORKER), "flag --nnodes: found many, expected NUMBER or MIN:MAX"),
        (("--nproc-per-node=many", WORKER), "torchrun's flags: .*many"),
        (("--nnodes=2", WORKER), "--rdzv-backend: found static, expected c10d"),
        (("--metrics-port=70000", WORKER), "flag --metrics-port: found 70000, expected a port"),
        (("--crash-loop-budget=0", WORKER), "flag --crash-loop-budget: found 0"),
        (("--nproc-per-nodes=2", WORKER), "unrecognized arguments: --nproc-per-nodes=2"),
        ((), "arguments are required: training_script"),
        (("--rdzv-backend=etcd", "--rdzv-endpoint=a:1", WORKER), "--rdzv-backend: found etcd"),
        (("--signals-to-handle=SIGNONE", WORKER), "--signals-to-handle: SIGNONE is no signal"),
        (("--signals-to-handle=SIGKILL", WORKER), "--signals-to-handle: SIGKILL is no signal"),
        (("--rdzv-conf=is_host=maybe", *ALONE, WORKER), "flag --rdzv-conf: .*'is_host'"),
        (("--rdzv-conf=join_timeout=soon", *ALONE, WORKER), "flag --rdzv-conf: .*'join_timeout'"),
        (("--rdzv-conf=keep_alive_interval=0", *ALONE, WORKER), "found keep_alive_interval=0, exp"),
        (("--rdzv-backend=c10d", "--rdzv-endpoint=a:b", WORKER), "flag --rdzv-endpoint: .*'a:b'"),
        (("--no-python", "/nowhere/program"), "the program cannot be started: .*/nowhere/program"),
        (("-m", "fmnist_dist.train", "--run-dirr=x"), "did you mean --run-dir?"),
    ],
)
def test_wrong_usage_is_one_line_and_64(wrong: tuple[str, ...], said: str, tmp_path: Path) -> None:
    assert agent_code(tmp_path, *wrong) == ExitCode.USAGE == 64
    lines = (tmp_path / "agent.log").read_text().splitlines()
    assert re.search(said, lines[-1]), lines
    assert lines[-1].endswith("exit_code=64")
    assert json.loads((tmp_path / "message").read_text())["fault"] == "the command line"
    assert sum("exit_code=" in line for line in lines) == 1


def test_a_torch_that_the_agent_does_not_know_is_one_line_and_78(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    with Agent(tmp_path, *ALONE, WORKER, "x", "0", PYTHONPATH=path) as agent:
        assert agent.end() == ExitCode.INCOMPATIBLE == 78
        (line,) = agent.text().splitlines()
        assert "the agent cannot use this torch: No module named 'torch.distributed'" in line
        assert agent.post_mortem()["exit_code"] == 78


def test_an_older_torch_is_refused_by_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    older = dataclasses.make_dataclass("LaunchConfig", ["numa_options", "signals_to_handle"])
    monkeypatch.setattr(arguments, "LaunchConfig", older)
    with pytest.raises(IncompatibleError, match="has no shutdown_timeout, virtual_local_rank;"):
        parse([*ALONE, WORKER], {})


def test_a_post_mortem_that_cannot_be_written_changes_no_exit_code(tmp_path: Path) -> None:
    words = (f"--termination-log={tmp_path}", *ALONE, WORKER, str(tmp_path / "notes"), "65")
    assert agent_code(tmp_path, *words) == 65
    assert "the post-mortem cannot be written" in (tmp_path / "agent.log").read_text()


# The arithmetic that processes show too seldom.


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([75, 143, 78], 78),
        ([79, 1, 143], 1),
        ([143, 79], 79),
        ([79, 75], 75),
        ([-9, 1], 137),  # the first of equals
        ([1, -9], 1),
        ([0, 143], 143),
        ([143, 130], 143),
        ([0, 0], 0),
    ],
)
def test_the_most_telling_end_of_several(codes: list[int], expected: int) -> None:
    assert outcome.most_telling(ended(*codes)).code == expected


def test_a_worker_fenced_while_the_agent_was_out_of_touch_gets_another_look() -> None:
    assert outcome.judge(ended(76)) is Next.FINAL
    assert outcome.judge(ended(76, 143), in_doubt=True) is Next.REJOIN
    assert outcome.judge(ended(78, 76), in_doubt=True) is Next.FINAL
    assert outcome.after_notice(ended(76)) == 76
    assert outcome.after_notice(ended(76), in_doubt=True) == 143


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([143, 143], 143),
        ([0, 0], 0),
        ([0, 143], 143),
        ([79, 143], 143),
        ([-15], 143),
        ([143, 75], 75),
        ([143, -9], 137),
        ([78, 143], 78),
        ([130, 130], 130),
    ],
)
def test_after_a_notice_143_means_that_all_is_saved(codes: list[int], expected: int) -> None:
    assert outcome.after_notice(ended(*codes)) == expected


class Kept(SubprocessContext):
    """A worker that is in the kernel, and that no signal ends."""

    def __init__(self) -> None:
        self.error_files = {0: "/nowhere"}
        self.subprocess_handlers = {0: self}  # type: ignore[dict-item]
        self.proc = self
        self.pid = 0

    def poll(self) -> None:
        return None

    def close(self, *_: object) -> None:
        """Give up waiting, as torch does."""


def test_a_worker_that_no_signal_ends_counts_as_killed() -> None:
    workers = Workers(parse([*ALONE, WORKER], {}), cast(Link, None))
    workers._pcontext = Kept()
    assert workers.ended() == []
    workers.close()
    assert [each.code for each in workers.ended()] == [137]


@pytest.mark.parametrize(
    ("num_notices", "silent_seconds", "world_size", "expected"),
    [
        (0, 0, 2, "200 OK: training"),
        (0, 0, 0, "200 OK: waiting for the other agents"),
        (1, 0, 2, "503 Service Unavailable: draining"),
        (0, 31, 2, "503 Service Unavailable: the agent's loop stands still for 31 s"),
    ],
)
def test_an_agent_that_drains_or_whose_loop_stands_still_is_not_healthy(
    num_notices: int, silent_seconds: float, world_size: int, expected: str
) -> None:
    ticked_at = time.monotonic() - silent_seconds
    rounds = SimpleNamespace(ticked_at=ticked_at, is_training=world_size > 0)
    notices = SimpleNamespace(count=num_notices)
    assert ": ".join(metrics.health(rounds, notices)) == expected  # type: ignore[arg-type]


def test_what_torch_starts_beside_workers_ends_with_their_round() -> None:
    """Else each round would leave a thread of its file timer, which kills by process number."""
    ends: list[str] = []
    workers = Workers(parse([*ALONE, WORKER], {}), cast(Link, None))
    workers._pcontext = Kept()
    workers._worker_watchdog = SimpleNamespace(stop=lambda: ends.append("timer"))
    workers.close()
    assert ends == ["timer"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('{"message": "seed differs"}', "seed differs"),
        ('{"message": {"message": "OSError: full", "extraInfo": {}}}', "OSError: full"),
        ('{"message": "healed", "exit_code": 75}', ""),
        ("[]", ""),
        ('{"message": {}}', ""),
        ('{"mess', ""),
        ("", ""),
    ],
)
def test_whatever_a_worker_has_written_last_is_read_or_let_alone(
    written: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "error.json").write_text(written)
    assert _last_words(str(tmp_path / "error.json"), 78) == expected


@pytest.fixture
def metrics_port() -> int:
    """Serve on a free port of all addresses; return it."""
    port = free_port()
    metrics.serve(port, metrics.Metrics, Mock(), Mock())  # type: ignore[arg-type]
    return port


def test_who_asks_nothing_of_the_metrics_port_is_left_and_does_not_fill_the_log(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], metrics_port: int
) -> None:
    assert metrics._Silent.timeout == limits.SCRAPE_SECONDS
    monkeypatch.setattr(metrics._Silent, "timeout", 0.1)
    with socket.create_connection(("127.0.0.1", metrics_port), timeout=30) as silent:
        assert silent.recv(1) == b""
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_metrics_port_answers_on_ipv4_and_on_ipv6(address: str, metrics_port: int) -> None:
    """A pod of a cluster with IPv6 is probed there."""
    if ":" in address and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    asking = HTTPConnection(address, metrics_port, timeout=30)
    asking.request("GET", "/")
    answer = asking.getresponse()
    assert (answer.status, answer.read()) == (404, b"expected /metrics or /healthz\n")
    asking.close()


def test_every_code_names_a_fault() -> None:
    assert {outcome.fault(code) for code in ExitCode} <= set(outcome._FAULT.values())
    assert outcome._FAULT.keys() == set(ExitCode)
    assert "memory" in outcome.fault(137)
    assert outcome.fault(139) == "a crash"


def test_progress_resets_the_budget_and_its_lack_exhausts_it() -> None:
    budget = Budget(crash_loop=3, max_restarts=9, best=10)
    for step in (10, 10, 11, 11, 11):
        budget.round_ended(step, seconds=1e9)
        assert not budget.is_crash_loop
    assert budget.pause_seconds() > 0
    budget.round_ended(5, seconds=1e9)
    assert budget.is_crash_loop


def test_where_progress_is_not_known_time_counts() -> None:
    budget = Budget(crash_loop=2, max_restarts=9)
    for seconds in (1.0, limits.SOUND_SECONDS, 1.0):
        budget.round_ended(None, seconds=seconds)
        assert not budget.is_crash_loop
    budget.round_ended(None, seconds=limits.SOUND_SECONDS - 1)
    assert budget.is_crash_loop


def test_pauses_grow_with_rounds_in_vain_and_are_bounded() -> None:
    budget = Budget(crash_loop=99, max_restarts=99, best=0)
    assert budget.pause_seconds() == 0
    for number in range(1, 20):
        budget.round_ended(0, seconds=0)
        full = min(30.0, 2.0**number / 2)
        assert full / 2 <= budget.pause_seconds() <= full


class UnreadableRun:
    """Where a run is, on a storage that is away."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes

    def storage(self) -> Storage:
        raise RuntimeError("the storage is away")


def judged(folder: Path, progress: Progress, notices: Notices) -> Ending | None:
    """Return how an agent ends after its only allowed round in vain, by a worker's bug."""

    class Ended1:
        link = None

        def ended(self) -> list[Ended]:
            return ended(1)

    words = [*ALONE, "--max-restarts=9", "--crash-loop-budget=1", WORKER, str(folder)]
    rounds = Rounds(parse(words, {}), notices, progress)
    rounds._budget.best = 7
    progress.latest = Reached(attempt=1, step=7, furthest=7, checkpoint_step=7)
    return rounds._judge(Ended1(), again=False, seconds=limits.SOUND_SECONDS)  # type: ignore[arg-type]


@pytest.fixture
def notices() -> Iterator[Notices]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard = Notices()
    heard.keep()
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_storage_that_is_away_is_no_proof_that_nothing_was_done(
    tmp_path: Path, notices: Notices
) -> None:
    """The last step that was read before is not the newest: as if progress could not be known."""
    place = cast(Place, UnreadableRun(tmp_path))
    assert judged(tmp_path, Progress(place), notices) is None


def test_a_notice_that_comes_while_progress_is_read_is_no_crash_loop(
    tmp_path: Path, notices: Notices
) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    assert notices.are_waiting
    assert judged(tmp_path, Progress(Place.of(str(tmp_path))), notices) is None


@pytest.mark.parametrize("line", ["x" * 9000, '"\\\n' * 3000, "\N{SNOWMAN}" * 5000, "short"])
def test_a_post_mortem_fits_and_is_json_whatever_was_said(line: str) -> None:
    worker = Ended(rank=3, status=75, line=line)
    text = PostMortem.of(Ending(code=75, reason="r" * 20, worker=worker), None).text()
    assert len(text.encode()) <= LIMIT_BYTES
    told = json.loads(text)
    assert (told["worker"], told["exit_code"], told["reason"]) == (3, 75, "r" * 20)
    assert told["error"] == line or (told["error"].endswith("...") and len(text) > LIMIT_BYTES / 2)


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        (["--termination-log=/a", "-m", "x"], {}, "/a"),
        (["--nnodes", "2", "--termination-log", "/a"], {"PET_TERMINATION_LOG": "/b"}, "/a"),
        (["-m", "x", "--termination-log=/a"], {"PET_TERMINATION_LOG": "/b"}, "/b"),
        (["-m", "x", "--termination-log=/a"], {}, None),
        (["--termination-log"], {}, None),
    ],
)
def test_the_post_mortems_place_is_known_before_torch_is(
    argv: list[str], environ: dict[str, str], expected: str | None
) -> None:
    found = termination_log_of(argv, environ)
    assert found == (Path(expected) if expected else None)
    assert os.environ.get("PET_TERMINATION_LOG") is None
