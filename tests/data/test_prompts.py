"""Prompts alone, out of rows of every shape, with the columns that rewards read."""

import json
import tracemalloc

import pytest

from tests.data import families
from train.data import prompts
from train.data.errors import DataError


@pytest.fixture
def prepared(tmp_path):
    def prepared(*rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = families.tokenizer("byte-level", families.NEWLINE)
        options = {"max_length": 200, "max_dropped": 0.9, **options}
        return prompts.prepare([str(path)], tokenizer, **options), tokenizer

    return prepared


TURNS = [{"role": "user", "content": "Hi there"}]
ANSWER = {"role": "assistant", "content": "Hello."}
SHAPES = [
    {"prompt": "Hi there"},
    {"prompt": TURNS},
    {"question": "Hi there"},
    {"messages": TURNS},
    {"messages": [*TURNS, ANSWER]},
    {"prompt": "Hi there", "chosen": "a", "rejected": "b"},
    {"prompt": "Hi there", "chosen": "a", "rejected": "a"},
    {"chosen": [*TURNS, ANSWER], "rejected": [*TURNS, ANSWER]},
    {
        "chosen": "\n\nHuman: Hi there\n\nAssistant: a",
        "rejected": "\n\nHuman: Hi there\n\nAssistant: b",
    },
    {"prompt": "Hi there", "completion": "a", "label": True},
    # answers that nobody could train on
    {"prompt": "Hi there", "chosen": "  ", "rejected": "b"},
    {"prompt": "Hi there", "chosen": 5, "rejected": None},
    {"prompt": TURNS, "chosen": TURNS, "rejected": "b"},
    {"prompt": "Hi there", "completion": [{"role": "assistant", "content": None}]},
    {"prompt": "Hi there", "chosen": [ANSWER, {"role": "tool", "content": "5"}, ANSWER]},
    {"prompt": "Hi there", "responses": ["a", "b"], "scores": [1, 1]},
    {"question": "Hi there", "completions": ["a", "b"], "ratings": [1]},
    {"messages": [*TURNS, ANSWER], "answers": [{"text": "a", "score": "none"}]},
]


@pytest.mark.parametrize("row", SHAPES)
def test_shapes(prepared, row):
    found, tokenizer = prepared(row)
    wanted = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    assert len(found) == 1 and list(found.ids(0)) == wanted
    assert found.asked(0).messages == TURNS and found.row(0) == row


def test_rows_without_a_prompt_are_dropped(prepared):
    found, _ = prepared({"prompt": ""}, {"prompt": [ANSWER]}, {"prompt": "x"}, {"other": 1})
    assert len(found) == 1 and found.row(0) == {"prompt": "x"}
    assert [dropped.row for dropped in found.data.dropped] == [0, 1, 3]
    with pytest.raises(DataError, match="no column 'prompt'"):
        prepared({"other": 1})


def test_a_prompt_that_is_not_that_of_its_answers_is_dropped(prepared):
    other = [{"role": "user", "content": "Bye"}, ANSWER]
    found, _ = prepared({"prompt": "Hi there", "chosen": other, "rejected": "b"}, {"prompt": "x"})
    [dropped] = found.data.dropped
    assert dropped == (dropped.source, 0, "prompt differs from the conversation in the answers")


def test_two_prompts_are_one_only_where_all_columns_agree(prepared):
    rows = [
        {"prompt": "a", "answer": 1},
        {"prompt": "a", "answer": 2},
        {"answer": 1, "prompt": "a"},
    ]
    found, _ = prepared(*rows)
    assert [found.row(i) for i in range(len(found))] == rows[:2]


def test_one_long_row_does_not_make_all_long(prepared):
    """Of 2,000 prompts one has a book beside it: half a megabyte, of which an array of numpy's would
    have 2,000 times four.
    """
    rows = [{"prompt": f"question {i}", "n": i} for i in range(2000)]
    found, _ = prepared(*rows, rows[0], {"prompt": "a", "book": "word " * 100_000})
    tracemalloc.start()
    again = prompts._distinct(found.data, found.rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(again) == len(found) == 2001 and peak < 50e6


def test_renamed_columns(prepared):
    found, _ = prepared({"q": "Hi there", "solution": "3"}, columns=["prompt=q"])
    assert found.columns == ["solution", "prompt"] and found.asked(0).messages == TURNS


def test_columns_are_those_of_any_row(prepared):
    """Of two sources in one run each may have some of its own."""
    found, _ = prepared({"prompt": "a"}, {"prompt": "b", "answer": 1}, {"n": 2, "prompt": "c"})
    assert found.columns == ["prompt", "answer", "n"]


def test_split_by_prompt(prepared):
    found, _ = prepared(*({"prompt": f"question {i % 10}", "n": i} for i in range(30)))
    train, held_out = found.split(0.3, seed=1)
    texts = [
        {part.asked(i).messages[0]["content"] for i in range(len(part))}
        for part in (train, held_out)
    ]
    assert not texts[0] & texts[1] and len(train) + len(held_out) == 30 and len(held_out) > 0
