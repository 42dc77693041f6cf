"""A rollout of random tokens, as the engine's tests and their workers both make it."""

import numpy as np
import torch

from train.losses.algorithms import ALGORITHMS
from train.methods.rollout import Answers
from train.models.generate import Completion

CLIP = 0.1  # below the norm of every algorithm's gradient
BUDGETS = (1, 300, 4000)  # a row a group; a few groups a row; a minibatch in one row a rank
TEMPERATURE = 0.7
PROMPTS, SAMPLES, MOST_TOKENS = 8, 4, 40
MINIBATCHES, SEED = 2, 5
# flags that a Collector reads for its updates
SETTINGS = dict(
    seed=SEED,
    max_new_tokens=MOST_TOKENS,
    gamma=0.98,
    lam=0.9,
    value_lam=0.95,
    value_warmup=0,
    target_kl=0.0,
)
FLAT = 3  # a group of equal rewards
WITHOUT = 9  # an answer that no reward applies to


def algorithm_row(name):
    """The row `name` on the made rollout: one pass over two minibatches."""
    return ALGORITHMS[name]._replace(samples=SAMPLES, epochs=1, minibatches=MINIBATCHES)


def made_answers():
    """Prompts of 1 to 30 tokens, each answered four times with 1 to 40."""
    random = np.random.default_rng(0)

    def ids(most):
        return tuple(int(i) for i in random.integers(3, 1000, random.integers(1, most + 1)))

    prompts = tuple(ids(30) for _ in range(PROMPTS))
    completions = [Completion(ids(MOST_TOKENS), True) for _ in range(PROMPTS * SAMPLES)]
    return Answers(tuple(range(PROMPTS)), prompts, tuple(completions))


def made_scores():
    """(B,) fp64: NaN where no reward applies, one group's all equal."""
    score = np.random.default_rng(1).normal(size=PROMPTS * SAMPLES)
    score[FLAT * SAMPLES : (FLAT + 1) * SAMPLES] = 0.3
    score[WITHOUT] = np.nan
    return score


def made_tokens(name, logps, values):
    """What a rollout knows of its tokens, (T,) fp32 each: at random distances from what the models
    say now, so that ratios lie on both sides of every bound. An answer's mean ratio is bounded a
    thousand times as closely as a token's.

    logps, values: (T,) fp64 of the models that are trained.
    """
    random = np.random.default_rng(2)
    spread = 2e-3 if algorithm_row(name).ratio == "mean" else 0.25

    def away(scale):
        return torch.from_numpy(random.normal(scale=scale, size=len(logps)))

    return {
        "old": (logps - away(spread)).float(),
        "ref": (logps - away(0.5)).float(),
        "values": (values - away(0.2)).float(),
        "entropy": None,
    }
