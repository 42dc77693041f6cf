"""Losses over pairs: tensors in, one number a pair out. The caller reduces, and names the denominator.

Legend: B pairs; nats summed over a response's tokens.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Pairs(NamedTuple):
    """What a step knows of B pairs: log-probabilities of both responses under the policy and the reference."""

    chosen: torch.Tensor  # (B,) nats, log pi(y_w | x), with gradient
    rejected: torch.Tensor  # (B,) nats, log pi(y_l | x), with gradient
    ref_chosen: torch.Tensor  # (B,) nats, log pi_ref(y_w | x)
    ref_rejected: torch.Tensor  # (B,) nats, log pi_ref(y_l | x)
    chosen_len: torch.Tensor  # (B,) tokens
    rejected_len: torch.Tensor  # (B,) tokens

    @classmethod
    def of(cls, scores, ref_scores, lengths) -> "Pairs":
        """From the scores of a row of groups of two, (2B,) each: chosen and rejected in turn."""
        return cls(scores[0::2], scores[1::2], ref_scores[0::2], ref_scores[1::2], lengths[0::2], lengths[1::2])

    def rewards(self, beta: float):
        """The implicit rewards beta * log(pi / pi_ref) of chosen and rejected, (B,) each (DPO, eq. 5 without Z)."""
        return beta * (self.chosen - self.ref_chosen), beta * (self.rejected - self.ref_rejected)


def sigmoid(pairs: Pairs, beta: float, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO, (B,): -log sigmoid(beta * h) with h the difference of the two log-ratios to the reference.

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7. With `label_smoothing` eps in [0, 0.5) it is cDPO (Mitchell
    2023): -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h), for labels of which a share eps is flipped.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing lies in [0, 0.5), not at {label_smoothing}")
    chosen, rejected = pairs.rewards(beta)
    h = chosen - rejected  # (B,) nats times beta
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


# One row a loss. A loss's own parameters are the keyword arguments of its signature.
LOSSES: dict[str, Callable] = {
    "sigmoid": sigmoid,
}


def choose(name: str, beta: float, args: dict) -> Callable[[Pairs], torch.Tensor]:
    """The loss `name` with beta and its own parameters bound. ValueError with the choices where one does not exist."""
    if name not in LOSSES:
        raise ValueError(f"loss {name!r} is none of: {', '.join(LOSSES)}")
    loss = LOSSES[name]
    own = [p.name for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(args) - set(own)):
        raise ValueError(f"loss {name!r} takes no {', '.join(unknown)}; its parameters are: {', '.join(own) or 'none'}")
    bound = lambda pairs: loss(pairs, beta, **args)
    bound(Pairs(*torch.zeros(6, 1)))  # parameters out of range are refused here, before a model is loaded
    return bound
