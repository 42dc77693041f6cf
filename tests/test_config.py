"""The command line as users meet it: what is accepted, what is refused, and in which words."""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest

from train import config

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Settings:
    """Train a small thing on small data."""

    model: str | None = None
    """directory of the model to train"""
    data: list[str] = field(default_factory=list)
    """files of pairs"""
    layers: list[int] = field(default_factory=list)
    """layers to keep"""
    beta: float = 0.1
    """how far the policy may move"""
    batch_size: int = 16
    """groups a step, all ranks"""
    max_steps: int | None = None
    """stop after so many steps"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """arithmetic"""
    compile: Literal["auto", "off"] = "auto"
    """off: not at all"""
    deterministic: bool = False
    """same bits every time"""
    loss_args: dict[str, int | float | str] = field(default_factory=dict)
    """the loss's own parameters"""

    def __post_init__(self):
        if self.beta < 0:
            raise ValueError(f"--beta must not be negative, got {self.beta}")


OPTIONAL = ("model", "max_steps")  # of these a null is a value


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def refused(capsys, *argv):
    """The one line on stderr that `argv` is refused with, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        config.parse(Settings, list(argv))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("; see --help\n")
    return err.removesuffix("; see --help\n")


@pytest.mark.parametrize(
    "argv, name, value",
    [
        ("--beta 1e-6", "beta", 1e-6),
        ("--beta=0.5", "beta", 0.5),
        ("--model 123", "model", "123"),
        ("--model null", "model", None),
        ("--max_steps 3", "max_steps", 3),
        ("--data a.jsonl", "data", ["a.jsonl"]),
        ("--data a.jsonl 7 --beta 1", "data", ["a.jsonl", "7"]),
        ("--data [a,b]", "data", ["a", "b"]),
        ("--model m --model null", "model", None),
        ("--layers 3 -1", "layers", [3, -1]),
        ("--deterministic", "deterministic", True),
        ("--deterministic --beta 1", "deterministic", True),
        ("--deterministic false", "deterministic", False),
        ("--loss_args '{tau: 2, kind: x}'", "loss_args", {"tau": 2, "kind": "x"}),
        ("--loss_args.tau -2", "loss_args", {"tau": -2}),
        ("--precision bf16", "precision", "bf16"),
        ("--local_rank 3 --beta 1", "beta", 1.0),
        ("--beta 1 --local_rank=0", "beta", 1.0),
        ("--local-rank 1", "beta", 0.1),
    ],
)
def test_a_flag_becomes_its_field(argv, name, value):
    settings = config.parse(Settings, shlex.split(argv))
    assert getattr(settings, name) == value and type(getattr(settings, name)) is type(value)


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--bta 1", "error: there is no flag --bta (did you mean --beta?)"),
        ("--batch-size 4", "error: there is no flag --batch-size (did you mean --batch_size?)"),
        ("--batch 4", "error: there is no flag --batch"),  # no abbreviations
        ("--zzz", "error: there is no flag --zzz"),
        ("--beta ten", "error: --beta: expected float, got 'ten'"),
        ("--beta=", "error: --beta: expected float, got ''"),
        ("--beta", "error: --beta needs a value"),
        ("--beta --deterministic", "error: --beta needs a value"),
        ("--data", "error: --data needs a value"),
        ("--max_steps 1.5", "error: --max_steps: expected int or null, got '1.5'"),
        ("--precision fp16", "error: --precision: expected one of auto, bf16, fp32, got 'fp16'"),
        (
            "--deterministic perhaps",
            "error: --deterministic: expected true or false, got 'perhaps'",
        ),
        ("--loss_args 3", "error: --loss_args: expected {name: value}, got '3'"),
        ("--beta -1", "error: --beta must not be negative, got -1.0"),
        ("stray", "error: unexpected argument 'stray': flags are written --name value"),
        ("-beta 1", "error: unexpected argument '-beta': flags are written --name value"),
        ("--config nowhere.yaml", "error: --config nowhere.yaml: there is no such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, argv, message):
    said = refused(capsys, *argv.split())
    assert said == message or (argv == "--batch 4" and said.startswith(message))


@pytest.mark.parametrize(
    "text, message",
    [
        (b"bta: 1\n", "there is no key bta (did you mean beta?)"),
        (b"beta: ten\n", "beta: expected float, got 'ten'"),
        (b"layers: one\n", "layers: expected list[int], got 'one'"),
        (b"- 1\n", "expected lines of `key: value`"),
        (b"beta: [1\n", "line 2, column 1: expected ',' or ']', but got '<stream end>'"),
        (b"beta: 1\nbeta: 2\n", "line 2, column 1: the key beta stands twice: keep one"),
        (b"loss_args: {tau: 1, tau: 2}\n", "line 1, column 21: the key tau stands twice: keep one"),
        (
            b"bta: 1\nprecision: fp16\nzz: 3\nbatch_size: a\n",
            "there is no key bta (did you mean beta?); there is no key zz; precision: expected one of "
            "auto, bf16, fp32, got 'fp16'; batch_size: expected int, got 'a'",
        ),
        (
            b'{"zero_optimization": {"stage": 2}}',
            "a DeepSpeed configuration: pass it as --ds_config",
        ),
        (
            b"learning_rate: 1\noutput_dir: x\n",
            "there is no key learning_rate: leave it out (this script has no --lr); there is no key "
            "output_dir: leave it out (this script has no --output)",
        ),
        (b"beta: 1\n\xff\n", "not UTF-8: invalid start byte at byte 8"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_name(capsys, tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    assert refused(capsys, "--config", str(path)) == f"error: {path}: {message}"


def test_a_file_that_is_not_there_and_its_neighbour(capsys, tmp_path):
    (tmp_path / "recipe.yaml").touch()
    path = tmp_path / "recpe.yaml"
    expected = f"error: --config {path}: there is no such file (did you mean recipe.yaml?)"
    assert refused(capsys, "--config", str(path)) == expected


@pytest.mark.parametrize("name", [f.name for f in fields(Settings) if f.name not in OPTIONAL])
def test_a_key_without_a_value_is_refused(capsys, tmp_path, name):
    """Whatever its type is; a flag may supply the value."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{name}:\n")
    said = refused(capsys, "--config", str(path))
    assert said.startswith(f"error: --{name}: expected ")
    assert said.endswith(", got nothing: leave it out for the default")
    if name == "data":
        assert config.parse(Settings, ["--config", str(path), "--data", "a"]).data == ["a"]


def test_flags_override_the_file_and_the_second_file_the_first(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("beta: 1e-6\nbatch_size: 4\ndata: [a, b]\nloss_args: {tau: 1}\n")
    second.write_text("batch_size: 8\n")
    argv = ["--beta", "0.5", "--config", str(first), "--loss_args.kind", "x", f"--config={second}"]
    settings = config.parse(Settings, argv)
    assert (settings.beta, settings.batch_size, settings.data) == (0.5, 8, ["a", "b"])
    assert settings.loss_args == {"tau": 1, "kind": "x"}
    # a float, although YAML 1.1 reads a string
    assert config.parse(Settings, ["--config", str(first)]).beta == 1e-6


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("data: one.jsonl", "data", ["one.jsonl"]),
        ("layers: -1", "layers", [-1]),
        ("loss_args.tau: 2\nloss_args.kind: x", "loss_args", {"tau": 2, "kind": "x"}),
        ("model: '123'", "model", "123"),
        ("model: null", "model", None),
        # texts, although YAML reads a date, a number to base 8, booleans
        ("model: 2026-11-26", "model", "2026-11-26"),
        ("model: 0123", "model", "0123"),
        ("data: [1e3, no, 12:30:00]", "data", ["1e3", "no", "12:30:00"]),
        ("compile: off", "compile", "off"),
        ("loss_args: {tau: 2}\ndeterministic: yes", "deterministic", True),
        ("model: ~/m", "model", str(Path.home() / "m")),
        ("data: [~/a, b~c]", "data", [str(Path.home() / "a"), "b~c"]),
        ("# nothing", "beta", 0.1),
    ],
)
def test_what_a_file_may_hold(tmp_path, text, name, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert getattr(config.parse(Settings, ["--config", str(path)]), name) == value


def test_all_flags_that_do_not_exist_are_named(capsys):
    said = refused(capsys, "--bta", "1", "--beta", "2", "--precison", "a", "b", "--zzz")
    assert said == (
        "error: there is no flag --bta (did you mean --beta?); there is no flag --precison (did you "
        "mean --precision?); there is no flag --zzz"
    )


def test_a_printed_config_is_a_config_again(capsys, tmp_path):
    argv = ["--beta", "1e-6", "--data", "a b.jsonl", "--loss_args.tau", "2", "--max_steps", "3"]
    with pytest.raises(SystemExit) as stop:
        config.parse(Settings, [*argv, "--print_config"])
    assert stop.value.code == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(capsys.readouterr().out)
    assert config.parse(Settings, ["--config", str(recipe)]) == config.parse(Settings, argv)


def test_a_required_field_may_stand_in_the_file(capsys, tmp_path):
    @dataclass
    class Needs:
        """A script that needs a checkpoint."""

        checkpoint: str
        """what to export"""
        keep: int = 1
        """how many"""

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("keep: 2\n")
    assert config.parse(Needs, ["--checkpoint", "c", "--config", str(recipe)]) == Needs("c", 2)
    with pytest.raises(SystemExit) as stop:
        config.parse(Needs, [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: missing: --checkpoint; see --help\n"


def test_help_shows_the_docstrings_without_importing_torch():
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from train import config
from test_config import Settings
try:
    config.parse(Settings, ["--help"])
finally:
    assert not {{"torch", "transformers", "deepspeed"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for text in (
        "Train a small thing on small data.",
        "--batch_size",
        "groups a step, all ranks",
        "default: 16",
    ):
        assert text in done.stdout


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_only_rank_0_speaks_and_every_rank_exits(capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    for argv, code in ((["--bta"], 2), (["--help"], 0), (["--print_config"], 0)):
        with pytest.raises(SystemExit) as stop:
            config.parse(Settings, argv)
        assert stop.value.code == code
    with pytest.raises(SystemExit) as stop:
        config.fail("nothing left", config.Exit.DATA)
    assert stop.value.code == 4 and capsys.readouterr() == ("", "")
    # a launcher's RANK counts before the srun that started the launcher
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        config.fail("nothing left", config.Exit.DATA)
    assert capsys.readouterr() == ("", "error: nothing left\n")


def test_exit_codes_are_those_that_wrappers_know():
    assert {code.name: int(code) for code in config.Exit} == {
        "DONE": 0,
        "FLAGS": 2,
        "CHECKPOINT": 3,
        "DATA": 4,
        "NONFINITE": 5,
        "HUB": 6,
        "PREEMPTED": 85,
        "INTERRUPTED": 130,
    }


def test_settings_as_plain_values():
    class Colour(Enum):
        RED = "red"

    @dataclass
    class Odd:
        """Odd types."""

        output: Path = Path("runs/1")
        sizes: tuple[int, ...] = (1, 2)
        colour: Colour = Colour.RED
        nested: dict = field(default_factory=lambda: {"a": (Path("x"), None)})

    plain = config.as_dict(Odd())
    assert plain == {
        "output": "runs/1",
        "sizes": [1, 2],
        "colour": "red",
        "nested": {"a": ["x", None]},
    }
    assert json.loads(json.dumps(plain)) == plain


def test_an_error_in_one_line():
    assert config.named(OSError("no\n\n  room")) == "OSError: no room"
    assert config.named(KeyError()) == "KeyError"
    assert config.named(ValueError("x" * 999)) == "ValueError: " + "x" * 300
