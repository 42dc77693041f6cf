"""Statistics that compare samples: histograms, overlap, AUROC, Wasserstein distance, calibration."""

import torch

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
