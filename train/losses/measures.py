"""What training and evaluation report of pairs: sums and counts, so that ranks and rows add up exactly.

Legend: B pairs.
"""

import math

import torch

from train.losses.preference import Pairs

# Sums over pairs, in this order, after the pairs' count; names as TRL's.
PAIR_SUMS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
             "logps/chosen", "logps/rejected", "chosen_fell", "tokens/chosen", "tokens/rejected")  # fmt: skip


def of_pairs(pairs: Pairs, losses: torch.Tensor, beta: float) -> torch.Tensor:
    """(1 + len(PAIR_SUMS),) fp64: the number of pairs and the sums of PAIR_SUMS over them. A tie counts one half."""
    with torch.no_grad():
        chosen, rejected = pairs.rewards(beta)
        margin = chosen - rejected
        fell = pairs.chosen < pairs.ref_chosen  # likelihood displacement (Razin et al. 2024, arXiv 2410.08847)
        columns = (torch.ones_like(margin), losses, chosen, rejected, margin, wins(margin), pairs.chosen, pairs.rejected,
                   fell, pairs.chosen_len, pairs.rejected_len)  # fmt: skip
        return torch.stack([column.detach().double() for column in columns]).sum(1)


def wins(margin: torch.Tensor) -> torch.Tensor:
    """(B,) reward margins -> (B,): 1 where chosen is preferred, 0 where rejected is, one half for a tie."""
    return (margin > 0).float() + 0.5 * (margin == 0).float()


def means(sums: torch.Tensor) -> dict[str, float]:
    """Summed `of_pairs` -> the mean a pair by name, and log-probabilities a token. NaN without a pair."""
    count, *values = sums.tolist()
    named = {name: value / count if count else math.nan for name, value in zip(PAIR_SUMS, values, strict=True)}
    for side in ("chosen", "rejected"):
        tokens = named.pop(f"tokens/{side}")
        named[f"logps/{side}_per_token"] = named[f"logps/{side}"] / tokens if tokens else math.nan
    return named


def wilson(share: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share among `count` independent cases, 95 % unless told (Wilson 1927)."""
    if not count:
        return math.nan, math.nan
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (middle - half) / scale, (middle + half) / scale
