"""Claims about commands other than train: what is wrong with a command line is one line and 64."""

from typing import Any

import pytest
from cyclopts import App

from fmnist_dist.errors import DataDamagedError, ExitCode, UsageError
from fmnist_dist.usage import new_app, printable, run_app


def runs() -> App:
    app = new_app("runs")

    @app.command
    def show(run: str, /, *, json: bool = False, step: int | None = None) -> tuple[Any, ...]:
        """Show a run."""
        return run, json, step

    @app.command
    def verify(run: str, /) -> None:
        """Check every checkpoint."""
        raise DataDamagedError(run)

    return app


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "shwo x",
            "command shwo: there is no such command, expected show, verify; did you mean show?",
        ),
        ("show", "argument RUN: found nothing, expected a value; see --help"),
        ("show a b", "argument b: expected nothing here but flags; see --help"),
        ("show a --jsn", "flag --jsn: there is no such flag; did you mean --json?"),
        ("show a --step", "flag --step: found nothing, expected a value; see --help"),
        ("show a --step x", "flag --step: found 'x', expected a whole number"),
        ("show a --step 1 --step 2", "flag --step: found twice, expected once"),
        ("show a --json=maybe", "flag --json: found 'maybe', expected true or false"),
    ],
)
def test_a_wrong_command_line_is_one_line(line: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        run_app(runs(), line.split())
    assert str(caught.value) == expected
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_command_returns_its_result_and_raises_its_own_errors() -> None:
    assert run_app(runs(), ["show", "a", "--step", "3"]) == ("a", False, 3)
    with pytest.raises(DataDamagedError, match="damaged-run"):
        run_app(runs(), ["verify", "damaged-run"])


def test_help_is_printed_and_returns_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(runs(), ["--help"]) is None
    assert "Check every checkpoint." in capsys.readouterr().out


def test_nothing_that_a_user_wrote_breaks_the_line() -> None:
    assert printable("a\nb\x1b[31m\udcff" * 1000).isprintable()
    assert len(printable("x" * 1000)) == 80
