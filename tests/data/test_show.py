"""Rows for people to look at: what is scored, where the end is, and nothing that harms a terminal."""

import json

import pytest

from train.data import show
from train.data.chat import Chat
from train.data.rows import Dropped
from train.data.tokens import collect
from train.files import ROOT

ROW = {"prompt": "Hi", "chosen": "ok", "rejected": "no \x1b[31m"}


@pytest.fixture
def data(letters, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps(ROW) + "\n" + json.dumps({**ROW, "chosen": "yes" * 40})
    )
    return collect([str(tmp_path / "a.jsonl")], letters, max_length=160, max_prompt_length=100)


def test_record(letters, data, tmp_path):
    found = show.record(letters, data, 0, Chat(letters).end_id)
    assert (found["source"], found["row"], found["dropped"]) == (str(tmp_path / "a.jsonl"), 0, None)
    assert found["chosen_ids"] == [81, 77, 2] and found["tokens"]["chosen"] == [
        "o",
        "k",
        "<|im_end|>",
    ]
    assert found["prompt_ids"] == list(data.group(0).prompt)
    assert found["scored"]["chosen"] == [True] * 3 and found["end"]["chosen"] == 2
    assert found["cut"] == {"prompt": False, "chosen": False, "rejected": False}
    cut = show.record(letters, data, 1, 2)
    assert cut["end"]["chosen"] is None and cut["cut"]["chosen"] and json.dumps(cut)


def test_text(letters, data):
    found = show.record(letters, data, 0, 2)
    plain = show.as_text(found)
    assert "\x1b" not in plain and "no \\x1b[31m<|im_end|>" in plain
    assert f"...|n|t|Ċ{show.BORDER}o|k|<|im_end|>" in plain
    assert "scored  all of 3; end token: the last, 2" in plain
    coloured = show.as_text(found, colour=True)
    assert "\x1b[7m<|im_end|>\x1b[0m" in coloured and coloured.count("\x1b") % 2 == 0


def test_dropped(letters):
    dropped = Dropped("a.jsonl", 3, "empty prompt")
    for row in (
        {"prompt": "", "chosen": "\x1b[2J"},
        ["x"],
        None,
        {"a": b"x"},
        {"prompt": "x" * 9000},
    ):
        found = show.dropped_record(dropped, row, ("chosen", "rejected"))
        assert found["prompt_ids"] is None and found["dropped"] == "empty prompt"
        text = show.as_text(json.loads(json.dumps(found)))
        assert text.startswith("a.jsonl row 3  dropped: empty prompt") and "\x1b" not in text
        assert len(text) < 3000


def test_markdown(letters, data):
    """For TensorBoard: every line is code, so no text of the data is taken for Markdown."""
    text = show.as_markdown(letters, data, 2, rows=5)
    blocks = text.split("\n\n---\n\n")
    assert len(blocks) == 2
    assert all(line.startswith("    ") for block in blocks for line in block.splitlines())


def test_markdown_folds_long_lines(letters, tmp_path):
    """What is shown below each other is the line; ids and tokens stay in their column."""
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "chosen": "ab" * 150, "rejected": "c d " * 60}))
    data = collect([str(path)], letters, max_length=900)
    whole = show.as_text(show.record(letters, data, 0, 2))
    text = show.as_markdown(letters, data, 2)
    lines = [line[4:] for line in text.splitlines()]
    assert max(map(len, lines)) <= show.FOLDED < max(map(len, whole.splitlines()))
    assert "".join(text.split()) == "".join(whole.split())
    after_ids = lines[[line.startswith("    ids ") for line in lines].index(True, 3) + 1]
    assert after_ids.startswith(" " * 12) and after_ids[12:13].isdigit()


def test_markdown_of_the_built_in_rows_names_no_place_on_this_machine(letters):
    data = collect([f"{ROOT}/train/data/builtin/train.jsonl"], letters, max_length=900)
    assert show.as_markdown(letters, data, 2).startswith("    train/data/builtin/train.jsonl row 0")


def test_labelled(letters, tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "completion": "ok", "label": False}))
    data = collect([str(path)], letters, max_length=200, kind="labelled")
    found = show.record(letters, data, 0, 2)
    assert found["label"] is False and found["completion_ids"] == [81, 77, 2]
    assert "label False" in show.as_text(found)


def test_plain_text(letters, tmp_path):
    """Nothing predicts the first token of a text without bos: it is shown as not scored."""
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"text": "ok"}))
    data = collect([str(path)], letters, max_length=200, kind="text")
    found = show.record(letters, data, 0, 2)
    assert found["scored"] == {"completion": [False, True]} and "(o)|k" in show.as_text(found)
