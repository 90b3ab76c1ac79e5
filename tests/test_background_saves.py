"""Saves beside training: what is copied is what is committed, and nothing that goes wrong is lost.

Most tests hold the storage's door shut at one file, so that a save is under way for as long as they
want. `Training` drives the very objects that a trainer has; where a trainer is killed, it is real.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from alone import Alone
from forked import status_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import wait_for
from memory_storage import MemoryStorage
from run_builders import begin, snapshot
from run_files import assert_sound, checkpoints
from safetensors.torch import save

from fmnist_dist import limits
from fmnist_dist.agreement import settings_of
from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.deadline import deadline
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import File, Heal
from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.checkpoint.watch import AbandonedError
from fmnist_dist.checkpoint.writer import RunWriter, TornCopyError
from fmnist_dist.config import Config
from fmnist_dist.distributed.comparison import Comparison
from fmnist_dist.distributed.share import DifferentStatesError
from fmnist_dist.errors import FencedError
from fmnist_dist.filenames import EMA, MODEL, OPTIMIZER
from fmnist_dist.flight import Flight
from fmnist_dist.handover.board import Board
from fmnist_dist.models.cnn import Cnn
from fmnist_dist.plan import Plan
from fmnist_dist.saves import Saves
from fmnist_dist.state import StepResult, TrainState
from fmnist_dist.telemetry.progress import NullProgress
from fmnist_dist.tensorfile import TensorFile

SECONDS = 60.0  # of a wait in these tests


class Door(MemoryStorage):
    """A storage that can be shut at files whose name has a text in it; counts who came."""

    def __init__(self) -> None:
        super().__init__()
        self.shut_at: str | None = None
        self.fails = False
        self.waiting = 0
        self._opened = threading.Event()

    def create(self, path: str, data: bytes) -> None:
        if self.shut_at is not None and self.shut_at in path:
            self.waiting += 1
            assert self._opened.wait(SECONDS), "a test did not open the door"
        if self.fails:
            raise StorageError("as if it were away")
        super().create(path, data)

    def shut(self, at: str = MODEL) -> None:
        self._opened.clear()
        self.shut_at = at

    def open(self) -> None:
        self.shut_at = None
        self._opened.set()

    def await_somebody(self, number: int = 1) -> None:
        wait_for(lambda: self.waiting >= number, "a save to come to the door")


class Training:
    """A state that changes in all its parts at every step, and the saves of one rank."""

    def __init__(self, storage: MemoryStorage, writer: RunWriter, **config: Any) -> None:
        self.storage, self.board = storage, Board.create()
        self.config = Config(**{"optimizer": "adamw", "ema": 0.9, "save_every_steps": 1, **config})
        torch.manual_seed(3)
        model = Cnn(image_shape=(1, 28, 28), num_classes=10, dropout=0.0, widths=(4, 8))
        model.to(memory_format=torch.channels_last)
        settings = settings_of(self.config)
        self.state = TrainState(model, optimizer="adamw", settings=settings)
        self.plan = Plan(replace(settings, epochs=1000), num_samples=60_000)
        self.log = RunLog(storage)
        self.writer = writer
        self.saves = self.renew()

    def renew(self) -> Saves:
        """Return the saves of this trainer's successor, who finds the same board."""
        self.saves = Saves(
            lambda: self.writer,
            self.log,
            self.config,
            self.plan,
            NullProgress(),
            self.board,
            retires=True,
        )
        return self.saves

    def advance(self, steps: int = 1) -> None:
        for _ in range(steps):
            for parameter in self.state.model.parameters():
                parameter.grad = torch.randn_like(parameter)
            step = self.plan.at(self.state.step)
            buffers = [each + 1 for each in self.state.buffers]
            result = StepResult(
                loss=1.0, correct=1, count=step.size, digest=(step.step, 1), buffers=buffers
            )
            self.state.advance(step, result, durable=self.saves.newest)

    def files(self) -> dict[str, bytes]:
        """Return what a checkpoint of the state as it is now must hold, as safetensors has it."""
        return {
            name: save({n: each.detach().contiguous() for n, each in file.items()})
            for name, file in self.state.tensors_by_file().items()
        }

    def turn(self, comparison: Comparison | None = None) -> bool:
        """Do what the loop does for a step: ask, train, and save if it was wanted."""
        wanted = self.saves.wants(self.state.step + 1, ends_epoch=False)
        self.advance()
        if wanted:
            self.saves.offer(self.state, ends_epoch=False, comparison=comparison)
        return wanted

    def settle(self) -> None:
        assert self.saves._saver.wait(SECONDS)

    def committed(self) -> dict[int, dict[str, bytes]]:
        """Return the files of every checkpoint that stands, by step."""
        head = self.log.read().head
        found = [lineage.commit(self.log, each.index).checkpoint for each in head.checkpoints]
        return {
            each.step: {n: self.storage.read(f"{each.folder}/{n}") for n in each.files}
            for each in found
        }

    def folders(self) -> list[str]:
        return self.storage.list("checkpoints")


@contextmanager
def trained(**config: Any) -> Iterator[tuple[Training, Door]]:
    """Give a training that has done two steps, and its storage."""
    storage = Door()
    training = Training(storage, begin(storage), **config)
    training.advance(2)
    try:
        yield training, storage
    finally:
        storage.open()
        training.saves.close()


# What is written.

_dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
_shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
_layouts = st.sampled_from(["as it is", "channels_last", "transposed"])


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> torch.Tensor:
    made = (torch.rand(shape) * 100).to(dtype)
    if layout == "channels_last" and len(shape) == 4:
        return made.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and len(shape) > 1:
        return made.transpose(0, 1)
    return made


@given(st.dictionaries(st.text(max_size=6), st.tuples(_dtypes, _shapes, _layouts), max_size=9))
@settings(max_examples=200, deadline=None)
def test_a_file_of_tensors_has_the_very_bytes_of_the_safetensors_library(
    drawn: dict[str, tuple[torch.dtype, tuple[int, ...], str]],
) -> None:
    tensors = {name: _tensor(*each) for name, each in drawn.items() if name != "__metadata__"}
    expected = save({name: each.contiguous() for name, each in tensors.items()})
    file = TensorFile(tensors)
    for _ in range(2):  # its memory is used again
        for place, tensor in zip(file.tensors, tensors.values(), strict=True):
            place.copy_(tensor)
        file.arrange()
        assert bytes(file.data) == expected


def test_steps_that_go_on_while_a_save_is_written_are_not_in_it() -> None:
    with trained() as (training, storage):
        storage.shut()
        assert training.turn()
        expected = training.files()
        assert set(expected) == {MODEL, OPTIMIZER, EMA}
        storage.await_somebody()
        training.advance(5)
        assert all(training.files()[name] != expected[name] for name in expected)
        storage.open()
        training.settle()
        found = training.committed()[3]
        assert {name: found[name] for name in expected} == expected
        assert [row.step for row in training.state.rows()] == [1, 2, 3, 4, 5, 6, 7, 8]
        assert found["metrics.jsonl"].count(b"\n") == 3
        # The next step's commit knows what is durable, and drops what it holds.
        training.turn()
        assert [row.step for row in training.state.rows()] == [4, 5, 6, 7, 8, 9]


def test_memory_that_changes_while_it_is_written_is_not_committed() -> None:
    with trained() as (training, storage):
        storage.shut(OPTIMIZER)
        training.turn()
        storage.await_somebody()
        place = training.saves._staging._files[EMA].tensors[0]
        place.view(-1)[0:1].view(torch.int32).bitwise_xor_(1)
        storage.open()
        training.settle()
        with pytest.raises(TornCopyError, match=r"step 3 changed while its ema\.safetensors"):
            training.saves.wants(4, ends_epoch=False)
        assert training.committed() == {}
        assert training.folders() == []


# One under way, one waiting, the newest wins.


def test_what_is_due_while_a_save_is_under_way_is_saved_once_and_newest() -> None:
    with trained(save_every_steps=3) as (training, storage):
        storage.shut()
        assert training.turn()
        storage.await_somebody()
        assert [training.turn() for _ in range(4)] == [False] * 4  # due after step 6, and in vain
        storage.open()
        training.settle()
        assert training.turn()
        training.settle()
        assert list(training.committed()) == [3, 8]
        # Each row once, along the line.
        line = lineage.line(training.log, training.log.read().head)
        assert [each.checkpoint.step for each in line] == [3, 8]
        rows = [files["metrics.jsonl"].count(b"\n") for files in training.committed().values()]
        assert rows == [3, 5]


def test_what_goes_wrong_beside_training_is_raised_at_the_next_step() -> None:
    with trained() as (training, storage):
        training.turn()
        training.settle()
        begin(storage)  # a newer launch
        training.turn()
        training.settle()
        with pytest.raises(FencedError):
            training.saves.wants(5, ends_epoch=False)
        assert list(training.committed()) == [3]


def test_a_bug_beside_training_is_raised_at_the_next_step() -> None:
    with trained() as (training, _):

        def wrong(*_: object) -> bool:
            raise IndexError("a bug")

        training.saves._committer._save = wrong
        training.turn()
        training.settle()
        with pytest.raises(IndexError, match="a bug"):
            training.saves.offer(training.state, ends_epoch=False)


def test_storage_that_is_away_is_tried_again_with_the_newest_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "SAVE_RETRY_SECONDS", 0.0)
    with trained() as (training, storage):
        storage.fails = True
        training.turn()
        training.settle()
        assert training.turn()
        training.settle()
        storage.fails = False
        assert training.turn()
        training.settle()
        assert list(training.committed()) == [5]


def test_a_save_that_does_not_come_back_ends_the_training_after_its_limit() -> None:
    with trained(max_unsaved_seconds=0.2) as (training, storage):
        storage.shut()
        training.turn()
        storage.await_somebody()

        def ends() -> bool:
            try:
                return training.turn()
            except StorageError as error:
                return "a save does not come to an end" in str(error)

        wait_for(ends, "the end of the training")


def test_a_save_that_takes_long_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "LONG_SAVE_SECONDS", 0.05)
    said = "a save takes long, training goes on"
    with trained() as (training, storage):
        training.saves._saver.start(lambda: None)  # no save, whatever else is done there
        training.saves.wants(4, ends_epoch=False)
        for number in (1, 2):  # of two saves
            storage.shut()
            training.settle()
            assert training.turn()
            assert caplog.messages.count(said) == number - 1
            wait_for(lambda: training.turn() or said in caplog.messages[number - 1 :], said)  # noqa: B023 - at once
            training.turn()
            assert caplog.messages.count(said) == number
            storage.open()


def test_an_error_that_comes_while_one_looks_is_not_taken_for_success() -> None:
    with trained() as (training, storage):
        storage.fails = True
        storage.shut("")
        training.turn()
        error = training.saves._saver.error

        def ends_meanwhile() -> BaseException | None:
            found = error()
            storage.open()
            training.settle()
            return found

        training.saves._saver.error = ends_meanwhile  # type: ignore[method-assign]
        training.saves.wants(4, ends_epoch=False)
        training.saves._saver.error = error  # type: ignore[method-assign]
        training.saves.wants(4, ends_epoch=False)
        assert training.saves._due._retry_at is not None


def test_a_thread_that_has_died_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with trained() as (training, storage):
        storage.shut()
        training.turn()
        monkeypatch.setattr(training.saves._saver._thread, "is_alive", lambda: False)
        with pytest.raises(RuntimeError, match="has died"):
            training.saves.wants(4, ends_epoch=False)


def test_a_heal_is_recorded_while_a_save_is_written() -> None:
    with trained() as (training, storage):
        storage.shut()
        training.turn()
        storage.await_somebody()
        training.saves.writer.heal(step=3, rank=1, reason="killed", seconds=0.1, lost_steps=0)
        assert isinstance(training.log.record(1).body, Heal)
        storage.open()
        training.settle()
        assert list(training.committed()) == [3]


# At the end.


def test_a_save_of_the_very_state_that_is_under_way_is_waited_for() -> None:
    with trained() as (training, storage):
        storage.shut(OPTIMIZER)
        training.turn()
        storage.await_somebody()
        threading.Timer(0.2, storage.open).start()
        training.saves.secure(training.state, reason="drain", seconds=SECONDS)
        assert list(training.committed()) == [3]
        assert len(training.folders()) == 1


def test_an_older_save_under_way_is_given_up_for_the_newest_state() -> None:
    with trained() as (training, storage):
        storage.shut()
        training.turn()
        storage.await_somebody()
        training.advance(2)
        expected = training.files()
        threading.Timer(0.2, storage.open).start()
        training.saves.secure(training.state, reason="drain", seconds=SECONDS)
        found = training.committed()
        assert list(found) == [5]
        assert {name: found[5][name] for name in expected} == expected
        assert len(training.folders()) == 1  # what was given up has taken its folder back


def test_a_save_that_hangs_does_not_keep_a_drain_from_saving(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "ABANDON_SECONDS", 0.05)
    with trained() as (training, storage):
        storage.shut()
        training.turn()
        storage.await_somebody()
        training.advance()
        storage.shut_at = None  # whoever waits goes on waiting, and nobody else does
        expected = training.files()
        staged = bytes(training.saves._staging._files[MODEL].data)
        training.saves.secure(training.state, reason="drain", seconds=SECONDS)
        found = training.committed()
        assert list(found) == [4]
        assert {name: found[4][name] for name in expected} == expected
        # Nobody writes to the memory that the other one may still send.
        assert bytes(training.saves._staging._files[MODEL].data) == staged
        storage.open()  # it comes back: its step is old by now
        training.settle()
        assert list(training.committed()) == [4]
        assert len(training.folders()) == 1


def test_a_rank_that_lets_others_save_waits_no_longer_for_storage_than_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    def hang(path: str) -> bytes:  # until its limit, without taking that long
        asked.append(deadline() - time.monotonic())
        monkeypatch.undo()
        raise StorageError(f"cannot read {path}: no answer in time")

    with trained() as (training, storage):
        monkeypatch.setattr(storage, "read", hang)
        training.saves.precede = 1
        training.saves.secure(training.state, reason="drain", seconds=SECONDS)
        assert len(asked) == 1
        assert asked[0] <= limits.SECURE_SECONDS
        assert list(training.committed()) == [training.state.step]


def test_training_that_goes_on_after_it_was_secured_owes_nothing() -> None:
    with trained(save_every_steps=100, max_unsaved_seconds=0.05) as (training, storage):
        storage.shut()
        training.saves._due.remember("steps")
        training.turn()
        storage.await_somebody()
        training.advance()
        threading.Timer(0.2, storage.open).start()
        training.saves.secure(training.state, reason="survivor", seconds=SECONDS)
        assert training.saves._due.unsaved_seconds() == 0
        assert not training.turn()


def test_where_saves_take_longer_than_a_drain_the_one_under_way_is_waited_for() -> None:
    with trained() as (training, storage):
        storage.shut()
        training.turn()
        storage.await_somebody()
        training.advance()
        training.saves._committer.took = 2 * SECONDS
        threading.Timer(0.2, storage.open).start()
        training.saves.secure(training.state, reason="drain", seconds=SECONDS)
        assert list(training.committed()) == [3, 4]


def test_at_the_end_a_save_that_is_under_way_is_kept() -> None:
    with trained() as (training, storage):
        storage.shut()
        training.turn()
        storage.await_somebody()
        training.advance(2)
        threading.Timer(0.2, storage.open).start()
        training.saves.insist(training.state, reason="finish", seconds=SECONDS, hurry=False)
        assert list(training.committed()) == [3, 5]


def test_of_weights_that_are_taken_back_no_save_under_way_is_committed_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "LAND_SECONDS", 0.05)
    monkeypatch.setattr(limits, "ABANDON_SECONDS", 0.05)
    with trained() as (training, storage):
        training.turn()
        training.settle()
        storage.shut()
        training.turn()
        storage.await_somebody()
        assert training.saves.take_back(training.state, why="a loss of nan") == 3
        storage.open()
        training.settle()
        assert list(training.committed()) == [3]


def test_a_save_that_is_given_up_just_before_its_record_appends_none() -> None:
    class Late(Flight):
        def confirm(self, files: Mapping[str, File]) -> None:
            self.abandon()

    storage = MemoryStorage()
    writer = begin(storage)
    with pytest.raises(AbandonedError):
        writer.save(snapshot(10), Late(10, None))
    assert storage.list("checkpoints") == []
    assert writer.refresh().newest_step is None


# The ranks' copies.


class Keys:
    """A store that ranks share, in this process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def get(self, key: str) -> str | None:
        return self.values.get(key)

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        if self.values.get(key, "") == expected:
            self.values[key] = desired
        return self.values.get(key, "")

    def delete(self, key: str) -> None:
        del self.values[key]


@contextmanager
def two_ranks() -> Iterator[tuple[Training, Training, Callable[[int], Comparison], Keys]]:
    keys = Keys()

    def comparison(rank: int) -> Comparison:
        return Comparison(keys, generation=0, rank=rank, size=2)

    with trained() as (first, storage):
        second = Training(storage, first.writer)
        torch.manual_seed(3)
        second.advance(2)
        second.state.load_image(b"".join(first.state.image()))
        try:
            yield first, second, comparison, keys
        finally:
            second.saves.close()


def advance_alike(*trainings: Training) -> None:
    for training in trainings:
        torch.manual_seed(training.state.step)
        training.advance()


def test_a_save_waits_for_the_digests_of_all_ranks_and_leaves_no_key() -> None:
    with two_ranks() as (first, second, comparison, keys):
        advance_alike(first, second)
        assert first.state.digest() == second.state.digest()
        first.saves.offer(first.state, ends_epoch=False, comparison=comparison(0))
        assert not first.saves._saver.wait(0.2)
        assert first.committed() == {}
        second.saves.show(second.state, comparison(1))
        first.settle()
        assert list(first.committed()) == [3]
        assert keys.values == {}
        assert not first.saves.differs


def test_a_copy_that_differs_on_one_rank_is_not_committed_and_told_to_all() -> None:
    with two_ranks() as (first, second, comparison, _):
        advance_alike(first, second)
        copy_right = second.saves._copy

        def copy_wrong(*args: Any) -> Any:
            copy = copy_right(*args)
            place = copy.staging._files[MODEL].tensors[0]
            place.view(-1)[0:1].view(torch.int32).bitwise_xor_(1)
            return copy

        second.saves._copy = copy_wrong  # type: ignore[method-assign]
        first.saves.offer(first.state, ends_epoch=False, comparison=comparison(0))
        second.saves.show(second.state, comparison(1))
        first.settle()
        second.settle()
        first.saves.wants(4, ends_epoch=False)
        assert first.saves.differs
        shown = [each.saves.shown for each in (first, second)]
        assert [step for _, step in shown] == [3, 3]
        assert shown[0] != shown[1]  # what the ranks compare then, together
        assert first.committed() == {}
        assert first.folders() == []


def test_a_drain_does_not_save_what_was_found_to_differ() -> None:
    with two_ranks() as (first, _, comparison, _keys):
        advance_alike(first)
        first.saves.offer(first.state, ends_epoch=False, comparison=comparison(0))
        comparison(1).tell(3, "another digest")
        first.settle()
        with pytest.raises(DifferentStatesError, match="after step 3"):
            first.saves.secure(first.state, reason="survivor", seconds=SECONDS)
        assert first.committed() == {}


@pytest.mark.parametrize("how", ["its generation has failed", "it has left", "it says nothing"])
def test_a_peer_that_is_lost_does_not_keep_a_save_from_its_commit(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "COMPARE_SECONDS", 0.1 if how == "it says nothing" else SECONDS)
    with two_ranks() as (first, _, comparison, keys):
        advance_alike(first)
        if how == "its generation has failed":
            keys.set("generation", "1")
        elif how == "it has left":
            keys.set("left", '{"1": "killed"}')
        first.saves.offer(first.state, ends_epoch=False, comparison=comparison(0))
        first.settle()
        assert list(first.committed()) == [3]


# A trainer that dies with a save.


def test_a_save_that_died_with_its_trainer_is_due_at_once_for_its_successor() -> None:
    with trained() as (training, storage):
        storage.shut()
        training.turn()
        storage.await_somebody()
        assert training.board.saving == 3
        dead = training.saves
        training.config = replace(training.config, save_every_steps=1000)
        training.renew()
        training.board.renew()  # as a keeper does before it forks
        training.renew()
        storage.open()
        dead.close()
        training.advance()
        training.saves.offer(training.state, ends_epoch=False)
        training.settle()
        assert list(training.committed())[-1] == 4
        assert training.board.saving == 0
        assert not training.turn()


def test_a_trainer_that_is_killed_in_a_save_heals_and_the_save_starts_again(
    tmp_path: Path,
) -> None:
    every = 30
    job = Alone(
        tmp_path / "run",
        f"--max-steps={3 * every - 1}",
        f"--save-every-steps={every}",
        "--eval-every-epochs=99",
        FMNIST_DIST_FAULTS="save:crash:1",
    )
    code, text = job.end()
    assert code == 0, text
    assert "fault: crash at save, call 1, rank 0" in text
    assert "worker lost, a new one takes its place" in text
    again, regular, *_ = checkpoints(job.run)
    # Alone, it goes on from its keeper's copy, which may be some steps older than what was due.
    assert again.reason == "retry"
    assert every - 10 <= again.step < 2 * every
    assert (regular.reason, regular.step > again.step) == ("steps", True)
    assert_sound(job.run)


# Memory.


def test_a_save_takes_no_more_than_two_states_of_memory() -> None:
    assert status_of(_save_in_little_memory) == 0


def _save_in_little_memory() -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        storage: Any = LocalStorage(Path(folder))
        training = Training(storage, begin(storage))
        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(8)))
        settings = settings_of(training.config)
        training.state = TrainState(model, optimizer="adamw", settings=settings)
        training.advance(2)
        size = sum(len(each) for each in training.files().values())
        assert size > 100 << 20
        Path("/proc/self/clear_refs").write_text("5")
        training.advance()
        before = _resident_peak()  # gradients and all
        Path("/proc/self/clear_refs").write_text("5")
        for _ in range(3):
            training.turn()
            training.settle()
        training.saves.secure(training.state, reason="drain", seconds=SECONDS)
        peak = _resident_peak() - before
        assert len(training.committed()) == 3
        assert size < peak < 2 * size, f"{peak / size:.2f} states"


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
