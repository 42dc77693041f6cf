"""Rows of several answers to choose from."""

import json

import pytest

from train.data.packing import pack
from train.data.rows import MissingColumn, RowError, check_candidates
from train.data.tokens import collect


def texts_of(row):
    found = check_candidates(row)
    return [answer["content"] for answer in found.answers], found.num_chosen


ASKED = {"role": "user", "content": "Hi"}


def said(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "texts", "num_chosen"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, ["a", "b"], 1),
        ({"prompt": "Hi", "chosen": ["a"], "rejected": ["b", "c", "d"]}, ["a", "b", "c", "d"], 1),
        ({"prompt": "Hi", "chosen": ["a", "b"], "rejected": "c"}, ["a", "b", "c"], 2),
        ({"prompt": [ASKED], "chosen": [said("a")], "rejected": [said("b")]}, ["a", "b"], 1),
        (
            {"chosen": [[ASKED, said("a")]], "rejected": [[ASKED, said("b")], [ASKED, said("c")]]},
            ["a", "b", "c"],
            1,
        ),
        ({"prompt": "Hi", "responses": ["a", "b", "c"], "scores": [2, 3, 1]}, ["b", "c"], 1),
    ],
)
def test_answers_of_a_row(row, texts, num_chosen):
    assert texts_of(row) == (texts, num_chosen)
    assert check_candidates(row).messages == [ASKED]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Hi", "chosen": [], "rejected": ["b"]}, "chosen has no answer in it"),
        ({"prompt": "Hi", "chosen": ["a"], "rejected": ["b", "a"]}, "chosen equals rejected"),
        ({"prompt": "Hi", "chosen": ["a", "b"], "rejected": ["c", "b"]}, "chosen equals rejected"),
        ({"prompt": "Hi", "chosen": ["a"], "rejected": ["b", 3]}, "rejected message 0"),
        (
            {
                "chosen": [[ASKED, said("a")]],
                "rejected": [[ASKED, said("b")], [{"role": "user", "content": "Ho"}, said("c")]],
            },
            "differ",
        ),
        ({"prompt": "Hi", "chosen": ["a"]}, "rejected"),
    ],
)
def test_reasons(row, words):
    with pytest.raises(RowError, match=words) as raised:
        check_candidates(row)
    assert isinstance(raised.value, MissingColumn) == ("rejected" not in row)


def test_groups_of_unlike_numbers(letters, tmp_path):
    """Each group has its own answers, in the cache and in a batch; a row of ten answers makes no room
    in one of two.
    """
    rows = [
        {"prompt": "Hi", "chosen": "a", "rejected": "bc"},
        {"prompt": "Ho", "chosen": ["d", "e"], "rejected": [f"f{i}" for i in range(8)]},
        {"prompt": "Hi", "chosen": ["g"], "rejected": ["h", "ij"]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = collect([str(path)], letters, max_length=200, kind="candidates")
    again = collect([str(path)], letters, max_length=200, kind="candidates")
    assert data.lengths.shape == (3, 11)
    groups = [data.group(i) for i in range(3)]
    assert [len(group.responses) for group in groups] == [2, 10, 3]
    assert groups == [again.group(i) for i in range(3)]
    texts = [letters.decode(ids[:-1]) for group in groups for ids in group.responses]
    assert texts == ["a", "bc", "d", "e", *(f"f{i}" for i in range(8)), "g", "h", "ij"]
    assert data.lengths.sum(1).tolist() == [group.tokens for group in groups]
    assert pack(groups).num_responses == 15
