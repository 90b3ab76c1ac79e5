"""What a worker said last about its end, left where its launcher looks for it.

torch's elastic launchers name a file for that in `TORCHELASTIC_ERROR_FILE`. torchrun shows the
message in it instead of advice on tracebacks; the agent in `launch/` hands it on to whoever asks.
"""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "TORCHELASTIC_ERROR_FILE"
_BUG = 1


class LastWords(logging.Handler):
    """Leaves every log line that says with which code the process is to end, and every traceback.

    The newest one stands. A process that is ended by a signal has said nothing about it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "fields", {})
        code = fields.get("exit_code") if isinstance(fields, Mapping) else None
        said = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            code = _BUG if code is None else code
            said = f"{said}: {type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
        if isinstance(code, int):
            try:
                leave(self._path, said, exit_code=code)
            except OSError:
                self.handleError(record)


def leave(path: Path, said: str, *, exit_code: int) -> None:
    """Write it as torch reads it; the code tells the agent whether it is about this end."""
    words = {"message": said, "timestamp": int(time.time()), "exit_code": int(exit_code)}
    path.write_text(json.dumps(words))
