"""The run log: damage is found, the newest record is found cheaply, wherever holes are."""

import dataclasses
import json
import math

import pytest
from memory_storage import MemoryStorage
from on_s3 import every_storage  # noqa: F401 - once more, on a real server
from run_builders import attempt, begin, snapshot

from fmnist_dist.checkpoint import record as records
from fmnist_dist.checkpoint.fold import fold
from fmnist_dist.checkpoint.head import Head, Retained
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import (
    Body,
    Checkpoint,
    DamagedRecordError,
    File,
    Finish,
    Heal,
    Override,
    Quarantine,
    Record,
    Retire,
    Rollback,
    decode,
    encode,
    path_of,
)
from fmnist_dist.digest import EpochDigest
from fmnist_dist.errors import DataDamagedError, ExitCode, IncompatibleError
from fmnist_dist.interval import Cost, Evidence, choose

LONGEST = 300

BODIES: list[Body] = [
    attempt("Jürgen's pod \ud800 \n"),
    Checkpoint(
        step=118,
        epoch=1.0000000000000002,
        reason="epoch",
        folder="checkpoints/000000118-0001-0123456789abcdef",
        files={"model.safetensors": File(size=3, sha256="0" * 64)},
        parent=None,
        ledger=(EpochDigest(epoch=0, count=60000, digest=(-(2**63), 2**63 - 1)),),
        evaluated=True,
        metrics={"train_loss": 1e-310, "lr": -0.0, "test_accuracy": 0.1 + 0.2},
        swept=0,
    ),
    Checkpoint(
        step=120,
        epoch=1.01,
        reason="auto",
        folder="checkpoints/000000120-0001-0123456789abcdef",
        files={},
        parent=3,
        ledger=(),
        evaluated=False,
        metrics={},
        swept=0,
        interval=choose(
            cost=Cost(pause_seconds=0.1 + 0.2, save_seconds=7.0),
            evidence=Evidence(interruptions=2, seconds=1e4 / 3),
            step_seconds=0.07,
        ),
    ),
    Override(step=5, settings={"lr": 0.1, "epochs": 3, "augment": "none"}),
    Quarantine(checkpoint=1, step=118, why="x"),
    Retire(checkpoints=(1, 2), folders=("a", "b")),
    Heal(step=7, rank=1, reason="killed", seconds=0.1 + 0.2, lost_steps=0),
    Rollback(step=4, until=6, why="the loss of step 6 is nan"),
    Finish(step=9, reason="epochs", metrics={}),
]


def record_of(body: Body, index: int = 7) -> Record:
    head = Head(
        index=index - 1,
        attempt=3,
        attempt_index=2,
        previous_attempt_index=0,
        owner="owner",
        checkpoints=(Retained(step=4, index=1), Retained(step=5, index=3)),
        committed=True,
        overrides=(4,),
        wanted={"lr": 0.1},
        cut=5,
        cut_off=(4,),
        passed_over=((2, 3),),
    )
    after = fold(head, index=index, body=body)
    return Record(index=index, attempt=after.attempt, body=body, head=after)


def chain(length: int) -> MemoryStorage:
    """Return a log of `length` records: an attempt, then overrides that tell their index."""
    storage, head = MemoryStorage(), Head()
    for index in range(length):
        body = Override(step=index, settings={}) if index else attempt()
        head = fold(head, index=index, body=body)
        # The list of overrides would grow with the log; newest records stay small in a real one.
        head = dataclasses.replace(head, overrides=head.overrides[-1:])
        record = Record(index=index, attempt=head.attempt, body=body, head=head)
        storage.objects[path_of(index)] = encode(record)
    return storage


def damage(storage: MemoryStorage, index: int) -> None:
    storage.objects[path_of(index)] = storage.objects[path_of(index)][:-1]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_a_record_reads_back_as_it_was_written(body: Body) -> None:
    record = record_of(body)
    assert decode(encode(record), index=7) == record


def test_a_head_from_before_there_were_rollbacks_is_read() -> None:
    """Format 1 has always been the same to readers: what an old record lacks has its default."""
    fields = dataclasses.asdict(record_of(BODIES[1]).head)
    for name in ("cut", "cut_off", "passed_over"):
        del fields[name]
    head = Head.from_json(json.loads(json.dumps(fields)))
    assert (head.cut, head.cut_off, head.passed_over) == (None, (), ())
    assert head.checkpoints == record_of(BODIES[1]).head.checkpoints
    record = dataclasses.replace(record_of(BODIES[1]), head=head)
    assert decode(encode(record), index=7) == record


def test_a_checkpoint_without_a_chosen_interval_is_what_it_was_before_there_was_one() -> None:
    """Or versions that do not know `--save-every-steps auto` could not read any newer run."""
    chosen = [b'"interval"' in encode(record_of(body)) for body in BODIES]
    assert [type(body) for body, each in zip(BODIES, chosen, strict=True) if each] == [Checkpoint]


def test_every_kind_of_record_is_among_those_that_are_read_back() -> None:
    assert {record_of(body).kind for body in BODIES} == set(records.Kind)


@pytest.mark.parametrize("body", BODIES[:2], ids=lambda body: type(body).__name__)
def test_every_flipped_bit_of_a_record_is_found(body: Body) -> None:
    data = encode(record_of(body))
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(DamagedRecordError):
                decode(bytes(flipped), index=7)


def test_a_record_truncated_at_any_length_is_damaged() -> None:
    data = encode(record_of(BODIES[1]))
    for length in range(len(data)):
        with pytest.raises(DamagedRecordError):
            decode(data[:length], index=7)


@pytest.mark.parametrize("extra", [b"\n", b" ", b"\0", b"{}"])
def test_a_record_with_something_after_it_is_damaged(extra: bytes) -> None:
    with pytest.raises(DamagedRecordError):
        decode(encode(record_of(BODIES[1])) + extra, index=7)


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"7", b'"x"', b"{}", b'{"sha256":1}', b"[" * 100_000, b"\xff\xfe"]
)
def test_bytes_that_are_no_record_are_damaged(data: bytes) -> None:
    with pytest.raises(DamagedRecordError):
        decode(data, index=7)


def test_the_record_of_another_index_is_damaged() -> None:
    with pytest.raises(DamagedRecordError, match="holds the record of index 7"):
        decode(encode(record_of(BODIES[1])), index=8)


def test_a_record_of_a_newer_format_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "FORMAT", 2)
    data = encode(record_of(BODIES[1]))
    monkeypatch.undo()
    with pytest.raises(IncompatibleError, match="format 2, this version reads up to 1") as caught:
        decode(data, index=7)
    assert caught.value.exit_code == ExitCode.INCOMPATIBLE == 78


@pytest.mark.parametrize(
    ("old", "new"),
    [('"kind": "finish"', '"kind": "applause"'), ('"reason": "epochs"', '"why": "epochs"')],
)
def test_an_intact_record_that_this_version_does_not_know_is_no_damage(old: str, new: str) -> None:
    import hashlib

    fields = json.loads(encode(record_of(BODIES[-1])))
    del fields["sha256"]
    changed = json.loads(json.dumps(fields).replace(old, new))
    assert changed != fields
    changed["sha256"] = hashlib.sha256(records._canonical(changed)).hexdigest()
    with pytest.raises(IncompatibleError, match="another fmnist_dist"):
        decode(records._canonical(changed), index=7)


def test_a_value_that_is_no_number_cannot_enter_the_log() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode(record_of(Finish(step=1, reason="epochs", metrics={"train_loss": math.nan})))


def test_the_newest_record_is_found_in_a_log_of_any_length() -> None:
    whole = chain(LONGEST)
    storage = MemoryStorage()
    assert RunLog(storage).read().head == Head()
    for length in range(1, LONGEST + 1):
        storage.objects[path_of(length - 1)] = whole.objects[path_of(length - 1)]
        state = RunLog(storage).read()
        assert (state.head.index, state.damaged) == (length - 1, ())


def test_the_newest_record_is_found_with_little_reading() -> None:
    storage, whole = MemoryStorage(), chain(LONGEST).objects
    for length in range(1, LONGEST + 1):
        storage.objects[path_of(length - 1)] = whole[path_of(length - 1)]
        storage.reads = 0
        RunLog(storage).read()
        # Gallop up, then halve: 2 log2(n) probes; one that finds nothing looks 3 times.
        assert storage.reads <= 6 * math.ceil(math.log2(length + 1)) + 6


@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 9, 17, 33, 100, LONGEST])
def test_a_record_removed_anywhere_does_not_hide_the_newer_ones(length: int) -> None:
    storage = chain(length)
    for removed in range(length - 1):
        data = storage.objects.pop(path_of(removed))
        assert RunLog(storage).read().head.index == length - 1, removed
        storage.objects[path_of(removed)] = data


@pytest.mark.parametrize("every_storage", ["memory"], indirect=True)  # 100,000 requests
@pytest.mark.slow
def test_a_record_removed_anywhere_from_a_log_of_any_length_hides_nothing() -> None:
    for length in range(2, LONGEST + 1):
        test_a_record_removed_anywhere_does_not_hide_the_newer_ones(length)


@pytest.mark.parametrize("how_many", [1, 2, 5, 19])
def test_a_damaged_tail_falls_back_to_the_newest_intact_record(how_many: int) -> None:
    storage = chain(20)
    for index in range(20 - how_many, 20):
        damage(storage, index)
    state = RunLog(storage).read()
    assert state.damaged == tuple(range(20 - how_many, 20))
    assert state.head.index == 19  # the damaged ones occupy their indices
    intact = RunLog(storage).record(19 - how_many).head
    assert dataclasses.replace(state.head, index=intact.index) == intact


def test_damage_before_the_newest_record_does_not_matter_to_the_head() -> None:
    storage = chain(20)
    before = RunLog(storage).read()
    for index in range(19):
        damage(storage, index)
    assert RunLog(storage).read() == before


@pytest.mark.parametrize("length", [1, 2, 3, 20])
def test_a_log_of_which_nothing_is_intact_is_refused_with_what_to_do(length: int) -> None:
    storage = chain(length)
    for index in range(length):
        damage(storage, index)
    with pytest.raises(DataDamagedError, match="restore the run folder") as caught:
        RunLog(storage).read()
    assert caught.value.exit_code == ExitCode.DATA_DAMAGED == 65


def test_nobody_appends_at_the_index_of_a_damaged_record() -> None:
    storage = MemoryStorage()
    writer = begin(storage)
    writer.save(snapshot(10))
    damage(storage, 1)
    damaged = storage.objects[path_of(1)]
    again = begin(storage)
    assert again.head.index == 2
    assert storage.objects[path_of(1)] == damaged


def test_a_writer_folds_past_a_damaged_record_of_somebody_else() -> None:
    storage = MemoryStorage()
    writer = begin(storage)
    other = chain(2).objects[path_of(1)]
    storage.objects[path_of(1)] = other[:-1]
    assert writer.save(snapshot(10))
    assert writer.head.index == 2


def test_a_damaged_attempt_still_fences_once_it_has_written_something_else() -> None:
    from fmnist_dist.errors import FencedError

    storage = MemoryStorage()
    old = begin(storage)
    new = begin(storage)
    new.save(snapshot(10))
    damage(storage, 1)
    with pytest.raises(FencedError):
        old.save(snapshot(20))
    assert new.save(snapshot(20))


def test_the_heads_of_all_records_are_what_folding_them_gives() -> None:
    storage = MemoryStorage()
    for _ in range(3):
        writer = begin(storage)
        writer.choose(report=lambda _: None)
        for _ in range(3):
            writer.save(snapshot((writer.head.newest_step or 0) + 10))
            writer.retire(keep_last=2, keep_every=None)
    log = RunLog(storage)
    head = Head()
    for index in range(log.read().head.index + 1):
        record = log.record(index)
        head = fold(head, index=index, body=record.body)
        assert record.head == head
