"""What a reward model makes of rows of answers: accuracy, margins, calibration, length, subsets,
with intervals; and whether it is better than the rules that need no model.

A row has c chosen answers among n. Its margin is the least chosen score less the greatest rejected
one, and it is won where that is above 0: with one chosen answer, where that is the best of n. Where
the margin is 0 the row counts 1/m, m the answers that tie for the place: one half of a pair.
RewardBench counts such a row as lost, which stands beside it.

Margins, loss and calibration are of pairs: every chosen answer of a row with every rejected one. The
implied probability that chosen beats rejected is sigmoid(difference) (Bradley and Terry 1952).

Legend: N rows, A answers, P pairs; `clusters` are numbers of prompts (train/methods/intervals.py).
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch

from eval import baselines, benchmarks, preferences
from eval.judges import AnswerScores
from train.losses.preference import Pairs
from train.methods import intervals
from train.methods.intervals import percent

# The verdict's words, and how they are said.
WORDS = {
    "better": "better than the rules that need no model",
    "unclear": "not shown to be better than a rule that needs no model",
    "worse": "worse than a rule that needs no model",
    "chance": "not shown to be better than chance",
}
RULES = {
    "model_minus_longer_wins": '"longer wins"',
    "model_minus_bag_of_words": "a bag of words",
}


class Answers(NamedTuple):
    """Rows of answers and what is known of each, flat."""

    row: np.ndarray  # (A,) number of the row, from 0
    chosen: np.ndarray  # (A,) bool
    scores: np.ndarray  # (A,) fp64
    lengths: np.ndarray  # (A,) tokens
    characters: np.ndarray  # (A,) of the text
    texts: list[str]  # A

    @classmethod
    def of(cls, scores: AnswerScores, candidates) -> "Answers":
        """candidates: N of train.data.rows.Candidates."""
        texts = [answer["content"] for row in candidates for answer in row.answers]
        chosen = [i < row.num_chosen for row in candidates for i in range(len(row.answers))]
        return cls(
            row=np.repeat(np.arange(len(scores.counts)), scores.counts),
            chosen=np.array(chosen),
            scores=scores.scores,
            lengths=scores.lengths,
            characters=np.array([len(text) for text in texts]),
            texts=texts,
        )

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(P,) and (P,) numbers of answers: each chosen answer with each rejected one of its row."""
        starts = np.flatnonzero(np.diff(self.row, prepend=-1))
        chosen, rejected = [], []
        for start, end in zip(starts, [*starts[1:], len(self.row)], strict=True):
            places = np.arange(start, end)
            right, wrong = places[self.chosen[start:end]], places[~self.chosen[start:end]]
            chosen.append(np.repeat(right, len(wrong)))
            rejected.append(np.tile(wrong, len(right)))
        return np.concatenate(chosen), np.concatenate(rejected)


def wins_of_rows(values: np.ndarray, answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    """(margins, shares of a win), (N,) each, of rows whose answers have these values (A,)."""
    count = int(answers.row[-1]) + 1
    least = np.full(count, math.inf)
    np.minimum.at(least, answers.row[answers.chosen], values[answers.chosen])
    greatest = np.full(count, -math.inf)
    np.maximum.at(greatest, answers.row[~answers.chosen], values[~answers.chosen])
    # rejected answers that score as the least chosen one
    tied = (values == least[answers.row]) & ~answers.chosen
    ties = np.bincount(answers.row[tied], minlength=count)
    margins = least - greatest
    shares = np.where(margins > 0, 1.0, np.where(margins == 0, 1 / (1 + ties), 0.0))
    return margins, shares


def chance(answers: Answers) -> float:
    """The accuracy of guessing: that the c chosen of n answers stand before all others."""
    counts = np.bincount(answers.row)
    chosen = np.bincount(answers.row, answers.chosen).astype(int)
    return float(np.mean([1 / math.comb(n, c) for n, c in zip(counts, chosen, strict=True)]))


def measure(opened, scores: AnswerScores) -> tuple[dict, dict]:
    """(the report's chapter, tables of rows and of answers).

    opened: eval.reward_inputs.RewardInputs.
    """
    answers = Answers.of(scores, opened.rows)
    clusters = intervals.clusters_of(scores.prompts)  # (N,)
    margins, correct = wins_of_rows(answers.scores, answers)
    first, second = answers.pairs()
    pair_clusters = clusters[answers.row[first]]  # (P,)
    pairs = as_pairs(answers, first, second)
    differences = pairs.chosen - pairs.rejected  # (P,)
    several = len(first) > len(margins)
    estimates = estimates_of(answers, clusters, margins, correct)
    estimates |= estimates_of_pairs(differences, pair_clusters)
    if several:
        won = preferences.wins(differences)
        estimates |= {
            "rewards/row_margins": intervals.ratio(margins, clusters),
            "rewards/pair_accuracies": intervals.ratio(won, pair_clusters, proportion=True),
        }
    of_baselines, words = baselines.measure(
        [answers.texts[i] for i in first],
        [answers.texts[i] for i in second],
        pair_clusters,
        preferences.wins(differences),
    )
    if several:
        _, longest = wins_of_rows(answers.characters, answers)
        of_baselines["longest_of_row_wins"] = intervals.ratio(longest, clusters, proportion=True)
    section = {
        "rows": len(margins),
        "pairs": len(first),
        "prompts": int(clusters.max()) + 1,
        "answers": len(answers.row),
        "chance": chance(answers),
        "margin": "difference of scores",
        "model": estimates,
        "calibration": preferences.calibration(differences, pair_clusters),
        "by_length": preferences.by_length(differences, pairs, pair_clusters),
        "length_correlation": preferences.length_correlation(differences, pairs),
        "score_length_correlation": rank_correlation(
            answers.scores, answers.lengths, clusters[answers.row]
        ),
    }
    chapter = {"preferences": section, "baselines": of_baselines}
    rows = {
        "row": scores.rows,
        "prompt": clusters,
        "answers": scores.counts,
        "margin": margins,
        "correct": correct,
    }
    if opened.by:
        chapter["by"] = by_value(opened.by, correct, margins, clusters)
        rows["by"] = opened.by
    if benchmark := benchmark_of(opened, answers, margins, correct, clusters):
        chapter["benchmark"] = benchmark
    if not several:
        rows |= {
            "chosen_tokens": answers.lengths[first],
            "rejected_tokens": answers.lengths[second],
            "chosen_score": answers.scores[first],
            "rejected_score": answers.scores[second],
            **words,
        }
    of_answers = {
        "row": scores.rows[answers.row],
        "answer": np.arange(len(answers.row)) - np.searchsorted(answers.row, answers.row),
        "chosen": answers.chosen,
        "tokens": answers.lengths,
        "score": answers.scores,
    }
    chapter["verdict"] = verdict(chapter)
    return chapter, {"rewards": rows, "answers": of_answers}


def as_pairs(answers: Answers, first: np.ndarray, second: np.ndarray) -> Pairs:
    """The pairs (P,) of answers as fp64 tensors, their scores in the place of log-probabilities."""
    chosen, rejected = (torch.from_numpy(answers.scores[places]) for places in (first, second))
    return Pairs(
        chosen=chosen,
        rejected=rejected,
        ref_chosen=torch.zeros_like(chosen),
        ref_rejected=torch.zeros_like(rejected),
        chosen_len=torch.from_numpy(answers.lengths[first]),
        rejected_len=torch.from_numpy(answers.lengths[second]),
    )


def estimates_of(
    answers: Answers, clusters: np.ndarray, margins: np.ndarray, correct: np.ndarray
) -> dict:
    """Estimates over rows, (N,) each, and over answers."""
    of_answer = clusters[answers.row]  # (A,)
    found = {
        "rewards/accuracies": intervals.ratio(correct, clusters, proportion=True),
        "rewards/accuracies_ties_lost": intervals.ratio(margins > 0, clusters, proportion=True),
    }
    for name, side in (("chosen", answers.chosen), ("rejected", ~answers.chosen)):
        found[f"rewards/{name}"] = intervals.ratio(answers.scores[side], of_answer[side])
    return found


def estimates_of_pairs(differences: torch.Tensor, clusters: np.ndarray) -> dict:
    """Estimates over pairs, (P,) each."""
    losses = -torch.nn.functional.logsigmoid(differences)
    return {
        "rewards/margins": intervals.ratio(differences.numpy(), clusters),
        "loss": intervals.ratio(losses.numpy(), clusters),
    }


def rank_correlation(one: np.ndarray, other: np.ndarray, clusters: np.ndarray) -> dict:
    """Spearman's rank correlation of two values of each answer, (A,) each.

    Its interval resamples prompts, and keeps the ranks that values have among all.
    """
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return intervals.as_estimate(None, (len(one),), "none: all alike")
    x, y = (torch.from_numpy(scipy.stats.rankdata(values)) for values in (one, other))

    def statistic(weights):
        if weights is None:
            weights = torch.ones_like(x)
        mass = weights.sum(-1, keepdim=True)
        dx = x - (weights * x).sum(-1, keepdim=True) / mass
        dy = y - (weights * y).sum(-1, keepdim=True) / mass
        covariance = (weights * dx * dy).sum(-1)
        spread = (weights * dx * dx).sum(-1) * (weights * dy * dy).sum(-1)
        return (torch.where(spread > 0, covariance / spread.sqrt(), 0.0),)

    return intervals.resampled(statistic, clusters, bounds={"rho": None}, sizes=(len(one),))["rho"]


def by_value(
    values: list[str], correct: np.ndarray, margins: np.ndarray, clusters: np.ndarray
) -> list[dict]:
    """Accuracy and margin of the rows of each value, (N,) each, in the values' order."""
    of_row = np.array(values)
    found = []
    for value in sorted(set(values)):
        rows = of_row == value
        found.append(
            {
                "name": value,
                **intervals.ratio(correct[rows], clusters[rows], proportion=True),
                "ties_lost": float((margins[rows] > 0).mean()),
                "margin": intervals.ratio(margins[rows], clusters[rows]),
            }
        )
    return found


def benchmark_of(
    opened, answers: Answers, margins: np.ndarray, correct: np.ndarray, clusters: np.ndarray
) -> dict | None:
    """The scores of the benchmark that the rows are from; None where they are from none."""
    if opened.benchmark == "RewardBench":
        return benchmarks.reward_bench(opened.by, (margins > 0).astype(float), clusters)
    if opened.benchmark == "RewardBench 2":
        starts = np.flatnonzero(np.diff(answers.row, prepend=-1))[1:]
        scores = np.split(answers.scores, starts)
        of_rows = [(s, row.num_chosen) for s, row in zip(scores, opened.rows, strict=True)]
        return benchmarks.reward_bench_2(opened.by, opened.ids, correct, of_rows, clusters)
    return None


def verdict(chapter: dict) -> dict:
    """{"word": one of WORDS, "reasons": sentences}.

    Better: more often right than chance and than both rules that need no model; worse: less often
    right than one of them. Only what whole intervals say counts.
    """
    section, rules = chapter["preferences"], chapter["baselines"]
    accuracy = section["model"]["rewards/accuracies"]
    low, _ = accuracy["interval"] or (-math.inf, math.inf)
    sides = []
    for name in RULES:
        ends = (rules.get(name) or {}).get("interval") or (-math.inf, math.inf)
        sides.append(int(ends[0] > 0) - int(ends[1] < 0))
    if low <= section["chance"]:
        word = "chance"
    elif min(sides) < 0:
        word = "worse"
    elif min(sides) == 0:
        word = "unclear"
    else:
        word = "better"
    lost = section["model"]["rewards/accuracies_ties_lost"]["value"]
    reasons = [
        f"It is right on {percent(accuracy)} of {section['rows']} rows (chance: "
        f"{section['chance']:.1%}; with ties as lost {lost:.1%})."
    ]
    several = section["pairs"] > section["rows"]
    of = f" of their {section['pairs']} pairs" if several else ""
    own = "the model's accuracy on pairs" if several else "the model's accuracy"
    for name, said in RULES.items():
        rule = rules[name.removeprefix("model_minus_")]
        if rule["value"] is not None:
            reasons.append(
                f"Without any model {said} is right on {rule['value']:.1%}{of}; {own} less that: "
                f"{percent(rules[name])}."
            )
    for name, said in (
        ("score_length_correlation", "score and length of an answer"),
        ("length_correlation", "margin and length difference of a pair"),
    ):
        reasons.append(f"Rank correlation of {said}: {intervals.show(section[name], 3)}.")
    return {"word": word, "reasons": reasons}
