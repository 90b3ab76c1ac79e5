"""One of several processes that want the same run at the same time.

    python race_child.py URL NAME    a round for each line on stdin

In a round it is a launch of its own: it takes the run over, saves and retires until it is fenced or
has saved enough. It tells on stdout what it was told: `begun ATTEMPT`, `starts STEP`, `saved STEP
INDEX`, and at the end of a round `fenced` or `done`.
"""

import sys

from run_builders import begin, files_of, snapshot, step_of

from fmnist_dist.checkpoint.place import Place
from fmnist_dist.checkpoint.storage import Storage, StorageError
from fmnist_dist.errors import FencedError

SAVES = 3
KEEP_LAST = 2


def files_by(owner: str, step: int) -> dict[str, bytes]:
    """Return what `owner` saves of a step: nobody else's bytes."""
    return {name: data + owner.encode() for name, data in files_of(step).items()}


def take_part(storage: Storage, owner: str) -> None:
    writer = begin(storage, owner)
    tell(f"begun {writer.attempt}")
    restored = writer.choose(report=lambda text: tell(f"damage {text}"))
    first = step_of(restored)
    tell(f"starts {first}")
    writer.sweep()
    for step in range(first + 1, first + SAVES + 1):
        try:
            saved = writer.save(snapshot(step, files_by(owner, step)))
        except StorageError:
            writer.refresh()  # as `saves` does: a newer attempt has swept what was under way
            raise
        if saved:
            tell(f"saved {step} {writer.head.index}")
        writer.retire(keep_last=KEEP_LAST, keep_every=None)


def tell(text: str) -> None:
    print(text, flush=True)


def main(url: str, name: str) -> None:
    storage = Place.of(url).storage()
    tell("ready")
    for line in sys.stdin:
        try:
            take_part(storage, f"{name}-{line.strip()}")
        except FencedError:
            tell("fenced")
        else:
            tell("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
