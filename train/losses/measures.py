"""What training and evaluation report of examples: sums and counts, so that ranks and rows add up
exactly.

Legend: B pairs, or B responses that are labelled one by one.
"""

import math

import torch

from train.losses.family import Labelled, Pairs

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


# The measures below compare samples. Weights (..., n) say how often each value counts, 1 each
# unless told; leading dimensions are other weightings of the same values, such as bootstrap
# resamples, and come out again.


def histogram(
    values: torch.Tensor, edges: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """(n,) values, (b + 1,) rising edges -> (..., b) weight in each bin, by linear binning (Jones
    and Lotwick 1984).

    A value's weight is shared by the two bins whose centres it lies between, the nearer the more;
    beyond the first and the last centre that bin has it all. So rounding, which moves a value over
    an edge, moves no more than itself.
    """
    values, centres = values.to(torch.float64), (edges[:-1] + edges[1:]).to(torch.float64) / 2
    counts = _weights(values, weights)
    bins = counts.new_zeros(*counts.shape[:-1], len(centres))
    if len(centres) == 1:
        return bins + counts.sum(-1, keepdim=True)
    left = (torch.bucketize(values, centres, right=True) - 1).clamp(0, len(centres) - 2)
    right = ((values - centres[left]) / (centres[left + 1] - centres[left])).clamp(
        0, 1
    )  # the right bin's share
    return bins.index_add(-1, left, counts * (1 - right)).index_add(-1, left + 1, counts * right)


def overlap(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The area that two histograms on the same bins share, (..., b) each -> (...): 0 apart, 1 the
    same shape.
    """
    share = lambda counts: counts / counts.sum(-1, keepdim=True)
    return torch.minimum(share(first), share(second)).sum(-1)


def auroc(
    high: torch.Tensor, low: torch.Tensor, high_weights=None, low_weights=None
) -> torch.Tensor:
    """How likely a value drawn from `high` (n,) exceeds one from `low` (m,); a tie counts one half
    -> (...).

    The Mann-Whitney statistic over n * m, the area under the ROC curve (Hanley and McNeil 1982).
    """
    a, b = _weights(high, high_weights), _weights(low, low_weights)
    ordered, order = low.sort()
    below = torch.nn.functional.pad(
        b[..., order].cumsum(-1), (1, 0)
    )  # (..., m + 1): weight before each place
    smaller = below[..., torch.searchsorted(ordered, high)]
    not_larger = below[..., torch.searchsorted(ordered, high, right=True)]
    return (a * (smaller + not_larger)).sum(-1) / (2 * a.sum(-1) * b.sum(-1))


def wasserstein(
    first: torch.Tensor, second: torch.Tensor, first_weights=None, second_weights=None
) -> torch.Tensor:
    """How far one sample's mass must move to become the other's, in the unit of the values: (n,),
    (m,) -> (...).

    In one dimension it is the area between the two distribution functions (Vallender 1974).
    """
    a, b = _weights(first, first_weights), _weights(second, second_weights)
    ordered, order = torch.cat([first, second]).sort()
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    gap = torch.cat([a, -b], -1)[..., order].cumsum(-1)[..., :-1].abs()
    return (gap * ordered.diff()).sum(-1)


def calibration(
    probabilities: torch.Tensor, outcomes: torch.Tensor, edges: torch.Tensor, weights=None
):
    """The reliability table and the expected calibration error (Guo et al. 2017, arXiv 1706.04599,
    equation 3).

    probabilities (n,) of an outcome, outcomes (n,) in [0, 1], edges (b + 1,) -> (..., b, 3):
    weight, mean probability and mean outcome of each bin (NaN where it is empty), and (...): the
    gap between the two means, over all bins.
    """
    counts = _weights(probabilities, weights)
    place = (torch.bucketize(probabilities, edges, right=True) - 1).clamp(0, len(edges) - 2)
    empty = counts.new_zeros(*counts.shape[:-1], len(edges) - 1)
    mass, confidence, observed = (
        empty.index_add(-1, place, counts * x)
        for x in (torch.ones_like(probabilities), probabilities, outcomes)
    )
    error = (confidence - observed).abs().sum(-1) / mass.sum(-1)
    return torch.stack([mass, confidence / mass, observed / mass], -1), error


def _weights(values, weights):
    return torch.ones_like(values) if weights is None else weights.to(values.dtype)
