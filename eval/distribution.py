"""Text from the preference data against text from elsewhere: log-probabilities a token, and how far
the two lie apart.

Texts are scored each by itself, from their first token where the tokenizer begins its texts with
one of its own (bos), else from their second, which the first one predicts; a text longer than --max_length is cut there, and nothing is scored twice. Perplexity is exp of minus the
mean log-probability of all scored tokens. Two views of the same tokens: by text (the mean of each
response or text) and by token.
"""

import math

import numpy as np
import scipy.stats
import torch

from eval import intervals, statistics

MOST_BINS = 80
WIDTHS = tuple(
    float(f"{base}e{power}") for power in range(-9, 4) for base in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
)  # nats
RESAMPLED_VALUES = 200_000_000  # values times resamples: 20 s on one core
SEPARATION = {
    "overlap": (0, 1),
    "auroc": None,
    "wasserstein": (0, math.inf),
}  # see intervals.resampled
SHUFFLES = 500
MOST_SHUFFLED = 4_000  # values; beyond, what chance shows is next to nothing


def measure(pair_scores, text_scores, names: list[str]) -> tuple[dict, dict]:
    """(the report's section, columns of the texts' table). `names`: of the models in the scores'
    order.
    """
    inside = Sample.of(pair_scores, 0)
    outside = Sample.of(text_scores, 0)
    views = {
        "by_text": ((inside.means, inside.units), (outside.means, outside.units)),
        "by_token": ((inside.tokens, inside.token_units), (outside.tokens, outside.token_units)),
    }
    edges = {
        view: shared_edges(values, others) for view, ((values, _), (others, _)) in views.items()
    }
    section = {
        "in_distribution": {"what": "chosen responses", **inside.size()},
        "out_of_distribution": {"what": "texts", **outside.size()},
    }
    for number, name in enumerate(names):
        section[name] = {"in": likelihood(inside, number), "out": likelihood(outside, number)}
        for view, ((values, units), (others, their_units)) in views.items():
            section[name][view] = separation(
                values[number], others[number], units, their_units, edges[view]
            )
    if len(names) == 2:
        section["change"] = {
            side: change(sample) for side, sample in (("in", inside), ("out", outside))
        }
    columns = {"row": text_scores.rows, "tokens": outside.lengths, "logp": outside.sums[0]}
    if len(names) == 2:
        columns["ref_logp"] = outside.sums[1]
    return section, columns


class Sample:
    """n texts under M models: one response of each group of eval.scores.Scores."""

    def __init__(self, sums, lengths, tokens, prompts):
        self.sums, self.lengths, self.tokens = (
            sums,
            lengths,
            tokens,
        )  # (M, n) nats, (n,) tokens, (M, T) nats
        self.units = intervals.units_of(prompts)  # (n,)
        self.token_units = np.repeat(self.units, lengths)  # (T,)
        self.means = sums / lengths  # (M, n) nats a token

    @classmethod
    def of(cls, scores, response: int) -> "Sample":
        """Response number `response` of every group."""
        k = scores.lengths.shape[1]
        taken = np.repeat(
            np.arange(scores.lengths.size) % k == response, scores.lengths.reshape(-1)
        )  # (T,)
        tokens = scores.tokens[:, taken].astype(np.float64)
        return cls(scores.sums[:, :, response], scores.lengths[:, response], tokens, scores.prompts)

    def size(self) -> dict:
        """How much text it is."""
        return {
            "texts": len(self.lengths),
            "tokens": int(self.lengths.sum()),
            "mean_tokens": float(self.lengths.mean()),
            "longest": int(self.lengths.max()),
        }


def likelihood(sample: Sample, model: int) -> dict:
    """Mean log-probability a token, nats, and its perplexity."""
    mean = intervals.ratio(sample.sums[model], sample.units, sample.lengths)
    return {"logp_per_token": mean, "perplexity": _exp(mean)}


def change(sample: Sample) -> dict:
    """The model against the reference on the same texts: difference in nats a token, ratio of
    perplexities.
    """
    mean = intervals.ratio(sample.sums[0] - sample.sums[1], sample.units, sample.lengths)
    return {"logp_per_token": mean, "perplexity_ratio": _exp(mean)}


def _exp(mean: dict) -> dict:
    """exp(-x) of a measure; it is monotone, so the interval's ends trade places."""
    interval = mean["interval"] and [math.exp(-mean["interval"][1]), math.exp(-mean["interval"][0])]
    return mean | {"value": math.exp(-mean["value"]), "interval": interval}


def separation(inside, outside, inside_units, outside_units, edges) -> dict:
    """Overlap, AUROC (inside likelier than outside) and Wasserstein distance (nats), and the
    histograms behind them.
    """
    a, b, bins = (torch.from_numpy(np.ascontiguousarray(x)) for x in (inside, outside, edges))

    def compare(a_weights, b_weights):
        shared = statistics.overlap(
            statistics.histogram(a, bins, a_weights), statistics.histogram(b, bins, b_weights)
        )
        return (
            shared,
            statistics.auroc(a, b, a_weights, b_weights),
            statistics.wasserstein(a, b, a_weights, b_weights),
        )

    resamples = int(np.clip(RESAMPLED_VALUES // (len(a) + len(b)), 100, 500))
    found = intervals.resampled(
        compare,
        inside_units,
        outside_units,
        measures=SEPARATION,
        what=(len(a), len(b)),
        resamples=resamples,
    )
    counts = [statistics.histogram(x, bins).tolist() for x in (a, b)]
    found["if_alike"] = alike(a, b, bins) if len(a) + len(b) <= MOST_SHUFFLED else None
    return {
        **found,
        "histogram": {"edges": [float(edge) for edge in edges], "in": counts[0], "out": counts[1]},
    }


def alike(a, b, bins) -> dict:
    """Where overlap and distance lie in 95 % of shuffles of the two samples' values: what chance
    alone shows.
    """
    pooled, n = torch.cat([a, b]), len(a)
    order = np.random.default_rng(0).permuted(
        np.tile(np.arange(len(pooled)), (SHUFFLES, 1)), axis=1
    )  # (S, n + m)
    first = torch.from_numpy((order < n).astype(np.float64))
    histogram = lambda weights: statistics.histogram(pooled, bins, weights)
    found = {
        "overlap": statistics.overlap(histogram(first), histogram(1 - first)),
        "wasserstein": statistics.wasserstein(pooled, pooled, first, 1 - first),
    }
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: torch.quantile(values, ends).tolist() for name, values in found.items()}


def shared_edges(*samples: np.ndarray) -> np.ndarray:
    """Bins for all samples (M, n) of all models: of a round width, at round places, which no
    rounding moves.

    The width is Freedman and Diaconis' (1981), 2 IQR n^(-1/3), of the sample that it is least for:
    a few values far out do not make it coarse. Wider where that would be more than MOST_BINS.
    """
    low, high = min(x.min() for x in samples), max(x.max() for x in samples)
    wanted = [
        2 * float(iqr) / x.shape[-1] ** (1 / 3)
        for x in samples
        for iqr in scipy.stats.iqr(x, axis=-1)
        if iqr
    ]
    wanted = max(min(wanted, default=0), (high - low) / MOST_BINS) or 1.0
    width = next((w for w in WIDTHS if w >= wanted), WIDTHS[-1])
    first = math.floor(low / width)
    last = max(
        math.ceil(high / width), first + 1
    )  # 0 closes the bins of log-probabilities, and counts below it
    return np.arange(first, last + 1) * width
