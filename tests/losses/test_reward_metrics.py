"""Measures of scores by hand, and that sums of parts are the sums of the whole."""

import math

import pytest
import torch

from train.losses.metrics import REWARD_METRICS, SCORE_SUMS, score_means, score_sums
from train.losses.reward import ScoredAnswers, ScoredPairs

PAIRS = ScoredPairs(
    torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 3.0, 1.0]), torch.tensor([0.5, 0.0, 0.0])
)
PAIR_LOSSES = torch.tensor([1.0, 2.0, 6.0])
ANSWERS = ScoredAnswers(torch.tensor([2.0, -1.0, 0.0, 3.0]), torch.tensor([1.0, 0.0, 1.0, 0.0]))
ANSWER_LOSSES = torch.tensor([0.0, 1.0, 2.0, 5.0])


def test_pairs_by_hand():
    """Right, wrong and a tie; six scores 2 0 1 1 3 1 of mean 4/3 and mean square 16/6."""
    found = score_means(score_sums(PAIRS, PAIR_LOSSES), of_pairs=True)
    assert found == pytest.approx(
        {
            "loss": 3.0,
            "rewards/accuracies": 0.5,
            "rewards/chosen": 1.0,
            "rewards/rejected": 5 / 3,
            "rewards/margins": -2 / 3,
            "rewards/mean": 4 / 3,
            "rewards/std": math.sqrt(16 / 6 - 16 / 9),
        }
    )


def test_answers_by_hand():
    """Right, right, a tie, wrong. Scores: mean 1, variance 14/4 - 1; targets: mean 1/2, variance 1/4;
    covariance 2/4 - 1/2 = 0.
    """
    found = score_means(score_sums(ANSWERS, ANSWER_LOSSES), of_pairs=False)
    assert found == pytest.approx(
        {
            "loss": 2.0,
            "rewards/accuracies": 2.5 / 4,
            "rewards/mean": 1.0,
            "rewards/std": math.sqrt(2.5),
            "rewards/correlation": 0.0,
        }
    )
    rated = ScoredAnswers(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.5, 4.5, 8.5]))
    found = score_means(score_sums(rated, torch.zeros(3)), of_pairs=False)
    assert found["rewards/correlation"] == pytest.approx(1.0)  # targets are 2 r + 1/2
    assert "rewards/accuracies" not in found  # a rating has no right side


@pytest.mark.parametrize("examples, losses", [(PAIRS, PAIR_LOSSES), (ANSWERS, ANSWER_LOSSES)])
def test_parts_add_up(examples, losses):
    def part(which):
        return score_sums(type(examples)(*(x[which] for x in examples)), losses[which])

    whole = score_sums(examples, losses)
    none = part(slice(0, 0))
    assert none.tolist() == [0] * (1 + len(SCORE_SUMS))
    assert torch.allclose(part(slice(0, 1)) + part(slice(1, None)) + none, whole, rtol=1e-15)
    means = score_means(none, isinstance(examples, ScoredPairs))
    assert math.isnan(means["loss"]) and math.isnan(means["rewards/std"])


def test_every_metric_is_measured_and_named():
    ones = torch.ones(1 + len(SCORE_SUMS))
    measured = {*score_means(ones, True), *score_means(ones, False)}
    assert {metric.name for metric in REWARD_METRICS} == measured


def test_targets_that_are_all_the_same_have_no_correlation():
    """In fp64 the mean of their squares less the square of their mean is a little above 0."""
    n = 3
    targets = torch.full((n,), 0.3, dtype=torch.float64)
    assert (targets**2).sum().item() / n - (targets.sum().item() / n) ** 2 > 0
    scores = torch.arange(n, dtype=torch.float64)
    sums = score_sums(ScoredAnswers(scores, targets), torch.zeros(n))
    assert math.isnan(score_means(sums, of_pairs=False)["rewards/correlation"])
    sums = score_sums(ScoredAnswers(targets, scores), torch.zeros(n))
    found = score_means(sums, of_pairs=False)
    assert math.isnan(found["rewards/correlation"]) and found["rewards/std"] == 0
