"""What one setting may hold: its type, choices and limits, read from a field's annotation.

`Config` asks its rules about every field; a rule accepts a value or says in one line what is wrong.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from cyclopts import UNSET, Group, Parameter, Token

from fmnist_dist.errors import UsageError
from fmnist_dist.usage import did_you_mean, shown

_INTEGERS_END = 2**63  # what fits into TOML's integers, every reader's of the log, and NumPy's
_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}
# Without password, query or fragment: a URL is shown and recorded. (Azure's container@account.)
_PLAIN_URL = re.compile(
    r"(?:file|local)://.+|[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@:]+@)?(?:[^/?#@:]+(?::\d+)?)?(?:/[^?#@]*)?(?<!//)",
    re.DOTALL,
)
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class InvalidSettingError(UsageError):
    """A setting holds what it cannot hold; `other` is a second one with which it does not agree."""

    def __init__(self, name: str, problem: str, *, other: str | None = None) -> None:
        super().__init__(f"{name}: {problem}")
        self.name = name
        self.problem = problem
        self.other = other


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a value of the right type must fulfil besides, and how to say so."""

    expected: str
    holds: Callable[[Any], bool]


POSITIVE = Limit(expected=" above 0", holds=lambda value: value > 0)
NOT_NEGATIVE = Limit(expected=" of at least 0", holds=lambda value: value >= 0)
FRACTION = Limit(expected=" of at least 0 and below 1", holds=lambda value: 0 <= value < 1)
URL = Limit(
    expected=" or a URL as in s3://bucket/folder; keys and other parameters come from the "
    "environment or the provider's files (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ...)",
    holds=lambda value: "://" not in value or _PLAIN_URL.fullmatch(value) is not None,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What one setting may hold."""

    kind: Any  # bool, int, float, str or Path
    optional: bool
    choices: tuple[str, ...]  # empty: any value within the limit
    limit: Limit | None
    words: tuple[str, ...] = ()  # that may stand in place of a number

    def accept(self, name: str, value: object) -> object:
        """Return a value in the setting's own type. Raises InvalidSettingError."""
        if self.optional and (value is None or value == "none"):
            return None
        if isinstance(value, str) and value in self.words:
            return value
        if self.kind is Path and type(value) is str and value:
            value = Path(value)
        # Exact types: a bool is an int to Python, not to a user. float() of 10**400 would overflow.
        if self.kind is float and type(value) is int and abs(value) < _INTEGERS_END:
            value = float(value)
        fits = isinstance(value, Path) if self.kind is Path else type(value) is self.kind
        if not fits or not self._allows(value):
            expected = self._expected(value)
            raise InvalidSettingError(name, f"found {shown(value)}, expected {expected}")
        return value

    def _allows(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if isinstance(value, int) and value >= _INTEGERS_END:
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if isinstance(value, str | Path) and (not str(value) or not str(value).isprintable()):
            return False  # lone surrogates too, which no log in JSON could hold
        return self.limit is None or self.limit.holds(value)

    def _expected(self, value: object) -> str:
        names = (*self.choices, *self.words)
        hint = did_you_mean(value, names) if isinstance(value, str) else ""
        what = " or ".join(self.choices) or _KINDS.get(self.kind, "a path")
        limit = self.limit.expected if self.limit is not None else ""
        end = " and below 2**63" if isinstance(value, int) and value >= _INTEGERS_END else ""
        words = (*self.words, "none") if self.optional else self.words
        *commas, last = (f"{what}{limit}{end}", *words)
        return f"{', '.join(commas)} or {last}{hint}" if commas else f"{last}{hint}"


def rule_of(hint: Any) -> Rule:
    """Return the rule of a field annotated as `Annotated[type, Limit, flag(...)]`."""
    annotated, *notes = get_args(hint)
    literal = get_origin(annotated) is Literal
    members = [kind for kind in get_args(annotated) or (annotated,) if kind is not NoneType]
    return Rule(
        kind=str if literal else members[0],
        optional=NoneType in get_args(annotated),
        choices=get_args(annotated) if literal else (),
        limit=next((note for note in notes if isinstance(note, Limit)), None),
        words=() if literal else _words(annotated),
    )


def _words(annotated: Any) -> tuple[str, ...]:
    """Return the words of a type such as `int | Literal["auto"] | None`."""
    literals = (each for each in get_args(annotated) if get_origin(each) is Literal)
    return tuple(word for each in literals for word in get_args(each))


def flag(
    group: Group, text: str, metavar: str | None = None, *, has_negative: bool = True
) -> Parameter:
    """Return how a setting looks on the command line; its metavar is its unit.

    A switch has a form that begins with `--no-`, unless its own name is such a one.
    """
    negative = None if has_negative else ()
    return Parameter(
        group=group, help=text, metavar=metavar, converter=_from_tokens, negative=negative
    )


def _from_tokens(kind: Any, tokens: tuple[Token, ...]) -> object:
    """Read text as `kind`; text that cannot be read stays text, for the rule to refuse."""
    value, text = tokens[-1].implicit_value, tokens[-1].value
    if value is not UNSET:
        return value  # from TOML, where values have types
    if _words(kind):
        kind = next(each for each in get_args(kind) if get_origin(each) is not Literal)
    if kind is bool:
        return _BOOLEANS.get(text.lower(), text)
    try:
        return kind(text) if kind in {int, float} else text
    except ValueError:
        return text
