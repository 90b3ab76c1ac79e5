"""Every file of a run, damaged in every way: found, told, passed over, never chosen again.

On a disk, and on a real S3 server: there it is other objects in the places of those that were put.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import DAMAGES, empty, flip_a_bit, folder_of, record_of, remove
from run_builders import begin, files_of, snapshot, start, step_of
from run_files import Folder, opened

from fmnist_dist.checkpoint import lineage, s3client
from fmnist_dist.checkpoint.folder import write_files
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.record import Quarantine
from fmnist_dist.checkpoint.restore import read_newest
from fmnist_dist.checkpoint.sweep import prune
from fmnist_dist.checkpoint.verify import verify
from fmnist_dist.errors import DataDamagedError, ExitCode, UsageError
from fmnist_dist.filenames import METRICS

Damage = Callable[[Folder], None]
STEPS = (10, 20, 30, 40)
# Their records: 0 attempt, 1 step 10, 2 step 20, 3 step 30, 4 attempt, 5 step 40.
RECORDS = 6

each_damage = pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)


@pytest.fixture(autouse=True)
def without_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncs are most of the time, and matter in `test_power_cut` only."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("healthy") / "run"
    storage = LocalStorage(run)
    writer = begin(storage)
    for step in STEPS[:-1]:
        writer.save(snapshot(step))
    again, _, _ = start(storage)
    again.save(snapshot(STEPS[-1]))
    return run


@pytest.fixture(autouse=True)
def one_client(root: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connect once in a test."""
    client = s3client.S3Client()
    monkeypatch.setattr("fmnist_dist.checkpoint.s3.S3Client", lambda: client)


@pytest.fixture
def run(healthy: Path, root: Folder) -> Folder:
    if isinstance(root, Path):
        return Path(shutil.copytree(healthy, root))
    return root.upload(healthy)


def started(run: Folder) -> tuple[int, list[str]]:
    """Start, and return where training goes on and what was reported."""
    reports: list[str] = []
    _, restored, _ = start(opened(run), report=reports.append)
    if restored is not None:
        assert restored.files == files_of(step_of(restored))
    return step_of(restored), reports


def damage_found(run: Folder) -> str:
    storage = opened(run)
    return "\n".join(verify(storage, RunLog(storage)).damage)


def test_a_healthy_run_goes_on_at_its_newest_checkpoint(run: Folder) -> None:
    assert started(run) == (40, [])
    assert damage_found(run) == ""


@each_damage
@pytest.mark.parametrize("name", files_of(0))
def test_a_damaged_file_of_the_newest_checkpoint_is_passed_over_for_good(
    run: Folder, name: str, damage: Damage
) -> None:
    path = folder_of(run, 40) / name
    whole = path.read_bytes()
    damage(path)
    assert f"{path.parent.name}/{name}" in damage_found(run)
    reader = opened(run)
    assert step_of(read_newest(reader, RunLog(reader))) == 30

    step, reports = started(run)
    assert step == 30
    assert len(reports) == 1
    assert "step 40" in reports[0]
    assert name in reports[0]
    assert len(verify(reader, RunLog(reader)).quarantined) == 1

    path.write_bytes(whole)  # repaired: the run has gone on without it, and stays with that
    assert started(run) == (30, [])


@each_damage
@pytest.mark.parametrize("name", files_of(0))
@pytest.mark.parametrize("step", STEPS[:-1])
def test_a_damaged_file_of_an_older_checkpoint_is_found(
    run: Folder, step: int, name: str, damage: Damage
) -> None:
    path = folder_of(run, step) / name
    damage(path)
    assert f"{path.parent.name}/{name}" in damage_found(run)
    assert started(run) == (40, [])


@each_damage
@pytest.mark.parametrize("index", range(RECORDS))
def test_a_damaged_record_costs_no_more_than_its_own_checkpoint(
    run: Folder, index: int, damage: Damage
) -> None:
    damage(record_of(run, index))
    newest = index == RECORDS - 1
    if not (newest and damage is remove):  # of the newest record nothing tells that it was there
        assert f"log/{index:012d}.json" in damage_found(run)
    step, reports = started(run)
    assert step == (30 if newest else 40)
    if newest and damage is not remove:
        assert reports == [f"record {index} of the run log is damaged: what it told is lost"]
    else:
        assert reports == []
    assert started(run) == (step, [])


@each_damage
def test_damage_upon_damage_falls_back_further(run: Folder, damage: Damage) -> None:
    for path in (folder_of(run, 40) / METRICS, record_of(run, 3), folder_of(run, 20) / METRICS):
        damage(path)
    step, reports = started(run)
    assert step == 10
    assert [report.split(" is unusable")[0] for report in reports] == [
        f"the checkpoint of step {step}" for step in (40, 30, 20)
    ]


@each_damage
def test_a_run_without_any_valid_checkpoint_says_what_to_do_each_time(
    run: Folder, damage: Damage
) -> None:
    for step in STEPS:
        damage(folder_of(run, step) / METRICS)
    with pytest.raises(DataDamagedError, match="no valid checkpoint is left"):
        read_newest(opened(run), RunLog(opened(run)))
    for _ in range(2):
        with pytest.raises(DataDamagedError, match=r"restore the run folder.*--run-dir") as caught:
            started(run)
        assert caught.value.exit_code == ExitCode.DATA_DAMAGED == 65
    with pytest.raises(DataDamagedError, match="quarantine"):
        read_newest(opened(run), RunLog(opened(run)))


def test_a_run_whose_only_checkpoint_has_a_damaged_record_does_not_start_over(
    root: Folder,
) -> None:
    storage = opened(root)
    begin(storage).save(snapshot(10))
    flip_a_bit(record_of(root, 1))
    for _ in range(2):
        with pytest.raises(DataDamagedError, match="restore the run folder"):
            started(root)


def test_a_damaged_record_of_a_run_that_never_saved_does_not_matter(root: Folder) -> None:
    storage = opened(root)
    begin(storage)
    begin(storage)
    flip_a_bit(record_of(root, 1))
    assert started(root)[0] == 0


@each_damage
def test_a_run_that_lost_the_record_of_its_settings_is_refused(
    root: Folder, damage: Damage
) -> None:
    storage = opened(root)
    begin(storage).save(snapshot(10))
    damage(record_of(root, 0))
    log = RunLog(storage)
    with pytest.raises(DataDamagedError, match=r"settings are lost: restore log/0+\.json"):
        list(lineage.attempts(log, log.read().head))


def test_attempts_are_told_past_damaged_ones(root: Folder) -> None:
    storage, log = opened(root), RunLog(opened(root))
    for _ in range(5):
        begin(storage)
    for index in (1, 3):
        flip_a_bit(record_of(root, index))
    assert [each.number for each in lineage.attempts(log, log.read().head)] == [5, 3, 1]
    flip_a_bit(record_of(root, 4))
    assert [each.number for each in lineage.attempts(log, log.read().head)] == [3, 1]


def test_retention_counts_verified_checkpoints_only(run: Folder) -> None:
    writer, _, _ = start(opened(run))
    empty(folder_of(run, 30) / METRICS)
    assert writer.retire(keep_last=2, keep_every=None) == [10]
    assert [each.step for each in writer.head.checkpoints] == [20, 40]


def test_a_record_damaged_after_it_was_verified_stops_no_retirement(run: Folder) -> None:
    writer, _, _ = start(opened(run))
    assert writer.retire(keep_last=4, keep_every=None) == []  # verifies all
    flip_a_bit(record_of(run, 2))
    assert writer.retire(keep_last=1, keep_every=None) == [10, 30]
    assert [each.step for each in writer.head.checkpoints] == [40]


def test_a_damaged_record_suspends_the_sweep_of_folders(run: Folder) -> None:
    storage = opened(run)
    start(storage)
    write_files(storage, "checkpoints/000000050-0003-00000000000000aa", files_of(50))
    flip_a_bit(record_of(run, 3))
    _, _, swept = start(storage)
    assert swept.orphans == ()
    assert swept.suspended is not None
    assert "000000000003.json" in swept.suspended
    assert "000000050-0003-00000000000000aa" in storage.list("checkpoints")
    assert prune(storage, RunLog(storage), RunLog(storage).read().head).suspended is not None
    assert "000000050-0003-00000000000000aa" in storage.list("checkpoints")


def test_pruning_a_quarantined_checkpoint_keeps_the_metrics_of_the_line(run: Folder) -> None:
    empty(
        folder_of(run, 30) / "model.safetensors"
    )  # step 40 was trained from it while it was whole
    storage, log = opened(run), RunLog(opened(run))
    writer, _, _ = start(storage)
    writer.retire(keep_last=4, keep_every=None)
    start(storage)
    prune(storage, log, log.read().head)
    line = lineage.line(log, log.read().head)
    assert [commit.checkpoint.step for commit in line] == [10, 20, 30, 40]
    assert all((run / each.checkpoint.folder / METRICS).exists() for each in line)
    assert sorted(path.name for path in folder_of(run, 30).iterdir()) == [METRICS]


def test_a_quarantine_tells_why(run: Folder) -> None:
    remove(folder_of(run, 40) / METRICS)
    started(run)
    log = RunLog(opened(run))
    body = log.record(log.read().head.index).body
    assert isinstance(body, Quarantine)
    assert (body.checkpoint, body.step) == (5, 40)
    assert body.why.endswith("metrics.jsonl is missing")


@pytest.mark.parametrize(("step", "there"), [(15, "10, 20, 30, 40"), (50, "10, 20, 30, 40")])
def test_a_step_that_was_not_kept_is_answered_with_those_that_were(
    run: Folder, step: int, there: str
) -> None:
    storage = opened(run)
    with pytest.raises(UsageError, match=f"no checkpoint of step {step} .*: {there}$"):
        read_newest(storage, RunLog(storage), step=step)


def test_a_run_that_has_not_saved_yet_is_not_called_damaged(root: Folder) -> None:
    storage = opened(root)
    begin(storage)
    with pytest.raises(UsageError, match="no checkpoint in this run; there is: none yet"):
        read_newest(storage, RunLog(storage))
