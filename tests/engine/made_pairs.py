"""Pairs of random tokens of very different lengths, as the engine's tests and their workers both
make them.
"""

import numpy as np

from train.data.packing import Group

BETA = 0.3
CLIP = 0.5  # well below the gradient's norm
BUDGETS = (1, 120, 4000)  # a row a pair; a few pairs a row; everything in one row a rank


class MadePairs:
    """What the engine asks of a tokenised data set."""

    def __init__(self, groups):
        self.groups = groups
        self.lengths = np.array([[len(g.prompt), *map(len, g.responses)] for g in groups])

    def __len__(self):
        return len(self.groups)

    def group(self, i):
        return self.groups[i]


def made_pairs(count=11, seed=0):
    """`count` pairs; prompts of 1 to 30 tokens, responses of 1 to 40."""
    random = np.random.default_rng(seed)

    def ids(most):
        return tuple(int(i) for i in random.integers(3, 1000, random.integers(1, most + 1)))

    return MadePairs([Group(ids(30), (ids(40), ids(40)), row=i) for i in range(count)])


def with_targets(pairs, singles=False):
    """The same pairs with margins from -0.5 on, or their chosen answers alone with these as scores."""
    groups = [group._replace(target=i / 4 - 0.5) for i, group in enumerate(pairs.groups)]
    if singles:
        groups = [group._replace(responses=group.responses[:1]) for group in groups]
    return MadePairs(groups)
