"""A run beside a model of it: launches, saves, faults, damage and retention in any order."""

import contextlib
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from memory_storage import MemoryStorage
from run_builders import files_of, snapshot, start, step_of

from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.restore import read_newest
from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.checkpoint.sweep import prune
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.errors import DataDamagedError, FencedError, UsageError
from fmnist_dist.filenames import METRICS

NAMES = sorted(files_of(0))


class Unreliable(MemoryStorage):
    """Fails one create: before or after it has happened."""

    def __init__(self) -> None:
        super().__init__()
        self.fails_in: int | None = None
        self.applies = False

    def create(self, path: str, data: bytes) -> None:
        if self.fails_in == 0:
            self.fails_in = None
            if self.applies:
                super().create(path, data)
            raise StorageError("no answer")
        if self.fails_in is not None:
            self.fails_in -= 1
        super().create(path, data)


@dataclass
class Model:
    """What a run should be, told in four values."""

    retained: dict[int, bool] = field(default_factory=dict)  # step: is whole; rising
    committed: bool = False
    owners: list[str] = field(default_factory=list)

    @property
    def newest(self) -> int | None:
        return max((step for step, whole in self.retained.items() if whole), default=None)

    @property
    def highest(self) -> int:
        return max(self.retained, default=0)

    def quarantine_down_to_the_newest(self) -> None:
        newest = self.newest or 0
        self.retained = {step: whole for step, whole in self.retained.items() if step <= newest}


class RunMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.storage = Unreliable()
        self.log = RunLog(self.storage)
        self.model = Model()
        self.writers: list[RunWriter] = []
        self.removed: set[str] = set()  # paths that the test took away

    @rule(owner=st.sampled_from("ab"))
    def launch(self, owner: str) -> None:
        owners = self.model.owners
        if owner in owners and owners[-1] != owner:
            with pytest.raises(FencedError):
                start(self.storage, owner)
            return
        owners.append(owner)
        if self.model.newest is None and self.model.committed:
            with pytest.raises(DataDamagedError):
                start(self.storage, owner)
            self.writers = []
        else:
            writer, restored, swept = start(self.storage, owner)
            self.writers.append(writer)
            assert step_of(restored) == (self.model.newest or 0)
            assert restored is None or restored.files == files_of(step_of(restored))
            assert swept.suspended is None
        self.model.quarantine_down_to_the_newest()

    @precondition(lambda self: self.writers)
    @rule(further=st.integers(0, 3), fails_in=st.none() | st.integers(0, 3), applies=st.booleans())
    def save(self, further: int, fails_in: int | None, *, applies: bool) -> None:
        step = self.model.highest + further
        self.storage.fails_in, self.storage.applies = fails_in, applies
        try:
            saved = self.writers[-1].save(snapshot(step or 1))
            assert saved == (further > 0 or step == 0)
            stands = saved
        except StorageError:
            # Files, then the record: it stands if it was the record's put that was applied.
            stands = applies and fails_in == len(NAMES) and (further > 0 or step == 0)
        self.storage.fails_in = None
        if stands:
            self.model.retained[step or 1] = True
            self.model.committed = True

    @precondition(lambda self: len(self.writers) > 1)
    @rule(data=st.data())
    def a_superseded_attempt_does_anything(self, data: st.DataObject) -> None:
        old = data.draw(st.sampled_from(self.writers[:-1]))
        before = dict(self.storage.objects)
        with pytest.raises(FencedError):
            old.save(snapshot(10_000))
        with pytest.raises(FencedError):
            old.finish(step=1, reason="epochs", metrics={})
        assert self.storage.objects == before

    @precondition(lambda self: self.writers)
    @rule(keep_last=st.integers(1, 3))
    def retire(self, keep_last: int) -> None:
        self.writers[-1].head = self.log.read().head  # a save without an answer may stand
        self.writers[-1]._verified.clear()
        gone = self.writers[-1].retire(keep_last=keep_last, keep_every=None)
        whole = [step for step, is_whole in self.model.retained.items() if is_whole]
        assert gone == whole[:-keep_last]
        self.model.retained = dict.fromkeys(whole[-keep_last:], True)

    @precondition(lambda self: self.model.retained)
    @rule(data=st.data(), name=st.sampled_from(NAMES), removed=st.booleans())
    def damage(self, data: st.DataObject, name: str, *, removed: bool) -> None:
        step = data.draw(st.sampled_from(sorted(self.model.retained)))
        index = {each.step: each.index for each in self.log.read().head.checkpoints}[step]
        path = f"{lineage.commit(self.log, index).checkpoint.folder}/{name}"
        if removed:
            self.storage.objects.pop(path, None)
            self.removed.add(path)
        else:
            self.storage.objects[path] = b"damaged"
        self.model.retained[step] = False

    @rule()
    def prune(self) -> None:
        prune(self.storage, self.log, self.log.read().head)

    @invariant()
    def a_reader_finds_the_newest_whole_checkpoint(self) -> None:
        newest = self.model.newest
        if newest is not None:
            found = read_newest(self.storage, self.log)
            assert (step_of(found), found.files) == (newest, files_of(newest))
        else:
            error = DataDamagedError if self.model.committed else UsageError
            with pytest.raises(error):
                read_newest(self.storage, self.log)

    @invariant()
    def the_log_retains_what_the_model_does(self) -> None:
        retained = [each.step for each in self.log.read().head.checkpoints]
        assert retained == list(self.model.retained)

    @invariant()
    def the_metrics_of_the_line_are_never_deleted(self) -> None:
        with contextlib.suppress(DataDamagedError):
            for each in lineage.line(self.log, self.log.read().head):
                path = f"{each.checkpoint.folder}/{METRICS}"
                assert path in self.storage.objects or path in self.removed


TestRunMachine = RunMachine.TestCase
TestRunMachine.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.slow
class TestRunMachineForLong(RunMachine.TestCase):
    settings = settings(TestRunMachine.settings, max_examples=700, stateful_step_count=50)
