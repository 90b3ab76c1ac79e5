"""Guards of the architecture: what may import what, and what nobody may import."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fmnist_dist

PACKAGE = Path(fmnist_dist.__file__).parent

# From top to bottom: a module imports from the layers below its own, and from its own folder.
LAYERS = (
    {"train", "evaluate", "runs"},
    {"keeper"},
    {"job", "inspection"},
    {"trainer"},
    {"healing", "held"},
    {"loop", "lookout", "opening"},
    {"build", "desk", "saves", "takeover"},
    {"committer"},
    {"due", "flight", "pace"},
    {"checkpoint", "data", "distributed", "handover", "models", "staging", "telemetry"},
    {"agreement", "state"},
    {"plan", "digest", "filenames", "interval", "steptimes", "tensorfile"},
    {"settings"},
    {"config"},
    {"command", "rule"},
    {"usage"},
    {"errors", "faults", "keys", "limits", "masking", "saver"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

# Thousands of their interleavings run in seconds, and `runs` answers at once.
WITHOUT_TORCH = ["agreement", "config", "data.order", "digest", "distributed.meeting"]
WITHOUT_TORCH += ["distributed.generation", "distributed.process", "distributed.stop"]
WITHOUT_TORCH += ["distributed.comparison", "distributed.interface", "saver"]
WITHOUT_TORCH += ["distributed.transfer", "faults", "keeper.deaths", "keeper.watchdog", "limits"]
WITHOUT_TORCH += [f"handover.{path.stem}" for path in (PACKAGE / "handover").glob("[a-z]*.py")]
WITHOUT_TORCH += ["distributed.tree", "errors", "filenames", "interval", "keys", "pace", "plan"]
WITHOUT_TORCH += ["rule", "runs", "settings", "steptimes", "usage", "evaluate", "train"]
WITHOUT_TORCH += [f"checkpoint.{path.stem}" for path in (PACKAGE / "checkpoint").glob("[a-z]*.py")]


def sources() -> dict[str, ast.Module]:
    """Return every module of the package, by its path in it."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text())
        for path in PACKAGE.rglob("*.py")
    }


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the full names of all that a module imports, wherever it does so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_of(path: str) -> str:
    return path.split("/", maxsplit=1)[0].removesuffix(".py")


def violations(files: dict[str, ast.Module]) -> list[str]:
    found = []
    for path, tree in files.items():
        for name in imports(tree):
            _, *parts = name.split(".")
            if not name.startswith("fmnist_dist.") or parts == ["__version__"]:
                continue
            mine, other = top_of(path), parts[0]
            inside = mine == other and "/" in path
            if not inside and LAYER[other] <= LAYER[mine]:
                found.append(f"{path} imports {name}")
    return found


def test_every_module_has_its_layer() -> None:
    modules = {top_of(path) for path in sources()} - {"__init__"}
    assert modules == LAYER.keys(), "a new module: say in LAYERS what it may import"


def test_imports_point_down_only() -> None:
    assert violations(sources()) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("checkpoint/log.py", "from fmnist_dist.telemetry.events import EventLog"),
        ("data/order.py", "from fmnist_dist import loop"),
        ("plan.py", "import fmnist_dist.state"),
        ("errors.py", "from fmnist_dist.keys import key"),
        ("saves.py", "def late():\n    from fmnist_dist import takeover"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_found(path: str, line: str) -> None:
    assert len(violations({path: ast.parse(line)})) == 1


def test_only_distributed_imports_torch_distributed() -> None:
    users = {
        top_of(path)
        for path, tree in sources().items()
        if any(f"{name}.".startswith("torch.distributed.") for name in imports(tree))
    }
    assert users == {"distributed"}


def test_nothing_is_ever_unpickled() -> None:
    """A checkpoint is tensors and JSON: reading one cannot run code."""
    for path, tree in sources().items():
        banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
        assert not banned & {name.split(".")[0] for name in imports(tree)}, path
        assert not {"torch.load", "torch.save"} & set(imports(tree)), path
        for node in ast.walk(tree):
            assert not (
                isinstance(node, ast.Attribute)
                and node.attr in {"load", "save"}
                and isinstance(node.value, ast.Name)
                and node.value.id == "torch"
            ), f"{path}:{node.lineno}"


def test_the_torch_free_modules_import_no_torch() -> None:
    program = "import importlib, sys\n"
    program += f"for name in {WITHOUT_TORCH}:\n"
    program += "    importlib.import_module('fmnist_dist.' + name)\n"
    program += "    if 'torch' in sys.modules: sys.exit(name)\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
