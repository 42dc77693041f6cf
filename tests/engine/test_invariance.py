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

from tests.engine.made_pairs import BETA, BUDGETS, CLIP, made_pairs, with_targets

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


def score_oracle(name, model):
    """The same of transformers' class for sequence classification: its logit at the last token."""
    data, losses = with_targets(made_pairs(), singles=name == "squared"), []
    for group in data.groups:
        scores = []
        for response in group.responses:
            ids = torch.tensor([*group.prompt, *response])
            scores.append(model(input_ids=ids[None], use_cache=False).logits[0, 0])
        if name == "squared":
            losses.append((scores[0] - group.target) ** 2)
        else:
            losses.append(torch.log1p(torch.exp(-(scores[0] - scores[1] - group.target))))
    torch.stack(losses).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def check(name, path, expected, world, out):
    """Every stage and budget gives the expected gradient, clipped."""
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
            name,
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


@pytest.mark.parametrize(
    "world", [pytest.param(1), pytest.param(2), pytest.param(4, marks=pytest.mark.slow)]
)
def test_gradient_is_the_oracle_s(models, world, tmp_path):
    path, expected = models
    check("dpo", path, expected, world, tmp_path / "gradients.pt")


@pytest.mark.parametrize(
    "name, world",
    [
        pytest.param("bradley_terry", 1, marks=pytest.mark.slow),
        ("bradley_terry", 2),
        pytest.param("bradley_terry", 4, marks=pytest.mark.slow),
        pytest.param("squared", 1, marks=pytest.mark.slow),
        ("squared", 2),
    ],
)
def test_gradient_of_scores_is_the_oracle_s(name, world, tmp_path):
    """With margins, and of single answers with targets."""
    lm = tiny.make_score_model("llama", initializer_range=0.05, pad_token_id=None)
    lm.save_pretrained(tmp_path / "score")
    expected = score_oracle(name, lm.double())
    check(name, tmp_path / "score", expected, world, tmp_path / "gradients.pt")
