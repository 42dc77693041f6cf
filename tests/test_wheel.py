"""The wheel holds what the clone holds, and its commands work where there is no clone."""

import json
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("train/", "launch/", "eval/", "ds_configs/")


def run(*line, cwd, **environment):
    """stdout of a command that must succeed, without this clone on Python's path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    line = [str(word) for word in line]
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the tracked files: setuptools leaves build/ where it works."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in tracked:
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    options = ("--no-build-isolation", "--no-deps", "--no-index", "-q", "-w", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, folder / "source", cwd=folder)
    (path,) = folder.glob("*.whl")
    return path, tracked


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """bin/ of an environment with the wheel, and with this one's packages behind it."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", folder, cwd=folder)
    python = folder / "bin/python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    ours = Path(run(python, "-c", code, cwd=folder).strip())
    # The system's packages are not those of a virtual environment that runs the tests.
    theirs = Path(run(sys.executable, "-c", code, cwd=folder).strip())
    (ours / "behind.pth").write_text(f"{theirs}\n")
    options = ("--no-deps", "--no-index", "-q", "--force-reinstall")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel[0], cwd=folder)
    return folder / "bin"


@pytest.mark.slow
def test_the_wheel_holds_every_file_that_the_clone_ships(wheel):
    path, tracked = wheel
    there = {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}
    assert there == {f"zeropref/{name}" for name in tracked if name.startswith(SHIPPED)}
    assert "zeropref/train/py.typed" in there


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "reward", "ppo", "evaluate", "validate", "export"])
def test_each_command_explains_itself(name, installed, tmp_path):
    assert f"zeropref-{name}" in run(installed / f"zeropref-{name}", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_recipes_and_configurations_are_found_and_data_validated_and_trained_on(
    wheel, installed, tmp_path
):
    recipe = "launch/recipes/qwen2_5_7b_zero2.yaml"
    printed = run(installed / "zeropref-dpo", "--config", recipe, "--print_config", cwd=tmp_path)
    assert "ds_config: ds_configs/zero2.json" in printed
    rows = [{"prompt": f"Say {n}", "chosen": f"It is {n}.", "rejected": "No."} for n in range(4)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.save_model(tmp_path / "model")
    flags = ("--model", tmp_path / "model", "--data", data, "--max_length", 256)
    report = json.loads(run(installed / "zeropref-validate", *flags, cwd=tmp_path))
    assert report["verdict"] == "usable" and report["data"]["rows"] == 4
    launcher = (installed / "python", "-m", "deepspeed.launcher.runner", "--num_accelerators", 1)
    ours = ("--ds_config", "ds_configs/zero2.json")
    output = ("--max_steps", 1, "--output", tmp_path / "run")
    said = run(*launcher, installed / "zeropref-dpo", *flags, *ours, *output, cwd=tmp_path)
    (following,) = (line for line in said.splitlines() if "zeropref-evaluate" in line)
    words = shlex.split(following)
    assert words[:2] == ["deepspeed", str(installed / "zeropref-evaluate")]
    held_out = ("--data", data, "--max_length", 256, "--prompts", 0)
    run(*launcher, *words[1:], *held_out, cwd=tmp_path)
    assert (tmp_path / "run/eval/report.md").exists()
    versions = json.loads((tmp_path / "run/run.json").read_text())["versions"]
    assert versions["zeropref"] == wheel[0].name.split("-")[1]
