"""Heals: recorded by whoever went on, and told in a few lines however many there were."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from memory_storage import MemoryStorage
from on_s3 import every_storage  # noqa: F401 - once more, on a real server
from run_builders import begin, snapshot

from fmnist_dist import runs
from fmnist_dist.checkpoint.history import read_history
from fmnist_dist.checkpoint.local import LocalStorage
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.storage import AlreadyExistsError
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.errors import FencedError

HUNDREDS = 200


def heal(writer: RunWriter, **changed: Any) -> None:
    fields = {"step": 7, "rank": 1, "reason": "killed", "seconds": 0.25, "lost_steps": 0}
    writer.heal(**{**fields, **changed})


def shown(root: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fmnist_dist.runs", "show", str(root), *flags])
        assert runs.main() == 0
    return capsys.readouterr().out


def heals_on_the_page(page: str) -> list[list[str]]:
    lines = page.splitlines()
    below = lines[lines.index("heals") + 1 :]
    end = next(i for i, line in enumerate(below) if not line.startswith(" "))
    return [line.split() for line in below[1:end]]


def test_a_heal_moves_nothing_but_the_index() -> None:
    writer = begin(MemoryStorage())
    writer.save(snapshot(10))
    before = writer.head
    heal(writer)
    after = writer.head
    assert after.index == before.index + 1
    assert {**vars_of(after), "index": before.index} == vars_of(before)
    assert writer.save(snapshot(20))


def vars_of(head: object) -> dict[str, object]:
    return {name: getattr(head, name) for name in type(head).__slots__}  # type: ignore[attr-defined]


def test_any_rank_of_the_attempt_records_a_heal_and_a_fenced_one_does_not() -> None:
    storage = MemoryStorage()
    first = begin(storage)
    log = RunLog(storage)
    second = RunWriter.follow(storage, log, attempt=first.attempt, parent=None)
    heal(second, rank=0)
    heal(first)
    begin(storage)
    before = dict(storage.objects)
    for writer in (first, second):
        with pytest.raises(FencedError):
            heal(writer)
    assert storage.objects == before
    assert [each.rank for each in read_history(log, {}).heals] == [0, 1]


def test_a_heal_whose_answer_was_lost_is_recorded_once() -> None:
    class Forgetful(MemoryStorage):
        def create(self, path: str, data: bytes) -> None:
            super().create(path, data)
            raise AlreadyExistsError(path)

    storage = Forgetful()
    heal(begin(storage))
    assert len(read_history(RunLog(storage), {}).heals) == 1


def test_json_lists_each_heal_with_its_attempt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = begin(LocalStorage(tmp_path))
    heal(writer)
    writer = begin(LocalStorage(tmp_path))
    heal(writer, step=9, rank=0, reason="stuck", seconds=1.5, lost_steps=2)
    found = json.loads(shown(tmp_path, capsys, "--json"))["heals"]
    assert found == [
        {
            "attempt": 1,
            "step": 7,
            "rank": 1,
            "reason": "killed",
            "seconds": 0.25,
            "lost_steps": 0,
        },
        {
            "attempt": 2,
            "step": 9,
            "rank": 0,
            "reason": "stuck",
            "seconds": 1.5,
            "lost_steps": 2,
        },
    ]
    assert list(found[0]) == ["attempt", "step", "rank", "reason", "seconds", "lost_steps"]


def test_hundreds_of_heals_are_a_line_for_each_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = begin(LocalStorage(tmp_path))
    writer.save(snapshot(10))
    for step in range(HUNDREDS):
        heal(writer, step=step, seconds=0.1 if step % 2 else 0.3, lost_steps=step % 2)
    heal(writer, step=50, reason="stuck", seconds=4)
    page = shown(tmp_path, capsys)
    assert heals_on_the_page(page) == [
        ["killed", "200", "0.2", "100", "199"],
        ["stuck", "1", "4", "0", "50"],
    ]


def test_a_page_without_heals_says_nothing_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(LocalStorage(tmp_path))
    assert "heals" not in shown(tmp_path, capsys).splitlines()


def test_where_an_attempt_began_does_not_move_with_its_heals(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    begin(storage).save(snapshot(10))
    writer = begin(storage)
    heal(writer, step=12)
    writer.save(snapshot(20))
    heal(writer, step=22)
    assert [each.first_step for each in read_history(RunLog(storage), {}).attempts] == [0, 10]
