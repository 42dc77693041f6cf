"""How far one gets on pairs without a model: the longer answer wins, and a bag of words.

A reward model that is no better than these has learnt what they see, or nothing.
"""

from typing import NamedTuple

import numpy as np
import torch

from train.data.dataset import Tokenised
from train.losses.metrics import wins

FITTED_ON = 10_000  # pairs at most: a bag of words learns no more from ten times as many


class Baselines(NamedTuple):
    """Accuracies on held-out pairs; a tie counts one half."""

    longer_wins: float  # the answer of more tokens
    bag_of_words: float  # fitted on the training pairs


def measure(data: Tokenised, held_out: Tokenised) -> Baselines:
    """The accuracies on `held_out` of what knows `data`, the training pairs. Seconds on 10,000 pairs."""
    lengths = torch.from_numpy(held_out.lengths[:, 1:].astype(np.int64))  # (B, 2) tokens
    longer = wins(lengths[:, 0] - lengths[:, 1])
    words = wins(torch.from_numpy(bag_of_words(data, held_out)))
    return Baselines(float(longer.mean()), float(words.mean()))


def bag_of_words(data: Tokenised, held_out: Tokenised) -> np.ndarray:
    """(B,) log-odds that chosen is the better answer of each held-out pair.

    Bradley-Terry on weights of tokens, which are this bag's words: a logistic regression without
    intercept on the difference of chosen's and rejected's log(1 + count), each of Euclidean length
    1. Every training pair is given in both directions, so that no direction is preferred.
    """
    # here: they take a second to import
    import scipy.sparse
    from sklearn.linear_model import LogisticRegression

    width = 1 + max(int(each.ids.max(initial=0)) for each in (data, held_out))
    fitted = _differences(data, min(len(data), FITTED_ON), width)
    both_ways = scipy.sparse.vstack([fitted, -fitted])
    labels = np.repeat([1, 0], fitted.shape[0])
    classifier = LogisticRegression(C=10.0, fit_intercept=False, max_iter=1000)
    classifier.fit(both_ways, labels)
    return classifier.decision_function(_differences(held_out, len(held_out), width))


def _differences(data: Tokenised, count: int, width: int):
    """Chosen's bag minus rejected's of the first pairs: sparse (count, width)."""
    chosen, rejected = (_bags(data, side, count, width) for side in (0, 1))
    return chosen - rejected


def _bags(data: Tokenised, side: int, count: int, width: int):
    """The bags of one side's answers: sparse (count, width)."""
    import scipy.sparse

    words, values, ends = [], [], [0]
    for i in range(count):
        ids, counts = np.unique(data.group(i).responses[side], return_counts=True)
        value = np.log1p(counts)
        words.append(ids)
        values.append(value / np.linalg.norm(value))
        ends.append(ends[-1] + len(ids))
    return scipy.sparse.csr_matrix(
        (np.concatenate(values), np.concatenate(words), ends), shape=(count, width)
    )
