"""What a GPU makes of this project, in one command: whether it computes what it should, then how fast.

    python tests/benchmarks/gpu.py                    # under 9 minutes on a data centre's GPU
    python tests/benchmarks/gpu.py --json gpu.json --minutes 20
    python tests/benchmarks/gpu.py --tiny             # the same code with small sizes, on a CPU too

Nothing is downloaded: models have random weights and the shapes of SmolLM2-135M and Llama-3.2-1B, the
tokenizer is made from the built-in pairs. Each part is a process of its own with a limit, so that one
that fails costs its own row only; when the time is up, the rest are left out and said. Prints one
Markdown table and a line of JSON with everything measured; the exit status is 1 where a part failed or
computed what it should not.

    packed      packed batches against one padded sequence a response, fp32 and bf16
    repeat      gradients of segments of 300 to 1,000 tokens, five times: bit for bit the same?
    zero        two updates under ZeRO stages 0 to 3 on this one GPU, fp32
    resume      a run continued from its second step against one that was never stopped
    eager, compiled, deterministic
                launch/train_dpo.py as a user runs it with --compile off, with --compile auto, and with
                --deterministic: 16 pairs and about 4,859 tokens a step; the epoch is that of
                launch/recipes/smollm_human_like.yaml, 10,884 pairs
    breakdown   where such a step's time goes, the device waited for between its parts, and, without
                waiting, how long it idles; memory beside its estimate (train/engine/footprint.py)
    generate    tokens a second by the number of answers at once
    grpo, ppo   launch/train_ppo.py, the second rollout
    billion     a step of the 1B shape, 16 pairs
    trl         TRL's DPOTrainer beside ours (tests/benchmarks/dpo_step.py), where it is installed
"""

import argparse
import importlib.util
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

PAIRS_OF_EPOCH = 10_884  # of Human-Like-DPO
PAIRS_OF_STEP = 16
TOKENS_OF_STEP = 4_859  # packed


class Sizes(NamedTuple):
    """How large everything is."""

    model: dict  # fields of a LlamaConfig
    billion: dict
    prompt: int  # tokens of a pair's prompt, and of an answer, in the middle
    answer: int
    steps: int  # measured, of launch/train_dpo.py and of `breakdown`
    answers_at_once: tuple[int, ...]
    new_tokens: int
    rollout: dict  # flags of launch/train_ppo.py


SMOLLM = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, vocab_size=49152, max_position_embeddings=2048, tie_word_embeddings=True,
    initializer_range=0.02)  # fmt: skip
LLAMA_1B = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256, max_position_embeddings=2048, tie_word_embeddings=True,
    initializer_range=0.02)  # fmt: skip
SMALL = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=1024, max_position_embeddings=2048, tie_word_embeddings=True,
    initializer_range=0.02)  # fmt: skip
# Of pairs that come to TOKENS_OF_STEP: 16 (60 + 2 x 122).
FULL = Sizes(
    model=SMOLLM, billion=LLAMA_1B, prompt=60, answer=122, steps=40,
    answers_at_once=(32, 128, 512), new_tokens=128,
    rollout=dict(batch_size=16, samples_per_prompt=8, max_new_tokens=128))  # fmt: skip
TINY = Sizes(
    model=SMALL, billion=SMALL | dict(hidden_size=128), prompt=6, answer=12, steps=4,
    answers_at_once=(2, 4), new_tokens=4,
    rollout=dict(batch_size=2, samples_per_prompt=2, max_new_tokens=4))  # fmt: skip


class Part(NamedTuple):
    """What is measured in one process."""

    measure: Callable  # (Sizes, work folder, device) -> what was measured, for JSON
    rows: Callable  # that -> (what, value) a line of the table
    limit: int  # seconds
    trains: bool = False  # in this process itself, under DeepSpeed


class Wrong(Exception):
    """Something was computed that should not have been."""


# ------------------------------------------------------------ what parts share


def pairs(sizes: Sizes, count: int, seed: int = 0, longest: float = 1.67):
    """Groups of random token ids; lengths spread evenly around their middle."""
    from train.data.packing import Group

    draw = random.Random(seed)
    most = 1000 if sizes.model["vocab_size"] <= 1024 else 40_000

    def ids(middle):
        size = draw.randint(max(1, round(middle * (2 - longest))), round(middle * longest))
        return tuple(draw.randrange(3, most) for _ in range(size))

    return [
        Group(ids(sizes.prompt), (ids(sizes.answer), ids(sizes.answer)), row=i)
        for i in range(count)
    ]


class Data(list):
    """Groups, as a data set has them."""

    def group(self, i):
        return self[i]


def make_lm(shape: dict, device, dtype=None):
    """A Llama of random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)


def save_model(shape: dict, folder: Path) -> Path:
    """A model directory of random weights, with the tests' tokenizer. Made on the CPU: what is started
    on it finds a GPU that nobody else holds.
    """
    import tiny

    if not folder.exists():
        make_lm(shape, "cpu").save_pretrained(folder)
        tiny.save_tokenizer(folder)
    return folder


def write_pairs(sizes: Sizes, folder: Path, count: int) -> Path:
    """A file of pairs whose texts come to about the sizes' tokens."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    file = folder / f"pairs-{count}.jsonl"
    draw = random.Random(0)
    words = sorted({tokenizer.decode([i]) for i in range(300, 1000)} - {""})
    words = [w for w in words if w.startswith(" ") and w.strip().isalpha()]
    empty = [{"role": "user", "content": ""}]
    overhead = len(
        tokenizer.apply_chat_template(empty, add_generation_prompt=True, return_dict=False)
    )

    def text(tokens):
        return "".join(draw.choice(words) for _ in range(max(1, tokens))).strip()

    def length(middle):
        return draw.randint(round(middle / 3), round(middle * 5 / 3))

    with file.open("w") as out:
        for _ in range(count):
            row = {"prompt": text(length(sizes.prompt) - overhead)}
            row |= {side: text(length(sizes.answer)) for side in ("chosen", "rejected")}
            out.write(json.dumps(row) + "\n")
    return file


def command(script: str, **flags) -> tuple[dict, float]:
    """Run a script as a user does: run.json, and the seconds that it took."""
    line = [sys.executable, str(ROOT / script)]
    for name, value in flags.items():
        line += [f"--{name}", str(value)]
    began = time.perf_counter()
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script}: exit code {done.returncode}: {done.stderr[-1500:]}")
    record = json.loads((Path(flags["output"]) / "run.json").read_text())
    return record, time.perf_counter() - began


def precision_of(device) -> str:
    return "bf16" if device.type == "cuda" else "fp32"


def resolved(stage: int, precision: str) -> dict:
    from train.engine import ds_config

    config = ds_config.read_config(ROOT / f"ds_configs/zero{stage}.json")
    return ds_config.resolve(config, precision, 1.0)


def wrap(module, stage: int, precision: str, steps: int):
    from train.engine.trained import TrainedModel

    return TrainedModel(
        module, resolved(stage, precision), lr=1e-4, weight_decay=0.0, grad_clip=1.0,
        scheduler="constant", warmup_ratio=0.0, total_steps=steps)  # fmt: skip


def synchronise(device):
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------ is it right?


def packed(sizes, work, device) -> dict:
    """The mean distance of a token's log-probability, in nats, between the two ways."""
    import torch

    from train.data.packing import pack
    from train.engine.checks import TOLERANCE
    from train.models.backbone import Backbone, plain_forward

    batch = pack(pairs(sizes, 4)).to(device)
    found = {}
    for precision in ("fp32", "bf16"):
        autocast = torch.bfloat16 if precision == "bf16" else None
        backbone = Backbone(make_lm(sizes.model, device), autocast=autocast)
        with torch.no_grad():
            together = backbone(batch)
            with plain_forward(backbone):
                alone = backbone(batch)
        found[precision] = backbone.distance(together, alone)
        if not found[precision] <= TOLERANCE[precision]:
            raise Wrong(f"packed rows are {found[precision]:.2g} nats off in {precision}")
    return found


def repeat(sizes, work, device) -> dict:
    """How many of five passes gave the first one's gradients, bit for bit."""
    import torch

    from train.data.packing import Group, pack
    from train.models.backbone import Backbone

    draw = random.Random(0)
    lengths = [(100, 300, 700), (50, 1000, 400)]
    groups = []
    for prompt, *answers in lengths:
        scale = 1 if sizes is FULL else 20
        ids = [
            tuple(draw.randrange(3, 1000) for _ in range(max(2, n // scale)))
            for n in (prompt, *answers)
        ]
        groups.append(Group(ids[0], tuple(ids[1:])))
    batch = pack(groups).to(device)
    backbone = Backbone(make_lm(sizes.model, device), autocast=torch.bfloat16)
    found = {}
    for deterministic in (False, True):
        backbone.deterministic = deterministic

        def gradients():
            backbone.zero_grad()
            backbone(batch).sum().backward()
            return [p.grad.clone() for p in backbone.parameters()]

        first, same = gradients(), 0
        for _ in range(5):
            again = gradients()
            same += all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        found["deterministic" if deterministic else "default"] = same
    if found["deterministic"] != 5:
        raise Wrong("gradients differ from pass to pass under --deterministic")
    return found


def zero(sizes, work, device) -> dict:
    """Gradient norms of two updates under each stage, and their distance from stage 0's."""
    import torch

    from train.data.packing import pack
    from train.engine import loading

    folder = save_model(SMALL, work / "small")
    batch = pack(pairs(TINY, 4)).to(device)
    norms = {}
    for stage in range(4):
        module = loading.load_backbone(folder, resolved(stage, "fp32"), "fp32", stage, device)
        model = wrap(module, stage, "fp32", 2)
        norms[stage] = []
        for _ in range(2):
            model.backward(-model(batch).mean())
            norms[stage].append(model.step().grad_norm)
        del model, module
    torch.cuda.empty_cache()
    apart = max(
        abs(ours - theirs) / theirs
        for stage in norms
        for ours, theirs in zip(norms[stage], norms[0], strict=True)
    )
    if not apart <= 1e-4:
        raise Wrong(f"gradient norms of ZeRO's stages are {apart:.2g} of themselves apart: {norms}")
    return {"norms": norms, "apart": apart}


def resume(sizes, work, device) -> dict:
    """How many of the weights' tensors a continued run has bit for bit."""
    import torch
    from safetensors.torch import load_file

    folder = save_model(SMALL, work / "small")
    data = write_pairs(TINY, folder, 24)
    flags = dict(
        model=folder,
        data=data,
        batch_size=4,
        max_steps=4,
        max_length=512,
        save_every=2,
        keep=3,
        deterministic="true",
    )
    command("launch/train_dpo.py", output=work / "whole", **flags)
    command(
        "launch/train_dpo.py",
        output=work / "continued",
        resume=work / "whole/checkpoints/step-2",
        **flags,
    )
    whole, continued = (
        load_file(next((work / name / "model").glob("*.safetensors")))
        for name in ("whole", "continued")
    )
    same = sum(torch.equal(whole[name], continued[name]) for name in whole)
    if same < len(whole):
        raise Wrong(f"a continued run has {same} of {len(whole)} tensors of one never stopped")
    return {"same": same, "of": len(whole)}


# ------------------------------------------------------------ how fast?


def step(**mode):
    """The part that measures a run under flags of a mode: of the readings of its second half, one in two
    steps, the middle one. A shape of batches that has first to be compiled costs one reading.
    """

    def measure(sizes, work, device) -> dict:
        folder = save_model(sizes.model, work / "model")
        data = write_pairs(sizes, folder, PAIRS_OF_STEP * sizes.steps)
        output = work / "-".join(["step", *mode.values()])
        _, seconds = command(
            "launch/train_dpo.py", model=folder, data=data, output=output, batch_size=PAIRS_OF_STEP,
            max_steps=sizes.steps, epochs=1, log_every=2, beta=0.1, max_length=1024, save_minutes=0,
            max_implausible=1, **mode)  # fmt: skip
        readings = curves(output, "perf/")
        pairs_a_second = readings["perf/pairs_per_second"]
        late = [*range(len(pairs_a_second) // 2, len(pairs_a_second))]
        middle = sorted(late, key=lambda i: pairs_a_second[i])[len(late) // 2]
        tokens_a_second = readings["perf/tokens_per_second"]
        return {
            "seconds": PAIRS_OF_STEP / pairs_a_second[middle],
            "tokens": tokens_a_second[middle] * PAIRS_OF_STEP / pairs_a_second[middle],
            "epoch": PAIRS_OF_EPOCH / pairs_a_second[middle],
            "mfu": readings["perf/mfu"][middle],
            "memory_gb": readings["perf/memory_gb"][-1],
            "pairs_per_second": pairs_a_second,
            "whole_run": seconds,
        }

    return measure


class Clock:
    """Seconds of a step's parts, each waited for."""

    def __init__(self, device):
        self.device, self.seconds = device, {}

    def measure(self, name, call):
        synchronise(self.device)
        began = time.perf_counter()
        result = call()
        synchronise(self.device)
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)
        return result


def loop(sizes, shape, device, steps: int) -> dict:
    """Steps of DPO without a launch script around them: seconds of each as a whole, then of its parts;
    FLOP, memory, and its estimate.
    """
    import torch

    from train.data.packing import pack, plan_batches
    from train.engine import ds_config, footprint, memory
    from train.losses import composition
    from train.methods import preference
    from train.methods.reference import Live
    from train.models.backbone import Backbone
    from train.models.flops import FlopCounter
    from train.run import meter

    precision = precision_of(device)
    autocast = ds_config.autocast_dtype(0, precision)
    policy = wrap(Backbone(make_lm(shape, device), autocast=autocast), 0, precision, 4 * steps)
    frozen = Backbone(make_lm(shape, device), autocast=autocast)
    reference = Live(frozen, ds_config.resolve_frozen({}, resolved(0, precision)))
    loss = composition.choose("sigmoid", 0.1, {})
    counter = FlopCounter(policy.module)
    budget = memory.default_batch_tokens(policy.module, device, 0, False, 1024)

    def packs(number):
        groups = pairs(sizes, PAIRS_OF_STEP, seed=number)
        plan = plan_batches([g.tokens for g in groups], budget)[0]
        return [pack([groups[i] for i in batch]).to(device) for batch in plan]

    def losses_of(batch, ref_logps, logps):
        scored = preference.score_batch(logps, ref_logps, batch, loss)
        return loss(scored.examples, scored.weights).sum() / PAIRS_OF_STEP

    def whole(number):
        for batch in packs(number):
            ref_logps = reference(batch)
            policy.backward(losses_of(batch, ref_logps, policy(batch)))
        policy.step()

    seconds = []
    for number in range(3 + steps):
        synchronise(device)
        began = time.perf_counter()
        whole(number)
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    peak = meter.peak_memory(device)

    clock = Clock(device)
    for number in range(steps):
        for batch in clock.measure("input", lambda n=number: packs(n)):
            ref_logps = clock.measure("reference", lambda b=batch: reference(b))
            value = clock.measure(
                "forward", lambda b=batch, r=ref_logps: losses_of(b, r, policy(b))
            )
            clock.measure("backward", lambda v=value: policy.backward(v))
        clock.measure("optimiser", policy.step)

    batches = packs(0)
    tokens = sum(len(batch.input_ids) for batch in batches)
    # the policy's forward pass and the reference's
    flops = sum(2 * counter.forward(batch) + counter.backward(batch) for batch in batches)
    middle = statistics.median(seconds[3:])
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layers = policy.module.lm.config.num_hidden_layers
    activations = footprint.of_module(policy.module, device.type).of_token(layers, False)
    weights = sum(p.numel() for p in policy.module.parameters())
    head = policy.module.head.weight
    longest = max(batches, key=lambda batch: len(batch.input_ids))
    logits_bytes = min(policy.module.logits_bytes, 4 * head.shape[0] * len(longest.target))
    estimated = (
        footprint.states(weights, 0, precision, 1).total
        + footprint.frozen(weights, False, precision, 1)
        + footprint.autocast_copies(policy.module)
        + footprint.head_bytes(head.numel(), dtype, logits_bytes)
        + activations * len(longest.input_ids)
    )
    return {
        "seconds": seconds,
        "middle": middle,
        "tokens": tokens,
        "tokens_per_second": tokens / middle,
        "flops": flops,
        "mfu": flops / middle / meter.peak_flops(device, dtype),
        "memory_gb": peak,
        "estimated_gb": estimated / 1e9,
        "parts": {name: sum(times) / steps for name, times in clock.seconds.items()},
        "idle": idle(whole, device, steps=3),
    }


def idle(whole, device, steps: int) -> float | None:
    """The share of steps in which the device runs no kernel; None where that is not seen: on a CPU, which
    is the device, and on machines that keep a GPU's counters to the administrator.
    """
    if device.type != "cuda":
        return None
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        synchronise(device)
        began = time.perf_counter()
        for number in range(steps):
            whole(number)
        synchronise(device)
        seconds = time.perf_counter() - began
    # a range that somebody has named lies over kernels, and over what is between them
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    if not kernels:  # the profiler was not let see any
        return None
    return 1 - union(sorted(kernels)) / 1e6 / seconds


def union(spans) -> float:
    """The length of sorted (start, end) spans together, overlaps once."""
    total, until = 0.0, -math.inf
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def breakdown(sizes, work, device) -> dict:
    return loop(sizes, sizes.model, device, max(2, sizes.steps // 2))


def billion(sizes, work, device) -> dict:
    return loop(sizes, sizes.billion, device, 2 if sizes is TINY else 5)


def generate(sizes, work, device) -> dict:
    """Tokens a second by answers at once."""
    import torch

    from train.models import generate as generation

    lm = make_lm(sizes.model, device)
    autocast = torch.bfloat16 if device.type == "cuda" else None
    found = {}
    for count in sizes.answers_at_once:
        prompts = [group.prompt for group in pairs(sizes, count)]

        def decode(asked, count=count):
            return generation.generate(
                lm, asked, eos_token_ids=(), max_new_tokens=sizes.new_tokens, batch_size=count,
                autocast=autocast)  # fmt: skip

        decode(prompts[: max(1, count // 8)])  # warms up
        synchronise(device)
        began = time.perf_counter()
        done = decode(prompts)
        synchronise(device)
        seconds = time.perf_counter() - began
        found[str(count)] = sum(len(each.ids) for each in done) / seconds
    return found


def rollout(algorithm: str):
    """The part that measures a rollout of an algorithm with its updates."""

    def measure(sizes, work, device) -> dict:
        folder = save_model(sizes.model, work / "model")
        data = write_pairs(sizes, folder, 64)
        _, seconds = command(
            "launch/train_ppo.py", algorithm=algorithm, model=folder, data=data,
            output=work / algorithm, max_steps=2, epochs=1, reward="length:1-40", save_minutes=0,
            max_implausible=1, **sizes.rollout)  # fmt: skip
        readings = curves(work / algorithm, "perf/")
        return {name: values[-1] for name, values in readings.items()} | {"whole_run": seconds}

    return measure


def curves(output: Path, prefix: str) -> dict[str, list[float]]:
    """The values of a run's curves whose names begin so, off its TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard")).Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith(prefix)]
    return {name: [event.value for event in events.Scalars(name)] for name in names}


def trl(sizes, work, device) -> dict:
    """What dpo_step.py measures of ours and TRL's on the same pairs."""
    folder = save_model(sizes.model, work / "model")
    data = write_pairs(sizes, folder, 2 * PAIRS_OF_STEP)
    count = 4 if sizes is TINY else PAIRS_OF_STEP
    script = ROOT / "tests/benchmarks/dpo_step.py"
    line = [sys.executable, script, "--model", folder, "--data", data, "--pairs", count]
    line += ["--rounds", 1, "--steps", 1 if sizes is TINY else 5, "--contenders", "ours", "trl"]
    line += ["--precision", precision_of(device), "--trl-micro", min(count, 4)]
    line += ["--json", work / "trl.json"]
    done = subprocess.run([*map(str, line)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    runs = json.loads((work / "trl.json").read_text())["runs"]
    return {
        run["contender"].partition("/")[0]: {
            "seconds": statistics.median(run["seconds"][1:]),
            "memory_gb": run["peak_gb"],
        }
        for run in runs
        if "seconds" in run
    }


# ------------------------------------------------------------ the table


def of_loop(found):
    """Rows of `breakdown` and `billion`."""
    yield "a step", f"{1e3 * found['middle']:.1f} ms, {found['tokens']:,} tokens"
    yield "tokens/s", f"{found['tokens_per_second']:,.0f}"
    yield "model FLOPs utilisation", f"{found['mfu']:.1%}"
    yield "memory, and its estimate", f"{found['memory_gb']:.2f} GB, {found['estimated_gb']:.2f} GB"
    parts = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in found["parts"].items())
    yield "its parts, each waited for", f"{parts} ms"
    yield "the GPU idles", "-" if found["idle"] is None else f"{found['idle']:.0%} of the time"


def of_step(found):
    yield "a step", f"{1e3 * found['seconds']:.1f} ms, {found['tokens']:,.0f} tokens"
    yield "an epoch of the reference workload", f"{found['epoch']:,.0f} s"
    yield (
        "model FLOPs utilisation, memory",
        f"{found['mfu']:.1%}, {found['memory_gb']:.2f} GB",
    )


def of_rollout(found):
    parts = [
        f"{name.removeprefix('perf/seconds_')} {value:.2f} s"
        for name, value in found.items()
        if name.startswith("perf/seconds_")
    ]
    yield "a rollout and its updates", ", ".join(parts)
    yield (
        "tokens/s, memory",
        (f"{found['perf/tokens_per_second']:,.0f}, {found['perf/memory_gb']:.2f} GB"),
    )


def of_trl(found):
    for name, of_one in found.items():
        yield name, f"{1e3 * of_one['seconds']:.0f} ms a step, {of_one['memory_gb']:.2f} GB"


PARTS = {
    "packed": Part(
        packed,
        lambda f: [(f"distance in {name}", f"{x:.1e} nats") for name, x in f.items()],
        60,
    ),
    "repeat": Part(
        repeat,
        lambda f: [(f"the same gradients, {name}", f"{n} of 5 times") for name, n in f.items()],
        60,
    ),
    "zero": Part(
        zero, lambda f: [("stages 0 to 3 apart by", f"{f['apart']:.1e} of the norm")], 120, True
    ),
    "resume": Part(
        resume, lambda f: [("the same weights", f"{f['same']} of {f['of']} tensors")], 180
    ),
    "eager": Part(step(compile="off"), of_step, 90),
    "compiled": Part(step(compile="auto"), of_step, 240),  # three graphs for each of a few shapes
    "deterministic": Part(step(compile="off", deterministic="true"), of_step, 90),
    "breakdown": Part(breakdown, of_loop, 90, True),
    "generate": Part(
        generate,
        lambda f: [(f"{n} answers at once", f"{x:,.0f} tokens/s") for n, x in f.items()],
        90,
    ),
    "grpo": Part(rollout("grpo"), of_rollout, 120),
    "ppo": Part(rollout("ppo"), of_rollout, 120),
    "billion": Part(billion, of_loop, 90, True),
    "trl": Part(trl, of_trl, 120),
}


def machine() -> dict:
    import torch
    import transformers

    on_cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_cuda else "CPU",
        "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if on_cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
    }


def in_process(name: str, sizes: Sizes, work: Path):
    """One part; what it measured goes into a file."""
    from train import quiet

    quiet.silence_libraries()
    from tests.benchmarks import contest
    from train.engine import dist

    device = dist.init() if PARTS[name].trains else contest.default_device()
    try:
        found = PARTS[name].measure(sizes, work, device)
    except Wrong as error:
        found = {"wrong": str(error)}
    (work / f"{name}.json").write_text(json.dumps(found))
    dist.shutdown()


def run_within(limit: float, line: list[str], env: dict | None = None) -> tuple[int, str]:
    """Run a command: its exit status and what it said on stderr. TimeoutExpired after `limit` seconds,
    when all that it has started is ended with it: the next part finds the GPU free.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(
        line, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            _, said = process.communicate(timeout=limit)
        except BaseException:  # Ctrl-C, too, which a group of its own does not get
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said


def spawn(name: str, args, work: Path, seconds: float) -> dict:
    """A part in a process of its own: what it measured, or {"failed": why}."""
    line = [sys.executable, __file__, "--part", name, "--work", str(work)]
    line += ["--tiny"] if args.tiny else []
    env = os.environ | {"HF_HUB_OFFLINE": "1", "ZEROPREF_CACHE": str(work / "cache")}
    limit = min(seconds, PARTS[name].limit * (4 if args.tiny else 1))  # a CPU takes its time
    try:
        code, said = run_within(limit, line, env)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within {limit:.0f} s"}
    if code:
        return {"failed": (said.strip() or "no word")[-1500:]}
    return json.loads((work / f"{name}.json").read_text())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tiny", action="store_true", help="small sizes, on whatever device there is")
    add("--minutes", type=float, default=9, help="all parts together (default 9)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--json", help="a file for everything measured, besides")
    add("--part", choices=PARTS, help=argparse.SUPPRESS)
    add("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = TINY if args.tiny else FULL
    if args.part:
        in_process(args.part, sizes, Path(args.work))
        return
    about = machine()
    if about["cuda"] is None or about["device"] == "CPU":
        if not args.tiny:
            parser.error("there is no GPU: --tiny runs the same code with small sizes on a CPU")
    sys.exit(run(args, about))


def run(args, about: dict) -> int:
    """All parts, one after the other; prints the table. The exit status."""
    until = time.monotonic() + 60 * args.minutes
    results, rows = {}, []
    with tempfile.TemporaryDirectory(prefix="gpu-") as work:
        for name in args.parts:
            if name == "trl" and not importlib.util.find_spec("trl"):
                continue
            began = time.monotonic()
            left = until - began
            found = (
                {"failed": "no time was left"} if left < 10 else spawn(name, args, Path(work), left)
            )
            results[name] = found | {"took": time.monotonic() - began}
            bad = found.get("failed") or found.get("wrong")
            lines = [("failed" if "failed" in found else "WRONG", bad.splitlines()[-1])] if bad else [
                *PARTS[name].rows(found)
            ]  # fmt: skip
            rows += [(name, what, value) for what, value in lines]
            print(f"{name}: {results[name]['took']:.0f} s", file=sys.stderr, flush=True)
    print(f"{about['device']}, torch {about['torch']}, transformers {about['transformers']}\n")
    print("| part | what | value |\n|---|---|---|")
    print("\n".join(f"| {part} | {what} | {value} |" for part, what, value in rows))
    everything = json.dumps({"machine": about, "tiny": args.tiny, "results": results})
    print("\n" + everything)
    if args.json:
        Path(args.json).write_text(everything + "\n")
    return int(any("failed" in found or "wrong" in found for found in results.values()))


if __name__ == "__main__":
    main()
