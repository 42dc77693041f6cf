"""Intervals: what is resampled, and how often they hold the truth."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from eval import measures
from train.methods import intervals


def clustered(rng, prompts, rows=4):
    """(values, clusters) of rows whose values share most of their spread with the other rows of
    their prompt; the truth is 1.
    """
    clusters = np.repeat(np.arange(prompts), rows)
    values = 1 + rng.normal(0, 1, prompts)[clusters] + rng.normal(0, 0.3, prompts * rows)
    return values, clusters


def test_ratio_is_the_ratio_of_sums_and_scipys_bootstrap_of_prompts():
    values, clusters = np.array([1.0, 2, 3, 10, 5, 7]), np.array([0, 0, 1, 1, 2, 3])
    counts = np.array([1.0, 2, 1, 4, 2, 2])
    found = intervals.ratio(values, clusters, counts)
    assert found["value"] == 28 / 12 and found["n"] == 6 and found["prompts"] == 4
    sums = np.array([3.0, 13, 5, 7]), np.array([3.0, 5, 2, 2])  # by prompt, by hand
    expected = scipy.stats.bootstrap(
        sums,
        lambda t, w, axis: t.sum(axis) / w.sum(axis),
        paired=True,
        method="BCa",
        n_resamples=intervals.RESAMPLES,
        rng=np.random.default_rng(0),
    )
    assert found["interval"] == pytest.approx(list(expected.confidence_interval))
    assert "BCa" in found["method"]


def test_intervals_of_means_cover_the_truth_by_prompt_and_not_by_row():
    trials = 400
    held = {"prompt": 0, "row": 0}
    for trial in range(trials):
        values, clusters = clustered(np.random.default_rng(trial), 40)
        for name, resampled in (("prompt", clusters), ("row", np.arange(len(values)))):
            low, high = intervals.ratio(values, resampled)["interval"]
            held[name] += low <= 1 <= high
    assert 0.92 <= held["prompt"] / trials <= 0.98  # 95 % of 400, give or take 2.7 standard errors
    assert held["row"] / trials < 0.8  # what resampling rows would claim


def test_intervals_of_shares_cover_the_truth():
    trials, truth = 400, 0.8
    held = 0
    for trial in range(trials):
        wins = (np.random.default_rng(trial).random(50) < truth).astype(float)
        low, high = intervals.ratio(wins, np.arange(50), proportion=True)["interval"]
        held += low <= truth <= high
    assert 0.91 <= held / trials <= 0.98


def test_large_samples_take_the_percentile_bootstrap():
    rng = np.random.default_rng(0)
    values = rng.normal(2, 1, 1500)
    found = intervals.ratio(values, np.arange(1500))
    assert found["method"].startswith("percentile")
    half = 1.96 * values.std() / math.sqrt(1500)
    ends = [values.mean() - half, values.mean() + half]
    assert found["interval"] == pytest.approx(ends, abs=0.1 * half)


def test_a_share_without_spread_gets_wilsons_interval_by_prompt():
    found = intervals.ratio(np.ones(12), np.repeat([0, 1, 2, 3], 3), proportion=True)
    assert found["value"] == 1 and "Wilson" in found["method"]
    expected = scipy.stats.binomtest(4, 4).proportion_ci(method="wilson")  # 4 prompts, not 12 rows
    assert found["interval"] == pytest.approx([expected.low, expected.high])
    assert intervals.ratio(np.zeros(5), np.arange(5))["interval"] == [0, 0]


def test_one_prompt_has_no_interval_and_no_row_no_value():
    found = intervals.ratio(np.array([1.0, 3.0]), np.array([7, 7]))
    assert found["value"] == 2 and found["interval"] is None
    assert found["method"] == "none: one prompt"
    assert math.isnan(intervals.ratio(np.zeros(0), np.zeros(0, dtype=int))["value"])


def test_clusters_are_numbered_as_they_appear():
    assert intervals.clusters_of(np.array([9, -4, 9, 100, -4])).tolist() == [0, 1, 0, 2, 1]


def test_resampled_weights_are_counts_of_whole_prompts():
    weights = intervals.resampled_weights(np.array([0, 1, 1, 2]), 2000, 0)
    assert torch.equal(weights[:, 1], weights[:, 2]) and (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert weights.mean(0).tolist() == pytest.approx([1, 1, 1, 1], abs=0.06)


def test_auroc_and_distance_intervals_cover_the_truth():
    """Two normals 1 apart: AUROC Phi(1 / sqrt 2), Wasserstein 1. ECE of confidence .8 that is right
    in .6: .2.
    """
    truths = {"auroc": scipy.stats.norm.cdf(1 / math.sqrt(2)), "wasserstein": 1.0, "ece": 0.2}
    trials, held = 200, np.zeros(3)
    for trial in range(trials):
        estimates = _estimates(np.random.default_rng(trial))
        for i, (name, truth) in enumerate(truths.items()):
            low, high = estimates[name]["interval"]
            held[i] += low <= truth <= high
    covered = held / trials
    assert (covered >= [0.9, 0.85, 0.9]).all() and (covered <= 0.99).all(), covered


def _estimates(rng):
    """Of 60 values a sample, by 300 resamples."""
    a, b = torch.from_numpy(rng.normal(1, 1, 60)), torch.from_numpy(rng.normal(0, 1, 60))
    sure = torch.full((60,), 0.8, dtype=torch.float64)
    right = torch.from_numpy((rng.random(60) < 0.6) * 1.0)
    edges = torch.linspace(0.5, 1, 11, dtype=torch.float64)

    def separation(a_weights, b_weights):
        auroc = measures.auroc(a, b, a_weights, b_weights)
        return auroc, measures.wasserstein(a, b, a_weights, b_weights)

    def error(weights):
        return (measures.calibration(sure, right, edges, weights)[1],)

    estimates = intervals.resampled(
        separation,
        np.arange(60),
        np.arange(60),
        bounds={"auroc": None, "wasserstein": (0, math.inf)},
        sizes=(60, 60),
        resamples=300,
    )
    return estimates | intervals.resampled(
        error, np.arange(60), bounds={"ece": (0, 1)}, sizes=(60,), resamples=300
    )
