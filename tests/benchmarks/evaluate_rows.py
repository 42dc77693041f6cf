"""Pairs a second of the evaluation's forward pass against the plain padded way, interleaved.

    python tests/benchmarks/evaluate_rows.py --data pairs.jsonl \
        [--pairs 32] [--rounds 3] [--batch 1 2 4]

Packed: rows planned over all pairs, as evaluation does. Padded: pairs in the data's order, a batch
of them at a time, each answer with its prompt, padded to the batch's longest, all logits,
transformers' own layers throughout. Both: one forward pass without gradient, the same weights.
Prints a Markdown table, `--json FILE` keeps every round.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train.data import tokens
from train.data.packing import pack
from train.data.steps import plan_pass
from train.engine import memory
from train.losses.logprobs import sum_per_response
from train.models import (
    backbone,
    builtin,
    pretrained,
)

PACKED = "packed"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="train/data/builtin/held_out.jsonl")
    parser.add_argument("--model", default=None)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    path = args.model or str(builtin.fetch())
    data = tokens.prepare(
        [args.data], pretrained.load_tokenizer(path), max_length=1024, max_prompt_length=256
    )
    data = data.select(range(min(args.pairs, len(data))))
    module, whole = backbone.Backbone(pretrained.load_causal_lm(path)), range(len(data))
    plans = {PACKED: plan_pass(data.lengths.sum(1), memory.CPU_TOKENS)}
    plans |= {
        f"padded, {n} at a time": [tuple(whole[i : i + n]) for i in whole[::n]] for n in args.batch
    }
    seconds, values = {name: [] for name in plans}, {}
    for _ in range(args.rounds):
        for name, plan in plans.items():
            took, values[name] = once(module, data, plan, name != PACKED)
            seconds[name].append(took)
    medians = {name: statistics.median(took) for name, took in seconds.items()}
    gaps = {name: float((found - values[PACKED]).abs().max()) for name, found in values.items()}
    lines = [
        f"{len(data)} pairs, {int(data.lengths.sum()):,} tokens with each prompt once; {args.rounds} rounds in turn, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the end",
        "",
        "| way, pairs | median s | fastest | slowest | pairs/s | times packed | largest gap, nats an answer |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, median in medians.items():
        took = seconds[name]
        lines.append(
            f"| {name} | {median:.2f} | {min(took):.2f} | {max(took):.2f} | {len(data) / median:.2f} | "
            f"{median / medians[PACKED]:.2f} | {gaps[name]:.1g} |"
        )
    print("\n".join(lines))
    if args.json:
        Path(args.json).write_text(
            json.dumps({"pairs": len(data), "seconds": seconds, "gaps": gaps}, indent=1)
        )


@torch.no_grad()
def once(module, data, plan, padded):
    """(seconds, (N, 2) nats of every pair's answers, in the data's order)."""
    found = {}
    with backbone.plain_forward(module) if padded else contextlib.nullcontext():
        began = time.perf_counter()
        for groups in plan:
            row = pack([data.group(i) for i in groups])
            found |= dict(
                zip(groups, sum_per_response(module(row), row.lengths).view(-1, 2), strict=True)
            )
        took = time.perf_counter() - began
    return took, torch.stack([found[i] for i in range(len(data))])


if __name__ == "__main__":
    main()
