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
from eval.models import Models
from train.engine import dist
from train.methods.reference import Live
from train.methods.rewards import Prompt
from train.models.backbone import Backbone


def models():
    """(model, reference): a tiny one and the same with other last digits of its weights, near enough
    for a small KL.
    """
    model, reference = (tiny.make_model(initializer_range=0.05) for _ in range(2))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.01)
    return tuple(Live(Backbone(lm), {}) for lm in (model, reference))


def compared(model, reference, reward_model=None, batch_tokens=128):
    """The carrier that generations.compare takes."""
    return Models(
        model=model,
        reference=reference,
        reward_model=reward_model,
        sharded=False,
        batch_tokens=batch_tokens,
        facts={},
    )


def prompts(count=9):
    """Prompts of random tokens, of four lengths."""
    random = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        ids = torch.randint(3, 1000, (3 + 5 * (i % 4),), generator=random)
        messages = [{"role": "user", "content": f"question {i}"}]
        found.append(Prompt(10 * i, tuple(ids.tolist()), messages))
    return found


def main():
    torch.set_num_threads(1)
    dist.init()
    tokenizer = tiny.save_tokenizer(f"{sys.argv[1]}.tokenizer-{dist.rank()}")
    decoding = generations.Decoding(max_new_tokens=12, batch_size=4)
    generated = generations.compare(compared(*models()), prompts(), tokenizer, decoding)
    if dist.is_main():
        content = json.dumps([generated.report, generated.rows])
        Path(sys.argv[1]).write_text(content, encoding="utf-8")
    dist.barrier()
    dist.shutdown()


if __name__ == "__main__":
    main()
