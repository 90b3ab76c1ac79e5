"""Where settings come from: flags, then FMNIST_DIST_* variables, then a TOML file, then defaults.

`python -m fmnist_dist.settings [flags]` checks them, starts nothing and prints what holds.
A value that loses to a stronger source is not judged; a name is judged wherever it stands.
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Argument, ArgumentCollection, Parameter, Token

from fmnist_dist.config import AUTO, RUN, Config, Value, to_json
from fmnist_dist.errors import FmnistDistError, UsageError
from fmnist_dist.rule import InvalidSettingError
from fmnist_dist.usage import did_you_mean, new_app, printable, run_app, shown

PREFIX = "FMNIST_DIST_"
# Known names with the prefix that are no settings, and why.
NOT_SETTINGS = frozenset(
    {
        "FMNIST_DIST_FAULTS",  # faults that tests inject; never in a config file
        "FMNIST_DIST_OWNER",  # the launch that agents belong to: `distributed/roster.py`
    }
)
# What Kubernetes sets in every pod beside a Service called fmnist-dist.
_SERVICE_LINK = re.compile(
    r"FMNIST_DIST_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?"
    r"|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
_CONFIG = "config"  # the flag and variable that name the TOML file; no setting itself
# The backslash keeps rich from reading [flags] as a style.
_USAGE = r"""Usage: torchrun --nproc_per_node=N -m fmnist_dist.train \[flags]
       python -m fmnist_dist.train \[flags]"""
_EPILOGUE = f"""\
In brackets: defaults; none = off. Every flag is also an environment variable
({PREFIX}LR=0.2) and a key of the TOML file (lr = 0.2).
Flags win over the environment, the environment over the file."""
_DEFAULTS = Config()


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What one launch asks for."""

    config: Config
    explicit: dict[str, Value]  # the settings that somebody wrote, by field name, as in JSON
    sources: dict[str, str]  # where: `flag --lr`, `environment FMNIST_DIST_LR`, `run.toml: lr`


def load(argv: Sequence[str], environ: Mapping[str, str]) -> Launch:
    """Return what flags, environment and TOML ask for.

    Raises UsageError with one line that names the source; `--help` prints and raises SystemExit.
    """
    sources: dict[str, str] = {}
    app = new_app(
        "fmnist_dist.train",
        default_command=_settings,
        config=(partial(_add_environment, environ), _add_file, partial(_note_sources, sources)),
        usage=_USAGE,
        help="Train on Fashion-MNIST; the same command resumes a run that exists.",
        help_epilogue=_EPILOGUE,
        group_commands=RUN,
    )
    try:
        config = run_app(app, argv)
    except InvalidSettingError as error:
        raise UsageError(_with_sources(error, sources)) from error
    if config is None:
        raise SystemExit(0)
    if config.save_every_steps == AUTO and "save_every_seconds" not in sources:
        # A default of 60 seconds would overrule most intervals that are chosen.
        config = replace(config, save_every_seconds=None)
    values = to_json(config)
    sources.pop(_CONFIG, None)
    return Launch(config=config, explicit={name: values[name] for name in sources}, sources=sources)


def _settings(
    *,
    config: Annotated[Config, Parameter(name="*")] = _DEFAULTS,
    file: Annotated[  # noqa: ARG001 - `_add_file` reads it
        str | None,
        Parameter(name=f"--{_CONFIG}", group=RUN, help="file with settings", metavar="TOML"),
    ] = None,
) -> Config:
    return config


def _by_name(arguments: ArgumentCollection) -> dict[str, Argument]:
    """Return the arguments that have values, by field name; the file's path is `config`."""
    flags = ((argument.name, argument) for argument in arguments)
    return {name[2:].replace("-", "_"): arg for name, arg in flags if name.startswith("--")}


def _add_environment(
    environ: Mapping[str, str], _app: App, _commands: tuple[str, ...], arguments: ArgumentCollection
) -> None:
    targets = {PREFIX + name.upper(): argument for name, argument in _by_name(arguments).items()}
    for name in sorted(name for name in environ if name.startswith(PREFIX)):
        if name in NOT_SETTINGS or _SERVICE_LINK.fullmatch(name):
            continue
        if name not in targets:
            hint = did_you_mean(name, targets, otherwise="; unset it, or see --help")
            raise UsageError(f"environment {printable(name)}: there is no such setting{hint}")
        if targets[name].tokens:
            continue
        if not environ[name]:
            raise UsageError(f"environment {name}: found nothing, expected a value; or unset it")
        targets[name].append(Token(value=environ[name], source=f"environment {name}"))


def _add_file(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    targets = _by_name(arguments)
    for token in targets.pop(_CONFIG).tokens:
        seen: dict[str, str] = {}
        for key, value in _read(token).items():
            name = key.replace("-", "_")
            where = f"{printable(token.value)}: {printable(key)}"
            if name not in targets:
                raise UsageError(f"{where}: {_not_a_key(key, value, targets)}")
            if name in seen:
                raise UsageError(
                    f"{where}: is the same setting as {seen[name]}, expected one of them"
                )
            seen[name] = key
            if not targets[name].tokens:
                targets[name].append(Token(implicit_value=value, source=where))


def _read(token: Token) -> dict[str, Any]:
    """Return the keys of the TOML file that a token names. Raises UsageError."""
    import tomllib  # noqa: PLC0415 - 15 ms, and most launches have no file

    try:
        return tomllib.loads(Path(token.value).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{printable(token.value)}: this is not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{printable(token.value)}: this is not TOML: not UTF-8 text") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"{_source(token)}: cannot read {shown(token.value)}, expected a TOML file: {reason}"
        ) from error


def _not_a_key(key: str, value: object, known: Mapping[str, Argument]) -> str:
    if isinstance(value, dict):
        return "found a table, expected all settings at the top level, without tables"
    hint = did_you_mean(key, known, otherwise="; see --help")
    return f"there is no such setting{hint}"


def _note_sources(
    sources: dict[str, str], _app: App, _commands: tuple[str, ...], arguments: ArgumentCollection
) -> None:
    named = _by_name(arguments).items()
    sources.update({name: _source(arg.tokens[-1]) for name, arg in named if arg.tokens})


def _source(token: Token) -> str:
    return f"flag {token.keyword}" if token.source == "cli" else token.source


def _with_sources(error: InvalidSettingError, sources: Mapping[str, str]) -> str:
    line = f"{sources.get(error.name, f'default of {error.name}')}: {error.problem}"
    if error.other is None:
        return line
    return f"{line} ({sources.get(error.other, 'its default')})"


def describe(launch: Launch) -> str:
    """Return the settings that hold as a TOML file, each with its source in a comment."""
    # JSON's scalars are TOML's, but for null; "none" is how every source spells None.
    values = {n: "none" if v is None else v for n, v in to_json(launch.config).items()}
    lines = {n: f"{n} = {json.dumps(v, ensure_ascii=False)}" for n, v in values.items()}
    width = max(len(line) for line in lines.values())
    return "".join(
        f"{line:{width}}  # {launch.sources.get(name, 'default')}\n" for name, line in lines.items()
    )


def main() -> int:
    """Check the settings, print those that hold and return the exit code."""
    try:
        sys.stdout.write(describe(load(sys.argv[1:], os.environ)))
    except FmnistDistError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
