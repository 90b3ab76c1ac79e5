"""The folder that `runs export` makes: evaluated weights, and all it takes to use them."""

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from safetensors.numpy import load, save

from fmnist_dist import __version__
from fmnist_dist.checkpoint.history import History
from fmnist_dist.checkpoint.restore import Restored, read_newest
from fmnist_dist.checkpoint.storage import StorageError
from fmnist_dist.data.dataset import spec_of
from fmnist_dist.errors import DataDamagedError, UsageError
from fmnist_dist.filenames import EMA, MODEL
from fmnist_dist.inspection.foundrun import FoundRun
from fmnist_dist.inspection.summary import own_settings

CONFIG = "config.json"
_LOAD = """\
import json; from safetensors.torch import load_file; from fmnist_dist.models import make_model
model = make_model(**json.load(open("config.json"))["model"])
model.load_state_dict(load_file("model.safetensors")); model.eval()
"""  # in the exported folder


def export(run: FoundRun, out: Path) -> dict[str, Any]:
    """Export the newest valid checkpoint into `out`, a new or empty folder; return its config.

    `out` appears whole or not at all. Raises `UsageError` where it is taken or there is no
    checkpoint, `DataDamagedError`, `StorageError`.
    """
    _refuse_taken(out)
    restored = read_newest(run.storage, run.log)
    weights = evaluated_weights(restored)
    config = _config(run.history(), restored, weights)
    _write(out, {MODEL: weights, CONFIG: f"{json.dumps(config, indent=2)}\n".encode()})
    return config


def evaluated_weights(restored: Restored) -> bytes:
    """Return the weights that evaluation uses: the model's, the averaged ones laid over them."""
    if EMA not in restored.files:
        return restored.files[MODEL]
    return save({**load(restored.files[MODEL]), **load(restored.files[EMA])})


def _config(history: History, restored: Restored, weights: bytes) -> dict[str, Any]:
    settings = own_settings(history)
    if not settings:
        raise DataDamagedError(
            "no attempt's record is intact, and with them the model's arguments are lost"
        )
    spec = spec_of(settings["dataset"])
    return {
        "format": 1,
        "model": {
            "name": settings["model"],
            "image_shape": list(spec.image_shape),
            "num_classes": spec.num_classes,
            "dropout": settings["dropout"],
        },
        "input": {
            "shape": [None, *spec.image_shape],
            "dtype": "float32",
            "pixels": "(value / 255 - mean) / std, per channel",
            "mean": list(spec.mean),
            "std": list(spec.std),
        },
        "dataset": settings["dataset"],
        "class_names": list(spec.class_names),
        "weights": "ema" if EMA in restored.files else "model",
        "step": restored.commit.checkpoint.step,
        "epoch": restored.commit.checkpoint.epoch,
        "test_accuracy": _test_accuracy(history, restored),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "fmnist_dist": __version__,
        "load": _LOAD.splitlines(),
    }


def _test_accuracy(history: History, restored: Restored) -> float | None:
    """Return what was measured at this very step; None where nothing was."""
    checkpoint = restored.commit.checkpoint
    if checkpoint.evaluated:
        return checkpoint.metrics.get("test_accuracy")
    if history.finish is not None and history.finish.step == checkpoint.step:
        return history.finish.metrics.get("test_accuracy")
    return None


def _refuse_taken(out: Path) -> None:
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise UsageError(f"OUT {out}: cannot be read: {error.strerror}") from error
    if taken:
        raise UsageError(f"OUT {out}: is there already; expected a new or an empty folder")


def _write(out: Path, files: dict[str, bytes]) -> None:
    temporary = out.absolute().with_name(f".{out.name}.{secrets.token_hex(8)}")
    try:
        temporary.mkdir(parents=True)
        try:
            for name, data in files.items():
                with (temporary / name).open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            temporary.rename(out)  # replaces an empty folder, and no other
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise StorageError(f"OUT {out}: cannot write: {error.strerror or error}") from error
