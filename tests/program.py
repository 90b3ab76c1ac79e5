"""The program's own text, for tests of what must hold everywhere in it: each node, and where."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def sources() -> dict[str, str]:
    """Return the text of every module of the package and of `launch`, by its path."""
    folders = (ROOT / "fmnist_dist", ROOT / "launch")
    files = (path for folder in folders for path in folder.rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(files)}


def nodes(texts: Mapping[str, str]) -> Iterator[tuple[str, ast.AST]]:
    """Yield every node with the place where it stands: `path::Class.function`."""
    for path, text in texts.items():
        yield from _below(ast.parse(text), f"{path}::", "")


def _below(node: ast.AST, path: str, inside: str) -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(node):
        yield path + inside, child
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        name = f"{inside}.{child.name}".lstrip(".") if named else inside  # type: ignore[attr-defined]
        yield from _below(child, path, name)


def called(node: ast.Call) -> str:
    """Return what a call calls, as it is written: `os.waitpid`, `self._thread.join`."""
    return ast.unparse(node.func)
