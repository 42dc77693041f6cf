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

from tests.engine import made_rollouts
from tests.engine.made_pairs import BETA, BUDGETS, CLIP, made_pairs, with_targets
from tests.engine.policy_oracle import Oracle
from train.losses.algorithms import ALGORITHMS

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


def launched(name, path, world, out, algorithms=()):
    """What the worker finds: {key: gradients} and {key: norm}."""
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
            *algorithms,
        ],
        check=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = torch.load(out)
    out.unlink()
    norms = json.loads(out.with_suffix(".json").read_text())
    return found, {key: norms[",".join(map(str, key))] for key in found}


def check(found, norms, expected):
    """Every stage and budget gives the expected gradient, clipped."""
    assert set(found) == {(stage, budget) for stage in range(4) for budget in BUDGETS}
    for key in found:
        same(found[key], norms[key], expected, CLIP, key)


def same(gradients, found_norm, expected, clip, key):
    """The expected gradient, whose norm is clipped."""
    norm = float(torch.cat([g.flatten() for g in expected.values()]).norm())
    assert norm > 2 * clip
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        clipped = expected[name] * clip / norm
        gap = (gradient.double() - clipped).norm() / clipped.norm()
        assert gap < 1e-5, (key, name, float(gap))
    assert found_norm == pytest.approx(norm, rel=1e-5)


@pytest.fixture(scope="module")
def policies(models):
    """The gradients of reinforcement learning, beside the policy what the worker reads of them."""
    path, _ = models
    lm = tiny.make_model("llama", seed=0, initializer_range=0.05).double()
    critic = tiny.make_score_model("llama", seed=2, initializer_range=0.05, pad_token_id=None)
    critic.save_pretrained(f"{path}-critic")
    oracle = Oracle(lm, critic.double())
    torch.save(oracle.made, f"{path}-rollouts.pt")
    return oracle


FEW = ("ppo", "grpo", "gspo")


@pytest.fixture(scope="module", params=[1, 2])
def with_few(request, models, policies, tmp_path_factory):
    """(world, gradients, norms) of one launch for DPO and a few algorithms."""
    out = tmp_path_factory.mktemp("gradients") / "gradients.pt"
    return request.param, *launched("dpo", models[0], request.param, out, FEW)


def test_gradient_is_the_oracle_s(models, with_few):
    _, found, norms = with_few
    mine = [key for key in found if len(key) == 2]
    check({key: found[key] for key in mine}, norms, models[1])


def check_policies(found, norms, oracle, names):
    """Every algorithm, stage, budget and update; the critic's too."""
    mine = {key for key in found if len(key) > 2}
    updates = range(made_rollouts.MINIBATCHES)
    assert mine == {
        (stage, name, budget, number, part)
        for stage in range(4)
        for name in names
        for budget in made_rollouts.BUDGETS
        for number in updates
        for part in ("policy", "critic")[: 1 + ALGORITHMS[name].needs_critic]
    }
    for name in names:
        for number in updates:
            expected = oracle.gradients(name, number)
            for key in mine:
                if (key[1], key[3]) == (name, number):
                    same(found[key], norms[key], expected[key[4]], made_rollouts.CLIP, key)


def test_gradients_of_a_few_algorithms_are_the_oracle_s(policies, with_few):
    _, found, norms = with_few
    check_policies(found, norms, policies, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_of_all_algorithms_are_the_oracle_s(models, policies, world, tmp_path):
    found, norms = launched("none", models[0], world, tmp_path / "gradients.pt", ALGORITHMS)
    check_policies(found, norms, policies, ALGORITHMS)


@pytest.mark.slow
def test_gradient_is_the_oracle_s_on_four_ranks(models, tmp_path):
    path, expected = models
    check(*launched("dpo", path, 4, tmp_path / "gradients.pt"), expected)


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
    check(*launched(name, tmp_path / "score", world, tmp_path / "gradients.pt"), expected)
