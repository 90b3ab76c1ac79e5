"""`fmnist_dist.train` that notes, at the moment of every fork, what must not cross it.

Nothing is imported before the command itself would: it sets what NumPy and torch find.
"""

import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from fmnist_dist import train


def note() -> None:
    torch = sys.modules["torch"]
    seen = {
        "pid": os.getpid(),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "main": threading.current_thread() is threading.main_thread(),
        "cuda": torch.cuda.is_initialized() or "libcuda.so" in Path("/proc/self/maps").read_text(),
    }
    with Path(os.environ["FORK_NOTES"]).open("a") as notes:
        notes.write(json.dumps(seen) + "\n")


def keep_few(*args: Any) -> int:
    """Keep trainers of the few images that `train_small` takes."""
    from train_small import few

    from fmnist_dist.data.dataset import DATASETS

    DATASETS["fashion-mnist"] = replace(DATASETS["fashion-mnist"], decode=few)
    return keep(*args)


if __name__ == "__main__":
    os.register_at_fork(before=note)
    keep, train._keep = train._keep, keep_few
    sys.exit(train.main())
