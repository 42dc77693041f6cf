"""Which rows are evaluated on where --data names none: those of the model's own run, found again."""

import json
from types import SimpleNamespace

import pytest
import transformers

from eval import held_out, inputs
from train.data import prompts, tokens
from train.data.dataset import split_by_prompt
from train.data.rows import check_candidates, check_pair
from train.run.folder import rows_fingerprint

ROWS = [
    {"prompt": f"Question {i}?", "chosen": f"Yes {i}.", "rejected": f"No {i}."} for i in range(30)
]
LENGTHS = {"max_length": 128, "max_prompt_length": 64}
RECIPE = LENGTHS | {
    "truncate_prompt": "keep_end",
    "allow_control_tokens": False,
    "allow_template_changes": False,
    "max_implausible": 0.5,
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(**given):
    return SimpleNamespace(**{"data": None, "columns": None, "max_dropped": 0.05} | given)


def record(data=None, eval_data=None, eval_split=0.0, fingerprint=None, **more):
    flags = {"data": data, "eval_data": eval_data, "eval_split": eval_split, "data_split_seed": 3}
    return {"flags": flags | more, "eval_data": {"rows_fingerprint": fingerprint}}


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return transformers.AutoTokenizer.from_pretrained(model_dir)


def test_the_same_split_gives_the_same_rows(tmp_path, tokenizer):
    path = write(tmp_path / "mine.jsonl", ROWS)
    # what training does
    data = tokens.prepare([path], tokenizer, **LENGTHS)
    _, of_training = split_by_prompt(data, 0.3, 3)
    fingerprint = rows_fingerprint(of_training)
    run = record([path], eval_split=0.3, fingerprint=fingerprint)
    rows = held_out.choose(settings(), run, check_pair)
    found = inputs.read_pairs(rows, tokenizer, RECIPE)
    assert 0 < len(found) < 30 and found.rows.tolist() == of_training.rows.tolist()
    said = rows.said(found)
    assert said == "the rows that training held out, the same split: 0.3 of the prompts by seed 3"
    # the rows of a reward model are read as another kind of data, and are the same ones
    candidates = inputs.read_pairs(rows, tokenizer, RECIPE, kind="candidates", keep_tail=True)
    assert rows.said(candidates) == said
    # an answer that has changed since is noticed
    place = int(found.rows[0])
    write(tmp_path / "mine.jsonl", [row | {"chosen": "Maybe."} if i == place else row
                                    for i, row in enumerate(ROWS)])  # fmt: skip
    changed = inputs.read_pairs(rows, tokenizer, RECIPE)
    assert changed.rows.tolist() == found.rows.tolist() and "not the same rows" in rows.said(
        changed
    )


def test_what_a_run_was_evaluated_on(tmp_path):
    mine = write(tmp_path / "mine.jsonl", ROWS)
    own = write(tmp_path / "own.jsonl", [{"q": r["prompt"], **r} for r in ROWS])
    rows = held_out.choose(settings(), record([mine], [own], 0.3, columns=["prompt=q"]), check_pair)
    assert (rows.sources, rows.columns, rows.split) == ([own], ["prompt=q"], None)
    assert rows.which == "the rows that training held out"
    rows = held_out.choose(settings(), record(max_dropped=0.4), check_pair)  # built-in data
    assert rows.sources == [held_out.BUILT_IN] and rows.is_own and rows.max_dropped == 0.4
    rows = held_out.choose(settings(), record(eval_split=0.1), check_pair)
    assert rows.sources[0].endswith("builtin/train.jsonl") and rows.split == (0.1, 3)
    rows = held_out.choose(settings(data=[mine]), record([mine], [own]), check_pair)
    assert (rows.sources, rows.which, rows.is_own) == ([mine], "--data", False)
    policy = record() | {"task": "policy"}
    assert held_out.of_run(settings(), policy)[0].sources[0].endswith("held_out_prompts.jsonl")


@pytest.mark.parametrize(
    "run, words",
    [
        (("mine.jsonl",), "training held nothing out"),
        (("mine.jsonl", "gone.jsonl"), "gone.jsonl, of which training held rows out, cannot be found"),
        (("mine.jsonl", "judged.jsonl"), "what training held out are no pairs of answers"),
        (("mine.jsonl", "empty.jsonl"), "cannot be read"),
        (None, None),
    ],
)  # fmt: skip
def test_the_built_in_pairs_take_their_place_and_it_is_said(tmp_path, run, words):
    write(tmp_path / "mine.jsonl", ROWS)
    write(tmp_path / "judged.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    write(tmp_path / "empty.jsonl", [])
    made = record(*([str(tmp_path / name)] for name in run)) if run else {}
    for check in (check_pair, check_candidates):
        rows = held_out.choose(settings(), made, check)
        assert rows.sources == [held_out.BUILT_IN] and not rows.is_own and rows.split is None
        assert rows.which.startswith("the built-in held-out pairs")
        assert words is None or words in rows.which
        assert str(tmp_path) not in rows.which  # a report is for others


def test_what_a_run_on_shares_held_out_is_of_all_rows(tmp_path, tokenizer):
    path = write(tmp_path / "mine.jsonl", ROWS)
    every = split_by_prompt(tokens.prepare([path], tokenizer, **LENGTHS), 0.3, 3)[1]
    fingerprint = rows_fingerprint(every)
    run = record([f"{path}:0.25"], eval_split=0.3, fingerprint=fingerprint)
    rows = held_out.choose(settings(), run, check_pair)
    found = inputs.read_pairs(rows, tokenizer, RECIPE)
    assert rows.sources == [path] and rows.is_own and "but" not in rows.said(found)
    assert found.rows.tolist() == every.rows.tolist()


def test_a_policy_answers_the_prompts_that_its_training_held_out(tmp_path, tokenizer):
    path = write(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    _, of_training = prompts.prepare([path], tokenizer, **LENGTHS).split(0.3, 3)
    fingerprint = rows_fingerprint(of_training.data)
    run = record([path], eval_split=0.3, fingerprint=fingerprint) | {"task": "policy"}
    rows = held_out.choose(settings(), run, check_pair)
    assert rows.sources == [held_out.BUILT_IN] and "no pairs of answers" in rows.which
    found, described = inputs.prompts_to_answer(
        settings(prompts=4), run, tokenizer, RECIPE, None, rows
    )
    assert [prompt.row for prompt in found] == of_training.data.rows.tolist()[:4]
    assert found[0].ids == of_training.ids(0) and described["groups"] == 4
    assert described["which"].endswith("the same split: 0.3 of the prompts by seed 3")
