"""Log lines made of an event name and fields, for people (text) or machines (JSON).

    log = EventLog("fmnist_dist.job")
    log.info("saved", step=1200, seconds=0.21)

This is the standard library's `logging` with two formatters, on one handler at the root: warnings
of torch, of `warnings.warn` and of packages that may not import this one take the same way.
`logging.getLogger("fmnist_dist.data").info("read", extra={"fields": {"images": 60000}})` is an
event; without `fields` it is a message of that logger.

Rank 0 narrates (INFO), the other ranks speak only when something is wrong (WARNING).
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TextIO

_Scalar = str | int | float | bool | Path | None
Field = _Scalar | Sequence[_Scalar]
LogFormat = Literal["text", "json"]

PACKAGE_LOGGER = "fmnist_dist"
_HANDLER_NAME = "fmnist_dist.telemetry"
_RESERVED = frozenset({"time", "level", "event", "rank"})

# Fields that hold for the whole process, such as the attempt. JSON lines carry them, since machines
# read them out of order; for people they were said once, by the event that set them.
_context: dict[str, Field] = {}


@dataclass(frozen=True, slots=True)
class EventLog:
    """Names a logger, and lets it speak in events."""

    logger_name: str

    def info(self, event: str, /, **fields: Field) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: Field) -> None:
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: Field) -> None:
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, /, **fields: Field) -> None:
        """As `error`, with the traceback of the exception being handled."""
        self._log(logging.ERROR, event, fields, exc_info=True)

    def _log(
        self, level: int, event: str, fields: Mapping[str, Field], *, exc_info: bool = False
    ) -> None:
        logger = logging.getLogger(self.logger_name)
        logger.log(level, "%s", event, extra={"fields": fields}, exc_info=exc_info)


def configure(*, log_format: LogFormat, rank: int, stream: TextIO) -> None:
    """Send every log line of this process to `stream`; called again, it replaces the last call."""
    previous = _handler()
    if previous is not None:
        logging.getLogger().removeHandler(previous)
    _context.clear()
    handler = logging.StreamHandler(stream)
    handler.set_name(_HANDLER_NAME)
    handler.setFormatter(JsonFormatter(rank) if log_format == "json" else TextFormatter(rank))
    logging.getLogger().addHandler(handler)
    logging.getLogger(PACKAGE_LOGGER).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.captureWarnings(capture=True)


def set_context(**fields: Field) -> None:
    """Add fields, such as `attempt=3`, to all JSON lines of this process from now on."""
    _context.update(fields)


def divert(stream: TextIO) -> TextIO | None:
    """Write log lines to `stream` from now on, and return where they went before.

    A live progress bar puts itself in between this way: it alone knows what has to be redrawn.
    Before `configure` there is nothing to divert, and None is returned.
    """
    handler = _handler()
    return None if handler is None else handler.setStream(stream)


def _handler() -> "logging.StreamHandler[TextIO] | None":
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.get_name() == _HANDLER_NAME:
            return handler
    return None


class TextFormatter(logging.Formatter):
    """`12:34:56 saved  step=1200 seconds=0.21`, with `[rank 3]` and `warning:` where they apply."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        parts = [datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")]
        if self._rank != 0:
            parts.append(f"[rank {self._rank}]")
        if record.levelno > logging.INFO:
            parts.append(f"{record.levelname.lower()}:")
        if not _is_from_package(record):
            parts.append(f"{record.name}:")
        parts.append(record.getMessage().rstrip("\n"))
        fields = _fields(record)
        if fields:
            parts.append("")  # two spaces: the eye finds where the name ends
            parts.extend(f"{key}={_as_text(value)}" for key, value in fields.items())
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object: `time` (UTC, milliseconds), `level`, `event`, `rank`, context, fields."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        is_event = hasattr(record, "fields")
        line: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage() if is_event else "message",
            "rank": self._rank,
            **_context,
        }
        if not is_event:
            line |= {"logger": record.name, "message": record.getMessage().rstrip("\n")}
        # A field named like one of the keys above (the rank that was healed) must not replace it.
        line |= {_unreserved(key): _as_json(value) for key, value in _fields(record).items()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, allow_nan=False)


def _is_from_package(record: logging.LogRecord) -> bool:
    return record.name == PACKAGE_LOGGER or record.name.startswith(f"{PACKAGE_LOGGER}.")


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, Mapping) else {}


def _unreserved(key: str) -> str:
    return f"{key}_" if key in _RESERVED else key


def _as_text(value: object) -> str:
    """Read aloud: few digits, quotes only around what would fall apart without them."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"  # noqa: PLR2004
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(_as_text(item) for item in value)
    text = str(value)
    is_one_word = text.isprintable() and text and not set(text) & set(' ="')
    return text if is_one_word else json.dumps(text, ensure_ascii=False)


def _as_json(value: object) -> object:
    """NaN and infinities as strings: strict readers refuse them as numbers, and null hides them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_as_json(item) for item in value]
    return value
