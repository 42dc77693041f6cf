"""Baselines without a model, by hand on pairs of a few tokens."""

import numpy as np
import pytest

from train.data.dataset import Tokenised
from train.methods import baselines

GOOD, BAD, OTHER = 7, 8, 9


def pairs(*rows):
    """A Tokenised of (chosen, rejected), token ids after a prompt of one token."""
    flat = [[1, *chosen, *rejected] for chosen, rejected in rows]
    lengths = [[1, len(chosen), len(rejected)] for chosen, rejected in rows]
    totals = np.array([len(each) for each in flat])
    return Tokenised(
        ids=np.concatenate([np.array(each, np.int32) for each in flat]),
        offsets=np.cumsum(totals) - totals,
        lengths=np.array(lengths, np.int32),
        truncated=np.zeros((len(rows), 3), bool),
        rows=np.arange(len(rows)),
        prompts=np.arange(len(rows)),
        dropped=[],
        fingerprint="",
    )


TRAIN = pairs(([GOOD, OTHER], [BAD, OTHER]), ([OTHER, GOOD, GOOD], [OTHER, BAD]))


def test_longer_wins():
    """Longer, shorter, as long."""
    held_out = pairs(([2, 3], [2]), ([2], [2, 3]), ([2], [3]))
    assert baselines.measure(TRAIN, held_out).longer_wins == 0.5
    assert baselines.measure(TRAIN, held_out.select([0, 2])).longer_wins == 0.75


def test_bag_of_words():
    """The token that tells the training pairs apart tells others: right, wrong, unknown, the same."""
    held_out = pairs(([GOOD, 2], [BAD, 2]), ([BAD], [GOOD]), ([3], [4]), ([5, 6], [6, 5]))
    log_odds = baselines.bag_of_words(TRAIN, held_out)
    assert log_odds[0] > 0 > log_odds[1] and log_odds[2:].tolist() == [0, 0]
    assert baselines.measure(TRAIN, held_out).bag_of_words == 0.5
    assert baselines.measure(TRAIN, held_out.select([0])).bag_of_words == 1


def test_bag_of_words_is_a_logistic_regression_without_intercept():
    """One training pair (7 against 8): by symmetry the weights are w and -w. The loss is 2 log(1 +
    exp(-2 w)), the penalty (w^2 + w^2) / 2 over C = 10: w solves 2 * 2 sigmoid(-2 w) = 2 w / 10.
    """
    low, high = 0.0, 20.0
    for _ in range(100):
        w = (low + high) / 2
        low, high = (w, high) if 4 / (1 + np.exp(2 * w)) > w / 5 else (low, w)
    held_out = pairs(
        ([GOOD], [BAD]), ([GOOD], [OTHER]), ([GOOD, OTHER], [OTHER]), ([GOOD, GOOD, OTHER], [OTHER])
    )
    found = baselines.bag_of_words(pairs(([GOOD], [BAD])), held_out)
    # OTHER has no weight; in the third GOOD counts 1 / sqrt(2), in the last log 3 over the bag's length
    last = np.log(3) / np.hypot(np.log(3), np.log(2))
    assert found == pytest.approx([2 * w, w, w / np.sqrt(2), w * last], rel=1e-3)
