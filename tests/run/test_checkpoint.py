"""Checkpoints of a run that trains two models: killed anywhere, it continues bit for bit."""

import json
import random
import shutil
import signal
import time

import pytest
import torch

from tests.launch.compare import ROOT, at_checkpoint, moments, same_bits
from tests.launch.warm import Warm
from train.run import checkpoint_files

STEPS = 6


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    with Warm(tmp_path_factory.mktemp("cache"), "tests/run/two_models.py") as process:
        yield process


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    lines = (ROOT / "train/data/builtin/train.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:20]))
    return path


def flags(model_dir, pairs, out, stage):
    return [
        *("--model", model_dir, "--data", pairs, "--output", out, "--max_length", 512),
        *("--ds_config", ROOT / f"ds_configs/zero{stage}.json", "--batch_size", 8),
        *("--max_steps", STEPS, "--epochs", 2, "--micro_tokens", 300, "--save_every", 1),
    ]


def losses(out):
    manifest = checkpoint_files.read_manifest(out / f"checkpoints/step-{STEPS}")
    assert manifest["parts"]["policy"]["updates"] == manifest["parts"]["value"]["updates"] == STEPS
    return manifest["parts"]["report"]["values"]


FAST = [(0, 1), (3, 2)]
ALL = [(stage, ranks) for stage in (0, 2, 3) for ranks in (1, 2)]


@pytest.mark.parametrize(
    "stage, ranks",
    [pytest.param(*each, marks=[] if each in FAST else pytest.mark.slow) for each in ALL],
)
def test_two_models_killed_and_continued(two_models, model_dir, pairs, tmp_path, stage, ranks):
    straight, out = tmp_path / "straight", tmp_path / "killed"
    codes, text = two_models.run(flags(model_dir, pairs, straight, stage), ranks)
    assert codes == [0] * ranks, text[-3000:]
    draw = random.Random(10 * stage + ranks)
    for kill in range(3):
        job = two_models.start(flags(model_dir, pairs, out, stage), ranks)
        at_checkpoint(out, 1 + kill)
        time.sleep(draw.uniform(0, 0.1))
        job.kill()
        codes, text = job.wait()
        assert codes == [-signal.SIGKILL] * ranks, text[-3000:]
    codes, text = two_models.run(flags(model_dir, pairs, out, stage), ranks)
    assert codes == [0] * ranks and "continues after step" in text, text[-3000:]

    tensors = moments(straight, STEPS)
    same_bits(moments(out, STEPS), tensors)
    assert losses(out) == losses(straight) and len(losses(out)) == STEPS
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        policy = {key for key in tensors if key.startswith("policy/") and key.endswith(f"/{kind}")}
        value = {key.replace("policy/", "value/") for key in policy}
        assert len(policy) > 10 and value <= tensors.keys()
        # they began as one model, and learnt opposite things
        assert not any(
            torch.equal(tensors[key], tensors[key.replace("policy/", "value/")]) for key in policy
        )
    saved = out / f"checkpoints/step-{STEPS}"
    assert (saved / "policy/config.json").is_file() and (saved / "value/tokenizer.json").is_file()


def test_a_checkpoint_of_the_old_format_is_refused_in_one_line(
    two_models, model_dir, pairs, tmp_path
):
    out = tmp_path / "old"
    command = flags(model_dir, pairs, out, 0)
    codes, text = two_models.run(command)
    assert codes == [0], text[-3000:]
    shutil.rmtree(out / "checkpoints")
    old = out / "checkpoints/step-3"
    old.mkdir(parents=True)
    manifest = {"format": 1, "step": 3}
    manifest |= {"sha256": checkpoint_files._digest(manifest)}
    (old / "manifest.json").write_text(json.dumps(manifest))
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"status": "running"}))
    codes, text = two_models.run(command)
    assert codes == [3]
    lines = [line for line in text.splitlines() if not line.startswith("DeepSpeed")]
    assert lines == [
        f"error: {old} was written by zeropref 0.1 (checkpoint format 1); zeropref 0.2.0 reads format "
        "2: finish the run with the version that began it"
    ]


def test_what_goes_wrong_in_a_step(two_models, model_dir, pairs, tmp_path):
    """Running out of memory is one line with advice; anything else is a failure, not a refusal."""
    command = flags(model_dir, pairs, tmp_path / "memory", 0)
    codes, text = two_models.run([*command, "--fault", "memory"])
    assert codes == [1] and "Traceback" not in text
    assert (
        "out of memory in a batch of " in text
        and "(--micro_tokens is 300): lower --max_length" in text
    )
    assert (tmp_path / "memory/status").read_text() == "failed\n"
    command = flags(model_dir, pairs, tmp_path / "value", 0)
    codes, text = two_models.run([*command, "--fault", "value"])
    assert codes == [1] and "ValueError: something of the trainer's own" in text
    assert (tmp_path / "value/status").read_text() == "failed\n"
