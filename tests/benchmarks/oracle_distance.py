"""How far training's losses are from an fp64 oracle's, ours beside TRL's, on the same token ids.

    python tests/benchmarks/oracle_distance.py --data PAIRS.jsonl [MORE.jsonl ...]
    python tests/benchmarks/oracle_distance.py --code . OTHER_CHECKOUT --json OUT.json

(TRL comes with the extra: pip install -e '.[peers]'.) Six steps of DPO (sigmoid, beta 0.1, AdamW at
a constant 1e-3, no weight decay, clipping to 1, eight pairs a step) of a tiny random Llama
(tests/tiny.py) in fp32, on every file of --data by itself; by default on four quarters of the
built-in pairs, whose answers are short. Contenders:

    ours    the user's command, `launch/train_dpo.py` of each checkout that --code names (default:
            this one), on one rank; every step's numbers stand in full in its log
    TRL     its DPOTrainer, fed our ids in our order: one pair a micro-batch, accumulated

The oracle is neither's code: the same weights in fp64, one sequence at a time, full logits, plain
autograd and torch's AdamW, transformers' own casts to fp32 lifted (tests/wide.py) but for one: the table
of cosines and sines by position is transformers' own, of angles in fp32. It is what the model is when
it is used, a constant that every contender shares, and no sum. Only the ids and their order come from
train/data.

Prints for each file the largest distance from the oracle over the six steps: of the step's mean
loss, and of its mean margin; then how many times as far TRL's loss is as the first checkout's, with a
standard error either way where there are several draws of weights, and in how many of these it is
farther. The exit status is 1 where this checkout's loss is farther than TRL's on some file.

What a distance says depends on the weights: by default both are measured, those drawn as
transformers draws them, with a deviation of 0.02, where the sums of log-probs decide, and
tests/tiny.py's own with 0.2. There AdamW has its say: its first update is the gradient over its size
plus 1e-8, so that a clipped gradient below about 1e-7 (some 50 of 127,296 weights have one) turns
its rounding into a part of a step. One such weight can move the loss by 1e-4, for every contender that
rounds: --seeds draws several sets of weights, and a file's distance is their geometric mean. Of one
set it is chance; with six the ratio's standard error is two fifths, with seventeen a quarter.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny
import wide

from train import quiet
from train.data import steps, tokens

STEPS, PAIRS, BETA, LR, CLIP = 6, 8, 0.1, 1e-3, 1.0
MAX_LENGTH, MAX_PROMPT = 1024, 256
BUILTIN = ROOT / "train/data/builtin/train.jsonl"
# Farther than this is no rounding: the contender has seen other ids, or another order.
SAME_PAIRS = 0.05


def main():
    args = arguments()
    quiet.silence_libraries()
    import trl  # late: it says much where it is not silenced first

    began = time.perf_counter()
    codes = [Path(code).resolve() for code in args.code]
    names = [*(f"ours in {code.name}" for code in codes), "TRL"]
    titles = [*names, "TRL / ours", "TRL is farther in", "mean tokens of an answer"]
    print(f"| largest distance: loss, margin | {' | '.join(titles)} |")
    print("|---" * (len(titles) + 1) + "|")
    files = {}
    for deviation in args.initializer_range:
        of_deviation = measure_all(args, codes, deviation)
        files |= {f"{path} at {deviation}": file for path, file in of_deviation.items()}
        columns = zip(*(file["distances"] for file in of_deviation.values()), strict=True)
        means = cells(geometric_means(column) for column in columns)
        draws = [of_seed for file in of_deviation.values() for of_seed in file["seeds"].values()]
        print(f"| geometric mean at {deviation} | {means} | {compared(draws)} | |", flush=True)
    seconds = time.perf_counter() - began
    print(f"\n{seconds:.0f} s; TRL {trl.__version__}, torch {torch.__version__}")
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "files": files}, indent=1))
    if ROOT in codes:
        mine = codes.index(ROOT)
        farther = [f["distances"][mine][0] > f["distances"][-1][0] for f in files.values()]
        sys.exit(1 if any(farther) else 0)


def measure_all(args, codes, deviation):
    """{path: what `measure` found} of every file, with weights of this deviation; prints a line each."""
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shape = dict(initializer_range=deviation, max_position_embeddings=MAX_LENGTH)
        models = {}  # of each seed: policy and reference
        for seed in args.seeds:
            policy = tiny.save_model(folder / f"policy-{seed}", seed=seed, **shape)
            reference = policy
            if args.other_reference:
                reference = tiny.save_model(folder / f"reference-{seed}", seed=seed + 1000, **shape)
            models[seed] = policy, reference
        for path in [Path(path).resolve() for path in args.data] or write_quarters(folder):
            of_seeds = {
                seed: measure(path, codes, *pair, folder / f"runs-{len(files)}-{seed}")
                for seed, pair in models.items()
            }
            every = [of_seed["distances"] for of_seed in of_seeds.values()]
            file = files[str(path)] = {
                "seeds": of_seeds,
                "distances": [geometric_means(column) for column in zip(*every, strict=True)],
                "tokens": next(iter(of_seeds.values()))["tokens"],
            }
            shown = (
                f"{cells(file['distances'])} | {compared(of_seeds.values())} | {file['tokens']:.0f}"
            )
            print(f"| {path.name} at {deviation} | {shown} |", flush=True)
    return files


def measure(path, codes, policy, reference, output):
    """Every step of the oracle and of the contenders on one file, and how far they lie apart."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    groups = groups_of_steps(path, tokenizer)
    exact = oracle(policy, reference, groups)
    found = [
        ours(code, policy, reference, path, output / str(number))
        for number, code in enumerate(codes)
    ]
    found.append(with_trl(tokenizer, policy, reference, groups, output / "trl"))
    sizes = [len(r) for step in groups for group in step for r in group.responses]
    return {
        "oracle": exact,
        "contenders": found,
        "distances": [distance(means, exact) for means in found],
        "tokens": statistics.fmean(sizes),
    }


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", nargs="+", default=[], help="jsonl files of pairs; default: the built-in pairs")
    add("--code", nargs="+", default=[str(ROOT)], help="checkouts; default: this one")
    add(
        "--initializer-range",
        type=float,
        nargs="+",
        default=[0.02, 0.2],
        help="deviations of the model's random weights (default 0.02 and 0.2)",
    )
    add("--seeds", type=int, nargs="+", default=[0], help="of those weights (default 0)")
    add(
        "--other-reference",
        action="store_true",
        help="a reference with other random weights; default: the policy as it is at the start",
    )
    add("--json", help="a file for every step's loss and margin")
    return parser.parse_args()


def cells(distances):
    return " | ".join(f"{loss:.1e}, {margin:.1e}" for loss, margin in distances)


def compared(draws):
    """How many times as far TRL's loss is as the first contender's, with a standard error either way,
    and in how many of the draws it is farther: two cells.
    """
    losses = [[max(found[0], 1e-16) for found in draw["distances"]] for draw in draws]
    logs = [math.log(loss[-1] / loss[0]) for loss in losses]
    mean = statistics.fmean(logs)
    shown = f"{math.exp(mean):.1f}"
    if len(logs) > 1:
        error = statistics.stdev(logs) / math.sqrt(len(logs))
        shown += f" ({math.exp(mean - error):.1f} to {math.exp(mean + error):.1f})"
    return f"{shown} | {sum(log > 0 for log in logs)} of {len(logs)}"


def geometric_means(distances):
    """Of the losses' distances and of the margins'. One of 0 counts as fp64's rounding of 1."""
    return [
        statistics.geometric_mean(max(value, 1e-16) for value in column)
        for column in zip(*distances, strict=True)
    ]


def write_quarters(folder):
    """The built-in training pairs in four files, as many as six steps take; their paths."""
    rows = BUILTIN.read_text().splitlines(keepends=True)
    paths = []
    for number, start in enumerate(range(0, len(rows), STEPS * PAIRS), 1):
        paths.append(folder / f"builtin-{number}.jsonl")
        paths[-1].write_text("".join(rows[start : start + STEPS * PAIRS]))
    return paths


def groups_of_steps(path, tokenizer):
    """The pairs of each step, as launch/train_dpo.py draws them."""
    lengths = dict(max_length=MAX_LENGTH, max_prompt_length=MAX_PROMPT)
    data = tokens.prepare([str(path)], tokenizer, **lengths, max_dropped=1.0)
    # how a step is packed into batches changes nothing of what it is made of
    planned = steps.plan_steps(data.lengths.sum(1), PAIRS, MAX_LENGTH, seed=0, total=STEPS)
    return [[data.group(i) for i in plan.groups] for plan in planned]


def distance(means, exact):
    """The largest difference of losses and of margins, both lists of (loss, margin) a step."""
    gaps = [
        [abs(value - true) for value, true in zip(step, exact_step, strict=True)]
        for step, exact_step in zip(means, exact, strict=True)
    ]
    loss, margin = (max(column) for column in zip(*gaps, strict=True))
    if not loss < SAME_PAIRS:
        raise ValueError(f"losses differ by {loss}: these are not the same pairs, {means}, {exact}")
    return loss, margin


def keep_table(rotary):
    """Let a rotary embedding compute in the types that it asks for."""
    own = rotary.forward

    def forward(x, position_ids):
        with wide.Wide.paused():
            return own(x, position_ids)

    rotary.forward = forward


def oracle(policy, reference, groups):
    """(mean loss, mean margin) of each step's pairs, fp64 throughout."""
    lm, frozen = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).double()
        for path in (policy, reference)
    )
    for model in (lm, frozen):
        keep_table(model.model.rotary_emb)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=LR, weight_decay=0.0)

    def logp(model, prompt, response):
        """log p(response | prompt), nats"""
        ids = torch.tensor([*prompt, *response])
        with wide.Wide():
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        logps = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
        return logps.gather(1, ids[len(prompt) :, None]).sum()

    means = []
    for step in groups:
        losses, margins = [], []
        for group in step:
            rewards = []
            for response in group.responses:
                with torch.no_grad():
                    ref_logp = logp(frozen, group.prompt, response)
                rewards.append(BETA * (logp(lm, group.prompt, response) - ref_logp))
            margin = rewards[0] - rewards[1]
            loss = -torch.nn.functional.logsigmoid(margin)
            (loss / len(step)).backward()
            losses.append(loss.item())
            margins.append(margin.item())
        torch.nn.utils.clip_grad_norm_(lm.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        means.append((statistics.fmean(losses), statistics.fmean(margins)))
    return means


def ours(code, policy, reference, data, output):
    """(mean loss, mean margin) of each step, from the log of the user's command."""
    flags = {
        "model": policy,
        "reference_model": reference,
        "data": data,
        "output": output,
        "beta": BETA,
        "lr": LR,
        "lr_scheduler": "constant",
        "grad_clip": CLIP,
        "batch_size": PAIRS,
        "max_steps": STEPS,
        "max_length": MAX_LENGTH,
        "max_prompt_length": MAX_PROMPT,
        "max_dropped": 1.0,
        "precision": "fp32",
    }
    command = [sys.executable, "launch/train_dpo.py"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    run = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} in {code}:\n{run.stderr[-3000:]}")
    log = (output / "logs/rank-0.log").read_text()
    lines = re.findall(r"INFO step \d+ (\{.*)", log)

    def number(name, line):
        return float(re.search(rf"'{name}': ([\d.e+-]+)", line)[1])

    return [(number("loss", line), number("rewards/margins", line)) for line in lines]


def with_trl(tokenizer, policy, reference, groups, folder):
    """(mean loss, mean margin) of each step of TRL's DPOTrainer, on our ids in our order."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = [group for step in groups for group in step]
    columns = {
        "prompt_ids": [list(pair.prompt) for pair in pairs],
        "chosen_ids": [list(pair.responses[0]) for pair in pairs],
        "rejected_ids": [list(pair.responses[1]) for pair in pairs],
    }
    args = DPOConfig(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=PAIRS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        beta=BETA,
        max_length=MAX_LENGTH,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    means = []

    class InOrder(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # it holds ids already

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Record(transformers.TrainerCallback):
        def on_log(self, *_, logs, **__):
            if "loss" in logs:
                means.append((float(logs["loss"]), float(logs["rewards/margins"])))

    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (policy, reference)
    ]
    trainer = InOrder(
        *models,
        args=args,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[Record()],
    )
    trainer.remove_callback(transformers.PrinterCallback)  # the table alone goes to stdout
    trainer.train()
    return means


if __name__ == "__main__":
    main()
