"""What the benchmarks of a training step share: contenders that take turns, a fresh process each, and
the table of what they took.

A benchmark is a script that calls `run` with a Contest; its docstring says what a step is.

"useful" FLOP/s counts the packed rows' work (train.models.flops), the same for all; "own" counts what
a layout computes, padding included. Shares are of the best matrix product measured in the same run
over several shapes, in fp32 or bf16 like the step. Peak memory is the whole process's: ru_maxrss,
nothing deducted, on CPU; torch.cuda.max_memory_allocated on CUDA.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import transformers

from train.data import steps
from train.data.packing import pack
from train.models import builtin
from train.models.flops import FlopCounter

CLIP, MAX_LENGTH, MAX_PROMPT = 1.0, 1024, 256  # the reference workload's
AGREE = 2e-3  # nats: how far losses of two contenders may lie apart in fp32
# matrix products (m, k, n)
SHAPES = ((1024,) * 3, (2048,) * 3, (4096,) * 3, (2048, 576, 1536), (1536, 576, 49152))


class Contest(NamedTuple):
    """A benchmark."""

    script: str  # its file
    doc: str  # for --help
    # ours, padded, trl -> (job, pairs of a micro-batch or 0) -> what was measured
    contenders: dict[str, Callable]
    open_pairs: Callable  # job -> (tokenizer, the pairs of a step)


def run(contest: Contest):
    """The benchmark as its command line has it, or one contender's turn in a process of its own."""
    if not sys.argv[-1].startswith("{"):
        main(contest)
        return
    job = json.loads(sys.argv[-1])
    kind, _, micro = job["contender"].partition("/")
    if kind == "machine":
        found = machine(job, contest.open_pairs)
    else:
        found = contest.contenders[kind](job, int(micro or 0))
    found["threads"] = torch.get_num_threads()
    Path(job["out"]).write_text(json.dumps(found))


# In a process of its own: what one contender's turn needs.


def now(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(job, open_pairs) -> dict:
    """The best matrix product, in FLOP/s, and its shape; the pairs' sizes in tokens. Fills the
    token cache.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, best = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]], (0.0, None)
    for m, k, n in SHAPES + ((8192,) * 3,) * (device.type == "cuda"):
        a, b = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((m, k), (n, k)))
        for _ in range(5):
            started = now(device)
            a @ b.t()
            best = max(best, (2 * m * k * n / (now(device) - started), f"{m} x {k} x {n}"))
    prompts, chosen, rejected = (int(column.sum()) for column in open_pairs(job)[1].lengths.T)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {
        "peak": best[0],
        "peak_shape": best[1],
        "packed_tokens": prompts + chosen + rejected,
        "two_sided_tokens": 2 * prompts + chosen + rejected,
        "device": name,
    }


def planned_steps(job, micro, data, batch_tokens):
    if not micro:
        return steps.plan_steps(
            data.lengths.sum(1), job["pairs"], batch_tokens, seed=0, total=1 + job["steps"]
        )
    groups = tuple(range(job["pairs"]))
    batches = tuple(groups[i : i + micro] for i in groups[::micro])
    return [
        steps.PlannedStep(number, number, groups, batches) for number in range(1 + job["steps"])
    ]


def operations(module, data, rows, padded, forwards):
    """FLOPs of a step: useful (prompts once, no padding), and own (as this layout computes them).
    forwards: what a step is worth, a backward counting two.
    """
    counter = FlopCounter(module)
    if padded:
        sizes = [
            [prompt + n for prompt, *responses in row.shape for n in responses] for row in rows
        ]
        flat = [torch.empty(len(each) * max(each), device="meta") for each in sizes]
        rows = [
            SimpleNamespace(
                input_ids=x, target=x, shape=[(0, max(each))] * len(each), num_responses=len(each)
            )
            for x, each in zip(flat, sizes, strict=True)
        ]
    useful = counter.forward(pack([data.group(i) for i in range(len(data))]))
    return forwards * useful, forwards * sum(counter.forward(row) for row in rows)


def clock(device):
    """A callback of transformers' Trainer that keeps the seconds and the loss of each step."""

    class Clock(transformers.TrainerCallback):
        seconds, losses = [], []

        def on_step_begin(self, *_, **__):
            self.began = now(device)

        def on_step_end(self, *_, **__):
            self.seconds.append(now(device) - self.began)

        def on_log(self, *_, logs, **__):
            self.losses += [float(logs["loss"])] if "loss" in logs else []

    return Clock()


def trainer_options(job, micro, device) -> dict:
    """TRL's arguments that its trainers share: the same work as ours, nothing besides."""
    return dict(
        max_steps=1 + job["steps"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=job["pairs"] // micro,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        max_length=MAX_LENGTH,
        bf16=job["precision"] == "bf16",
        use_cpu=device.type == "cpu",
        gradient_checkpointing=job["trl_checkpointing"],
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )


# In the first process, which loads no model: a child's ru_maxrss begins at its parent's.


def main(contest: Contest):
    args = arguments(contest)
    if args.model is None:
        args.model = str(builtin.fetch(say=lambda line: print(line, file=sys.stderr)))
    micros = {
        "ours": [],
        "padded": sorted({min(m, args.pairs) for m in args.padded_micro}),
        "trl": args.trl_micro,
    }
    names = [
        name
        for kind in args.contenders
        for name in ([f"{kind}/{m}" for m in micros[kind]] or [kind])
    ]
    runs = []
    for number in range(args.rounds):
        first = number % len(names)
        for precision in args.precision:
            for name in ("machine", *names[first:], *names[:first]):
                runs.append(
                    {"contender": name, "precision": precision, "round": number}
                    | spawn(contest, args, name, precision)
                )
                print(f"round {number + 1}: {_short(runs[-1])}", file=sys.stderr, flush=True)
                if name == "machine" and "failed" in runs[-1]:
                    sys.exit(1)
                if args.json:
                    Path(args.json).write_text(
                        json.dumps({"arguments": vars(args), "runs": runs}, indent=1)
                    )
    lines, agreed = agreement(args, names, runs)
    print("\n".join([*header(args, runs), *table(args, names, runs), "", *lines]))
    sys.exit(0 if agreed else 1)


def arguments(contest):
    parser = argparse.ArgumentParser(
        description=contest.doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a model directory; default: the built-in model")
    add("--data", required=True, help="a jsonl file of pairs")
    add("--pairs", type=int, default=4, help="pairs a step (default 4)")
    add("--rounds", type=int, default=3, help="turns of every contender (default 3)")
    add(
        "--steps",
        type=int,
        default=1,
        help="measured steps a turn, after one to warm up (default 1)",
    )
    add("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    add(
        "--contenders",
        nargs="+",
        choices=tuple(contest.contenders),
        default=list(contest.contenders),
    )
    add(
        "--micro-tokens",
        type=int,
        help="ours: tokens a packed row may hold; default: from free memory",
    )
    add(
        "--padded-micro",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        help="padded: pairs a micro-batch (default 1 2 4)",
    )
    add(
        "--trl-micro",
        type=int,
        nargs="+",
        default=[1],
        help="TRL: pairs a micro-batch; divides --pairs (default 1)",
    )
    add(
        "--trl-checkpointing", action="store_true", help="TRL: its default activation checkpointing"
    )
    add("--threads", type=int, help="CPU threads of each process; default: torch's own choice")
    add("--json", help="file for everything measured, written as it comes")
    args = parser.parse_args()
    if args.steps < 1 or args.rounds < 1:
        parser.error("at least one round of one measured step")
    if uneven := [m for m in args.trl_micro if args.pairs % m]:
        parser.error(f"--trl-micro {uneven[0]} does not divide --pairs {args.pairs}")
    return args


def spawn(contest, args, name, precision) -> dict:
    """A contender's turn in a process of its own; {"failed": why} where it did not end well."""
    env = {"CUDA_VISIBLE_DEVICES": "0", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"} | os.environ
    if args.threads:
        env["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory(prefix="contest-") as work:
        job = vars(args) | {
            "contender": name,
            "precision": precision,
            "folder": f"{work}/run",
            "out": f"{work}/out",
        }
        load, command = os.getloadavg()[0], [sys.executable, contest.script, json.dumps(job)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
        if done.returncode:
            why = (
                signal.Signals(-done.returncode).name
                if done.returncode < 0
                else done.stderr.strip()[-2000:]
            )
            return {"failed": why, "load_before": load}
        return json.loads(Path(job["out"]).read_text()) | {"load_before": load}


def _short(run) -> str:
    what = f"{run['contender']} {run['precision']}: "
    if "failed" in run or "peak" in run:
        return what + (
            f"failed: {run['failed']}" if "failed" in run else f"{run['peak'] / 1e9:,.0f} GFLOP/s"
        )
    steps = ", ".join(f"{seconds:.3f} s" for seconds in run["seconds"])
    return (
        what
        + f"{steps} (the first warms up), {run['peak_gb']:.2f} GB, load {run['load_before']:.1f} before"
    )


def sound(runs, name, precision):
    return [
        r
        for r in runs
        if r["contender"] == name and r["precision"] == precision and "failed" not in r
    ]


def header(args, runs) -> list[str]:
    one = next(r for r in runs if r["contender"] == "machine")
    threads = "/".join(str(n) for n in sorted({r["threads"] for r in runs if "threads" in r}))
    lines = [
        f"{Path(args.model).name}, the first {args.pairs} pairs of {Path(args.data).name} "
        f"({one['two_sided_tokens']:,} tokens two-sided, {one['packed_tokens']:,} packed and shared), "
        f"{one['device']} with {threads} threads, torch {torch.__version__}, {args.rounds} rounds."
    ]
    for precision in args.precision:
        best, shape = max((r["peak"], r["peak_shape"]) for r in sound(runs, "machine", precision))
        lines.append(
            f"Best matrix product of this run, {precision}: {best / 1e9:,.0f} GFLOP/s ({shape})."
        )
    return [*lines, ""]


def table(args, names, runs) -> list[str]:
    """The Markdown table, a row a contender and precision."""
    columns = (
        "contender",
        "precision",
        "s/step: median (min-max)",
        "pairs/s",
        "ours is faster by",
        "peak GB",
        "loss 1",
        "loss 2",
        "useful GFLOP/s (of peak)",
        "own GFLOP/s (of peak)",
    )
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for precision in args.precision:
        peak = max(r["peak"] for r in sound(runs, "machine", precision))
        ours = [s for r in sound(runs, "ours", precision) for s in r["seconds"][1:]]
        useful = next((r["useful_flops"] for r in runs if "useful_flops" in r), None)
        for name in names:
            mine = sound(runs, name, precision)
            if not mine:
                lines.append(f"| {name} | {precision} | failed |" + " |" * (len(columns) - 3))
                continue
            seconds = [s for r in mine for s in r["seconds"][1:]]
            middle, losses = (
                statistics.median(seconds),
                (f"{loss:.4f}" for loss in mine[0]["losses"][:2]),
            )
            ratio = f"{middle / statistics.median(ours):.2f}x" if ours else ""
            spread = f"{middle:.3f} ({min(seconds):.3f}-{max(seconds):.3f})"
            work = (useful, mine[0].get("own_flops"))
            rates = (
                f"{n / middle / 1e9:,.0f} ({n / middle / peak:.0%})" if n else "" for n in work
            )
            memory_gb = f"{max(r['peak_gb'] for r in mine):.2f}"
            cells = (
                name,
                precision,
                spread,
                f"{args.pairs / middle:.3f}",
                ratio,
                memory_gb,
                *losses,
                *rates,
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def agreement(args, names, runs) -> tuple[list[str], bool]:
    """How far the first two steps' losses lie apart over all contenders and rounds, and whether
    that is near enough.
    """
    lines, agreed = [], not any("failed" in r for r in runs)
    for precision in args.precision:
        if not (
            losses := [r["losses"][:2] for name in names for r in sound(runs, name, precision)]
        ):
            continue
        apart = [max(column) - min(column) for column in zip(*losses, strict=True)]
        near = max(apart) <= AGREE
        agreed &= near or precision != "fp32"
        verdict = (
            f"{'agree' if near else 'DISAGREE'}, bound {AGREE:g}"
            if precision == "fp32"
            else "shown only"
        )
        lines.append(
            f"Losses 1 and 2, {precision}: at most {apart[0]:.1e} and {apart[1]:.1e} apart ({verdict})."
        )
    return lines, agreed
