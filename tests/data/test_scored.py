"""Data for models that give scores: texts as everybody renders them, margins, single answers.

The oracle is transformers alone: apply_chat_template of the finished conversation, tokenised.
"""

import json
import math

import pytest
import tiny

from tests.data import families
from tests.data.test_truth import CHOSEN, MAX_LENGTH, SHAPES
from train.data import tokens
from train.data.chat import Chat, Request
from train.data.errors import DataError, RowError
from train.data.packing import pack
from train.data.rows import check_margin, check_score_margin, check_scored
from train.data.show import record
from train.data.tokens import collect, kind_of_scores

PAIR = {"prompt": "Name a cat.", "chosen": "Pebble.", "rejected": "No."}


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    """The tests' byte-level tokenizer with its ChatML template."""
    return tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("template", families.TEMPLATES)
@pytest.mark.parametrize("kind", families.TOKENIZERS)
def test_prompt_and_answer_are_the_conversation_s_ids(kind, template, tmp_path):
    """For every kind of tokenizer and template, those included whose template renders a prompt
    otherwise once it is answered, or whose tokens run across the border.
    """
    tokenizer = families.tokenizer(kind, template)
    shapes = list(SHAPES.values())
    path = write(tmp_path / "rows.jsonl", *(row for row, _ in shapes))
    data = collect([path], tokenizer, max_length=MAX_LENGTH, cache_dir=tmp_path, keep_tail=True)
    assert len(data) + len(data.dropped) == len(shapes) and len(data)
    for i in range(len(data)):
        group = data.group(i)
        _, (messages, *answers) = shapes[group.row]
        for ids, answer in zip(group.responses, answers, strict=True):
            turn = {"role": "assistant", "content": answer}
            text = tokenizer.apply_chat_template([*messages, turn], tokenize=False)
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert [*group.prompt, *ids] == expected


def test_the_tail_stands_behind_the_end_token(chatml):
    """A ChatML answer ends with <|im_end|> and a newline, where answers that a model writes end with
    <|im_end|>; the two are cached apart.
    """
    tokenizer = chatml
    plain, whole = Chat(tokenizer), Chat(tokenizer, keep_tail=True)
    question = [{"role": "user", "content": "Name a cat."}]
    short, long = plain.response_ids(question, CHOSEN), whole.response_ids(question, CHOSEN)
    assert long[: len(short)] == short and short[-1] == plain.end_id
    assert tokenizer.decode(long[len(short) :]) == "\n"
    [rendered] = whole.render([Request(question, ({"role": "assistant", "content": "x"},), {})])
    assert rendered.texts[0].endswith("x<|im_end|>\n")


def test_cut_answers_have_no_tail(chatml, tmp_path):
    row = {**PAIR, "chosen": "Pebble is good and so is Ash " * 5}
    path = write(tmp_path / "rows.jsonl", row)
    tokenizer = chatml
    whole = collect([path], tokenizer, max_length=200, cache_dir=tmp_path, keep_tail=True)
    length = int(whole.lengths[0, 0]) + 8
    data = collect([path], tokenizer, max_length=length, cache_dir=tmp_path, keep_tail=True)
    assert data.group(0).responses[0] == whole.group(0).responses[0][:8]
    assert data.truncated[0].tolist() == [False, True, False]
    end_id = tokenizer.eos_token_id
    shown = record(tokenizer, whole, 0, end_id)
    assert shown["end"]["chosen"] == len(shown["chosen_ids"]) - 2  # the newline follows it
    assert record(tokenizer, data, 0, end_id)["end"]["chosen"] is None
    plain = collect([path], tokenizer, max_length=200, cache_dir=tmp_path)
    assert plain.fingerprint != whole.fingerprint
    assert plain.group(0).responses[0] == whole.group(0).responses[0][:-1]


def test_margins():
    assert check_margin(PAIR).target == 0.0
    assert check_margin({**PAIR, "margin": None}).target == 0.0
    assert check_margin({**PAIR, "margin": 1.5}).target == 1.5
    assert check_margin({**PAIR, "margin": "2"}).target == 2.0  # of a CSV
    scores = {**PAIR, "score_chosen": 8.5, "score_rejected": 6}
    assert check_score_margin(scores).target == 2.5
    assert check_margin(scores).target == 0.0
    for margin in (math.nan, math.inf, "much", True, [1]):
        with pytest.raises(RowError, match=r"margin is .*, not a finite number"):
            check_margin({**PAIR, "margin": margin})
    with pytest.raises(RowError, match="score_chosen"):
        check_score_margin(PAIR)
    far = {**PAIR, "score_chosen": 1e308, "score_rejected": -1e308}
    with pytest.raises(RowError, match="score_chosen - score_rejected is inf, not a finite number"):
        check_score_margin(far)
    assert check_margin({**PAIR, "margin": 1e39}).target == 1e39  # past fp32


@pytest.mark.parametrize(
    "judgement, target",
    [
        ({"label": True}, 1.0),
        ({"label": 0}, 0.0),
        ({"label": "false"}, 0.0),
        ({"label": 0.25}, 0.25),
        ({"score": 3}, 3.0),
        ({"score": "-1.5"}, -1.5),
        ({"score": 4.0, "label": True}, 4.0),
    ],
)
def test_single_answers(judgement, target):
    item = check_scored({"prompt": "Name a cat.", "completion": "Pebble.", **judgement})
    assert item.target == target
    assert item.completion["content"] == "Pebble."


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "a", "completion": "b"}, "label"),
        ({"prompt": "a", "label": 1}, "completion"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "label is 'good', not a finite"),
        ({"prompt": "a", "completion": "b", "score": math.nan}, "score is nan, not a finite"),
        ({"completion": "b", "score": 1}, "prompt"),
    ],
)
def test_single_answers_that_cannot_be_used(row, words):
    with pytest.raises(RowError, match=words):
        check_scored(row)


def test_targets_reach_the_batch(chatml, tmp_path):
    tenth = write(tmp_path / "tenth.jsonl", {**PAIR, "margin": 0.1})
    data = collect([tenth], chatml, max_length=100, kind="margin", cache_dir=tmp_path)
    assert pack([data.group(0)]).targets.item() == 0.1  # in fp64
    rows = [{**PAIR, "prompt": f"Name cat {i}.", "margin": i / 2} for i in range(4)]
    path = write(tmp_path / "rows.jsonl", *rows)
    data = collect([path], chatml, max_length=100, kind="margin", cache_dir=tmp_path)
    assert data.targets.tolist() == [0.0, 0.5, 1.0, 1.5]
    chosen = data.select([3, 1])
    batch = pack([chosen.group(i) for i in range(2)])
    assert batch.targets.tolist() == [1.5, 0.5] and batch.labels is None
    assert batch.to("cpu").targets.tolist() == [1.5, 0.5]
    assert pack([]).targets is None
    again = [{**row, "margin": 0} for row in rows]  # the same texts
    path = write(tmp_path / "again.jsonl", *again)
    other = collect([path], chatml, max_length=100, kind="margin", cache_dir=tmp_path)
    assert other.targets.tolist() == [0.0] * 4 and other.fingerprint != data.fingerprint


def test_a_row_with_a_bad_margin_is_dropped_by_name(chatml, tmp_path):
    path = write(tmp_path / "rows.jsonl", PAIR, {**PAIR, "margin": "much"})
    data = collect([path], chatml, max_length=100, kind="margin", cache_dir=tmp_path)
    [dropped] = data.dropped
    assert (dropped.row, dropped.reason) == (1, "margin is 'much', not a finite number")
    with pytest.raises(DataError, match="margin is 'much'"):
        tokens.refuse_too_many(data, max_dropped=0.05)


def test_kind_of_scores(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", PAIR)
    single = write(tmp_path / "single.jsonl", {"prompt": "a", "completion": "b", "score": 1})
    assert kind_of_scores([single]) == "scored"
    found = [kind_of_scores([pairs], margin=margin) for margin in ("column", "scores", "none")]
    assert found == ["margin", "score_margin", "pair"]
