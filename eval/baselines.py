"""What a pair's text gives away without any model: how far "longer wins" and a bag of words get on
the same pairs.

A set on which a bag of words is always right does not show that a model understood anything.
"""

import logging

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from eval import intervals

FOLDS = 5
WORDS = 50_000  # at most so many distinct words


def measure(
    chosen: list[str], rejected: list[str], units: np.ndarray, correct: np.ndarray
) -> tuple[dict, dict]:
    """(the report's section, columns). `correct` (N,): the model's own wins, for the difference to
    the bag of words.
    """
    longer = np.array(
        [
            (len(a) > len(b)) + 0.5 * (len(a) == len(b))
            for a, b in zip(chosen, rejected, strict=True)
        ]
    )
    section = {
        "longer_wins": intervals.ratio(longer, units, share=True)
        | {"what": "the answer of more characters"}
    }
    scores = bag_of_words(chosen, rejected, units)
    if scores is None:
        section["bag_of_words"] = {
            "value": None,
            "interval": None,
            "n": len(chosen),
            "method": "none: fewer than two prompts",
        }
        return section, {}
    wins = (scores > 0) + 0.5 * (scores == 0)
    section["bag_of_words"] = intervals.ratio(wins, units, share=True) | {
        "what": f"logistic regression on words, fitted on other prompts ({min(FOLDS, int(units.max()) + 1)} folds)"
    }
    section["model_minus_bag_of_words"] = intervals.ratio(correct - wins, units)
    return section, {"bag_of_words": scores}


def bag_of_words(chosen: list[str], rejected: list[str], units: np.ndarray) -> np.ndarray | None:
    """(N,) log-odds that chosen is the better answer, each from a classifier that saw no row of the
    same prompt.

    Bradley-Terry on word weights: a logistic regression without intercept on tf-idf(chosen) -
    tf-idf(rejected), each difference given in both directions. None where there are fewer than two
    prompts.
    """
    folds = min(FOLDS, len(np.unique(units)))
    if folds < 2:
        return None
    found = np.zeros(len(chosen))
    for fit, held in GroupKFold(folds).split(found, groups=units):
        words = TfidfVectorizer(
            sublinear_tf=True, max_features=WORDS, token_pattern=r"(?u)\b\w+\b|[^\w\s]"
        )
        try:
            words.fit([text for i in fit for text in (chosen[i], rejected[i])])
        except ValueError as error:  # texts without a word: nothing to tell them by
            logging.getLogger("zeropref").info("bag of words: %s", error)
            continue
        vectors = lambda rows: (
            words.transform([chosen[i] for i in rows])
            - words.transform([rejected[i] for i in rows])
        )
        seen = vectors(fit)
        weights = LogisticRegression(C=10.0, fit_intercept=False, max_iter=1000)
        weights.fit(scipy.sparse.vstack([seen, -seen]), np.repeat([1, 0], len(fit)))
        found[held] = weights.decision_function(vectors(held))
    return found
