"""The house rules that a machine can check: which room imports what, one formatter, that every flag
is read and explained, that recipes and DeepSpeed files hold what exists.
"""

import ast
import dataclasses
import inspect
import itertools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = sorted(p for room in ("train", "launch", "eval") for p in (ROOT / room).rglob("*.py"))
SCRIPTS = [p for p in PRODUCT if "__main__" in p.read_text()]
# What each room may import of the project: arrows go down only.
BASE = {
    f"train.{name}" for name in ("config", "files", "hub", "other_trainers", "quiet", "settings")
}
TABLES = {"train.losses.algorithms"}  # without torch, as BASE
FLOORS = {
    "train": BASE | TABLES,
    "train/losses": {"train.losses"},
    "train/data": {"train.data"} | BASE,
    "train/models": {"train.losses", "train.data", "train.models"} | BASE,
    "train/engine": {f"train.{room}" for room in ("losses", "data", "models", "engine")} | BASE,
    "train/run": {f"train.{room}" for room in ("losses", "data", "models", "engine", "run")} | BASE,
    "train/methods": {"train"},
    "launch": {"train"},
    "eval": {"train", "eval"},
}
# Whose libraries only some rooms may name.
LIBRARIES = {
    "train/losses": {"torch"},
    "train/data": {
        "torch",
        "transformers",
        "datasets",
        "pyarrow",
        "numpy",
        "safetensors",
        "huggingface_hub",
        "tqdm",
    },
}


def room_of(path):
    return max((room for room in FLOORS if (ROOT / room) in path.parents), key=len)


def imports(path):
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_go_down(path):
    room = room_of(path)
    for module in imports(path):
        top = module.split(".")[0]
        if top in ("train", "launch", "eval", "tests"):
            allowed = FLOORS[room]
            assert any(module == a or module.startswith(a + ".") for a in allowed), (
                f"{path} imports {module}"
            )
        if top == "deepspeed" or module.startswith("torch.distributed"):
            assert room == "train/engine", f"{path} imports {module}"
        if room in LIBRARIES and top not in ("train", *LIBRARIES[room]):
            assert top in sys.stdlib_module_names, f"{path} imports {module}"


def test_rooms_of_the_library():
    """The tree that README shows: every file of train/ lies in one of its rooms or on its base."""
    rooms = {p.parent.relative_to(ROOT).as_posix() for p in PRODUCT if ROOT / "train" in p.parents}
    assert rooms == {room for room in FLOORS if room.startswith("train")}
    base = {f"train.{p.stem}" for p in (ROOT / "train").glob("*.py")} - {"train.__init__"}
    assert base == BASE


@pytest.mark.parametrize("command", [["format", "--check"], ["check"]], ids=lambda c: c[0])
def test_ruff_has_nothing_to_say(command):
    """One formatter decides layout (pyproject.toml); `ruff format` and `ruff check --fix` mend most."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_every_flag_is_explained_and_read(script):
    settings = runpy.run_path(str(script)).get("Settings")
    if settings is None:
        pytest.skip("no flags")
    text = "".join(p.read_text() for p in PRODUCT)
    files = {
        script,
        *(Path(inspect.getfile(base)) for base in settings.__mro__[1:-1]),
    }  # where flags are declared
    classes = {each.__name__ for each in settings.__mro__}
    helps = {name: text for path in files for name, text in _field_docstrings(path, classes)}
    shown = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, check=True
    ).stdout
    for field in dataclasses.fields(settings):
        assert len(re.findall(rf"settings\.{field.name}\b", text)) >= 1, (
            f"--{field.name} is read nowhere"
        )
        assert helps.get(field.name), f"--{field.name} has no help"
        assert "".join(helps[field.name].split()) in "".join(shown.split()), (
            f"--help does not explain --{field.name}"
        )


def _field_docstrings(path, classes):
    """(field, the docstring under it) of those classes of a file."""
    for found in ast.walk(ast.parse(path.read_text())):
        if not isinstance(found, ast.ClassDef) or found.name not in classes:
            continue
        for field, below in itertools.pairwise(found.body):
            match field, below:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    yield name, text


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "launch/recipes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_recipes_hold_flags_that_exist_and_say_why_their_rate(recipe):
    text = recipe.read_text()
    command = re.search(r"(launch/train_\w+\.py) --config (\S+)", text)
    assert (ROOT / command[2]) == recipe and "Learning rate:" in text
    settings = runpy.run_path(str(ROOT / command[1]))["Settings"]
    values = yaml.safe_load(text)
    assert set(values) <= {f.name for f in dataclasses.fields(settings)}
    settings(**values)
    for key in ("ds_config", "reference_ds_config"):
        assert key not in values or (ROOT / values[key]).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_deepspeed_configurations_are_accepted(path):
    from train.engine import ds_config

    config = ds_config.read_config(path)
    assert config == json.loads(path.read_text())
    assert ds_config.zero_stage(config) == int(re.search(r"zero(\d)", path.stem)[1])


def test_init_files_are_empty():
    assert all(not p.read_text() for p in ROOT.glob("train/**/__init__.py"))


def test_top_level_is_fixed():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    folders = {name.split("/")[0] for name in tracked if "/" in name and not name.startswith(".")}
    assert folders <= {"train", "launch", "ds_configs", "eval", "tests"}
