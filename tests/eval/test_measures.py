"""The measures of samples against scipy, scikit-learn and figures derived by hand; weights against
repeated values.
"""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from sklearn.calibration import calibration_curve

from eval import measures

RNG = np.random.default_rng(0)
HIGH = torch.from_numpy(np.round(RNG.normal(0.5, 1, 37), 1))  # rounded: ties within and between
LOW = torch.from_numpy(np.round(RNG.normal(0, 1.5, 29), 1))
HIGH_W, LOW_W = (torch.from_numpy(RNG.integers(0, 4, (3, n)).astype(float)) for n in (37, 29))


def test_histogram_and_overlap_by_hand():
    edges = torch.tensor([0.0, 1.0, 2.0, 4.0])  # centres .5, 1.5, 3
    # 2.0 lies a third of the way from 1.5 to 3
    values = torch.tensor([0.0, 0.75, 1.5, 2.0, 4.0, -7.0, 9.0])
    expected = torch.tensor([1 + 0.75 + 1, 0.25 + 1 + 2 / 3, 1 / 3 + 1 + 1], dtype=torch.float64)
    assert torch.allclose(measures.histogram(values, edges), expected, rtol=1e-12)
    weights = torch.tensor([1.0, 0, 2, 3, 0, 0.5, 1])
    expected = torch.tensor([1 + 0.5, 2 + 2, 1 + 1], dtype=torch.float64)
    assert torch.allclose(measures.histogram(values, edges, weights), expected, rtol=1e-12)
    # shares (.5 .5 0) and (0 .25 .75): the smaller of each bin, 0 + .25 + 0
    assert float(measures.overlap(torch.tensor([2.0, 2, 0]), torch.tensor([0.0, 1, 3]))) == 0.25
    two, other_two = torch.tensor([[2.0, 2], [1, 0]]), torch.tensor([[3.0, 3], [0, 5]])
    assert measures.overlap(two, other_two).tolist() == [1, 0]


def test_histogram_of_centres_is_numpys():
    edges = np.linspace(-6, 6, 13)
    values = torch.from_numpy(RNG.integers(-6, 6, 50) + 0.5)
    expected = np.histogram(values, edges)[0].tolist()
    assert measures.histogram(values, torch.from_numpy(edges)).tolist() == expected
    assert measures.histogram(values, torch.tensor([-6.0, 6.0])).tolist() == [50]


def test_histogram_between_centres_is_numpys_interpolation():
    """A bin's weight is the sum of the hat functions around its centre."""
    edges = np.linspace(-6, 6, 13)
    centres = (edges[1:] + edges[:-1]) / 2
    expected = [sum(np.interp(LOW, centres, np.eye(12)[i])) for i in range(12)]
    found = measures.histogram(LOW, torch.from_numpy(edges))
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_what_rounding_moves_over_an_edge_moves_overlap_by_rounding_only():
    edges = torch.arange(-3.0, 4.0)
    on_edges = torch.arange(-2.0, 3.0).double()  # and so on every edge inside
    other = measures.histogram(LOW, edges)
    overlaps = [
        float(measures.overlap(measures.histogram(on_edges + nudge, edges), other))
        for nudge in (-1e-9, 0, 1e-9)
    ]
    assert max(overlaps) - min(overlaps) < 1e-8 and 0.1 < overlaps[0] < 1


def test_auroc_is_scikit_learns():
    labels, values = np.repeat([1, 0], [37, 29]), torch.cat([HIGH, LOW])
    expected = sklearn.metrics.roc_auc_score(labels, values)
    assert float(measures.auroc(HIGH, LOW)) == pytest.approx(expected, rel=1e-12)
    weighted = measures.auroc(HIGH, LOW, HIGH_W, LOW_W)
    for found, a, b in zip(weighted, HIGH_W, LOW_W, strict=True):
        expected = sklearn.metrics.roc_auc_score(labels, values, sample_weight=torch.cat([a, b]))
        assert float(found) == pytest.approx(expected, rel=1e-12)
    # 2 > 1, 2 = 2, 0 < 1, 0 < 2: (1 + .5 + 0 + 0) / 4
    assert float(measures.auroc(torch.tensor([2.0, 0]), torch.tensor([1.0, 2]))) == 0.375


def test_wasserstein_is_scipys():
    expected = scipy.stats.wasserstein_distance(HIGH, LOW)
    assert float(measures.wasserstein(HIGH, LOW)) == pytest.approx(expected, rel=1e-12)
    weighted = measures.wasserstein(HIGH, LOW, HIGH_W, LOW_W)
    for found, a, b in zip(weighted, HIGH_W, LOW_W, strict=True):
        expected = scipy.stats.wasserstein_distance(HIGH, LOW, a, b)
        assert float(found) == pytest.approx(expected, rel=1e-12)
    # {0, 4} to {1, 1}: half the mass moves by 1, half by 3
    assert float(measures.wasserstein(torch.tensor([0.0, 4]), torch.tensor([1.0, 1]))) == 2


def test_calibration_by_hand_and_weighted():
    chances, outcomes = torch.tensor([0.55, 0.65, 0.95, 1.0]), torch.tensor([1.0, 0, 1, 0.5])
    edges = torch.tensor([0.5, 0.7, 0.9, 1.0])
    table, error = measures.calibration(chances, outcomes, edges)
    # bins hold {.55, .65}, none, {.95, 1}: gaps |.6 - .5| and |.975 - .75|, weights 2/4 each
    assert table[0].tolist() == pytest.approx([2, 0.6, 0.5])
    assert table[2].tolist() == pytest.approx([2, 0.975, 0.75])
    assert table[1, 0] == 0 and table[1, 1:].isnan().all()
    assert float(error) == pytest.approx(0.5 * 0.1 + 0.5 * 0.225)
    weights = torch.tensor([[1.0, 1, 1, 1], [3, 0, 1, 0], [0, 0, 0, 2]])
    _, errors = measures.calibration(chances, outcomes, edges, weights)
    # second: 3 x .55 against 1, 1 x .95 against 1, so (3 x .45 + .05) / 4; third: 1 against .5
    assert errors.tolist() == pytest.approx([float(error), (3 * 0.45 + 0.05) / 4, 0.5])


def test_calibration_is_scikit_learns_curve():
    chances = RNG.random(300)
    outcomes = (RNG.random(300) < chances**2).astype(float)
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    table, _ = measures.calibration(torch.from_numpy(chances), torch.from_numpy(outcomes), edges)
    observed, predicted = calibration_curve(outcomes, chances, n_bins=10)
    assert table[:, 1].tolist() == pytest.approx(predicted)
    assert table[:, 2].tolist() == pytest.approx(observed)
