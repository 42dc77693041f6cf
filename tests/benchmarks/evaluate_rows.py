"""Pairs a second of the evaluation's forward pass against the plain padded way, interleaved.

    python tests/benchmarks/evaluate_rows.py --data pairs.jsonl [--pairs 32] [--rounds 3] [--batch 1 2 4]

Plain: pairs in the data's order, a batch of them at a time, each answer with its prompt, padded to the batch's longest,
all logits. Ours: packed rows planned over all pairs. Both: one forward pass without gradient, the same weights.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train.data import tokens  # noqa: E402
from train.data.order import passes  # noqa: E402
from train.data.packing import pack  # noqa: E402
from train.engine import memory, run  # noqa: E402
from train.losses.logprobs import score  # noqa: E402
from train.models import backbone, builtin  # noqa: E402


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="train/data/builtin/held_out.jsonl")
    parser.add_argument("--model", default=None)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    path = args.model or str(builtin.fetch())
    data = tokens.prepare([args.data], run.load_tokenizer(path), max_length=1024, max_prompt_length=256)
    data = data.select(range(min(args.pairs, len(data))))
    whole = range(len(data))
    ours = backbone.Backbone(backbone.load(path))
    plans = {"packed": passes(data.lengths.sum(1), memory.CPU_TOKENS)}
    plans |= {f"padded, {n} pairs": [tuple(whole[i : i + n]) for i in range(0, len(data), n)] for n in args.batch}
    seconds, values = {name: [] for name in plans}, {}
    for _ in range(args.rounds):
        for name, plan in plans.items():
            began = time.perf_counter()
            values[name] = torch.cat(
                [part for _, part in sorted(once(ours, data, plan, name != "packed"), key=lambda item: item[0])]
            )
            seconds[name].append(time.perf_counter() - began)
    rates = {name: len(data) / statistics.median(took) for name, took in seconds.items()}
    best = max(rate for name, rate in rates.items() if name != "packed")
    gap = max(float((values[name] - values["packed"]).abs().max()) for name in plans)
    print(
        json.dumps(
            {
                "pairs": len(data),
                "tokens": int(data.lengths.sum()),
                "seconds": seconds,
                "pairs_per_second": rates,
                "times_the_best_padded": rates["packed"] / best,
                "largest_gap_nats": gap,
            },
            indent=1,
        )
    )


@torch.no_grad()
def once(module, data, plan, plain):
    """(index of the pair, (2,) nats) of every pair."""
    for groups in plan:
        row = pack([data.group(i) for i in groups])
        if plain:
            with backbone.plain(module):
                logps = module(row)
        else:
            logps = module(row)
        yield from zip(groups, score(logps, row.lengths).view(-1, 2), strict=True)


if __name__ == "__main__":
    main()
