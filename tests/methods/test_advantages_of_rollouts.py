"""A rollout's advantages and returns for every algorithm, against their definitions written down a
second time (tests/engine/policy_oracle.py): which statistics are over what, and what counts in them.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.engine import made_rollouts, policy_oracle
from train.losses.algorithms import ALGORITHMS
from train.methods.ppo import Collector


def made(name, **settings):
    """(the rollout with its advantages, what is known of its tokens)"""
    answers, score = made_rollouts.made_answers(), made_rollouts.made_scores()
    random = np.random.default_rng(7)
    count = int(answers.lengths.sum())
    logps, values = (torch.from_numpy(random.normal(size=count)) for _ in range(2))
    tokens = made_rollouts.made_tokens(name, logps, values)
    settings = SimpleNamespace(**made_rollouts.SETTINGS | settings)
    row = made_rollouts.algorithm_row(name)
    collector = Collector(None, settings, row, None, None, None, None)
    return collector._with_advantages(answers, score[:, None], score, tokens), tokens


@pytest.mark.parametrize("name", ALGORITHMS)
def test_advantages_and_returns(name):
    """Among the answers are a group of equal rewards and one that no reward applies to."""
    row, answers = made_rollouts.algorithm_row(name), made_rollouts.made_answers()
    found, tokens = made(name)
    of_answers = [
        tokens[part].double().split(answers.lengths.tolist()) for part in ("old", "ref", "values")
    ]
    advantages, returns = policy_oracle.advantages_of(row, *of_answers)
    assert torch.allclose(found.advantages.double(), torch.cat(advantages), rtol=0, atol=1e-6)
    assert (found.returns is not None) == row.needs_critic
    if row.needs_critic:
        assert torch.allclose(found.returns.double(), torch.cat(returns), rtol=0, atol=1e-6)


def test_returns_have_the_advantages_lambda_by_default():
    """As with a lambda of their own that is next to it, which is another line of code."""
    lam = made_rollouts.SETTINGS["lam"]
    by_default, _ = made("ppo", value_lam=None)
    beside, _ = made("ppo", value_lam=lam * (1 - 1e-12))
    assert torch.allclose(by_default.returns, beside.returns, rtol=0, atol=1e-6)
    assert not torch.allclose(by_default.returns, made("ppo")[0].returns, rtol=0, atol=1e-3)
