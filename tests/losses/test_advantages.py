"""Advantages against numbers derived by hand, and against what a rollout's neighbours must not change;
golden_estimators.json holds values in fp64 that peers' own functions gave (on test_policy.py's rollout).
"""

import json
import math
from pathlib import Path

import pytest
import torch

from train.losses import advantages as adv

CASES = json.loads((Path(__file__).parent / "golden_estimators.json").read_text())["cases"]
ROLLOUT = json.loads((Path(__file__).parent / "golden_policy.json").read_text())["rollout"]
LENGTHS = torch.tensor(ROLLOUT["lengths"])


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def flat(rows):
    """(T,) of a list an answer, cut at the answers' lengths."""
    return double([x for row, n in zip(rows, LENGTHS.tolist(), strict=True) for x in row[:n]])


def rewards():
    kl = flat(ROLLOUT["old_logps"]) - flat(ROLLOUT["ref_logps"])
    return adv.token_rewards(double(ROLLOUT["score"]), LENGTHS, kl, ROLLOUT["kl_coef"])


def test_gae_by_hand():
    """Two tokens, r = (0, 1), V = (0.5, 0.25), gamma 0.5, lambda 0.25: delta_1 = 1 - 0.25, delta_0 =
    0.5 * 0.25 - 0.5, A_0 = delta_0 + 0.125 delta_1. With gamma and lambda exchanged delta_0 is another.
    """
    found = adv.gae(double([0, 1]), double([0.5, 0.25]), torch.tensor([2]), 0.5, 0.25)
    assert found.tolist() == [-0.375 + 0.125 * 0.75, 0.75]


def test_gae_does_not_see_the_neighbours():
    """What stands behind an answer's end is the next answer: here numbers of a million and NaN."""
    gamma, lam = 0.97, 0.8
    r, v = rewards(), flat(ROLLOUT["values"])
    alone = [
        adv.gae(r_i, v_i, torch.tensor([len(r_i)]), gamma, lam)
        for r_i, v_i in zip(r.split(LENGTHS.tolist()), v.split(LENGTHS.tolist()), strict=True)
    ]
    assert torch.equal(adv.gae(r, v, LENGTHS, gamma, lam), torch.cat(alone))
    for junk in (1e6, math.nan):
        for odd in (0, 1):
            kept = (torch.arange(len(LENGTHS)) % 2 == odd).repeat_interleave(LENGTHS)
            r_junk, v_junk = torch.where(kept, r, junk), torch.where(kept, v, junk)
            found = adv.gae(r_junk, v_junk, LENGTHS, gamma, lam)
            assert torch.equal(found[kept], torch.cat(alone)[kept])


def test_gae_telescopes_at_one():
    """gamma = lambda = 1: all rewards to come less the value, whatever the later values."""
    r, v = rewards(), flat(ROLLOUT["values"])
    to_come = torch.cat([x.flip(0).cumsum(0).flip(0) for x in r.split(LENGTHS.tolist())])
    assert torch.allclose(adv.gae(r, v, LENGTHS, 1.0, 1.0), to_come - v, rtol=0, atol=1e-14)
    assert torch.allclose(adv.to_go(r, LENGTHS, 1.0), to_come, rtol=0, atol=1e-14)
    # discounted, by hand: 1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4
    assert adv.to_go(double([1, 2, 4]), torch.tensor([3]), 0.5).tolist() == [3, 4, 4]


def test_a_score_lies_at_the_last_token():
    """Also of an answer of one token; the KL is a cost, also where the score is."""
    found = adv.token_rewards(double([3, -1]), torch.tensor([1, 2]), double([0.5, -0.25, 1]), 0.1)
    assert found.tolist() == pytest.approx([3 - 0.05, 0.025, -1 - 0.1], abs=1e-15)


def test_whitening_by_hand():
    """1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9, over n - 1 = 3 and not over 4."""
    scale = math.sqrt(14 / 3 + 1e-8)
    assert adv.whiten(double([1, 2, 3, 6])).tolist() == pytest.approx(
        [-2 / scale, -1 / scale, 0, 3 / scale], abs=1e-15
    )
    # in fp32, or from a mean of squares, nothing would be left of the spread
    assert adv.whiten(double([1, 2, 3, 6]) + 1e9).tolist() == pytest.approx(
        [-2 / scale, -1 / scale, 0, 3 / scale], abs=1e-15
    )


def test_whitened_as_peers_but_for_their_variance():
    """Theirs is over n, ours over n - 1: a factor sqrt((n - 1) / n). Both eps are 1e-8 of variances
    around 1, below the tolerance.
    """
    by_group = adv.over_groups(double(ROLLOUT["score"]), 4, "mean", "none")
    n = int(LENGTHS.sum())
    for name, x in {
        "whitening, population": adv.gae(rewards(), flat(ROLLOUT["values"]), LENGTHS, 1.0, 0.95),
        "reinforce++ advantage, population variance": adv.to_go(rewards(), LENGTHS, 1.0),
        "reinforce++_baseline advantage (no KL in the reward), population variance": (
            by_group.repeat_interleave(LENGTHS)
        ),
    }.items():
        wanted = flat(CASES[name]["value"]) * math.sqrt((n - 1) / n)
        assert torch.allclose(adv.whiten(x), wanted, rtol=0, atol=1e-7), name


def test_leaving_one_out_is_the_mean_of_the_others():
    score = double([1.0, 0.5, -2.0, 0.25, math.nan, 3.0, 1.0, 7.0])
    found = adv.over_groups(score, 4, "leave_one_out", "none").tolist()
    for i, value in enumerate(score.tolist()):
        others = [score[j].item() for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        others = [x for x in others if not math.isnan(x)]
        wanted = 0.0 if math.isnan(value) else value - sum(others) / len(others)
        assert found[i] == pytest.approx(wanted, abs=1e-14)


def test_a_deviation_is_over_n_minus_one():
    """0 and 1: mean 0.5, deviation sqrt(0.25 + 0.25). Of the batch 0, 1, 5, 5: mean 2.75, squares
    7.5625 + 3.0625 + 2 * 5.0625 = 20.75, over 3; the second group's scores are equal.
    """
    score = double([0, 1, 5, 5])
    root = math.sqrt(0.5)
    assert adv.over_groups(score, 2, "mean", "group").tolist() == pytest.approx(
        [-0.5 / root, 0.5 / root, 0, 0], abs=1e-15
    )
    deviation = math.sqrt(20.75 / 3)
    assert adv.over_groups(score, 2, "mean", "batch").tolist() == pytest.approx(
        [-0.5 / deviation, 0.5 / deviation, 0, 0], abs=1e-15
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("value", "k"), CASES["all rewards equal, fp32 rounding"]["value"])
def test_equal_rewards_whose_mean_is_another(value, k, dtype):
    """Values and sizes at which peers' fp32 advantages were up to 0.94. Scores of a run are fp64, whose
    sums are rounded as well: three times 0.1 has a mean above 0.1. fp32 values add up exactly in fp64.
    """
    score = torch.full((k,), value, dtype=dtype)
    other = torch.arange(k).to(dtype)  # another group, so that the batch has a deviation
    for baseline in ("mean", "leave_one_out"):
        for scale in ("group", "batch", "none"):
            found = adv.over_groups(torch.cat([score, other]), k, baseline, scale)
            assert found[:k].tolist() == [0.0] * k and found[-1] > 0


def test_equal_rewards_beside_one_that_does_not_apply():
    score = double([0.1, 0.1, math.nan, 0.1])
    assert adv.over_groups(score, 4, "mean", "group").tolist() == [0.0] * 4
    assert adv.is_flat(score, 4).tolist() == [True]
