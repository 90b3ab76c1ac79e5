"""A rank as the run log sees it: what its weights have learned, and rows that it still holds."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from run_builders import snapshot

from fmnist_dist.checkpoint import lineage
from fmnist_dist.checkpoint.head import Head
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.restore import Restored
from fmnist_dist.checkpoint.storage import Storage
from fmnist_dist.checkpoint.writer import RunWriter, Snapshot
from fmnist_dist.filenames import METRICS, MODEL


@dataclass
class Rank:
    """Steps count as rows do: n is learned when n steps are done."""

    writer: RunWriter
    step: int
    learned: list[int]  # what the weights come from
    rows: list[int]  # since the writer's parent
    passed_over: tuple[tuple[int, int], ...]
    cut: int | None

    @staticmethod
    def after(writer: RunWriter, restored: Restored | None) -> "Rank":
        """Return the rank that goes on from what `choose` has returned."""
        return Rank(
            writer=writer,
            step=restored.commit.checkpoint.step if restored else 0,
            learned=json.loads(restored.files[MODEL]) if restored else [],
            rows=[],
            passed_over=writer.head.passed_over,
            cut=writer.head.cut,
        )

    def follower(self, storage: Storage, *, tells_cut: bool = True) -> "Rank":
        """Return another rank of this attempt, which was sent the state.

        One that was not told of the cut can know it only if it was there before the attempt, or
        before the state's parent.
        """
        log, parent = RunLog(storage), self.writer.parent
        cut = self.cut if tells_cut else None
        writer = RunWriter.follow(storage, log, attempt=self.writer.attempt, parent=parent, cut=cut)
        if cut is None:
            head = writer.head
            assert head.attempt_index is not None
            known = head.cut is not None and head.cut < max(head.attempt_index, parent or 0)
            cut = head.cut if known else log.record(head.attempt_index).head.cut
        return Rank(
            writer=writer,
            step=self.step,
            learned=self.learned.copy(),
            rows=self.rows.copy(),
            passed_over=self.passed_over,
            cut=cut,
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            if not any(first <= self.step < until for first, until in self.passed_over):
                self.learned.append(self.step + 1)
                self.rows.append(self.step + 1)
            self.step += 1

    def save(self) -> bool:
        saved = self.writer.save(self.snapshot())
        if saved:
            self.rows = []
        return saved

    def snapshot(self) -> Snapshot:
        rows = "".join(f'{{"step": {step}}}\n' for step in self.rows)
        files = {MODEL: json.dumps(self.learned).encode(), METRICS: rows.encode()}
        return snapshot(self.step, files)

    def go_on(self) -> None:
        """Take what `choose` returns for the log as it is now."""
        self.writer.refresh()
        restored = self.writer.choose(report=lambda _: None)
        vars(self).update(vars(Rank.after(self.writer, restored)))


def expected_rows(head: Head) -> list[int]:
    """Return the steps that whoever stands at the newest checkpoint must have learned."""
    passed = {step for first, until in head.passed_over for step in range(first, until)}
    return [step + 1 for step in range(head.newest_step or 0) if step not in passed]


def rows_of_the_line(log: RunLog, head: Head, objects: Mapping[str, bytes]) -> Iterator[int]:
    for each in lineage.line(log, head):
        for row in objects[f"{each.checkpoint.folder}/{METRICS}"].splitlines():
            yield json.loads(row)["step"]


def learned_by_the_newest(log: RunLog, head: Head, objects: Mapping[str, bytes]) -> list[int]:
    if not head.checkpoints:
        return []
    newest = lineage.commit(log, head.checkpoints[-1].index).checkpoint
    learned: list[int] = json.loads(objects[f"{newest.folder}/{MODEL}"])
    return learned
