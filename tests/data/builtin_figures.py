"""Figures of the built-in preference pairs, for the data's README and its test.

    python tests/data/builtin_figures.py                # lengths in words
    python tests/data/builtin_figures.py MODEL_DIR   # lengths in its tokenizer's tokens

The pairs are worth training on only if the preference lies in the stance of the answers. So what a
model could learn instead is measured here: a template, a length, a give-away word.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from scipy.sparse import vstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold

FOLDER = Path(__file__).resolve().parents[2] / "train/data/builtin"
SPLITS = ("train", "held_out")
ANSWERS = ("chosen", "rejected")
CLAIM = re.compile(r"\b(as an ai|language model|artificial intelligence|chatbot)\b", re.IGNORECASE)
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf]")


def load(split):
    """The rows of one split, as written."""
    with open(FOLDER / f"{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def words(text):
    return re.findall(r"[\w']+", text.lower().replace("’", "'"))


def prompts(rows):
    """The distinct prompts, without regard to case and punctuation."""
    return {" ".join(words(row["prompt"])) for row in rows}


def lengths(rows, length):
    """(answers,) length of every answer by the function `length`."""
    return np.array([length(row[side]) for row in rows for side in ANSWERS])


def longer_wins(rows, length):
    """Share of pairs in which the chosen answer is the longer one; a tie counts one half."""
    difference = lengths(rows, length).reshape(-1, 2) @ [1, -1]  # (pairs,) chosen - rejected
    return float(np.mean((np.sign(difference) + 1) / 2))


def worst_ngram(rows, n=6):
    """(number of pairs it occurs in, n-gram) of the n words in a row that most pairs share, prompt
    included.
    """
    count = {}
    for row in rows:
        texts = [words(row[column]) for column in ("prompt", *ANSWERS)]
        for gram in {tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)}:
            count[gram] = count.get(gram, 0) + 1
    gram = max(sorted(count), key=count.get)
    return count[gram], " ".join(gram)


def share_with(rows, pattern):
    """(share, number) of the answers in which `pattern` is found."""
    found = lengths(rows, lambda text: bool(pattern.search(text)))
    return float(found.mean()), int(found.sum())


def bag_of_words(rows, shuffles=5, folds=5):
    """(shuffles,) accuracy of a pairwise linear classifier on word counts, on the folds it was not
    trained on.

    A pair is d = counts(chosen) - counts(rejected). Trained on +d and -d without intercept, so that
    the order of a pair tells nothing; right when d.w > 0, half right when d.w = 0.
    """
    vectorizer = CountVectorizer().fit([row[side] for row in rows for side in ANSWERS])
    chosen, rejected = (vectorizer.transform([row[side] for row in rows]) for side in ANSWERS)
    difference = chosen - rejected  # (pairs, vocabulary) counts
    accuracies = []
    for seed in range(shuffles):
        hits = np.zeros(len(rows))
        for train, test in KFold(folds, shuffle=True, random_state=seed).split(hits):
            sides = np.repeat([1, -1], len(train))
            both = vstack([difference[train], -difference[train]])
            model = LogisticRegression(fit_intercept=False, max_iter=1000).fit(both, sides)
            hits[test] = (np.sign(model.decision_function(difference[test])) + 1) / 2
        accuracies.append(hits.mean())
    return np.array(accuracies)


def token_counter(folder):
    """A function that counts the tokens of a text under the tokenizer in `folder`, special tokens
    left out.
    """
    from transformers import (
        AutoTokenizer,
    )  # imported here: the other figures need no torch and come in a second

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def main(folder=None):
    rows = {split: load(split) for split in SPLITS}
    every = [row for split in SPLITS for row in rows[split]]
    for split in SPLITS:
        print(f"{split:9} {len(rows[split]):4} pairs, {len(prompts(rows[split]))} distinct prompts")
    print(f"overlap   {len(prompts(rows['train']) & prompts(rows['held_out'])):4} prompts in both")

    unit, length = (
        ("tokens", token_counter(folder)) if folder else ("words", lambda text: len(text.split()))
    )
    for side in ANSWERS:
        found = np.array([length(row[side]) for row in every])
        print(
            f"{side:9} {found.min()} / {found.mean():.1f} / {found.max()} {unit} an answer (min / mean / max)"
        )
    for split in SPLITS:
        by_characters, by_words = (
            longer_wins(rows[split], by) for by in (len, lambda text: len(text.split()))
        )
        print(
            f"longer answer wins, {split:9} {by_characters:.3f} by characters, {by_words:.3f} by words"
        )

    print("6 words in a row shared by most pairs: {} pair(s), {!r}".format(*worst_ngram(every)))
    for name, pattern in (("claim to be an AI", CLAIM), ("emoji", EMOJI)):
        print(
            "answers with {}: {:.3f} ({} of {})".format(
                name, *share_with(every, pattern), len(every) * 2
            )
        )
    accuracy = bag_of_words(every)
    print(
        f"bag of words, 5 folds, 5 shuffles: mean accuracy {accuracy.mean():.3f}, max {accuracy.max():.3f}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:2])
