"""What the documents point to is there, and what they list is complete."""

import re
from pathlib import Path

import pytest

from fmnist_dist.errors import ExitCode

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(ROOT.glob("[!.]*/README.md"))
DOCUMENTS = [ROOT / "README.md", *FOLDERS, *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_exists(document: Path) -> None:
    for file, _, name in re.findall(r"(test_\w+\.py)(::(test_\w+))?", document.read_text()):
        path = ROOT / "tests" / file
        assert path.is_file(), f"{document.name} names {file}"
        assert not name or f"def {name}(" in path.read_text(), f"{document.name} names {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_exit_code_is_documented() -> None:
    table = (ROOT / "docs" / "failures.md").read_text().partition("## Exit codes")[2]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)}
    assert documented == {int(code) for code in ExitCode}


def test_every_failure_has_a_behaviour_and_a_test_or_says_that_it_has_none() -> None:
    text = (ROOT / "docs" / "failures.md").read_text().partition("## Exit codes")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5, row
        assert all(cells[:3]), row
        assert "test_" in cells[4] or cells[4] == "none", row
