"""P5: every sample exactly once per epoch, proved from what was really gathered.

On a disk, and on a real S3 server.
"""

from pathlib import Path
from unittest import mock

import pytest
import torch
from in_process import NUM_SAMPLES, SmallRun, small_run
from run_files import Folder, log_of
from torch import Tensor

from fmnist_dist import runs
from fmnist_dist.checkpoint import ledger, lineage
from fmnist_dist.data.split import Augmentation, Batch, Split

STEPS_AN_EPOCH = 4


def prove(run: SmallRun) -> list[ledger.EpochProof]:
    log = log_of(run.root)
    line = lineage.line(log, log.read().head)
    epochs = int(line[-1].checkpoint.epoch)
    return ledger.prove(line, num_samples=NUM_SAMPLES, finished_epochs=epochs)


def test_three_epochs_of_a_run_that_was_stopped_and_resumed_are_proved(
    root: Folder, tmp_path: Path
) -> None:
    with small_run(tmp_path, root) as run:
        for last in (2, 3, 7, 12):  # in mid-epoch, before an epoch's last step, across one
            assert run.launch(f"--max-steps={last}", "--epochs=3").code == 0
        assert [(p.epoch, p.consumed, p.exactly_once) for p in prove(run)] == [
            (0, NUM_SAMPLES, True),
            (1, NUM_SAMPLES, True),
            (2, NUM_SAMPLES, True),
        ]


@pytest.mark.parametrize("wrong", ["twice", "neighbour", "augmentation only"])
def test_a_planted_wrong_index_fails_its_epoch_and_no_other(
    wrong: str, root: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Split.gather
    planted: list[int] = []
    gathers = 0

    def gather(self: Split, ids: Tensor, augmentation: Augmentation | None) -> Batch:
        nonlocal gathers
        if augmentation is not None and self.num_samples == NUM_SAMPLES:
            gathers += 1
            if gathers == 8 * STEPS_AN_EPOCH + 9:  # 8 shards a step: in the second epoch
                planted.append(int(ids[0]))
                ids = ids.clone()
                if wrong == "twice":
                    # The last image of this shard is not the plan's but its neighbour's.
                    ids[0] = (ids[0] + 1) % NUM_SAMPLES
                elif wrong == "neighbour":
                    ids[0] = NUM_SAMPLES - 1 - ids[0]
        return original(self, ids, augmentation)

    with small_run(tmp_path, root) as run, mock.patch.object(Split, "gather", gather):
        assert run.launch("--epochs=3", "--save-every-steps=2").code == 0
        assert len(planted) == 1
        damaged = wrong != "augmentation only"
        assert [p.exactly_once for p in prove(run)] == [True, not damaged, True]
        with mock.patch("sys.argv", ["fmnist_dist.runs", "ledger", str(run.root)]):
            assert runs.main() == (65 if damaged else 0)
        output = capsys.readouterr().out
        assert f"{NUM_SAMPLES}" in output


def test_identity_is_gathered_by_the_rows_of_the_images(tmp_path: Path) -> None:
    """The digest cannot pass over a wrong row: there is one index for images and identity."""
    seen: list[tuple[Tensor, Tensor]] = []
    original = Split.gather

    def gather(self: Split, ids: Tensor, augmentation: Augmentation | None) -> Batch:
        batch = original(self, ids, augmentation)
        if augmentation is not None:
            seen.append((ids.clone(), batch.identity))
        return batch

    with small_run(tmp_path) as run, mock.patch.object(Split, "gather", gather):
        assert run.launch("--max-steps=4").code == 0
    ids = torch.cat([each for each, _ in seen])
    identity = torch.cat([each for _, each in seen])
    assert sorted(ids.tolist()) == list(range(NUM_SAMPLES))
    assert len({tuple(row) for row in identity.tolist()}) == NUM_SAMPLES
