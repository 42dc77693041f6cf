"""A small run of launch/train_dpo.py, and whether two of them came to the same, bit for bit."""

import json
import re
import time
from pathlib import Path

import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8


def flags(model_dir, few, out, stage=0, *extra):
    return [
        "--model",
        model_dir,
        "--data",
        few,
        "--eval_data",
        few,
        "--output",
        out,
        "--max_length",
        512,
        "--ds_config",
        ROOT / f"ds_configs/zero{stage}.json",
        "--batch_size",
        8,
        "--max_steps",
        STEPS,
        "--epochs",
        3,
        "--micro_tokens",
        512,
        "--lr",
        "1e-3",
        "--warmup_ratio",
        0.3,
        "--weight_decay",
        0.1,
        "--eval_every",
        3,
        "--log_every",
        2,
        "--save_every",
        1,
        "--seed",
        7,
        *extra,
    ]


def layout(events):
    """Pages of CUSTOM SCALARS as TensorBoard reads them: {page: {chart: patterns}}."""
    (event,) = events.Tensors("custom_scalars__config__")
    read = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {
        page.title: {chart.title: list(chart.multiline.tag) for chart in page.chart}
        for page in read.category
    }


def charts(folder):
    """{chart: the run's tags that CUSTOM SCALARS draws in it}, of a folder of TensorBoard's files."""
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    return {
        chart: [tag for tag in tags for pattern in patterns if re.match(pattern, tag)]
        for page in layout(events).values()
        for chart, patterns in page.items()
    }


EXPECTED = ("train/loss", "train/grad_norm", "val/rewards/margins", "train/learning_rate")


def scalars(out, expected=EXPECTED):
    """Every logged scalar but perf/*, as TensorBoard shows them: tag -> [(step, value)]."""
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("perf/")]
    assert {*expected} <= {*tags}
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def weights(out):
    with safe_open(out / "model/model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def moments(out, step=STEPS):
    """All tensors of the last checkpoint: weights and AdamW's moments."""
    found = {}
    for path in (out / f"checkpoints/step-{step}").glob("state-*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def same_bits(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different[:5]


def same_run(out, straight):
    same_bits(weights(out), weights(straight))
    same_bits(moments(out), moments(straight))
    assert len(moments(out)) > 3 * 10 and any(name.endswith("/exp_avg_sq") for name in moments(out))
    mine, theirs = scalars(out), scalars(straight)
    assert mine.keys() == theirs.keys()
    for tag in theirs:
        assert mine[tag] == theirs[tag], tag
    told = [json.loads((folder / "run.json").read_text()) for folder in (out, straight)]
    assert (
        told[0]["evaluations"] == told[1]["evaluations"]
        and told[0]["results"] == told[1]["results"]
    )


def at_checkpoint(out, step):
    """Come back when this checkpoint, or a later one, is complete."""

    def reached(path):
        return int(path.name.removeprefix("step-")) if path.suffix != ".tmp" else 0

    def there():
        return max(map(reached, (out / "checkpoints").glob("step-*")), default=0) >= step

    until(there, f"checkpoint after step {step}")


def until(condition, what, seconds=120):
    """Come back when `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.002)


def says(job, text, seconds=120):
    """Come back when a running job has printed `text`, a regular expression."""

    def shown():
        return Path(job.log.name).read_text()

    until(lambda: re.search(text, shown()), f"{text!r} in what it prints", seconds)


def straight(warm, model_dir, few, out, stage, ranks, *extra):
    began = time.monotonic()
    codes, text = warm.run(flags(model_dir, few, out, stage, *extra), ranks)
    assert codes == [0] * ranks, text[-3000:]
    return time.monotonic() - began
