"""What whole runs tell trackers, and where they take their model: a stand-in of wandb's package, and of
the hub.
"""

import json
import shlex
import shutil
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.hub_server import Hub
from tests.launch.commands import ROOT, free_port, launched
from train.run.trackers import FOREIGN

pytestmark = pytest.mark.slow
LENGTHS = ["--max_length", 256, "--max_prompt_length", 128]
ANSWERS = ["--max_length", 256, "--max_prompt_length", 64, "--max_new_tokens", 6]


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The stand-in in wandb's place: a file with what it is told."""
    (tmp_path / "packages").mkdir()
    shutil.copy(ROOT / "tests/launch/stand_in_wandb.py", tmp_path / "packages/wandb.py")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'packages'}:{ROOT}")
    monkeypatch.setenv("STAND_IN", str(tmp_path / "told"))
    monkeypatch.setenv("WANDB_MODE", "offline")  # asks for no login
    return tmp_path / "told"


@pytest.fixture
def hub(monkeypatch):
    """A stand-in of the hub, with a token for it."""
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield server


def told(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown(folder):
    """{(tag, step): value} of TensorBoard's scalars under a folder."""
    found = {}
    for path in folder.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found |= {(FOREIGN.sub("_", tag), e.step): e.value for e in events.Scalars(tag)}
    return found


def heard(lines):
    """{(name, step): value} of what the stand-in was told, the first word on each."""
    found = {}
    for line in lines:
        for name, value in line.get("values", {}).items():
            found.setdefault((name, line["step"]), value)
    return found


def same(output, lines):
    """Whether the tracker heard every scalar that TensorBoard shows, and the results beside them."""
    board, tracker = shown(output / "tensorboard"), heard(lines)
    results = {key: tracker.pop(key) for key in list(tracker) if key[0].startswith("final/")}
    assert results
    assert board.keys() == tracker.keys() and len(board) > 10
    for key, value in tracker.items():
        if not key[0].startswith("perf/"):  # measured again where a step was done again
            assert board[key] == pytest.approx(value, rel=1e-6, nan_ok=True), key


def command(script, model_dir, output, *more):
    return [
        sys.executable,
        f"launch/train_{script}.py",
        "--model",
        model_dir,
        "--output",
        output,
        *more,
    ]


def test_dpo_killed_and_continued(model_dir, few, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("STAND_IN_KILLS", "5")
    output = tmp_path / "a/run"
    line = command("dpo", model_dir, output, "--data", few, "--eval_split", 0.2, *LENGTHS)
    line += [
        "--batch_size",
        8,
        "--epochs",
        2,
        "--max_steps",
        7,
        "--save_every",
        2,
        "--eval_every",
        3,
    ]
    line += ["--report_to", "tensorboard", "wandb", "--loss_args", "{label_smoothing: 0.1}"]
    killed = launched(line, tmp_path / "cache")
    assert killed.returncode == -9, killed.stderr
    first = told(wandb)
    assert first[0]["project"] == "zeropref"
    assert first[0]["options"] == {"dir": str(output), "name": "a/run"}
    config = first[1]["config"]
    assert (config["beta"], config["loss_args.label_smoothing"], config["steps"]) == (0.1, 0.1, 7)
    assert config["hardware.world"] == 1 and config["versions.torch"] and config["model"]
    done = launched(line, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "wandb        https://stand-in/run\n" in done.stdout
    second = told(wandb)[len(first) :]
    # under the same name, from the checkpoint on
    assert second[0]["options"] == {"dir": str(output), "id": "generated", "resume": "allow"}
    steps = [entry["step"] for entry in second if "step" in entry]
    assert steps == [5, 6, 7, 7] and second[-1]["finished"]
    results = json.loads((output / "run.json").read_text())["results"]
    assert second[-2]["values"] == {f"final/{name}": value for name, value in results.items()}
    same(output, first + second)
    assert "wandb" not in (output / "model/README.md").read_text()


def test_a_reward_model_on_two_ranks_and_its_evaluation(model_dir, few, tmp_path, wandb):
    output = tmp_path / "run"
    ranks = ["deepspeed", "--master_port", free_port(), "--num_accelerators", 2]
    line = command("reward", model_dir, output, "--data", few, "--eval_split", 0.2, *LENGTHS)[1:]
    line += ["--batch_size", 8, "--max_steps", 2, "--report_to", "tensorboard", "wandb"]
    done = launched([*ranks, *line], tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    lines = told(wandb)
    assert len({entry["process"] for entry in lines}) == 1 and len(lines) == 7
    same(output, lines)
    evaluate = [sys.executable, "eval/evaluate.py", "--reward_model", output / "model", *LENGTHS]
    evaluate += ["--output", output / "eval", "--report_to", "wandb"]
    done = launched(evaluate, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "https://stand-in/run" in done.stdout and "tensorboard --logdir" not in done.stdout
    assert not (output / "eval/tensorboard").exists()
    begun, config, values, end = told(wandb)[len(lines) :]
    assert begun["options"]["name"] == "run/eval" and end["finished"] and values["step"] == 2
    assert config["config"]["reward_model"] == str(output / "model")
    report = json.loads((output / "eval/report.json").read_text())
    accuracy = report["rewards"]["preferences"]["model"]["rewards/accuracies"]["value"]
    assert values["values"]["eval/rewards/accuracies"] == accuracy


def test_ppo(model_dir, prompts, tmp_path, wandb):
    output = tmp_path / "run"
    line = command("ppo", model_dir, output, "--data", prompts, "--eval_split", 0.2, *ANSWERS)
    line += ["--batch_size", 4, "--samples_per_prompt", 2, "--max_steps", 2, "--lr", 1e-4]
    line += ["--reward", "length:2-4", "regex:[?]", "--report_to", "wandb", "tensorboard"]
    done = launched(line, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    lines = told(wandb)
    same(output, lines)
    assert [entry["step"] for entry in lines if "step" in entry] == [0, 1, 2, 2]
    assert lines[1]["config"]["reward"] == '["length:2-4", "regex:[?]"]'


def test_a_run_that_starts_over_is_a_new_one(model_dir, few, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("STAND_IN_KILLS", "1")
    line = command("dpo", model_dir, tmp_path / "run", "--data", few, *LENGTHS, "--max_steps", 1)
    line += ["--report_to", "wandb"]
    assert launched(line, tmp_path / "cache").returncode == -9
    done = launched([*line, "--resume", "never"], tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    begun = [entry["options"] for entry in told(wandb) if "options" in entry]
    assert len(begun) == 2 and all("id" not in options and options["name"] for options in begun)


def test_nobody_is_told(model_dir, few, tmp_path):
    output = tmp_path / "run"
    line = command("dpo", model_dir, output, "--data", few, *LENGTHS, "--max_steps", 1)
    done = launched([*line, "--report_to", "none"], tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert not (output / "tensorboard").exists() and not (output / "trackers").exists()
    assert "tensorboard" not in done.stdout and (output / "model/config.json").exists()


def test_the_model_goes_to_the_hub(model_dir, few, tmp_path, hub):
    output, cache = tmp_path / "run", tmp_path / "cache"
    line = command("dpo", model_dir, output, "--data", few, *LENGTHS, "--max_steps", 1)
    line += ["--save_every", 1]
    for name, said in (
        ("me", "write ORG/NAME"),
        ("you/it", "the token is for me and org; set HF_TOKEN to one for you"),
    ):
        done = launched([*line, "--push_to_hub", name], cache)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not (output / "run.json").exists()
    hub.refuses = "/commit/main"
    done = launched([*line, "--push_to_hub", "org/it"], cache)
    assert done.returncode == 0, done.stderr
    model = output / "model"
    later = f"hf upload org/it {shlex.quote(str(model))} . --private"
    (warning,) = (each for each in done.stdout.splitlines() if "not uploaded" in each)
    assert warning.startswith(f"warning: {model} was not uploaded (HfHubHTTPError: ")
    assert warning.endswith(f"; later: {later}") and "507" in warning
    assert done.stdout.index("\nnext\n") < done.stdout.index("not uploaded")
    assert json.loads((output / "run.json").read_text())["status"] == "finished"
    assert (output / "status").read_text() == "finished\n" and not hub.repositories["org/it"].files
    hub.refuses = ""
    done = launched([*line, "--push_to_hub", "org/it"], cache)  # the same command again
    assert done.returncode == 0 and f"hub          {hub.address}/org/it\n" in done.stdout, (
        done.stderr
    )
    there = hub.repositories["org/it"]
    files = {str(p.relative_to(model)): p.read_bytes() for p in model.rglob("*") if p.is_file()}
    assert there.private and there.files == files and b"- zeropref" in files["README.md"]
    record = json.loads((output / "run.json").read_text())
    assert record["hub"] == {"repository": "org/it", "address": f"{hub.address}/org/it"}
    assert record["status"] == "finished" and record["results"]
    asked = len(hub.requests)
    done = launched([*line, "--push_to_hub", "org/it"], cache)  # it is there
    assert done.returncode == 0 and len(hub.requests) == asked, done.stderr

    # an export of a checkpoint
    export = [sys.executable, "launch/export.py", output / "checkpoints/step-1"]
    for more, said in (
        (["--hub_public"], "--hub_public changes nothing without --push_to_hub"),
        (["--push_to_hub", "me/a--b"], "Cannot have -- or .. in repo_id"),
    ):
        done = launched([*export, tmp_path / "out", *more], cache)
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "out").exists()
    done = launched([*export, tmp_path / "out", "--push_to_hub", "me/it", "--hub_public"], cache)
    assert done.returncode == 0 and f"{hub.address}/me/it" in done.stdout, done.stderr
    there = hub.repositories["me/it"]
    assert not there.private and there.files["model.safetensors"] == files["model.safetensors"]
    hub.refuses = "/repos/create"
    done = launched([*export, tmp_path / "again", "--push_to_hub", "me/again"], cache)
    assert done.returncode == 6 and done.stderr.startswith(
        f"error: {tmp_path}/again was not uploaded"
    )
    assert f"; later: hf upload me/again {tmp_path}/again . --private\n" in done.stderr
    assert (tmp_path / "again/model.safetensors").read_bytes() == files["model.safetensors"]
