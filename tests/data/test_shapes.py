"""Rows as people have them: what is read, into which pair, and what is refused with which advice."""

import gzip
import json
import re

import datasets
import pandas
import pyarrow
import pytest

from train.data.rows import (
    PAIR_COLUMNS,
    PROMPT_COLUMNS,
    DataError,
    RowError,
    check_labelled,
    check_margin,
    check_pair,
    check_prompt,
    check_scored,
)
from train.data.shapes import parse_columns, rename
from train.data.sources import read_rows
from train.data.tokens import check_rows, collect, kind_of, kind_of_scores, prepare


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def share(who, text):
    return {"from": who, "value": text}


SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = ([user("Where?")], "Here.", "Nowhere at all.")
PAIR = {"chosen": GOOD[1], "rejected": GOOD[2]}
EARLIER = [user("Hi"), assistant("Hello."), *GOOD[0]]
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Where?\n\nAssistant:"


def texts(item):
    return item.messages, *(answer["content"] for answer in item.answers)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"question": "Where?", **PAIR}, GOOD[0]),
        ({"query": "Where?", "prompt": None, **PAIR}, GOOD[0]),
        ({"instruction": "Where?", "input": " ", **PAIR}, GOOD[0]),
        ({"instruction": "Where", "input": "is it?", **PAIR}, [user("Where\n\nis it?")]),
        ({"system": "Be brief.", "question": "Where?", **PAIR}, [SYSTEM, *GOOD[0]]),
        ({"system": "Be brief.", "prompt": EARLIER, **PAIR}, [SYSTEM, *EARLIER]),
        ({"system_prompt": "Be brief.", "prompt": [SYSTEM, *EARLIER], **PAIR}, [SYSTEM, *EARLIER]),
        ({"messages": EARLIER, **PAIR}, EARLIER),
        ({"messages": [*EARLIER, assistant("Here.")], **PAIR}, EARLIER),
        (
            {"messages": [*EARLIER, assistant("Here.")], "rejected_response": "Nowhere at all."},
            EARLIER,
        ),
        (
            {
                "conversations": [share("system", "Be brief."), share("human", "Where?")],
                "chosen": share("gpt", "Here."),
                "rejected": share("gpt", "Nowhere at all."),
            },
            [SYSTEM, *GOOD[0]],
        ),
        (
            {
                "chosen": [share("human", "Where?"), share("gpt", "Here.")],
                "rejected": [share("human", "Where?"), share("gpt", "Nowhere at all.")],
            },
            GOOD[0],
        ),
        ({"chosen": f"{HH} Here.", "rejected": f"{HH} Nowhere at all."}, EARLIER),
        ({"prompt": HH, "chosen": " Here.", "rejected": " Nowhere at all.\n"}, EARLIER),
        (
            {"prompt": HH, "chosen": f"{HH} Here.", "rejected": f"{HH} Nowhere at all."},
            EARLIER,
        ),
        (
            {
                "prompt": "Where?",
                "responses": ["x", "Here.", "Nowhere at all."],
                "scores": [3, 9, 1],
            },
            GOOD[0],
        ),
        (
            {
                "instruction": "Where?",
                "completions": [
                    {"response": "Nowhere at all.", "overall_score": "2.5"},
                    {"response": "Here.", "overall_score": 8},
                ],
            },
            GOOD[0],
        ),
        (
            {
                "prompt": "Where?",
                "answers": [
                    {"answer": "Here.", "rank": 1},
                    {"answer": "x", "rank": 2},
                    {"answer": "Nowhere at all.", "rank": 7},
                ],
            },
            GOOD[0],
        ),
        (
            # UltraFeedback, binarised: messages are the chosen conversation again.
            {
                "prompt": "Where?",
                "messages": [*GOOD[0], assistant("Here.")],
                "chosen": [*GOOD[0], assistant("Here.")],
                "rejected": [*GOOD[0], assistant("Nowhere at all.")],
                "score_chosen": 8.0,
                "score_rejected": 3,
            },
            GOOD[0],
        ),
        (
            {
                "prompt": [
                    {"role": "user", "content": [{"type": "text", "text": "Whe"}, {"text": "re?"}]}
                ],
                **PAIR,
            },
            GOOD[0],
        ),
    ],
)
def test_read(row, messages):
    assert texts(check_pair(row)) == (messages, *GOOD[1:])


@pytest.mark.parametrize(
    ("row", "remark"),
    [
        ({"instruction": "Where", "input": "is it?", **PAIR}, "are joined by an empty line"),
        ({"chosen": f"{HH} a", "rejected": f"{HH} b"}, "are read as messages"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}, "best and the worst scored"),
        ({"prompt": "q", "images": ["x.png"], **PAIR}, "the column 'images' is not read"),
        ({"prompt": "q", "input": "p", **PAIR}, "the column 'input' is not read"),
        ({"prompt": "q", "history": [["a", "b"]], **PAIR}, "the column 'history' is not read"),
    ],
)
def test_said(row, remark):
    [said] = check_pair(row).remarks
    assert remark in said


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a", "query": "b", **PAIR}, "no column 'prompt'"),  # which of the two?
        (
            {"messages": [*EARLIER, assistant("Other.")], **PAIR},
            "turn of assistant that is not the answer",
        ),
        ({"prompt": "q", "responses": ["a", "b"]}, "no column 'chosen'"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [2, 2]}, "have the same score"),
        (
            {"prompt": "q", "responses": ["a", "b"], "scores": [2, None]},
            "has no number for its scores",
        ),
        (
            {"prompt": "q", "responses": ["a", "b"], "scores": [2]},
            "2 answers in 'responses', 1 values",
        ),
        ({"prompt": "q", "system": ["x"], **PAIR}, "system is a list, not a string"),
        (
            {"prompt": [SYSTEM, user("q")], "system": "Be long.", **PAIR},
            "the column 'system' differs from the system turn",
        ),
        ({"prompt": "q", "tools": "no", **PAIR}, "tools is a string that is not JSON"),
        ({"prompt": "q", "tools": {"a": 1}, **PAIR}, "tools is not a list"),
        (
            {"chosen": [share("human", "q"), share("robot", "a")], "rejected": "b"},
            "unknown role 'robot'",
        ),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
                **PAIR,
            },
            "content has a part of type 'image_url'; only text is trained on",
        ),
        (
            {"chosen": f"{HH} Here.", "rejected": "\n\nHuman: Other\n\nAssistant: No."},
            "prompts of chosen and rejected differ",
        ),
        ({"chosen": [user("a"), assistant(" ")], "rejected": "b"}, "empty response: chosen"),
    ],
)
def test_refused(row, reason):
    with pytest.raises(RowError, match=reason):
        check_pair(row)


def test_labelled_rows_have_the_same_shapes():
    for row in (
        {"question": "Where?", "completion": "Here.", "label": "true"},
        {"prompt": "\n\nHuman: Where?\n\nAssistant:", "completion": " Here.", "label": 1},
        {"completion": [share("human", "Where?"), share("gpt", "Here.")], "label": True},
    ):
        item = check_labelled(row)
        assert texts(item) == GOOD[:2] and item.label is True


def test_tool_turns_and_keys_stay():
    call = {"function": {"name": "tide", "arguments": {"port": "P0"}}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    told = {"role": "tool", "content": "noon", "name": "tide"}
    tools = [{"type": "function", "function": {"name": "tide"}}]
    row = {"prompt": [user("When?"), asked, told], "tools": json.dumps(tools), **PAIR}
    item = check_pair(row)
    assert item.messages == [user("When?"), {**asked, "content": ""}, told]
    assert item.template_args == {"tools": tools}
    only = check_pair({"prompt": "When?", "chosen": [asked], "rejected": "b"})
    assert only.chosen == {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(RowError, match="roles out of order: user, tool; "):
        check_pair({"prompt": [user("When?"), told], **PAIR})


# ------------------------------------------------------------ other names of columns


def test_columns_are_renamed():
    renamed = parse_columns(["prompt=q", "chosen=better", "rejected=worse"])
    row = {"q": "Where?", "better": "Here.", "worse": "Nowhere at all.", "prompt": "another"}
    assert texts(check_pair(rename(row, renamed))) == GOOD
    assert rename([1], renamed) == [1]
    for wrong in (
        ["prompt"],
        ["prompt="],
        ["promt=q"],
        ["prompt=a", "prompt=b"],
        ["prompt=a", "chosen=a"],
    ):
        with pytest.raises(ValueError, match=f"--columns {wrong[-1]}: "):
            parse_columns(wrong)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_columns_in_a_data_set(letters, tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": "Hi", "better": "ok", "worse": "no"})
    columns = ["prompt=q", "chosen=better", "rejected=worse"]
    data = collect([path], letters, max_length=200, columns=columns)
    assert data.group(0).responses == ((81, 77, 2), (80, 81, 2))
    with pytest.raises(DataError, match="no column 'gone'; found 'q', 'better', 'worse'"):
        collect([path], letters, max_length=200, columns=["prompt=gone"])
    judged = write(tmp_path / "b.jsonl", {"prompt": "Hi", "answer": "ok", "good": True})
    assert kind_of([judged]) == "pair"
    assert kind_of([judged], columns=["completion=answer", "label=good"]) == "labelled"


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        (
            {"Question": "a", "better": "b", "worse": "c"},
            "pass --columns prompt=Question chosen=better rejected=worse",
        ),
        ({"prompt": "a", "win": "b", "lose": "c"}, "pass --columns chosen=win rejected=lose"),
        (
            {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 0},
            'rows.map(lambda row: {"chosen": row[f"response_{row',
        ),
    ],
)
def test_columns_that_are_not_there(letters, tmp_path, row, advice):
    path = write(tmp_path / "a.jsonl", row)
    with pytest.raises(DataError) as error:
        collect([path], letters, max_length=200)
    assert advice in str(error.value)
    if "--columns" in advice:
        flags = advice.split("--columns ")[1].split()
        assert len(collect([path], letters, max_length=200, columns=flags)) == 1


def saved_as(kind, folder, rows):
    """The rows as a source of a kind."""
    data = datasets.Dataset.from_list(rows)
    if kind in ("json", "csv", "parquet"):
        getattr(data, f"to_{kind}")(folder / f"rows.{kind}")
        return str(folder / f"rows.{kind}")
    if kind == "folder":
        data.save_to_disk(folder / "rows")
        return str(folder / "rows")
    datasets.DatasetDict({"test": data}).save_to_disk(folder / "rows")
    return f"{folder / 'rows'}@test"


def run_advice(said, start, tmp_path, monkeypatch):
    """Run the Python in a refusal, which begins with `start`; the file that it writes."""
    monkeypatch.chdir(tmp_path)
    line = said.partition(start)[2].partition(", or ast.literal_eval")[0]
    exec(line.replace("...", "'?'"), {"datasets": datasets, "json": json, "re": re})  # noqa: S102
    return str(tmp_path / "pairs.jsonl")


KINDS = ["json", "csv", "parquet", "folder", "dict"]


@pytest.mark.parametrize("kind", KINDS)
def test_advice_can_be_run(kind, letters, tmp_path, monkeypatch):
    """Whatever the source is, the lines read it."""
    source = saved_as(kind, tmp_path, [{"a": "x", "b": "y", "question": "q"}])
    with pytest.raises(DataError) as error:
        collect([source], letters, max_length=200)
    written = run_advice(str(error.value), "or convert: ", tmp_path, monkeypatch)
    [row] = read(written)
    assert row | {"chosen": "?", "rejected": "?", "prompt": "q"} == row


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_as_text_are_converted_by_the_advice(kind, letters, tmp_path, monkeypatch):
    """In whichever columns they stand, as a table that knows text alone has them."""
    prompt = [{"role": "user", "content": "Hi"}]
    answer = [{"role": "assistant", "content": "ok"}]
    row = {"prompt": json.dumps(prompt), "chosen": json.dumps(answer), "rejected": "no"}
    source = saved_as(kind, tmp_path, [row])
    with pytest.raises(DataError) as error:
        prepare([source], letters, max_length=200)
    written = run_advice(str(error.value), "else convert it: ", tmp_path, monkeypatch)
    data = prepare([written], letters, max_length=200)
    assert len(data) == 1
    assert letters.decode(data.group(0).responses[0]) == "ok<|im_end|>"


def test_a_judged_answer_is_one_flag_away(tmp_path, letters):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ok"}]
    for row, flags in (
        ({"messages": turns, "label": True}, ["completion=messages"]),
        ({"messages": turns, "kto_tag": True}, ["completion=messages", "label=kto_tag"]),
        ({"prompt": "Hi", "response": "ok", "label": True}, ["completion=response"]),
        ({"prompt": "Hi", "output": "ok", "score": 1}, ["completion=output"]),
    ):
        path = write(tmp_path / "a.jsonl", row)
        with pytest.raises(DataError) as error:
            collect([path], letters, max_length=200)
        assert str(error.value).endswith(f"pass --columns {' '.join(flags)}")
        kind = kind_of_scores([path], columns=flags)
        data = collect([path], letters, max_length=200, columns=flags, kind=kind)
        assert kind == "scored" and data.targets.tolist() == [1]


@pytest.mark.parametrize(
    ("check", "row", "columns", "target"),
    [
        (check_margin, {"chosen": "b", "rejected": "c", "gap": "1.5"}, ["margin=gap"], 1.5),
        (check_scored, {"completion": "b", "stars": 4}, ["score=stars"], 4.0),
    ],
)
def test_numbers_under_other_names(tmp_path, check, row, columns, target):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", **row})
    [[found], dropped] = check_rows([path], check, PAIR_COLUMNS, columns=columns)
    assert found.item.target == target and not dropped


def test_null_columns_are_not_there(tmp_path, letters):
    """A table of rows of several shapes has all columns in each of them."""
    none = dict.fromkeys(("chosen", "rejected", "responses", "scores", "completion", "label"))
    pair = {**none, "prompt": "a", "chosen": "b", "rejected": "c"}
    ranked = {**none, "prompt": "a", "responses": ["c", "b"], "scores": [1, 2]}
    judged = {**none, "prompt": "a", "completion": "b", "label": False}
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([pair, ranked]).to_parquet(path)
    one, other = (texts(row.item) for row in check_rows([str(path)], check_pair, PAIR_COLUMNS)[0])
    assert one == other == ([user("a")], "b", "c")
    datasets.Dataset.from_list([judged, pair]).select([0]).to_parquet(path)
    assert kind_of([str(path)]) == "labelled" and kind_of_scores([str(path)]) == "scored"
    [[found], dropped] = check_rows([str(path)], check_labelled, ())
    assert found.item.label is False and not dropped


def test_a_text_may_be_a_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(DataError, match="pass --columns prompt=text$"):
        check_rows([path], check_prompt, PROMPT_COLUMNS)


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_csv_of_another_separator_names_it(tmp_path, monkeypatch, separator):
    path = tmp_path / "a.csv"
    path.write_text(separator.join(("prompt", "chosen", "rejected")) + "\n" + separator.join("abc"))
    with pytest.raises(DataError, match="fields are separated by commas") as error:
        read(path)
    monkeypatch.chdir(tmp_path)
    exec(str(error.value).partition("commas: ")[2], {"pandas": pandas})  # noqa: S102
    assert read(tmp_path / "pairs.csv") == [{"prompt": "a", "chosen": "b", "rejected": "c"}]


def test_patterns_are_the_shell_s(tmp_path):
    with pytest.raises(DataError, match="patterns are expanded by the shell"):
        read(tmp_path / "*.parquet")


# ------------------------------------------------------------ files

ROWS = [{"prompt": "Hi", "chosen": "ok", "rejected": "no"}, {"prompt": "Bye", "chosen": "a\nb"}]

TABLE = pandas.DataFrame(ROWS)[["prompt", "chosen"]]


def read(path):
    return [row for _, _, row in read_rows([str(path)])]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_compressed_files(tmp_path, kind, suffix):
    text = "prompt,chosen\nHi,ok\n" if kind == ".csv" else "\n".join(map(json.dumps, ROWS))
    path = tmp_path / f"pairs{kind.upper()}{suffix}"
    if suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(text.encode())
    assert read(path) == ([{"prompt": "Hi", "chosen": "ok"}] if kind == ".csv" else ROWS)
    for damaged in (path.read_bytes()[:-5], b"plain text"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read: "):
            read(path)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (json.dumps(ROWS[0], indent=1), ROWS[:1]),
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), ROWS),
        (json.dumps({"data": ROWS}, indent=2), ROWS),
        (json.dumps({"version": 1, "train": ROWS}, indent=2), ROWS),
        (
            json.dumps(
                {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}, indent=1
            ),
            [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in ("ace", "bdf")],
        ),
        (
            json.dumps({"chosen": EARLIER[:2], "rejected": EARLIER[:2]}, indent=1),
            [{"chosen": EARLIER[:2], "rejected": EARLIER[:2]}],
        ),
        (TABLE.iloc[[1, 0]].to_json(), TABLE.to_dict("records")[::-1]),
        (TABLE.to_json(indent=1), TABLE.to_dict("records")),
        ("\n".join(map(json.dumps, ROWS)), ROWS),
        (json.dumps(ROWS, indent=1), ROWS),
    ],
)
def test_documents_over_several_lines(tmp_path, text, rows):
    (tmp_path / "a.json").write_text(f"\ufeff{text}\n")
    assert read(tmp_path / "a.json") == rows


def test_documents_that_are_broken(tmp_path):
    whole = json.dumps(ROWS[0], indent=1)
    (tmp_path / "a.json").write_text(whole + "\n" + whole[:-3])
    with pytest.raises(DataError, match="a.json, line 9, column .*: not JSON"):
        read(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text(whole)
    with pytest.raises(DataError, match="a.jsonl, line 1.*several lines is read from a .json file"):
        read(tmp_path / "a.jsonl")
