"""A worker for tests of the agent: it ends as its arguments say, round after round.

`agent_worker.py NOTES RANK0,RANK1 RANK0,RANK1 ...`: one word for each round of this rank; the last
one stands for all that follow. A word is an exit code, `-N` (a signal to itself), `hang` (until
SIGTERM, then 143), `deaf` (not even then), or `error` (with last words and code 75).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def end(word: str) -> int:
    if word == "error":
        words = {"message": "s3://user:secret@bucket/run is away", "timestamp": 1, "exit_code": 75}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(words))
        return 75
    if word in {"hang", "deaf"}:
        handler = signal.SIG_IGN if word == "deaf" else lambda *_: sys.exit(143)
        signal.signal(signal.SIGTERM, handler)
        note("hangs")
        while True:
            time.sleep(60)
    if word.startswith("-"):
        os.kill(os.getpid(), int(word[1:]))
    return int(word)


def note(what: str) -> None:
    with notes.open("a") as file:
        file.write(f"{what}\n")


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    notes = Path(f"{sys.argv[1]}-{os.environ['LOCAL_RANK']}-{os.getppid()}")
    number = notes.read_text().count("round") if notes.exists() else 0
    note(f"round {os.environ['WORLD_SIZE']}")
    rounds = sys.argv[2:]
    sys.exit(end(rounds[min(number, len(rounds) - 1)].split(",")[rank]))
