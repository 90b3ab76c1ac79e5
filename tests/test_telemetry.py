"""Log lines can be read by people, parsed by machines, and told apart by rank."""

import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fmnist_dist.telemetry.events import EventLog, Field, LogFormat, configure, set_context
from fmnist_dist.telemetry.extent import Extent

EXTENT = Extent(first_step=100, total_steps=500, num_epochs=5)
LOG = EventLog("fmnist_dist.job")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root, package = logging.getLogger(), logging.getLogger("fmnist_dist")
    handlers, level = root.handlers[:], package.level
    yield
    root.handlers[:] = handlers
    package.setLevel(level)
    logging.captureWarnings(capture=False)


def lines_of(act: Callable[[], object], *, log_format: LogFormat, rank: int = 0) -> list[str]:
    stream = io.StringIO()
    configure(log_format=log_format, rank=rank, stream=stream)
    act()
    return stream.getvalue().splitlines()


def objects_of(act: Callable[[], object], *, rank: int = 0) -> list[dict[str, object]]:
    return [json.loads(line) for line in lines_of(act, log_format="json", rank=rank)]


def test_text_is_a_clock_an_event_and_its_fields() -> None:
    fields: dict[str, Field] = {
        "step": 1200,
        "seconds": 0.21049,
        "images": 12345.678,
        "why": "a b",
        "ranks": [1, 2],
    }
    (line,) = lines_of(lambda: LOG.info("saved", **fields), log_format="text")
    expected = ' saved  step=1200 seconds=0.2105 images=12346 why="a b" ranks=1,2'
    assert re.fullmatch(r"\d\d:\d\d:\d\d" + re.escape(expected), line)


def test_only_rank_0_narrates_and_other_ranks_name_themselves_when_they_warn() -> None:
    def act() -> None:
        LOG.info("started")
        LOG.warning("peer_lost", peer=1)

    (line,) = lines_of(act, log_format="text", rank=3)
    assert line.endswith(" [rank 3] warning: peer_lost  peer=1")


def test_json_has_time_level_event_rank_context_and_fields() -> None:
    def act() -> None:
        set_context(attempt=3)
        LOG.info("saved", step=1200)

    (line,) = objects_of(act)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(line.pop("time")))
    assert line == {"level": "info", "event": "saved", "rank": 0, "attempt": 3, "step": 1200}


def test_json_stays_strict_and_one_line_whatever_the_fields_hold() -> None:
    awkward: dict[str, Field] = {"loss": float("nan"), "path": Path("/x"), "rank": 7}
    awkward["text"] = 'two\nlines "quoted"'
    (raw,) = lines_of(lambda: LOG.warning("odd", **awkward), log_format="json", rank=2)
    line = json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (line["loss"], line["text"], line["path"]) == ("nan", 'two\nlines "quoted"', "/x")
    assert (line["rank"], line["rank_"]) == (2, 7)  # whose line it is, and which rank it is about


def test_other_loggers_and_warnings_take_the_same_way() -> None:
    def act() -> None:
        logging.getLogger("fmnist_dist.data").info("read", extra={"fields": {"images": 5}})
        logging.getLogger("fmnist_dist.data").warning("mirror %d is slow", 2)
        logging.getLogger("botocore").info("chatter")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(capture=False)
            logging.captureWarnings(capture=True)
            warnings.warn("old name", FutureWarning, stacklevel=1)

    read, slow, warning = objects_of(act)
    assert (read["event"], read["images"]) == ("read", 5)
    assert (slow["event"], slow["message"]) == ("message", "mirror 2 is slow")
    assert warning["logger"] == "py.warnings"
    assert "old name" in str(warning["message"])


def test_an_exception_brings_its_traceback() -> None:
    def act() -> None:
        try:
            _ = 1 // int("0")
        except ZeroDivisionError:
            LOG.exception("failed", step=3)

    (line,) = objects_of(act)
    assert (line["level"], line["step"]) == ("error", 3)
    assert str(line["exception"]).endswith("ZeroDivisionError: integer division or modulo by zero")
    assert lines_of(act, log_format="text")[1] == "Traceback (most recent call last):"


def test_configured_twice_a_line_is_said_once() -> None:
    stream = io.StringIO()
    configure(log_format="text", rank=0, stream=stream)
    assert len(lines_of(lambda: LOG.info("started"), log_format="text")) == 1
    assert stream.getvalue() == ""
