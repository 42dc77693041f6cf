"""What a pair's text gives away without any model: how far "longer wins" and a bag of words get on
the same pairs.

A set on which a bag of words is always right does not show that a model understood anything.

Legend: N pairs.
"""

import logging

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from train.methods import intervals

FOLDS = 5
WORDS = 50_000  # at most so many distinct words


def measure(
    chosen: list[str], rejected: list[str], clusters: np.ndarray, correct: np.ndarray
) -> tuple[dict, dict]:
    """(the report's section, columns of the pairs' table).

    chosen, rejected: N texts each. clusters: (N,) number of each pair's prompt. correct: (N,) the
    model's own wins, for the differences to both rules.
    """
    sizes = [(len(a), len(b)) for a, b in zip(chosen, rejected, strict=True)]
    longer = np.array([(a > b) + 0.5 * (a == b) for a, b in sizes])  # (N,)
    section = {
        "longer_wins": intervals.ratio(longer, clusters, proportion=True)
        | {"what": "the answer of more characters"},
        "model_minus_longer_wins": intervals.ratio(correct - longer, clusters),
    }
    log_odds = bag_of_words(chosen, rejected, clusters)
    if log_odds is None:
        section["bag_of_words"] = intervals.as_estimate(
            None, (len(chosen),), "none: fewer than two prompts"
        )
        return section, {}
    wins = (log_odds > 0) + 0.5 * (log_odds == 0)  # (N,)
    folds = min(FOLDS, int(clusters.max()) + 1)
    section["bag_of_words"] = intervals.ratio(wins, clusters, proportion=True) | {
        "what": f"logistic regression on words, fitted on other prompts ({folds} folds)"
    }
    section["model_minus_bag_of_words"] = intervals.ratio(correct - wins, clusters)
    return section, {"bag_of_words": log_odds}


def bag_of_words(chosen: list[str], rejected: list[str], clusters: np.ndarray) -> np.ndarray | None:
    """(N,) log-odds that chosen is the better answer, each from a classifier that saw no row of the
    same prompt.

    Bradley-Terry on word weights: a logistic regression without intercept on tf-idf(chosen) -
    tf-idf(rejected), each difference given in both directions. None where there are fewer than two
    prompts.
    """
    folds = min(FOLDS, len(np.unique(clusters)))
    if folds < 2:
        return None
    log_odds = np.zeros(len(chosen))
    for fitted, held_out in GroupKFold(folds).split(log_odds, groups=clusters):
        words = TfidfVectorizer(
            sublinear_tf=True, max_features=WORDS, token_pattern=r"(?u)\b\w+\b|[^\w\s]"
        )
        try:
            words.fit([text for i in fitted for text in (chosen[i], rejected[i])])
        except ValueError as error:  # texts without a word: nothing to tell them by, log-odds 0
            logging.getLogger("zeropref").info("bag of words: %s", error)
            continue
        differences = _differences(words, chosen, rejected, fitted)
        classifier = LogisticRegression(C=10.0, fit_intercept=False, max_iter=1000)
        classifier.fit(
            scipy.sparse.vstack([differences, -differences]), np.repeat([1, 0], len(fitted))
        )
        log_odds[held_out] = classifier.decision_function(
            _differences(words, chosen, rejected, held_out)
        )
    return log_odds


def _differences(words: TfidfVectorizer, chosen, rejected, rows):
    """tf-idf(chosen) - tf-idf(rejected) of some rows: sparse (rows, words)."""
    return words.transform([chosen[i] for i in rows]) - words.transform([rejected[i] for i in rows])
