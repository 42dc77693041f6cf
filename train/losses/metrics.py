"""What training and evaluation report of examples: sums and counts, so that ranks and rows add up
exactly.

Legend: B pairs, or B responses that are labelled one by one.
"""

import math

import torch

from train.losses.preference import Labelled, Pairs

# Sums, in this order, after the examples' count; names as TRL's. Desired responses stand under
# chosen, others under rejected; "count" says how many there are of each.
PAIR_SUMS = (
    "loss",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "tokens/chosen",
    "tokens/rejected",
    "count/chosen",
    "count/rejected",
    "chosen_fell",
)

# What the closing table and the model card show of them, with titles.
ROWS_OF_TABLE = (
    ("loss", "loss"),
    ("reward accuracy", "rewards/accuracies"),
    ("reward margin", "rewards/margins"),
    ("log-prob of chosen", "logps/chosen"),
    ("log-prob of rejected", "logps/rejected"),
)


def of_pairs(examples: Pairs | Labelled, losses: torch.Tensor, beta: float) -> torch.Tensor:
    """(1 + len(PAIR_SUMS),) fp64: the number of examples and the sums of PAIR_SUMS over them. A tie
    counts one half.

    A pair is right where its margin is above 0, a labelled response where the sign of its reward is
    its label's.
    """
    with torch.no_grad():
        if isinstance(examples, Labelled):
            rewards, desired = examples.rewards(beta), examples.desired
            right = wins(torch.where(desired, rewards, -rewards))
            one = torch.ones_like(rewards)
            sides = [
                (x * desired, x * ~desired)
                for x in (rewards, examples.logps, examples.lengths, one)
            ]
            fell = (examples.logps < examples.ref_logps) & desired
        else:
            chosen, rejected = examples.rewards(beta)
            right, one = wins(chosen - rejected), torch.ones_like(chosen)
            sides = [
                (chosen, rejected),
                (examples.chosen, examples.rejected),
                (examples.chosen_len, examples.rejected_len),
                (one, one),
            ]
            fell = (
                examples.chosen < examples.ref_chosen
            )  # likelihood displacement (Razin et al. 2024, arXiv 2410.08847)
        columns = [one, losses, right, *(x for side in sides for x in side), fell]
        return torch.stack([column.detach().double() for column in columns]).sum(1)


def wins(margin: torch.Tensor) -> torch.Tensor:
    """(B,) reward margins -> (B,): 1 where chosen is preferred, 0 where rejected is, one half for a
    tie.
    """
    return (margin > 0).float() + 0.5 * (margin == 0).float()


def means(sums: torch.Tensor) -> dict[str, float]:
    """Summed `of_pairs` -> the mean an example by name, and log-probabilities a token. NaN without
    an example.

    The margin is the difference of the mean rewards, which for pairs is the mean difference.
    """
    count, *values = sums.tolist()
    named = dict(zip(PAIR_SUMS, values, strict=True))
    sides = {side: named.pop(f"count/{side}") for side in ("chosen", "rejected")}
    over = lambda value, n: value / n if n else math.nan
    for side in sides:
        named[f"logps/{side}_per_token"] = over(named[f"logps/{side}"], named.pop(f"tokens/{side}"))
        for name in (f"rewards/{side}", f"logps/{side}"):
            named[name] = over(named[name], sides[side])
    named["chosen_fell"] = over(named["chosen_fell"], sides["chosen"])
    named["rewards/margins"] = named["rewards/chosen"] - named["rewards/rejected"]
    return named | {name: over(named[name], count) for name in ("loss", "rewards/accuracies")}


def wilson(share: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share among `count` independent cases, 95 % unless told
    (Wilson 1927).
    """
    if not count:
        return math.nan, math.nan
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (middle - half) / scale, (middle + half) / scale
