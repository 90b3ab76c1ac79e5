"""Claims about where settings come from, and about the one line that names what is wrong."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fmnist_dist.config import Config, Value, rules, to_json
from fmnist_dist.errors import ExitCode, UsageError
from fmnist_dist.settings import Launch, describe, load

# One value for every setting that differs from its default.
OTHER: dict[str, Value] = {
    "run_dir": "file:///tmp/run",
    "max_steps": 7,
    "seed": 3,
    "log_format": "json",
    "epochs": 2,
    "batch_size": 64,
    "optimizer": "adamw",
    "lr": 0.001,
    "schedule": "cosine",
    "weight_decay": 0.0,
    "label_smoothing": 0.1,
    "ema": 0.5,
    "on_non_finite": "skip",
    "model": "cnn",
    "dropout": 0.5,
    "precision": "bf16",
    "dataset": "fashion-mnist",
    "data_dir": "some/where",
    "augment": "none",
    "eval_every_epochs": 2,
    "device": "cpu",
    "logical_shards": 4,
    "threads_per_worker": 2,
    "step_timeout": 1.5,
    "drain_seconds": 2.5,
    "no_keeper": True,
    "save_every_steps": 10,
    "save_every_seconds": 5.0,
    "keep_last": 1,
    "keep_every": 100,
    "max_unsaved_seconds": 60.0,
    "local_tier": "near/by",
    "single_writer": True,
}


def toml(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def as_toml(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool | int | float) else f'"{value}"'


def refused(*argv: str, **environ: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(argv, environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_setting_has_a_value_in_these_tests() -> None:
    assert list(OTHER) == list(rules())
    same = {name for name, value in to_json(Config()).items() if OTHER[name] == value}
    assert same == {"model", "dataset"}, "these two have a single choice so far"


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_can_come_from_a_flag(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    launch = load([flag if OTHER[name] is True else f"{flag}={OTHER[name]}"], {})
    assert launch.explicit == {name: OTHER[name]}
    assert to_json(launch.config)[name] == OTHER[name]
    assert launch.sources == {name: f"flag {flag}"}


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_can_come_from_the_environment(name: str) -> None:
    variable = f"FMNIST_DIST_{name.upper()}"
    launch = load([], {variable: str(OTHER[name])})
    assert launch.explicit == {name: OTHER[name]}
    assert to_json(launch.config)[name] == OTHER[name]
    assert launch.sources == {name: f"environment {variable}"}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("dash", ["-", "_"])
def test_every_setting_can_come_from_a_file(name: str, dash: str, tmp_path: Path) -> None:
    key = name.replace("_", dash)
    path = toml(tmp_path, f"{key} = {as_toml(OTHER[name])}")
    launch = load(["--config", str(path)], {})
    assert launch.explicit == {name: OTHER[name]}
    assert to_json(launch.config)[name] == OTHER[name]
    assert launch.sources == {name: f"{path}: {key}"}


def test_nothing_written_means_defaults_and_nothing_explicit() -> None:
    assert load([], {"PATH": "/bin"}) == Launch(config=Config(), explicit={}, sources={})


def test_a_default_that_somebody_writes_is_explicit() -> None:
    assert load(["--epochs", str(Config().epochs)], {}).explicit == {"epochs": Config().epochs}


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    path = toml(tmp_path, "lr = 1\nepochs = 1\nseed = 1")
    environ = {
        "FMNIST_DIST_CONFIG": str(path),
        "FMNIST_DIST_LR": "2",
        "FMNIST_DIST_EPOCHS": "2",
    }
    launch = load(["--lr", "3"], environ)
    assert launch.explicit == {"lr": 3.0, "epochs": 2, "seed": 1}


def test_a_flag_names_another_file_than_the_environment(tmp_path: Path) -> None:
    path = toml(tmp_path, "lr = 1")
    environ = {"FMNIST_DIST_CONFIG": "missing.toml"}
    assert load([f"--config={path}"], environ).explicit == {"lr": 1.0}


def test_a_flag_repairs_a_wrong_value_in_the_environment() -> None:
    assert load(["--lr", "1"], {"FMNIST_DIST_LR": "fast"}).config.lr == 1.0


def test_none_switches_an_optional_setting_off_in_every_source(tmp_path: Path) -> None:
    path = toml(tmp_path, 'save_every_seconds = "none"')
    for launch in (
        load(["--save-every-seconds", "none"], {}),
        load([], {"FMNIST_DIST_SAVE_EVERY_SECONDS": "none"}),
        load(["--config", str(path)], {}),
    ):
        assert launch.explicit == {"save_every_seconds": None}
        assert launch.config.save_every_seconds is None


def test_the_interval_between_saves_may_be_left_to_the_program(tmp_path: Path) -> None:
    path = toml(tmp_path, 'save-every-steps = "auto"')
    for launch in (
        load(["--save-every-steps", "auto"], {}),
        load([], {"FMNIST_DIST_SAVE_EVERY_STEPS": "auto"}),
        load(["--config", str(path)], {}),
    ):
        assert launch.explicit == {"save_every_steps": "auto"}
        assert launch.config.save_every_steps == "auto"
        assert launch.config.save_every_seconds is None  # or it would overrule what is chosen
        assert tomllib.loads(describe(launch))["save_every_seconds"] == "none"


def test_seconds_that_somebody_writes_hold_beside_an_interval_that_is_chosen() -> None:
    launch = load(["--save-every-steps=auto"], {"FMNIST_DIST_SAVE_EVERY_SECONDS": "60"})
    assert launch.config.save_every_seconds == 60.0


@pytest.mark.parametrize("value", ["0", "1.5", "-3", "fast"])
def test_what_is_neither_a_number_of_steps_nor_auto_is_refused(value: str) -> None:
    assert refused("--save-every-steps", value) == (
        f"flag --save-every-steps: found {value if value.strip('-').isdigit() else repr(value)}, "
        "expected a whole number above 0, auto or none"
    )


def test_a_word_that_is_nearly_right_is_named() -> None:
    assert refused("--save-every-steps=auot").endswith("auto or none; did you mean auto?")
    assert "did you mean" not in refused("--seed=auto")


def test_a_switch_has_a_negative_form_and_nothing_else_has() -> None:
    assert load(["--no-single-writer"], {"FMNIST_DIST_SINGLE_WRITER": "1"}).explicit == {
        "single_writer": False
    }
    assert refused("--no-optimizer") == (
        "flag --no-optimizer: there is no such flag; did you mean --optimizer?"
    )


def test_a_switch_whose_name_is_negative_has_that_form_only(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("no-keeper = true\n")
    for launch in (
        load(["--no-keeper"], {}),
        load([], {"FMNIST_DIST_NO_KEEPER": "true"}),
        load(["--config", str(path)], {}),
    ):
        assert launch.explicit == {"no_keeper": True}
    off = load([], {"FMNIST_DIST_NO_KEEPER": "false"})
    assert off.explicit == {"no_keeper": False}
    for wrong in ("--no-no-keeper", "--keeper"):
        said = f"flag {wrong}: there is no such flag; did you mean --no-keeper?"
        assert refused(wrong) == said
    page = settings("--help", COLUMNS="100").stdout
    assert "  --no-keeper  " in page
    assert "--[no-]single-writer" in page
    assert "no-no" not in page


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--leer 1", "flag --leer: there is no such flag; did you mean --lr?"),
        ("--batchsize=64", "flag --batchsize: there is no such flag; did you mean --batch-size?"),
        ("--zzz", "flag --zzz: there is no such flag; see --help"),
        ("-x", "flag -x: there is no such flag; see --help"),
        ("--lr.x 1", "flag --lr.x: there is no such flag; did you mean --lr?"),
        ("--lr fast", "flag --lr: found 'fast', expected a number above 0"),
        ("--lr nan", "flag --lr: found nan, expected a number above 0"),
        ("--lr -inf", "flag --lr: found -inf, expected a number above 0"),
        ("--lr=", "flag --lr: found '', expected a number above 0"),
        ("--lr", "flag --lr: found nothing, expected a value; see --help"),
        ("--lr 1 --lr 2", "flag --lr: found twice, expected once"),
        ("--epochs 8.5", "flag --epochs: found '8.5', expected a whole number above 0"),
        ("--epochs true", "flag --epochs: found 'true', expected a whole number above 0"),
        ("--keep-every 0", "flag --keep-every: found 0, expected a whole number above 0 or none"),
        (
            "--optimizer adam",
            "flag --optimizer: found 'adam', expected sgd or adamw; did you mean adamw?",
        ),
        ("--single-writer=si", "flag --single-writer: found 'si', expected true or false"),
        ("junk", "argument junk: expected nothing here but flags; see --help"),
        ("-- x", "argument x: expected nothing here but flags; see --help"),
        ("-- --lr", "flag --lr: found after --, expected before it; after -- nothing is a flag"),
    ],
)
def test_a_wrong_flag_is_named(argv: str, expected: str) -> None:
    assert refused(*argv.split()) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "FMNIST_DIST_OPTIMISER",
            "sgd",
            "there is no such setting; did you mean FMNIST_DIST_OPTIMIZER?",
        ),
        ("FMNIST_DIST_lr", "1", "there is no such setting; did you mean FMNIST_DIST_LR?"),
        ("FMNIST_DIST_", "1", "there is no such setting; unset it, or see --help"),
        ("FMNIST_DIST_LR", "", "found nothing, expected a value; or unset it"),
        ("FMNIST_DIST_LR", "fast", "found 'fast', expected a number above 0"),
        ("FMNIST_DIST_SINGLE_WRITER", "si", "found 'si', expected true or false"),
        ("FMNIST_DIST_CONFIG", "", "found nothing, expected a value; or unset it"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, expected: str) -> None:
    assert refused(**{name: value}) == f"environment {name}: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning-rat = 1", "learning-rat: there is no such setting; see --help"),
        ("batchsize = 1", "batchsize: there is no such setting; did you mean batch_size?"),
        ('config = "b.toml"', "config: there is no such setting; see --help"),
        (
            "[training]\nlr = 1",
            "training: found a table, expected all settings at the top level, without tables",
        ),
        ("[lr]\nx = 1", "lr: found a table, expected a number above 0"),
        ("lr = [1]", "lr: found a list, expected a number above 0"),
        ("lr = []", "lr: found a list, expected a number above 0"),
        ("lr = 2026-01-01", "lr: found 2026-01-01, expected a number above 0"),
        ('lr = "0.1"', "lr: found '0.1', expected a number above 0"),
        ("lr = nan", "lr: found nan, expected a number above 0"),
        ("lr = true", "lr: found true, expected a number above 0"),
        ("epochs = true", "epochs: found true, expected a whole number above 0"),
        ("epochs = 8.0", "epochs: found 8.0, expected a whole number above 0"),
        ("single-writer = 1", "single-writer: found 1, expected true or false"),
        ("model = true", "model: found true, expected cnn"),
        ("lr = 1\nseed = = 2", "this is not TOML: Invalid value (at line 2, column 8)"),
        (b"lr = \xff", "this is not TOML: not UTF-8 text"),
        (
            "batch-size = 8\nbatch_size = 8",
            "batch_size: is the same setting as batch-size, expected one of them",
        ),
    ],
)
def test_a_wrong_key_of_a_file_is_named(text: str | bytes, expected: str, tmp_path: Path) -> None:
    path = toml(tmp_path, text)
    assert refused("--config", str(path)) == f"{path}: {expected}"


def test_a_name_is_judged_even_where_its_value_loses(tmp_path: Path) -> None:
    path = toml(tmp_path, "lr = 1\nl-r = 2")
    assert "l-r: there is no such setting" in refused("--lr", "1", "--config", str(path))


@pytest.mark.parametrize("kind", ["missing", "folder", "unreadable"])
def test_a_file_that_cannot_be_read_is_named_with_who_asked_for_it(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    if kind == "unreadable":
        path.symlink_to(path)  # a loop: unreadable for root too
    tail = f"cannot read '{path}', expected a TOML file: "
    assert refused("--config", str(path)).startswith(f"flag --config: {tail[:40]}")
    assert refused(FMNIST_DIST_CONFIG=str(path)).startswith(
        "environment FMNIST_DIST_CONFIG: cannot"
    )


def test_settings_that_disagree_are_both_named_with_their_sources() -> None:
    shards = {"FMNIST_DIST_LOGICAL_SHARDS": "7"}
    assert refused("--batch-size", "100", **shards) == (
        "flag --batch-size: found 100, expected a multiple of logical_shards = 7 "
        "(environment FMNIST_DIST_LOGICAL_SHARDS)"
    )
    assert refused("--batch-size", "100").endswith("logical_shards = 8 (its default)")
    assert refused(**shards).startswith("default of batch_size: found 512")


def test_what_kubernetes_and_fault_drills_set_is_no_setting() -> None:
    links = [
        "SERVICE_HOST",
        "SERVICE_PORT",
        "SERVICE_PORT_RENDEZVOUS",
        "PORT",
        "PORT_29500_TCP",
        "PORT_29500_TCP_PROTO",
        "PORT_29500_TCP_PORT",
        "PORT_29500_TCP_ADDR",
        "PORT_53_UDP_ADDR",
        "FAULTS",
    ]
    assert (
        load([], {f"FMNIST_DIST_{link}": "tcp://10.0.0.1:29500" for link in links}).explicit == {}
    )


@pytest.mark.parametrize(
    "name", ["PORTS", "PORT_X", "SERVICE", "SERVICE_HOST_2", "PORT_1_TCP_LR", "FAULT"]
)
def test_what_only_looks_like_a_service_link_is_refused(name: str) -> None:
    assert "there is no such setting" in refused(**{f"FMNIST_DIST_{name}": "1"})


def test_the_settings_that_hold_are_printed_as_a_file_that_means_the_same(tmp_path: Path) -> None:
    launch = load(["--lr", "0.1", "--run-dir", 'a"é\\b', "--save-every-seconds=none"], {})
    path = toml(tmp_path, describe(launch))
    assert load(["--config", str(path)], {}).config == launch.config
    assert list(tomllib.loads(describe(launch))) == list(rules())
    assert "# flag --lr\n" in describe(launch)


def settings(*argv: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fmnist_dist.settings", *argv]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FMNIST_DIST_")}
    environment = {**inherited, "COLUMNS": "80", **environ}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_command_checks_settings_before_anything_starts() -> None:
    good = settings("--seed", "4")
    assert (good.returncode, good.stderr) == (0, "")
    assert tomllib.loads(good.stdout)["seed"] == 4
    bad = settings("--seed", "4.5")
    assert (bad.returncode, bad.stdout) == (ExitCode.USAGE, "")
    assert bad.stderr == "flag --seed: found '4.5', expected a whole number of at least 0\n"


@pytest.mark.parametrize("width", [80, 100])
def test_help_names_every_setting_and_fits_the_terminal(width: int) -> None:
    page = settings("--help", COLUMNS=str(width), FMNIST_DIST_LR="broken")
    assert (page.returncode, page.stderr) == (0, "")
    lines = page.stdout.splitlines()
    assert lines[0] == "Usage: torchrun --nproc_per_node=N -m fmnist_dist.train [flags]"
    assert lines[1] == "       python -m fmnist_dist.train [flags]"
    assert lines[-1] == "Flags win over the environment, the environment over the file."
    assert max(map(len, lines)) <= width
    assert "\x1b" not in page.stdout
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    expected = [f"--{name.replace('_', '-')}" for name in rules()]
    others = ["--config", "--help,"]
    names = [flag.replace("--[no-]", "--") for flag in flags if flag not in others]
    assert names == expected
    assert [flag for flag in flags if flag in others] == others


def test_reading_settings_never_imports_torch_nor_what_only_help_needs() -> None:
    code = (
        "import sys; from fmnist_dist.settings import load; load(['--lr', '1'], {});"
        "sys.exit(', '.join({'torch', 'rich', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
