"""Statistics that compare samples: histograms, overlap, AUROC, Wasserstein distance, calibration.

Legend: n and m values of two samples, b bins. Weights say how often each value counts, (..., n) or
None for once each. Leading dimensions are other weightings of the same values, bootstrap resamples
(train/methods/intervals.py), and come out again as (...): a scalar tensor where there are no weights.
"""

import torch


def histogram(
    values: torch.Tensor, edges: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """(n,) values, (b + 1,) rising edges -> (..., b) weight in each bin, by linear binning (Jones
    and Lotwick 1984).

    A value's weight is divided between the two bins whose centres it lies between, the nearer gets
    more; beyond the first and the last centre that bin gets all. So rounding, which can move a value
    over an edge, moves no more weight than its own size.
    """
    values = values.to(torch.float64)
    centres = (edges[:-1] + edges[1:]).to(torch.float64) / 2  # (b,)
    weights = _or_ones(weights, values)  # (..., n)
    bins = weights.new_zeros(*weights.shape[:-1], len(centres))  # (..., b)
    if len(centres) == 1:
        return bins + weights.sum(-1, keepdim=True)
    # the bin whose centre lies below each value, and the part of its weight that the next one gets
    left = (torch.bucketize(values, centres, right=True) - 1).clamp(0, len(centres) - 2)
    to_right = ((values - centres[left]) / (centres[left + 1] - centres[left])).clamp(0, 1)
    bins = bins.index_add(-1, left, weights * (1 - to_right))
    return bins.index_add(-1, left + 1, weights * to_right)


def overlap(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The area that two histograms on the same bins have in common, (..., b) each -> (...): 0 where
    they lie apart, 1 where they have the same shape.
    """
    one = one / one.sum(-1, keepdim=True)
    other = other / other.sum(-1, keepdim=True)
    return torch.minimum(one, other).sum(-1)


def auroc(
    high: torch.Tensor, low: torch.Tensor, high_weights=None, low_weights=None
) -> torch.Tensor:
    """The probability that a value drawn from `high` (n,) exceeds one from `low` (m,); a tie counts
    one half -> (...).

    The Mann-Whitney statistic over n * m, which is the area under the ROC curve (Hanley and McNeil
    1982).
    """
    high_weights = _or_ones(high_weights, high)  # (..., n)
    low_weights = _or_ones(low_weights, low)  # (..., m)
    ordered, order = low.sort()
    # the weight of the i smallest values of `low`, for i from 0 to m
    below = torch.nn.functional.pad(low_weights[..., order].cumsum(-1), (1, 0))  # (..., m + 1)
    smaller = below[..., torch.searchsorted(ordered, high)]  # (..., n)
    not_larger = below[..., torch.searchsorted(ordered, high, right=True)]
    doubled = (high_weights * (smaller + not_larger)).sum(-1)  # a win is in both, a tie in one
    return doubled / (2 * high_weights.sum(-1) * low_weights.sum(-1))


def wasserstein(
    one: torch.Tensor, other: torch.Tensor, one_weights=None, other_weights=None
) -> torch.Tensor:
    """How far one sample's mass must move to become the other's, in the unit of the values: (n,),
    (m,) -> (...).

    In one dimension it is the area between the two distribution functions (Vallender 1974).
    """
    one_weights = _or_ones(one_weights, one)
    other_weights = _or_ones(other_weights, other)
    one_mass = one_weights / one_weights.sum(-1, keepdim=True)  # (..., n), sums to 1
    other_mass = other_weights / other_weights.sum(-1, keepdim=True)  # (..., m)
    ordered, order = torch.cat([one, other]).sort()  # (n + m,)
    # the difference of the distribution functions between one value and the next
    gap = torch.cat([one_mass, -other_mass], -1)[..., order].cumsum(-1)[..., :-1].abs()
    return (gap * ordered.diff()).sum(-1)


def calibration(
    probabilities: torch.Tensor, outcomes: torch.Tensor, edges: torch.Tensor, weights=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the reliability table, the expected calibration error): Guo et al. 2017, arXiv 1706.04599,
    equation 3.

    probabilities: (n,) of an outcome. outcomes: (n,) in [0, 1]. edges: (b + 1,). The table is
    (..., b, 3): weight, mean probability and mean outcome of each bin, NaN where it is empty. The
    error is (...): the gap between the two means, averaged over the bins by their weight.
    """
    weights = _or_ones(weights, probabilities)  # (..., n)
    place = (torch.bucketize(probabilities, edges, right=True) - 1).clamp(0, len(edges) - 2)
    empty = weights.new_zeros(*weights.shape[:-1], len(edges) - 1)  # (..., b)
    mass = empty.index_add(-1, place, weights)
    confidence = empty.index_add(-1, place, weights * probabilities)
    observed = empty.index_add(-1, place, weights * outcomes)
    error = (confidence - observed).abs().sum(-1) / mass.sum(-1)
    return torch.stack([mass, confidence / mass, observed / mass], -1), error


def _or_ones(weights, values):
    return torch.ones_like(values) if weights is None else weights.to(values.dtype)
