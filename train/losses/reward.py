"""Losses of reward models: scores in, one number an example out.

The caller reduces, and names the denominator. A reward model gives a text one number, its score;
pairs say which of two answers to a prompt is better, labels and targets judge answers one by one.

Legend: B pairs, or B answers that are judged one by one; scores have no unit.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from train.losses.composition import meant


class ScoredPairs(NamedTuple):
    """What a step knows of B pairs."""

    chosen: torch.Tensor  # (B,) scores, with gradient
    rejected: torch.Tensor  # (B,) scores, with gradient
    margin: torch.Tensor  # (B,) by how much chosen is said to be better; 0 where nothing is said

    def difference(self) -> torch.Tensor:
        """(B,): chosen's score minus rejected's."""
        return self.chosen - self.rejected


class ScoredAnswers(NamedTuple):
    """What a step knows of B answers that are judged one by one."""

    scores: torch.Tensor  # (B,) with gradient
    targets: torch.Tensor  # (B,) labels of 0 and 1, or numbers


def bradley_terry(
    pairs: ScoredPairs, *, label_smoothing: float = 0.0, centering: float = 0.0
) -> torch.Tensor:
    """Bradley-Terry, (B,): -log sigmoid(r_w - r_l - m), r the scores and m the margin.

    Bradley and Terry 1952; for reward models Ouyang et al. 2022 (arXiv 2203.02155), equation 1, over
    pairs instead of rankings; the margin as in Llama 2 (Touvron et al. 2023, arXiv 2307.09288),
    equation 2. With `label_smoothing` eps in [0, 0.5): -(1 - eps) log sigmoid(h) - eps log
    sigmoid(-h), h = r_w - r_l - m: the cross-entropy of a label of 1 - eps, of which no paper is
    known that joins it with a margin. `centering` adds its multiple of
    (r_w + r_l)^2, which keeps scores near 0 (Eisenstein et al. 2023, arXiv 2312.09244, equation
    2; TRL's center_rewards_coefficient).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing lies in [0, 0.5), not at {label_smoothing}")
    if not 0 <= centering < math.inf:
        raise ValueError(f"centering is a finite number of at least 0, not {centering}")
    h = pairs.difference() - pairs.margin
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return losses + centering * (pairs.chosen + pairs.rejected) ** 2


def logistic(answers: ScoredAnswers) -> torch.Tensor:
    """Logistic regression, (B,): -t log sigmoid(r) - (1 - t) log sigmoid(-r), t in [0, 1] the target.

    The cross-entropy of an outcome reward model's judgement: Wang et al. 2023 (Math-Shepherd, arXiv
    2312.08935), equation 1, whose r is the sigmoid of this score.
    """
    t = answers.targets
    return -t * F.logsigmoid(answers.scores) - (1 - t) * F.logsigmoid(-answers.scores)


def squared(answers: ScoredAnswers) -> torch.Tensor:
    """Squared error, (B,): (r - t)^2, t the target.

    Regression on ratings, as Wang et al. 2024 (HelpSteer2, arXiv 2406.08673) do it with five
    attributes; here there is one.
    """
    return (answers.scores - answers.targets) ** 2


class RewardLoss(NamedTuple):
    """A loss, and all that the rest of the house must know of it.

    Its own parameters are the keyword-only arguments of `function`.
    """

    function: Callable  # (ScoredPairs or ScoredAnswers, *, parameters) -> (B,)
    takes_pairs: bool  # else answers that are judged one by one
    paper: str  # its arXiv id
    least: float = -math.inf  # what a target must be at least, and at most
    most: float = math.inf

    @property
    def parameters(self) -> dict:
        """The loss's own parameters and their defaults."""
        signature = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}


LOSSES: dict[str, RewardLoss] = {
    "bradley_terry": RewardLoss(bradley_terry, takes_pairs=True, paper="2203.02155"),
    "logistic": RewardLoss(logistic, takes_pairs=False, paper="2312.08935", least=0.0, most=1.0),
    "squared": RewardLoss(squared, takes_pairs=False, paper="2406.08673"),
}


# What they are called elsewhere: offered where a name does not exist.
ALSO_CALLED = {
    "bt": "bradley_terry",
    "sigmoid": "bradley_terry",
    "pairwise": "bradley_terry",
    "bce": "logistic",
    "mse": "squared",
    "regression": "squared",
}


class Loss(NamedTuple):
    """What a run minimises: a row of LOSSES with its parameters bound."""

    name: str
    args: dict

    @property
    def row(self) -> RewardLoss:
        """All that there is to know of it."""
        return LOSSES[self.name]

    def __call__(self, examples: ScoredPairs | ScoredAnswers) -> torch.Tensor:
        """(B,): one number an example."""
        return self.row.function(examples, **self.args)


def choose(name: str, args: dict) -> Loss:
    """The loss `name` with parameters bound.

    ValueError with the choices where a loss or a parameter does not exist, or a value is out of
    range.
    """
    if name not in LOSSES:
        hint = meant(name, LOSSES, ALSO_CALLED)
        raise ValueError(f"loss {name!r}{hint} is none of: {', '.join(LOSSES)}")
    row = LOSSES[name]
    for key, value in args.items():
        if key not in row.parameters:
            known = ", ".join(row.parameters) or "none"
            raise ValueError(f"loss {name!r} takes no {key}; its parameters are: {known}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key} is a float, not {value!r}")
    loss = Loss(name, args)
    # the functions refuse parameters out of range: here, before a model is loaded
    kind = ScoredPairs if row.takes_pairs else ScoredAnswers
    loss(kind(*torch.zeros(len(kind._fields), 1)))
    return loss
