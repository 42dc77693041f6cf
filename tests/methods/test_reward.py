"""A batch's examples, and what a reward model's scores are like."""

import math
from types import SimpleNamespace

import pytest
import torch

from train.data.packing import Group, pack
from train.losses import reward as losses
from train.methods import reward, setup
from train.methods.reward import Scale


def batch(*targets, responses=2):
    return pack([Group((1, 2), ((3, 4), (5, 6))[:responses], target=each) for each in targets])


def test_examples_are_in_fp64():
    """Scores of 1,000 that are 2^-13 apart, and a margin of 0.1: fp32 would lose the margin's digits
    and half of the difference's.
    """
    scores = torch.tensor([1000.0 + 2**-13, 1000.0], requires_grad=True)
    pairs = reward.examples(scores, batch(0.1), of_pairs=True)
    assert all(x.dtype == torch.float64 for x in pairs)
    assert pairs.margin.item() == 0.1
    found = losses.bradley_terry(pairs)
    assert found.item() == math.log1p(math.exp(0.1 - 2**-13))
    found.sum().backward()
    slope = 1 / (1 + math.exp(2**-13 - 0.1))
    assert scores.grad.tolist() == pytest.approx([-slope, slope], rel=1e-7)


def test_examples_without_targets():
    pairs = reward.examples(torch.tensor([2.0, 1.0]), batch(None), of_pairs=True)
    assert [x.tolist() for x in pairs] == [[2.0], [1.0], [0.0]]
    answers = reward.examples(torch.tensor([2.0]), batch(None, responses=1), of_pairs=False)
    assert [x.tolist() for x in answers] == [[2.0], [0.0]]


@pytest.mark.parametrize("of_pairs", [True, False])
def test_the_empty_batch(of_pairs):
    examples = reward.examples(torch.zeros(0), pack([]), of_pairs)
    assert all(x.shape == (0,) for x in examples)


def test_one_answer_has_no_deviation():
    """It is null in the configuration: a NaN there would be no JSON."""
    config = SimpleNamespace()
    model = SimpleNamespace(module=SimpleNamespace(lm=SimpleNamespace(config=config)))
    run = SimpleNamespace(note=dict, say=str)
    setup.note_scale(run, model, Scale(0.5, math.nan, 1, "training"))
    assert (config.score_mean, config.score_std) == (0.5, None)
