"""Text from the preference data against text from elsewhere: log-probabilities a token, and how far
the two lie apart.

Texts are scored each by itself: from the first token where the tokenizer begins its texts with one
of its own (bos), else from the second, as nothing predicts the first. A text longer than
--max_length is cut there, and nothing is scored twice. Perplexity is exp of minus the mean
log-probability of all scored tokens. There are two views of the same tokens: by text (the mean of
each response or text) and by token.

Legend: M models, n and m texts in and out of distribution, T scored tokens of a side, b bins.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch

from eval import measures
from train.methods import intervals

MOST_BINS = 80
# round widths of bins, nats
WIDTHS = tuple(
    float(f"{base}e{power}") for power in range(-9, 4) for base in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
)
RESAMPLED_VALUES = 200_000_000  # values times resamples: 20 s on one core
# What separates the sides, and the bounds of what noise moves one way: see intervals.resampled.
SEPARATION = {"overlap": (0, 1), "auroc": None, "wasserstein": (0, math.inf)}
SHUFFLES = 500
MOST_SHUFFLED = 4_000  # values; beyond, what chance shows is next to nothing


class Sample(NamedTuple):
    """Texts of one side under M models, in the data's order."""

    sums: np.ndarray  # (M, n) fp64 nats, log-probability of each text
    lengths: np.ndarray  # (n,) int64 scored tokens
    means: np.ndarray  # (M, n) fp64 nats a token
    tokens: np.ndarray  # (M, T) fp64 nats, log-probability of each scored token
    clusters: np.ndarray  # (n,) int64 number of each text's prompt
    token_clusters: np.ndarray  # (T,) the same of each token's text


def sample_of(scores, response: int) -> Sample:
    """Response number `response` of every group of eval.scores.Scores."""
    k = scores.lengths.shape[1]
    lengths, sums = scores.lengths[:, response], scores.sums[:, :, response]
    # tokens lie response after response, group after group
    of_response = np.arange(scores.lengths.size) % k == response
    chosen = np.repeat(of_response, scores.lengths.reshape(-1))  # bool, of all scored tokens
    clusters = intervals.clusters_of(scores.prompts)
    return Sample(
        sums=sums,
        lengths=lengths,
        means=sums / lengths,
        tokens=scores.tokens[:, chosen].astype(np.float64),
        clusters=clusters,
        token_clusters=np.repeat(clusters, lengths),
    )


def measure(pair_scores, text_scores, names: list[str]) -> tuple[dict, dict]:
    """(the report's section, columns of the texts' table).

    Both scores are eval.scores.Scores; names: of their models, in order.
    """
    inside = sample_of(pair_scores, 0)  # chosen responses
    outside = sample_of(text_scores, 0)
    text_edges = shared_edges(inside.means, outside.means)
    token_edges = shared_edges(inside.tokens, outside.tokens)
    section = {
        "in_distribution": {"what": "chosen responses", **size(inside)},
        "out_of_distribution": {"what": "texts", **size(outside)},
    }
    for i, name in enumerate(names):
        section[name] = {
            "in": likelihood(inside, i),
            "out": likelihood(outside, i),
            "by_text": separation(
                inside.means[i], outside.means[i], inside.clusters, outside.clusters, text_edges
            ),
            "by_token": separation(
                inside.tokens[i],
                outside.tokens[i],
                inside.token_clusters,
                outside.token_clusters,
                token_edges,
            ),
        }
    columns = {"row": text_scores.rows, "tokens": outside.lengths, "logp": outside.sums[0]}
    if len(names) == 2:
        section["change"] = {"in": change(inside), "out": change(outside)}
        columns["ref_logp"] = outside.sums[1]
    return section, columns


def size(sample: Sample) -> dict:
    """How much text a sample is."""
    return {
        "texts": len(sample.lengths),
        "tokens": int(sample.lengths.sum()),
        "mean_tokens": float(sample.lengths.mean()),
        "longest": int(sample.lengths.max()),
    }


def likelihood(sample: Sample, model: int) -> dict:
    """Mean log-probability a token, nats, and its perplexity."""
    mean = intervals.ratio(sample.sums[model], sample.clusters, sample.lengths)
    return {"logp_per_token": mean, "perplexity": _exp_of_minus(mean)}


def change(sample: Sample) -> dict:
    """The model against the reference on the same texts: difference in nats a token, ratio of
    perplexities.
    """
    mean = intervals.ratio(sample.sums[0] - sample.sums[1], sample.clusters, sample.lengths)
    return {"logp_per_token": mean, "perplexity_ratio": _exp_of_minus(mean)}


def _exp_of_minus(mean: dict) -> dict:
    """exp(-x) of an estimate; it falls in x, so the interval's ends trade places."""
    interval = mean["interval"] and [math.exp(-mean["interval"][1]), math.exp(-mean["interval"][0])]
    return mean | {"value": math.exp(-mean["value"]), "interval": interval}


def separation(inside, outside, inside_clusters, outside_clusters, edges) -> dict:
    """Overlap, AUROC (inside likelier than outside) and Wasserstein distance (nats), and the
    histograms behind them.

    inside, outside: (n,) and (m,) nats a token, with the cluster of each value. edges: (b + 1,).
    """
    a = torch.from_numpy(np.ascontiguousarray(inside))
    b = torch.from_numpy(np.ascontiguousarray(outside))
    bins = torch.from_numpy(np.ascontiguousarray(edges))

    def compare(a_weights, b_weights):
        common = measures.overlap(
            measures.histogram(a, bins, a_weights), measures.histogram(b, bins, b_weights)
        )
        ranked = measures.auroc(a, b, a_weights, b_weights)
        return common, ranked, measures.wasserstein(a, b, a_weights, b_weights)

    estimates = intervals.resampled(
        compare,
        inside_clusters,
        outside_clusters,
        bounds=SEPARATION,
        sizes=(len(a), len(b)),
        resamples=int(np.clip(RESAMPLED_VALUES // (len(a) + len(b)), 100, 500)),
    )
    few = len(a) + len(b) <= MOST_SHUFFLED
    return {
        **estimates,
        "if_alike": range_if_alike(a, b, bins) if few else None,
        "histogram": {
            "edges": [float(edge) for edge in edges],
            "in": measures.histogram(a, bins).tolist(),
            "out": measures.histogram(b, bins).tolist(),
        },
    }


def range_if_alike(a: torch.Tensor, b: torch.Tensor, bins: torch.Tensor) -> dict:
    """Where overlap and distance lie in 95 % of shuffles of the two samples' values, (n,) and (m,):
    what chance alone shows of samples from one distribution.
    """
    pooled = torch.cat([a, b])
    rng = np.random.default_rng(0)
    order = rng.permuted(np.tile(np.arange(len(pooled)), (SHUFFLES, 1)), axis=1)
    in_a = torch.from_numpy((order < len(a)).astype(np.float64))  # (shuffles, n + m), 1 or 0
    overlaps = measures.overlap(
        measures.histogram(pooled, bins, in_a), measures.histogram(pooled, bins, 1 - in_a)
    )
    distances = measures.wasserstein(pooled, pooled, in_a, 1 - in_a)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {
        "overlap": torch.quantile(overlaps, ends).tolist(),
        "wasserstein": torch.quantile(distances, ends).tolist(),
    }


def shared_edges(*samples: np.ndarray) -> np.ndarray:
    """(b + 1,) edges of bins for all samples, (M, n) each, of all models: of a round width, at round
    places, which no rounding moves.

    The width is Freedman and Diaconis' (1981), 2 IQR n^(-1/3), of the sample that it is least for:
    a few values far out do not make it coarse. It is wider where that would be more than MOST_BINS.
    """
    low = min(sample.min() for sample in samples)
    high = max(sample.max() for sample in samples)
    wanted = [
        2 * float(iqr) / sample.shape[-1] ** (1 / 3)
        for sample in samples
        for iqr in scipy.stats.iqr(sample, axis=-1)
        if iqr
    ]
    least = max(min(wanted, default=0), (high - low) / MOST_BINS) or 1.0
    width = next((round_width for round_width in WIDTHS if round_width >= least), WIDTHS[-1])
    start = math.floor(low / width)
    # 0, the largest log-probability there is, closes the last bin and counts in it
    stop = max(math.ceil(high / width), start + 1)
    return np.arange(start, stop + 1) * width
