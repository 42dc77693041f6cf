"""Compares two tiny models' answers on however many ranks run this; rank 0 writes what it found as
JSON.

torchrun --nproc_per_node 2 tests/eval/generations_worker.py OUT
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny
import torch

from eval import generations
from train.engine import dist
from train.methods import rewards
from train.methods.reference import Live
from train.models.backbone import Backbone


def models():
    """A tiny model, and the same with other last digits of its weights: near enough for a small KL."""
    model, reference = (tiny.make_model(initializer_range=0.05) for _ in range(2))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.01)
    return tuple(Live(Backbone(lm), {}) for lm in (model, reference))


def prompts(count=9):
    random = torch.Generator().manual_seed(0)
    ids = lambda n: tuple(torch.randint(3, 1000, (n,), generator=random).tolist())
    say = lambda i: [{"role": "user", "content": f"question {i}"}]
    return [rewards.Prompt(10 * i, ids(3 + 5 * (i % 4)), say(i)) for i in range(count)]


def main():
    torch.set_num_threads(1)
    device = dist.init()
    tokenizer = tiny.save_tokenizer(f"{sys.argv[1]}.tokenizer-{dist.rank()}")
    found = generations.compare(
        *models(), prompts(), tokenizer, device, budget=128, max_new_tokens=12, batch_size=4
    )
    if dist.is_main():
        Path(sys.argv[1]).write_text(json.dumps([found.report, found.rows]), encoding="utf-8")
    dist.barrier()
    dist.shutdown()


if __name__ == "__main__":
    main()
