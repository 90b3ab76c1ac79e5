"""The bar is on terminals only and draws seldom; elsewhere progress is log lines."""

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TextIO, cast

import pytest

from fmnist_dist.telemetry.bar import BarProgress
from fmnist_dist.telemetry.events import EventLog, LogFormat, configure
from fmnist_dist.telemetry.extent import Extent
from fmnist_dist.telemetry.ownline import OwnLine
from fmnist_dist.telemetry.progress import LineProgress, NullProgress, make_progress

EXTENT = Extent(first_step=100, total_steps=500, num_epochs=5)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root, package = logging.getLogger(), logging.getLogger("fmnist_dist")
    handlers, level = root.handlers[:], package.level
    yield
    root.handlers[:] = handlers
    package.setLevel(level)
    logging.captureWarnings(capture=False)


def run_steps(
    steps: list[int], *, seconds_per_step: float, epoch_of: int = 100
) -> list[dict[str, object]]:
    """Tell a LineProgress of steps that a clock of our own spaces; return its events."""
    now = 0.0
    stream = io.StringIO()
    configure(log_format="json", rank=0, stream=stream)
    progress = LineProgress(extent=EXTENT, clock=lambda: now)
    for step in steps:
        now += seconds_per_step
        epoch, ends = -(-step // epoch_of), step % epoch_of == 0
        progress.update(epoch=epoch, step=step, loss=0.5, images_per_second=99.0, ends_epoch=ends)
        progress.saved(step)
    progress.close()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_lines_come_every_ten_seconds_at_the_end_of_each_epoch_and_at_the_end() -> None:
    lines = run_steps(list(range(101, 231)), seconds_per_step=0.25)
    assert [line["step"] for line in lines] == [140, 180, 200, 230]
    assert [line["checkpoint"] for line in lines] == [139, 179, 199, 230]
    assert {line["event"] for line in lines} == {"progress"}


def test_time_left_counts_from_the_first_step_of_this_attempt_and_from_recent_speed() -> None:
    first = run_steps(list(range(101, 141)), seconds_per_step=0.25)[0]
    assert first["seconds_left"] == 90  # 360 steps; from step 0 it would be 26
    slow_then_fast = [101, *range(110, 500, 10)]
    lines = run_steps(slow_then_fast, seconds_per_step=10.0)
    assert lines[-1]["seconds_left"] == 10


def test_a_step_back_is_no_speed() -> None:
    lines = run_steps([110, 120, 105, 115], seconds_per_step=10.0)
    assert [line["seconds_left"] for line in lines] == [390, 380, None, 385]


def test_ranks_other_than_0_have_no_progress() -> None:
    progress = make_progress(
        log_format="text", rank=1, stream=sys.stderr, stream_is_terminal=True, extent=EXTENT
    )
    assert isinstance(progress, NullProgress)


CHILD = """
import sys
from fmnist_dist.telemetry.events import EventLog, configure
from fmnist_dist.telemetry.extent import Extent
from fmnist_dist.telemetry.progress import is_terminal, make_progress

log_format, stream = sys.argv[1], sys.stderr
configure(log_format=log_format, rank=0, stream=stream)
now = 0.0
progress = make_progress(
    log_format=log_format, rank=0, stream=stream, stream_is_terminal=is_terminal(stream),
    extent=Extent(first_step=100, total_steps=140, num_epochs=2), clock=lambda: now,
)
for step in range(101, 121):
    now += 1
    progress.update(epoch=1, step=step, loss=0.4567, images_per_second=1650.0, ends_epoch=False)
    if step == 110:
        progress.saved(step)
        EventLog("fmnist_dist.job").info("saved", step=step, where="x" * 90)
        print("from elsewhere", file=sys.stderr)
progress.close()
EventLog("fmnist_dist.job").info("rich", is_imported="rich" in sys.modules)
"""


def start_child(log_format: LogFormat, *, stderr: int, term: str) -> subprocess.Popen[bytes]:
    environment = {"TERM": term, "PATH": os.defpath, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", CHILD, log_format]
    return subprocess.Popen(command, env=environment, stderr=stderr)


def run_child_on_a_terminal(log_format: LogFormat, *, term: str = "xterm") -> str:
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    with start_child(log_format, stderr=terminal, term=term) as child:
        os.close(terminal)
        output = b""
        with os.fdopen(main, "rb", buffering=0) as screen, suppress(OSError):  # EIO: it has ended
            while part := screen.read(4096):
                output += part
    assert child.returncode == 0
    return output.decode()


def rows_on_screen(output: str) -> list[str]:
    """Return what a person would see, for the few control codes that a one-line bar needs."""
    rows = [""]
    for token in re.findall(r"\x1b\[[\d;?]*[a-zA-Z]|[\r\n]|[^\r\n\x1b]+", output):
        if token in {"\r", "\x1b[2K"}:
            rows[-1] = "" if token == "\x1b[2K" else rows[-1]
        elif token == "\n":
            rows.append("")
        elif not token.startswith("\x1b"):
            rows[-1] = token if rows[-1] == "" else rows[-1] + token
        else:
            assert token.endswith(("m", "h", "l")), f"{token!r} moves the cursor"
    return rows


def test_a_terminal_shows_a_bar_and_whole_log_lines_above_it() -> None:
    output = run_child_on_a_terminal("text")
    saved, elsewhere, bar, last, after = rows_on_screen(output)
    line = f" saved  step=110 where={'x' * 90}"
    assert saved[8:] == line  # all of its row, but for the clock
    assert line in output  # not coloured, not wrapped
    assert elsewhere == "from elsewhere"
    assert re.fullmatch(
        r"epoch 1/2 ━+╸?━+ 120/140 loss 0.4567 1650 images/s 0:00:20 saved 110", bar
    )
    assert (last[8:], after) == (" rich  is_imported=yes", "")


def test_a_line_of_another_process_takes_the_place_of_a_bar_that_nobody_draws_any_more() -> None:
    terminal = io.StringIO()
    BarProgress(stream=terminal, extent=EXTENT, clock=lambda: 0.0)  # its process is killed
    configure(log_format="text", rank=0, stream=cast("TextIO", OwnLine(terminal)))
    EventLog("fmnist_dist.keeper").warning("worker lost")
    EventLog("fmnist_dist.keeper").warning("and another line")
    lost, another, after = rows_on_screen(terminal.getvalue())
    assert (lost[8:], another[8:], after) == (
        " warning: worker lost",
        " warning: and another line",
        "",
    )


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_pipe_sees_no_escape_code_and_no_rich(log_format: LogFormat) -> None:
    with start_child(log_format, stderr=subprocess.PIPE, term="xterm") as child:
        output = child.communicate(timeout=60)[1].decode()
    assert "\x1b" not in output
    assert "\r" not in output
    rich = output.splitlines()[-1]
    assert rich.endswith("is_imported=no") or json.loads(rich)["is_imported"] is False


@pytest.mark.parametrize(("log_format", "term"), [("json", "xterm"), ("text", "dumb")])
def test_a_terminal_gets_lines_when_it_wants_json_or_can_no_more(
    log_format: LogFormat, term: str
) -> None:
    output = run_child_on_a_terminal(log_format, term=term)
    assert "\x1b" not in output
    assert output.count("progress") == 2


def test_a_bar_starts_at_the_first_step_and_a_kill_leaves_a_terminal_with_a_cursor() -> None:
    stream = io.StringIO()
    progress = BarProgress(stream=stream, extent=EXTENT, clock=lambda: 0.0)
    at_work = stream.getvalue()
    progress.close()
    assert "100/500" in at_work
    assert at_work.rfind("\x1b[?25h") > at_work.rfind("\x1b[?25l")  # shown after it was hidden


def test_the_bar_is_drawn_at_most_ten_times_a_second() -> None:
    stream, ticks = io.StringIO(), count()
    progress = BarProgress(stream=stream, extent=EXTENT, clock=lambda: next(ticks) / 1000)
    for step in range(101, 401):
        progress.update(epoch=1, step=step, loss=1.0, images_per_second=1.0, ends_epoch=False)
    drawn = stream.getvalue().count("epoch 1/5")
    elapsed_seconds = next(ticks) / 1000
    progress.close()
    assert drawn <= 10 * elapsed_seconds
    assert stream.getvalue().count("400/500") >= 1  # the last state is shown however recent


def test_a_terminal_that_goes_away_ends_the_bar_and_not_the_training() -> None:
    main, terminal = pty.openpty()
    stream = os.fdopen(terminal, "w")
    configure(log_format="text", rank=0, stream=stream)
    ticks = count()
    progress = BarProgress(stream=stream, extent=EXTENT, clock=lambda: float(next(ticks)))
    os.close(main)
    with pytest.raises(OSError, match="Input/output"):
        os.write(terminal, b"nobody reads this")
    for step in (101, 102):
        progress.update(epoch=1, step=step, loss=1.0, images_per_second=1.0, ends_epoch=False)
    progress.close()
    with suppress(OSError):
        stream.close()
