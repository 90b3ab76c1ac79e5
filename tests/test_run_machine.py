"""A run beside a model of it: launches, ranks and readers in any order, with any one trouble each.

A trouble is a crash, a lost answer or a failure at some storage operation, or that another rank
does something in just that moment. Mistakes are put back, and must be found, so that nobody has to
believe in the checks.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from memory_storage import MemoryStorage
from ranks import Rank, expected_rows, learned_by_the_newest, rows_of_the_line
from run_builders import start, step_of
from run_model import Killed, Model, Network, Trouble

from fmnist_dist.checkpoint import fold, lineage, log, record
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.history import read_history
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import Quarantine, Rollback
from fmnist_dist.checkpoint.restore import Restored, read_checkpoint, read_newest
from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.checkpoint.sweep import prune
from fmnist_dist.checkpoint.tier import LocalTier
from fmnist_dist.checkpoint.writer import CutOffError, RunWriter, Snapshot
from fmnist_dist.errors import DataDamagedError, FencedError, UsageError
from fmnist_dist.filenames import METRICS, MODEL

TROUBLES = ["killed", "died", "refused", "applied", "lost", "meanwhile", "meanwhile", "meanwhile"]
DEEDS = ["save", "save", "retire", "retire", "rollback", "go_on", "heal", "finish"]
WITHOUT_A_RANK = ["launch", "damage", "damage", "prune"]
RANKS_MAX = 4


class RunMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.storage = Network(self.model)
        self.log = RunLog(self.storage)
        self.ranks: list[Rank] = []
        self.untroubled = True
        self.acting: Rank | None = None  # the one in whose deed others may come in between
        self.compared: set[int] = set()  # records of checkpoints whose line was looked at
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(log, "decode", cache(record.decode))  # half of the time goes there

    # What can happen.

    @precondition(lambda self: not self.ranks)
    @rule(data=st.data())
    def launch(self, data: st.DataObject) -> None:
        with self.trouble(data):
            self.take_over(data.draw(st.sampled_from("ab")))

    @precondition(lambda self: self.ranks)
    @rule(data=st.data())
    def a_rank_saves(self, data: st.DataObject) -> None:
        rank = self.one_of_the_ranks(data)
        rank.train(data.draw(st.integers(0, 4)))
        with self.trouble(data):
            self.do("save", rank, data)

    @precondition(lambda self: self.ranks)
    @rule(data=st.data(), deed=st.sampled_from(DEEDS + WITHOUT_A_RANK))
    def a_rank_does_something(self, data: st.DataObject, deed: str) -> None:
        rank = self.one_of_the_ranks(data)
        with self.trouble(data):
            self.do(deed, rank, data)

    @precondition(lambda self: self.ranks)
    @rule(data=st.data(), tells_cut=st.booleans())
    def a_rank_joins(self, data: st.DataObject, *, tells_cut: bool) -> None:
        peer = self.one_of_the_ranks(data)
        if peer.writer.attempt != self.model.attempt:
            with pytest.raises(FencedError):
                peer.follower(self.storage, tells_cut=tells_cut)
            return
        self.add(peer.follower(self.storage, tells_cut=tells_cut))

    # How it is done.

    def tier(self) -> LocalTier | None:
        return None

    def one_of_the_ranks(self, data: st.DataObject) -> Rank:
        back = data.draw(st.sampled_from([0, 0, 0, *range(len(self.ranks))]))
        return self.ranks[-1 - back]

    def add(self, rank: Rank) -> None:
        self.ranks = [*self.ranks, rank][-RANKS_MAX:]

    @contextlib.contextmanager
    def trouble(self, data: st.DataObject) -> Iterator[None]:
        kind = data.draw(st.sampled_from([None] * len(TROUBLES) + TROUBLES))
        if kind is not None:
            after = data.draw(st.integers(0, 12))
            self.storage.trouble = Trouble(kind, after, lambda: self.meanwhile(data))
        self.untroubled = kind is None
        try:
            yield
        finally:
            self.storage.trouble = None
            self.acting = None

    def meanwhile(self, data: st.DataObject) -> None:
        rank = self.one_of_the_ranks(data) if self.ranks else self.acting
        deed = data.draw(st.sampled_from([*DEEDS, "launch"]))
        if rank is not None and rank is not self.acting:  # nobody does two things at once
            self.do(deed, rank, data)

    def take_over(self, owner: str) -> None:
        superseded = self.model.is_superseded(owner)
        trouble = self.storage.trouble
        try:
            writer, restored, swept = start(self.storage, owner, tier=self.tier())
        except FencedError:
            assert self.model.is_superseded(owner) or (trouble and trouble.kind == "meanwhile")
        except DataDamagedError:
            assert self.model.newest is None
            assert self.model.committed
        except StorageError:
            assert not self.untroubled
        except Killed:
            pass
        else:
            assert not superseded
            assert swept.suspended is None
            assert not self.untroubled or step_of(restored) == (self.model.newest or 0)
            self.add(Rank.after(writer, restored))

    def do(self, deed: str, rank: Rank, data: st.DataObject) -> None:
        self.acting = self.acting or rank
        fenced = rank.writer.attempt != self.model.attempt
        before = dict(self.storage.objects)
        try:
            getattr(self, f"_{deed}")(rank, data)
        except FencedError:
            assert rank.writer.attempt != self.model.attempt
        except CutOffError:
            assert rank.cut != self.model.cut
        except StorageError:
            assert not self.untroubled
        except Killed:
            self.ranks = [each for each in self.ranks if each is not rank]
        else:
            assert not fenced or deed in WITHOUT_A_RANK
        if fenced and self.untroubled and deed not in WITHOUT_A_RANK:
            assert self.storage.objects == before

    def _save(self, rank: Rank, data: st.DataObject) -> None:
        rank.train(0 if rank.step else 1)
        newest = max(self.model.line, default=0)
        finished = self.model.finished_step is not None
        saved = rank.save()
        assert not self.untroubled or saved == (rank.step > newest and not finished)
        if saved:
            assert rank.writer.parent is not None
            mine = lineage.commit(self.log, rank.writer.parent)
            assert (mine.attempt, mine.checkpoint.step) == (rank.writer.attempt, rank.step)

    def _retire(self, rank: Rank, data: st.DataObject) -> None:
        keep_last = data.draw(st.sampled_from([1, 1, 2, 3]))
        rank.writer.refresh()
        rank.writer.retire(keep_last=keep_last, keep_every=None)
        if self.untroubled:
            assert all(self.model.whole[index] for index in self.model.line.values())
            assert len(self.model.line) <= keep_last
            assert not self.model.cut_off

    def _rollback(self, rank: Rank, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from([0, *self.model.line]))
        until = max(step, rank.step) + data.draw(st.integers(0, 2))
        stale = rank.cut != self.model.cut
        try:
            cut = rank.writer.rollback(step=step, until=until, why="loss")
        except DataDamagedError:
            assert not self.untroubled  # what was there is retired or in quarantine since
            return
        assert not self.untroubled or cut != stale
        if data.draw(st.booleans()):
            self._go_on(rank, data)

    def _heal(self, rank: Rank, data: st.DataObject) -> None:
        rank.writer.heal(step=rank.step, rank=0, reason="killed", seconds=0.1, lost_steps=0)

    def _finish(self, rank: Rank, data: st.DataObject) -> None:
        records = self.model.records
        for _ in range(2):
            rank.writer.finish(step=rank.step, reason="epochs", metrics={})
        if self.untroubled:
            assert self.model.records <= records + 1
            assert rank.writer.refresh().finished_step == rank.step

    def _go_on(self, rank: Rank, data: st.DataObject) -> None:
        try:
            rank.go_on()
        except DataDamagedError:
            assert self.model.newest is None
            assert self.model.committed
        else:
            assert not self.untroubled or rank.step == (self.model.newest or 0)

    # What needs no rank.

    def _launch(self, _: Rank, data: st.DataObject) -> None:
        self.take_over(data.draw(st.sampled_from("aaab")))

    def _prune(self, _: Rank, __: st.DataObject) -> None:
        prune(self.storage, self.log, self.log.read().head)

    def _damage(self, _: Rank, data: st.DataObject) -> None:
        if not self.model.line:
            return
        steps = sorted(self.model.line)
        index = self.model.line[data.draw(st.sampled_from([steps[-1], *steps]))]
        name = data.draw(st.sampled_from([MODEL, METRICS]))
        path = f"{lineage.commit(self.log, index).checkpoint.folder}/{name}"
        if data.draw(st.booleans()):
            self.storage.objects.pop(path, None)
        else:
            self.storage.objects[path] = b"damaged"
        self.model.whole[index] = False
        for rank in self.ranks:
            rank.writer._verified.discard(index)  # it is verified as it is from now on

    # What holds at any time.

    @invariant()
    def a_reader_finds_the_newest_whole_checkpoint(self) -> None:
        if self.model.newest is not None:
            assert step_of(read_newest(self.storage, self.log)) == self.model.newest
        else:
            error = DataDamagedError if self.model.committed else UsageError
            with pytest.raises(error):
                read_newest(self.storage, self.log)

    @invariant()
    def every_checkpoint_on_the_line_can_be_read_unless_somebody_damaged_it(self) -> None:
        for each in self.log.read().head.checkpoints:
            if self.model.whole[each.index]:
                read_checkpoint(self.storage, self.log, each)

    @invariant()
    def every_line_has_the_rows_that_its_weights_have_learned(self) -> None:
        head = self.log.read().head
        for each in head.checkpoints:
            if each.index in self.compared:
                continue  # neither a record nor a file that a line leads through ever changes
            self.compared.add(each.index)
            until_here = dataclasses.replace(head, checkpoints=(each,))
            rows = list(rows_of_the_line(self.log, until_here, self.storage.originals))
            learned = learned_by_the_newest(self.log, until_here, self.storage.originals)
            assert rows == learned == expected_rows(until_here), "a gap or a double"

    def teardown(self) -> None:
        self.patch.undo()
        history = read_history(self.log, {})
        assert len(history.heals) == self.model.heals
        assert history.damaged == ()


class TieredMachine(RunMachine):
    """All launches are on one node, with a local tier: what storage refused may come later."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = MemoryStorage()

    def tier(self) -> LocalTier:
        return LocalTier(
            Path("/tier"), run="run", log=self.log, warn=self.refuse, make=lambda _: self.disk
        )

    @staticmethod
    def refuse(line: str) -> None:
        assert "the run's log cannot be read" in line

    @rule(data=st.data())
    def a_restart_finds_the_newest_copy_or_checkpoint(self, data: st.DataObject) -> None:
        """The newest rank saves while storage refuses everything; its launch is started again."""
        if not self.ranks or self.ranks[-1].writer.attempt != self.model.attempt:
            return
        rank = self.ranks[-1]
        rank.train(data.draw(st.integers(1, 3)))
        self.storage.trouble = Trouble("refused", 0, lambda: None)
        with contextlib.suppress(CutOffError, StorageError):
            rank.save()
        self.storage.trouble = None
        head, known = self.log.read().head, rank.writer.head.index
        since = [self.log.record(index).body for index in range(known + 1, head.index + 1)]
        stands = not any(isinstance(each, Quarantine | Rollback) for each in since)
        is_copied = rank.writer.copied_step == rank.step and not rank.writer._is_cut_off(head)
        at_least = max(self.model.newest or 0, rank.step if is_copied and stands else 0)
        self.untroubled = True
        self.take_over(self.model.owners[-1])
        if self.model.newest is not None or not self.model.committed:
            assert self.ranks[-1].writer.attempt == self.model.attempt
            assert self.ranks[-1].step >= at_least

    def _damage(self, rank: Rank, data: st.DataObject) -> None:
        self.disk.objects.clear()  # else a local copy would do
        super()._damage(rank, data)


SHORT = settings(
    max_examples=120,
    stateful_step_count=30,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],  # shrinking would take longer than a test may
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

TestRunMachine = RunMachine.TestCase
TestRunMachine.settings = SHORT


TestTieredMachine = TieredMachine.TestCase
TestTieredMachine.settings = settings(SHORT, max_examples=40)


@pytest.mark.slow
class TestTieredMachineForLong(TieredMachine.TestCase):
    settings = settings(SHORT, max_examples=200, stateful_step_count=60)


@pytest.mark.slow
class TestRunMachineForLong(RunMachine.TestCase):
    settings = settings(SHORT, max_examples=800, stateful_step_count=60)


def counts_unverified_checkpoints(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunWriter, "_verify", lambda mine, each, _: mine._verified.add(each.index))


def follows_without_a_look_at_the_attempt(patch: pytest.MonkeyPatch) -> None:
    follow_right = RunWriter.follow

    def wrong(*arguments: object, **named: object) -> RunWriter:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(RunWriter, "_check_fence", lambda *_: None)
            return follow_right(*arguments, **named)  # type: ignore[arg-type]

    patch.setattr(RunWriter, "follow", staticmethod(wrong))


def takes_a_cut_for_a_loss(patch: pytest.MonkeyPatch) -> None:
    """After a rollback to the initial weights the run looks as if all was damaged."""
    cut_right = fold._cut

    def wrong(head: Head, body: Rollback) -> Head:
        return dataclasses.replace(cut_right(head, body), committed=head.committed)

    patch.setattr(fold, "_cut", wrong)


def keeps_what_is_beyond_the_cut(patch: pytest.MonkeyPatch) -> None:
    cut_right = fold._cut

    def wrong(head: Head, body: Rollback) -> Head:
        return dataclasses.replace(cut_right(head, body), checkpoints=head.checkpoints)

    patch.setattr(fold, "_cut", wrong)


def keeps_its_parent_after_a_rollback_to_the_beginning(patch: pytest.MonkeyPatch) -> None:
    choose_right = RunWriter.choose

    def wrong(mine: RunWriter, *, report: Callable[[str], None]) -> Restored | None:
        parent = mine.parent
        restored = choose_right(mine, report=report)
        mine.parent = mine.parent if restored else parent
        return restored

    patch.setattr(RunWriter, "choose", wrong)


def forgets_that_it_saved(patch: pytest.MonkeyPatch) -> None:
    """The rows begin anew, and the parent stays."""
    save_right = RunWriter.save

    def wrong(mine: RunWriter, state: Snapshot) -> bool:
        parent = mine.parent
        saved = save_right(mine, state)
        mine.parent = parent
        return saved

    patch.setattr(RunWriter, "save", wrong)


def begins_its_rows_anew_with_somebody_elses_save(patch: pytest.MonkeyPatch) -> None:
    save_right = Rank.save

    def wrong(rank: Rank) -> bool:
        saved = save_right(rank)
        rank.rows = []
        return saved

    patch.setattr(Rank, "save", wrong)


@pytest.mark.parametrize(
    "mistake",
    [
        counts_unverified_checkpoints,
        follows_without_a_look_at_the_attempt,
        takes_a_cut_for_a_loss,
        keeps_what_is_beyond_the_cut,
        keeps_its_parent_after_a_rollback_to_the_beginning,
        forgets_that_it_saved,
        begins_its_rows_anew_with_somebody_elses_save,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_the_machine_finds_a_run_that(
    monkeypatch: pytest.MonkeyPatch, mistake: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mistake(monkeypatch)
    once = settings(
        SHORT,
        max_examples=600,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        print_blob=False,
    )
    with pytest.raises((AssertionError, DataDamagedError, pytest.fail.Exception)):
        run_state_machine_as_test(RunMachine, settings=once)
