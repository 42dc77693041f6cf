"""A step is its set of pairs: the same gradient for any ranks, ZeRO stage and token budget, and the
oracle's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from tests.engine.made_pairs import BETA, BUDGETS, CLIP, made_pairs

WORKER = Path(__file__).parent / "gradient_worker.py"


def oracle(model, reference):
    """One sequence at a time, all logits, fp64, plain autograd; the mean of the losses over all
    pairs.
    """
    groups, losses = made_pairs().groups, []

    def logp(lm, prompt, response):
        ids = torch.tensor([*prompt, *response])
        logps = torch.log_softmax(lm(input_ids=ids[None], use_cache=False).logits[0], dim=-1)
        return logps[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None]).sum()

    for group in groups:
        chosen, rejected = (logp(model, group.prompt, r) for r in group.responses)
        with torch.no_grad():
            ref_chosen, ref_rejected = (logp(reference, group.prompt, r) for r in group.responses)
        h = (chosen - ref_chosen) - (rejected - ref_rejected)
        losses.append(torch.log1p(torch.exp(-BETA * h)))
    torch.stack(losses).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy and another reference, as directories and in fp64."""
    folder = tmp_path_factory.mktemp("invariance")
    made = []
    for name, seed in (("policy", 0), ("policy-ref", 1)):
        # small weights: a reference near the policy keeps every pair's gradient of the same order
        lm = tiny.make_model("llama", seed=seed, initializer_range=0.05)
        lm.save_pretrained(folder / name)
        made.append(lm.double())
    return folder / "policy", oracle(*made)


@pytest.mark.parametrize(
    "world", [pytest.param(1), pytest.param(2), pytest.param(4, marks=pytest.mark.slow)]
)
def test_gradient_is_the_oracle_s(models, world, tmp_path):
    path, expected = models
    out = tmp_path / "gradients.pt"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(world),
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "127.0.0.1:0",
            str(WORKER),
            str(path),
            str(out),
        ],
        check=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = torch.load(out)
    norms = json.loads(out.with_suffix(".json").read_text())
    assert set(found) == {(stage, budget) for stage in range(4) for budget in BUDGETS}
    norm = float(torch.cat([g.flatten() for g in expected.values()]).norm())
    assert norm > 2 * CLIP
    for (stage, budget), gradients in found.items():
        assert set(gradients) == set(expected)
        for name, gradient in gradients.items():
            clipped = expected[name] * CLIP / norm
            gap = (gradient.double() - clipped).norm() / clipped.norm()
            assert gap < 1e-5, (world, stage, budget, name, float(gap))
        assert norms[f"{stage},{budget}"] == pytest.approx(norm, rel=1e-5)
