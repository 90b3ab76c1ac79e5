"""How every command speaks to its user: one-line usage errors, and help pages of aligned columns.

Commands are cyclopts Apps, made by `new_app`. Cyclopts would print errors as panels and exit with
2; `run_app` raises `UsageError` instead, which ends every command of this package with one line and
exit code 64.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from cyclopts import (
    App,
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    RepeatArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from fmnist_dist.errors import UsageError
from fmnist_dist.masking import masked_url

if TYPE_CHECKING:  # 15 ms at every start, for pages that are rarely printed
    from cyclopts.help import HelpEntry, HelpPanel

_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}
_FOUND_WIDTH = 80  # characters of a wrong value that are worth repeating
_NAMES_WIDTH = 33  # columns: "--max-unsaved-seconds SECONDS" and a margin of two


def new_app(name: str, **more: Any) -> App:
    """Return a command whose help pages look like those of all others here."""
    app = App(name=name, help_format="plaintext", help_formatter=columns, version_flags=[], **more)
    app["--help"].help = "print this page"
    return app


def run_app(app: App, argv: Sequence[str]) -> Any:
    """Run the command that `argv` asks for and return what it returns; None after `--help`.

    Raises UsageError, with one line, for whatever is wrong with `argv`; what the command itself
    raises passes through.
    """
    try:
        # A command that calls another App would otherwise inherit that one's habits.
        return app(list(argv), exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        raise UsageError(_line(error)) from error


def shown(value: object) -> str:
    """Return a value that was found, as a user would write it and on one line."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case dict():
            return "a table"
        case list():
            return "a list"
        case str() | Path():
            return f"'{printable(str(value))}'"
        case _:
            return printable(str(value))


def printable(text: str) -> str:
    """Return what a user wrote so that it stays on one line and in any encoding."""
    text = masked_url(text)
    short = text if len(text) <= _FOUND_WIDTH else f"{text[: _FOUND_WIDTH - 3]}..."
    return short if short.isprintable() else repr(short)[1:-1]


def did_you_mean(wrong: str, right: Iterable[str], *, otherwise: str = "") -> str:
    """Return `; did you mean X?` for the name nearest to a wrong one, else `otherwise`.

    Case, leading dashes and the choice between - and _ are no difference.
    """
    names = {_plain(name): name for name in right}
    close = get_close_matches(_plain(wrong), names, n=1, cutoff=0.55)
    return f"; did you mean {names[close[0]]}?" if close else otherwise


def columns(console: Any, options: Any, panel: "HelpPanel") -> None:
    """Print one group of a help page: names left, description and default right, no boxes.

    A `help_formatter` of cyclopts; `console` and `options` are rich's.
    """
    if not panel.entries:
        return
    width = max(options.max_width - _NAMES_WIDTH, 20)
    lines = ["", f"{panel.title}:"]
    for entry in panel.entries:
        wrapped = wrap(_description(entry), width, break_on_hyphens=False) or [""]
        lines += [f"  {_names(entry)}".ljust(_NAMES_WIDTH) + wrapped[0]]
        lines += [" " * _NAMES_WIDTH + line for line in wrapped[1:]]
    console.print("\n".join(map(str.rstrip, lines)), markup=False, highlight=False, soft_wrap=True)


def _names(entry: "HelpEntry") -> str:
    if entry.negative_names:
        return f"--[no-]{entry.positive_names[0].removeprefix('--')}"
    if entry.positional_label:
        return entry.positional_label
    return f"{', '.join(entry.all_options)} {entry.metavar or ''}"


def _description(entry: "HelpEntry") -> str:
    text = entry.description.primary_renderable if entry.description is not None else ""
    choices = f": {'|'.join(entry.choices)}" if entry.choices else ""
    default = entry.default
    if default is None and NoneType in get_args(entry.type):
        default = "none"
    # Defaults as the user would write them: 300 and false, not 300.0 and False.
    shown_default = "" if default is None else f" [{default.removesuffix('.0')}]"
    return f"{text}{choices}{shown_default.replace('[False]', '[false]')}"


def _line(error: CycloptsError) -> str:
    """Return what is wrong as `where: what was found, what was expected`."""
    wrong = (error.unused_tokens or ["?"])[0]
    match error:
        case UnknownOptionError():
            line = _unknown_flag(error)
        case UnknownCommandError():
            commands = [name for name in error.app or () if not name.startswith("-")]
            expected = f"expected {', '.join(commands)}{did_you_mean(wrong, commands)}"
            line = f"command {printable(wrong)}: there is no such command, {expected}"
        case MissingArgumentError() if error.argument is not None:
            name = error.keyword or error.argument.name
            line = f"{_where(name)}: found nothing, expected a value; see --help"
        case RepeatArgumentError():
            line = f"flag {error.token.keyword}: found twice, expected once"
        case CoercionError() if error.token is not None and error.argument is not None:
            where = _where(error.token.keyword or error.argument.name)
            expected = _KINDS.get(error.target_type, "something else")
            line = f"{where}: found {shown(error.token.value)}, expected {expected}"
        case UnusedCliTokensError():
            line = f"argument {printable(wrong)}: expected nothing here but flags; see --help"
        case _:
            line = " ".join(str(error).split())
    return line


def _unknown_flag(error: UnknownOptionError) -> str:
    wrong = (error.token.keyword or error.token.value).partition("=")[0]
    flags = [arg.name for arg in error.argument_collection if arg.name.startswith("--")]
    if wrong in flags:
        return f"flag {wrong}: found after --, expected before it; after -- nothing is a flag"
    hint = did_you_mean(wrong, flags, otherwise="; see --help")
    return f"flag {printable(wrong)}: there is no such flag{hint}"


def _where(name: str) -> str:
    return f"flag {name}" if name.startswith("-") else f"argument {name}"


def _plain(name: str) -> str:
    # Without the prefix that all variables share: it would make any two of them look alike.
    return name.lstrip("-").replace("-", "_").lower().removeprefix("fmnist_dist_")
