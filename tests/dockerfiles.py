"""What a Dockerfile says, as far as tests ask: its stages, each a list of instructions."""

import json
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    base: str
    name: str  # "" for none
    instructions: tuple[tuple[str, str], ...]  # without FROM

    def all(self, keyword: str) -> list[str]:
        return [text for word, text in self.instructions if word == keyword]

    def words(self, keyword: str) -> list[str]:
        """Return the last ENTRYPOINT or CMD; its form must be the one that starts no shell."""
        found = json.loads(self.all(keyword)[-1])
        assert isinstance(found, list)
        return found

    def variables(self) -> dict[str, str]:
        pairs = (re.findall(r'(\w+)=("[^"]*"|\S*)', text) for text in self.all("ENV"))
        return {name: value.strip('"') for each in pairs for name, value in each}


def stages(path: Path) -> list[Stage]:
    """Return the stages of a Dockerfile; before the first one only ARG may stand."""
    kept = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    lines = re.sub(r"\\\n", " ", "\n".join(kept)).splitlines()
    found: list[list[tuple[str, str]]] = [[]]
    for line in filter(None, map(str.strip, lines)):
        keyword, _, text = line.partition(" ")
        if keyword == "FROM":
            found.append([])
        found[-1].append((keyword, text.strip()))
    assert {keyword for keyword, _ in found[0]} <= {"ARG"}, path
    result = []
    for (_, start), *instructions in found[1:]:
        base, _, name = start.partition(" AS ")
        result.append(Stage(base=base, name=name, instructions=tuple(instructions)))
    return result
