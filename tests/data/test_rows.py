"""Reading and checking rows: what DESIGN section 10 says of data, and whatever else may stand in a
row.
"""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import arrow
from train.data.rows import DataError, MissingColumn, RowError, check_pair, check_text
from train.data.sources import read_rows

ROW = {"prompt": "Hi", "chosen": "Hey there!", "rejected": "Greetings."}
HI = [{"role": "user", "content": "Hi"}]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


GOOD = (HI, assistant("Hey there!"), assistant("Greetings."), {}, [])


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# ------------------------------------------------------------ shapes of a pair


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {**ROW, "prompt": HI},
        {**ROW, "chosen": assistant("Hey there!"), "rejected": [assistant("Greetings.")]},
        {"chosen": HI + [assistant("Hey there!")], "rejected": HI + [assistant("Greetings.")]},
        {
            "prompt": "Hi",
            "chosen": HI + [assistant("Hey there!")],
            "rejected": HI + [assistant("Greetings.")],
        },
        {"prompt": HI, "chosen": HI + [assistant("Hey there!")], "rejected": "Greetings."},
        {"prompt": " Hi\n", "chosen": HI + [assistant("Hey there!")], "rejected": "Greetings."},
        {
            "prompt": None,
            "chosen": HI + [assistant("Hey there!")],
            "rejected": HI + [assistant("Greetings.")],
        },
        {**ROW, "votes": 3, "nested": [[{}]], "chosen_score": None},
        {**ROW, "prompt": [{"role": "user", "content": "Hi", "name": None}]},
        {**ROW, "system": " "},
        {**ROW, "tools": [], "documents": None},
    ],
)
def test_every_shape_gives_the_same_pair(row):
    assert check_pair(row) == GOOD


def test_multi_turn_with_system():
    turns = [system(""), user("Hi"), assistant("Hey"), user("Bye")]
    row = {
        "prompt": "Hi",
        "chosen": turns + [assistant("See you")],
        "rejected": turns + [assistant("Farewell")],
    }
    assert check_pair(row) == (turns, assistant("See you"), assistant("Farewell"), {}, [])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**ROW, "prompt": " \n"}, "empty prompt"),
        ({**ROW, "prompt": []}, "empty prompt"),
        (
            {**ROW, "prompt": [user("Hi"), assistant(" "), user("so?")]},
            "empty prompt: a turn of assistant has no text",
        ),
        ({**ROW, "chosen": "\t"}, "empty response: chosen"),
        ({**ROW, "rejected": []}, "empty response: rejected"),
        ({**ROW, "rejected": ROW["chosen"]}, "chosen equals rejected"),
        ({**ROW, "prompt": 5}, "prompt is a number, not a string or messages"),
        (
            {**ROW, "prompt": {"role": "robot", "content": "Hi"}},
            "unknown role 'robot' in prompt; known: system, developer, user, assistant, tool",
        ),
        ({**ROW, "prompt": None}, "prompt is null"),
        ({**ROW, "chosen": None}, "chosen is null, not a string or messages"),
        (
            {**ROW, "chosen": ["Hey"]},
            "chosen message 0 is a string, not an object with role and content",
        ),
        (
            {**ROW, "chosen": {"role": "assistant", "content": ["x"]}},
            "chosen message 0: content is a list, not a string",
        ),
        ({**ROW, "chosen": {"content": "x"}}, "chosen message 0: role is null, not a string"),
        (
            {**ROW, "chosen": user("Hey")},
            "roles out of order: chosen ends with user, not with assistant",
        ),
        (
            {**ROW, "prompt": [{"role": "human", "content": "Hi"}]},
            "unknown role 'human' in prompt; known: system, developer, user, assistant, tool",
        ),
        (
            {**ROW, "prompt": [user("Hi"), system("Be kind")]},
            "roles out of order: user, system; expected user and assistant in turn, the prompt ending with user",
        ),
        (
            {**ROW, "prompt": [system("Be kind")]},
            "roles out of order: system; expected user and assistant in turn, the prompt ending with user",
        ),
        (
            {**ROW, "prompt": [user("Hi"), assistant("Hey")]},
            "roles out of order: user, assistant; expected user and assistant in turn, the prompt ending with user",
        ),
        (
            {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Ho"), assistant("b")]},
            "prompts of chosen and rejected differ",
        ),
        (
            {"prompt": "Ho", "chosen": HI + [assistant("a")], "rejected": HI + [assistant("b")]},
            "prompt differs from the conversation in chosen and rejected",
        ),
        (
            {
                "prompt": [user("Ho")],
                "chosen": HI + [assistant("a")],
                "rejected": HI + [assistant("b")],
            },
            "prompt differs from the conversation in chosen and rejected",
        ),
        ({**ROW, "chosen": "a\ud800b"}, "chosen is not valid Unicode: '\\ud800' at character 1"),
        (
            {**ROW, "prompt": [user("\udfff")]},
            "prompt message 0: content is not valid Unicode: '\\udfff' at character 0",
        ),
        (["Hi"], "the row is a list, not an object (a file that is one array is a .json)"),
        (None, "the row is null, not an object"),
        ({"prompt": "Hi", "chosen": "a"}, "no column 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "no column 'prompt'"),
        (
            {"chosen": str(HI + [assistant("a")]), "rejected": str(HI + [assistant("b")])},
            "no prompt, and chosen is a conversation written out as text: make messages of it by "
            "json.loads, or by ast.literal_eval where the quotes are Python's",
        ),
    ],
)
def test_reasons(row, reason):
    with pytest.raises(RowError) as error:
        check_pair(row)
    assert str(error.value) == reason


def test_text_rows():
    assert check_text({"text": " A line \n", "page": 3}) == " A line \n"
    for row, reason in [
        ({"text": "\n"}, "empty text"),
        ({"text": 1}, "text is a number, not a string"),
    ]:
        with pytest.raises(RowError, match=reason):
            check_text(row)
    with pytest.raises(MissingColumn, match="no column 'text'"):
        check_text(ROW)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["user", "assistant", "system", "Hi", "\ud800", "\0", "<|im_end|>"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "prompt", "chosen", "\udfff"]), inner, max_size=3
        )
        | st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system"]), "content": inner}
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {}, optional={name: anything for name in ("prompt", "chosen", "rejected", "text")}
    )
    | anything
)
def test_nothing_in_a_row_is_a_traceback(row):
    for check in (check_pair, check_text):
        try:
            item = check(row)
        except RowError as error:
            str(error).encode()  # goes to dropped.jsonl and to the screen
            assert len(str(error)) < 300
        else:
            json.dumps(item, ensure_ascii=False).encode()


# ------------------------------------------------------------ files


def test_every_local_format_gives_the_same_rows(tmp_path):
    rows = [ROW, {"prompt": "NA", "chosen": "42", "rejected": 'a, "b"\nc'}]
    lines = write(
        tmp_path / "a.jsonl", "\ufeff" + json.dumps(rows[0]) + "\r\n\n" + json.dumps(rows[1])
    )
    array = write(tmp_path / "b.json", json.dumps(rows, indent=1))
    as_lines = write(tmp_path / "c.json", "\n".join(map(json.dumps, rows)))
    table = write(
        tmp_path / "d.csv",
        'prompt,chosen,rejected\nHi,Hey there!,Greetings.\nNA,42,"a, ""b""\nc"\n',
    )
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "e.parquet")
    data.save_to_disk(tmp_path / "f")
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "g")
    for source in [
        lines,
        array,
        as_lines,
        table,
        *(str(tmp_path / name) for name in ("e.parquet", "f", "g")),
    ]:
        assert list(read_rows([source])) == [(source, 0, rows[0]), (source, 1, rows[1])], source
    both = [str(tmp_path / "g@test"), lines]
    assert list(read_rows(both)) == [
        (both[0], 0, rows[1]),
        (lines, 0, rows[0]),
        (lines, 1, rows[1]),
    ]
    assert list(read_rows([str(tmp_path / "g")], split="test")) == [
        (str(tmp_path / "g"), 0, rows[1])
    ]


def test_messages_survive_parquet(tmp_path):
    row = {"chosen": HI + [assistant("Hey there!")], "rejected": HI + [assistant("Greetings.")]}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
    [(_, _, read)] = read_rows([str(tmp_path / "a.parquet")])
    assert check_pair(read) == GOOD


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this datasets has no type for JSON")
def test_json_in_tables_is_what_it_spells(tmp_path):
    """datasets' own type for objects of unlike keys, as tool calls have: nulls in it were given."""
    calls = [{"function": {"name": "f", "arguments": a}} for a in ({"x": None}, {"y": ["z", 1]})]
    rows = [
        {
            "prompt": [user("Hi")],
            "chosen": [assistant("") | {"tool_calls": [call]}],
            "rejected": "no",
            "more": {"tools": [call], "n": 1},
        }
        for call in calls
    ]
    kinds = datasets.Features(
        prompt=datasets.List(datasets.Json()),
        chosen=datasets.List(datasets.Json()),
        rejected=datasets.Value("string"),
        more={"tools": datasets.List(datasets.Json()), "n": datasets.Value("int64")},
    )
    data = datasets.Dataset.from_list(rows, features=kinds)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        assert [row for _, _, row in read_rows([str(tmp_path / name)])] == rows


def test_odd_rows_are_rows(tmp_path):
    """Mixed types, values that are no objects, deep nesting, a key twice, endless digits: each is
    judged alone.
    """
    lines = [
        "7",
        '{"prompt": 1}',
        '{"prompt": ["x"]}',
        "[" * 100_000 + "]" * 100_000,
        '{"a": 1, "a": 2}',
        '{"n": ' + "9" * 5000 + "}",
    ]
    rows = [row for _, _, row in read_rows([write(tmp_path / "a.jsonl", "\n".join(lines))])]
    assert rows[:3] == [7, {"prompt": 1}, {"prompt": ["x"]}]
    assert isinstance(rows[3], RowError) and str(rows[3]) == "nested too deeply"
    assert rows[4:] == [{"a": 2}, {"n": float("inf")}]
    with pytest.raises(RowError, match="^the row has the key 'a' twice$"):
        check_pair(rows[4])


def test_a_key_twice_counts_where_it_is_read(tmp_path):
    """In the row and in its messages, the same value or another; not inside a column that nobody
    reads.
    """
    lines = [
        '{"prompt": "Hi", "chosen": "Hey there!", "rejected": "Greetings.", "rejected": "Greetings."}',
        '{"prompt": [{"role": "user", "content": "Hi", "content": "Ho"}], "chosen": "a", "rejected": "b"}',
        '{"prompt": "Hi", "chosen": "Hey there!", "rejected": "Greetings.", "votes": {"up": 1, "up": 2}}',
    ]
    jsonl = write(tmp_path / "a.jsonl", "\n".join(lines))
    array = write(tmp_path / "b.json", "[" + ",".join(lines) + "]")
    for path in (jsonl, array):
        first, second, third = (row for _, _, row in read_rows([path]))
        with pytest.raises(RowError, match="^the row has the key 'rejected' twice$"):
            check_pair(first)
        with pytest.raises(RowError, match="^prompt message 0 has the key 'content' twice$"):
            check_pair(second)
        assert check_pair(third) == GOOD


def test_tables_are_read_as_they_are(tmp_path):
    """A name with a pattern in it, a picture that is none, a value that no Python object holds."""
    picture = datasets.Features(
        {**dict.fromkeys(ROW, datasets.Value("string")), "picture": datasets.Image()}
    )
    data = datasets.Dataset.from_list(
        [{**ROW, "picture": write(tmp_path / "a.png", "none")}] * 2, features=picture
    )
    with pytest.raises(Exception):  # noqa: B017 - Pillow is not there, or does not know it; nobody has asked to see it
        data[0]
    data.to_parquet(tmp_path / "pairs[1]*.parquet")
    data.save_to_disk(tmp_path / "saved")
    for name in ("pairs[1]*.parquet", "saved"):
        assert [check_pair(row) for _, _, row in read_rows([str(tmp_path / name)])] == [GOOD, GOOD]
    text = pyarrow.array([b"Hi", b"\xff", b"Hi"]).cast(pyarrow.string(), safe=False)
    year = pyarrow.array([0, 0, 9 * 10**12], pyarrow.timestamp("s"))
    table = pyarrow.table(
        {"prompt": text, "chosen": ["Hey there!"] * 3, "rejected": ["Greetings."] * 3, "when": year}
    )
    pyarrow.parquet.write_table(table, tmp_path / "odd.parquet")
    first, second, third = (row for _, _, row in read_rows([str(tmp_path / "odd.parquet")]))
    assert check_pair(first) == check_pair(third) == GOOD
    with pytest.raises(
        RowError, match=r"^prompt is unreadable \('utf-8' codec can't decode.*\), not a string"
    ):
        check_pair(second)
    twice = pyarrow.Table.from_arrays([text, text], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(
        DataError, match="twice.parquet: a column stands twice in 'prompt', 'prompt'"
    ):
        list(read_rows([str(tmp_path / "twice.parquet")]))


def test_csv_rows_are_judged_alone(tmp_path):
    path = write(
        tmp_path / "a.csv", "prompt,chosen,rejected\na,b\na,b,c,d\na,b," + "c" * 200_000 + "\n"
    )
    first, second, third = (row for _, _, row in read_rows([path]))
    assert str(first) == str(second) == "not 3 fields, as the header has"
    assert third == {"prompt": "a", "chosen": "b", "rejected": "c" * 200_000}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            '{"prompt": "x"}\n\nprompt: y\n',
            ["a.jsonl, line 3, column 1: not JSON", "found 'prompt: y"],
        ),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ', ["a.jsonl, line 2", "it ends too early"]),
        (
            "a.jsonl",
            b'{"prompt": "x"}\n{"prompt": "\xff"}\n',
            ["a.jsonl, line 2: not UTF-8", "byte 0xff at column 13"],
        ),
        ("a.jsonl", '{"prompt": "x"}'.encode("utf-16"), ["a.jsonl, line 1: not UTF-8"]),
        (
            "a.json",
            '[{"prompt": "x"},\n {"prompt": }]',
            ["a.json, line 2, column 13: not JSON", "found '}]'"],
        ),
        ("a.csv", b"prompt,chosen\nx,y\nx,\xe9\n", ["a.csv, line 3: not UTF-8"]),
        ("a.csv", "a,b,a\n1,2,3\n", ["a.csv, line 1: a column stands twice in 'a', 'b', 'a'"]),
        ("a.csv", 'a,b\n1,"2\n', ["a.csv, line 2: not CSV: unexpected end of data"]),
        ("a.parquet", b"PAR1 no", ["a.parquet: cannot be read"]),
        ("a.jsonl", "\n \n", ["a.jsonl: no rows in it"]),
        ("a.json", "", ["a.json: no rows in it"]),
        ("a.json", "[]", ["a.json: no rows in it"]),
        ("a.csv", "", ["a.csv: no rows in it"]),
        ("a.csv", "prompt,chosen,rejected\n", ["a.csv: no rows in it"]),
        ("a.txt", "x", ["'.txt' are not read; expected one of .jsonl, .json, .csv, .parquet"]),
    ],
)
def test_bad_files_name_path_and_place(tmp_path, name, content, expected):
    with pytest.raises(DataError) as error:
        list(read_rows([write(tmp_path / name, content)]))
    for part in [str(tmp_path), *expected]:
        assert part in str(error.value)


def test_sources_that_are_not_there(tmp_path):
    write(tmp_path / "pairs.jsonl", "{}")
    (tmp_path / "folder").mkdir()
    for name, expected in [
        ("pair.jsonl", r"no such file or folder \(did you mean pairs.jsonl\?\)"),
        ("*.jsonl", "no such file or folder"),
        ("x" * 5000, "no such file or folder"),
        ("a\0b", "no such file or folder"),
        ("folder", "save_to_disk did not write"),
    ]:
        with pytest.raises(DataError, match=expected):
            list(read_rows([str(tmp_path / name)]))
    datasets.DatasetDict(test=datasets.Dataset.from_list([ROW])).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="no split 'train'; found 'test'"):
        list(read_rows([str(tmp_path / "saved")]))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "https://user:secret@host.org:80/a/b.jsonl",
            "https://host.org:80/...: addresses are not read",
        ),
        ("s3://bucket?X-Amz-Signature=secret", "s3://bucket/...: addresses are not read"),
        ("hf://datasets/org/name/secret.parquet", "hf://datasets/...: addresses are not read"),
        ("csv", "csv: no such file or folder, nor org/name as on the hub"),
    ],
)
def test_addresses_and_builders_are_no_data(source, said):
    """`load_dataset("csv")` would read what lies in the working folder; an address may hold a
    secret.
    """
    with pytest.raises(DataError) as error:
        list(read_rows([source]))
    assert str(error.value).startswith(said) and "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "split", "said"),
    [
        (None, "train", r"available configs: \['a', 'b'\]; name one as org/name:CONFIG$"),
        ("c", "train", r"Available: \['a', 'b'\]; name one as org/name:CONFIG$"),
        ("b", "train", r"Should be one of \['test_prefs'\]; name one as org/name:b@SPLIT$"),
        ("b", "train[:", "Unrecognized instruction format"),
    ],
)
def test_configurations_and_splits_that_are_not_there(tmp_path, monkeypatch, config, split, said):
    """`load_dataset` takes a folder for a name on the hub, and says the same of it."""
    folder = tmp_path / "org/name"
    folder.mkdir(parents=True)
    write(folder / "a.jsonl", json.dumps(ROW))
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: a\n  data_files: [{split: train, path: a.jsonl}]\n"
        "- config_name: b\n  data_files: [{split: test_prefs, path: a.jsonl}]\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(DataError, match=said):
        list(arrow.hub("org/name", "org/name", config, split))
    [row] = arrow.hub("org/name", "org/name", "b", "test_prefs")
    assert row == ROW


def test_hub_names(monkeypatch):
    """What a name asks of `datasets`, whose answer is replaced: tests have no network."""
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list([ROW])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = ["org/name", "org/name:en", "org/name@test", "org/name:en@train[:10%]"]
    assert [row for _, _, row in read_rows(names)] == [ROW] * 4
    assert asked == [
        (("org/name", None), {"split": "train"}),
        (("org/name", "en"), {"split": "train"}),
        (("org/name", None), {"split": "test"}),
        (("org/name", "en"), {"split": "train[:10%]"}),
    ]

    def refuse(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError,
        match="org/name: neither a file here nor in the hub's cache \\(HF_HUB_OFFLINE is set\\): ConnectionError: no route",
    ):
        list(read_rows(["org/name"]))


lines = st.binary(max_size=40) | st.sampled_from(
    [b'{"prompt": "a"}', b"\xef\xbb\xbf[]", b'[{"a"', b'"\\ud800"', b'a,b\n"c', b"NaN"]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(lines, max_size=4), st.sampled_from([".jsonl", ".json", ".csv"]))
def test_no_bytes_are_a_traceback(tmp_path_factory, parts, suffix):
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(b"\n".join(parts))
    try:
        list(read_rows([str(path)]))
    except DataError as error:
        str(error).encode()
