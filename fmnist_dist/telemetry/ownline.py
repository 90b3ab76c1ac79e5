"""Log lines on a terminal where another process draws the bar.

A worker draws it, and its keeper or another worker tells of that worker's end: the cursor stands at
the end of a bar that nobody will draw again.
"""

import io
from typing import TextIO


class OwnLine(io.TextIOBase):
    """Writes each line in place of what stands on the terminal's own; `logging` needs no more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str, /) -> int:
        return self._stream.write(f"\r\x1b[2K{text}")

    def flush(self) -> None:
        self._stream.flush()
