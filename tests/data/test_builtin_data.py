"""The built-in pairs keep the promises of train/data/builtin/README.md."""

import os
from pathlib import Path

import pytest

from tests.data import builtin_figures as figures
from train.data import rows
from train.models import builtin

CACHE = Path(
    os.environ.get("ZEROPREF_CACHE") or Path.home() / ".cache/zeropref"
)  # conftest.py gives tests another
MODEL = CACHE / "models" / builtin.NAME
PAIRS = {split: figures.load(split) for split in figures.SPLITS}
EVERY = [row for split in figures.SPLITS for row in PAIRS[split]]


def count_words(text):
    return len(text.split())


def test_192_and_64_pairs_over_distinct_prompts():
    assert {split: len(pairs) for split, pairs in PAIRS.items()} == {"train": 192, "held_out": 64}
    assert len(figures.prompts(EVERY)) == 256


def test_every_row_is_a_pair_of_plain_strings():
    for row in EVERY:
        assert tuple(row) == rows.PAIR_COLUMNS
        assert all(text == text.strip() for text in row.values())
        answers = [{"role": "assistant", "content": row[name]} for name in ("chosen", "rejected")]
        prompt = [{"role": "user", "content": row["prompt"]}]
        assert rows.check_pair(row) == (prompt, *answers, {}, [])


def test_lengths_in_words():
    """A stand-in for the bounds in tokens, which need the model's tokenizer: see the slow test
    below.
    """
    found = figures.lengths(EVERY, count_words)
    assert found.min() >= 15 and found.max() <= 66


@pytest.mark.slow
@pytest.mark.skipif(
    not MODEL.is_dir(), reason="needs the built-in model's tokenizer: run launch/train_dpo.py once"
)
def test_answers_are_20_to_90_tokens():
    found = figures.lengths(EVERY, figures.token_counter(MODEL))
    assert found.min() >= 20 and found.max() <= 90


@pytest.mark.parametrize("split", figures.SPLITS)
@pytest.mark.parametrize("length", [len, count_words])
def test_length_does_not_tell_the_chosen_answer(split, length):
    assert 0.45 <= figures.longer_wins(PAIRS[split], length) <= 0.55


def test_no_template():
    number, gram = figures.worst_ngram(EVERY)
    assert number <= 3, gram


def test_no_give_away():
    assert figures.share_with(EVERY, figures.CLAIM)[1] <= 3
    assert figures.share_with(EVERY, figures.EMOJI)[1] <= 3


def test_words_alone_tell_some_pairs_but_not_all():
    """Below 0.6 there would be hardly anything to learn, above 0.9 a list of words would do."""
    accuracy = figures.bag_of_words(EVERY)
    assert 0.6 <= accuracy.mean() <= accuracy.max() <= 0.9


def test_the_figures_see_what_they_are_for():
    """Two pairs with one sentence in common, a claim, an emoji, and a longer chosen answer in one
    pair of two.
    """
    pairs = [
        {
            "prompt": "Hello",
            "chosen": "One two three four five six 😄",
            "rejected": "As an AI I greet you",
        },
        {"prompt": "hello!", "chosen": "yes", "rejected": "So: one, two, three, four, five, six."},
    ]
    assert figures.worst_ngram(pairs) == (2, "one two three four five six")
    assert figures.longer_wins(pairs, count_words) == 0.5
    assert figures.share_with(pairs, figures.CLAIM) == (0.25, 1)
    assert figures.share_with(pairs, figures.EMOJI) == (0.25, 1)
    assert len(figures.prompts(pairs)) == 1


def test_bag_of_words_finds_a_give_away_and_ignores_a_tie():
    told = [{"prompt": str(i), "chosen": f"well w{i}", "rejected": f"thus v{i}"} for i in range(20)]
    tied = [{"prompt": str(i), "chosen": f"w{i}", "rejected": f"v{i}"} for i in range(20)]
    assert figures.bag_of_words(told).mean() == 1.0
    assert (
        figures.bag_of_words(tied).mean() == 0.5
    )  # no word of the held-out fold was seen: all ties
