"""Files made by a machine: sound rows among broken ones: every sound row comes out with its tokens,
in order; every other one is listed with its number and the reason; a file that cannot be read as
what it says it is names the line.

Nothing else may happen: any exception but DataError fails. The tokens expected are spelt here, byte
by byte, with no tokenizer and no template (fixture `letters`: a token a byte).
"""

import collections
import csv
import io
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from train.data.rows import DataError
from train.data.tokens import collect

MOST, MOST_PROMPT = 700, 400  # tokens, here bytes
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PRINTED = [
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
]  # the bytes that byte-level BPE writes as themselves
IDS = {
    byte: 3 + i
    for i, byte in enumerate(PRINTED + [byte for byte in range(256) if byte not in PRINTED])
}
NASTY = [
    "\0",
    "\x1b[31m",
    "\x7f",
    "\u2028",
    "\x85",
    "\ufeff",
    "\u202e",
    "\u200b",
    "\r\n",
    "\r",
    "\t",
    '"',
    '""',
    ",",
    "\\",
    "\\ud800",
    "{{ 7 * 7 }}",
    "{% raise %}",
    "<|im_en",
    "d|>",
    "[INST]",
    "NaN",
    "null",
    "42",
    "👩‍👩‍👧",
    "\U0010ffff",
    "e\u0301",
    "../../etc",
    "=1+1",
    "</s>",
]
CLUTTER = [
    '"score": NaN',
    '"a": Infinity',
    '"b": -Infinity',
    '"n": ' + "9" * 5000,
    '"deep": ' + "[" * 200 + "]" * 200,
    '"\\ud800": "\\udfff"',
    '"": null',
    '"x": {"k": 1, "k": 2}',
    '"f": 1e999',
    '"Prompt": 0',
]
TEXT = (
    st.lists(st.text(max_size=10) | st.sampled_from(NASTY), max_size=4)
    .map("".join)
    .filter(lambda text: not any(token in text for token in CONTROL))
)
BLANK = st.sampled_from(["", " ", "\n\t", "\u3000", "\u2028"])
JUNK = st.sampled_from(
    [
        0,
        -1.5,
        True,
        float("nan"),
        10**400,
        {},
        {"role": "user"},
        [1],
        ["Hi"],
        [[]],
        [None],
        [{}],
        {"a": {}},
    ]
)


def spell(text):
    """Token ids of a text, by hand."""
    ids = []
    for part in re.split("(" + "|".join(map(re.escape, CONTROL)) + ")", text):
        ids += [CONTROL.index(part)] if part in CONTROL else [IDS[byte] for byte in part.encode()]
    return tuple(ids)


def group_of(messages, chosen, rejected):
    """What tests/tiny.py's template and the length limits make of a pair."""
    text = (
        ""
        if messages[0]["role"] == "system"
        else "<|im_start|>system\nYou are helpful.<|im_end|>\n"
    )
    text += "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    prompt = spell(text + "<|im_start|>assistant\n")[-MOST_PROMPT:]
    return prompt, tuple(
        spell(answer + "<|im_end|>")[: MOST - len(prompt)] for answer in (chosen, rejected)
    )


def turn(role, content):
    return {"role": role, "content": content}


# ------------------------------------------------------------ sound rows: a dict, and the pair that
# it means


def plain(draw):
    prompt, chosen, rejected = "?" + draw(TEXT), "A" + draw(TEXT), "B" + draw(TEXT)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}, (
        [turn("user", prompt)],
        chosen,
        rejected,
    )


def messages(draw):
    """Several turns, as messages or as whole conversations, with what else may stand in a message."""
    row, (turns, chosen, rejected) = plain(draw)
    if draw(st.booleans()):
        turns = turns + [turn("assistant", "!" + draw(TEXT)), turn("user", "." + draw(TEXT))]
    if draw(st.booleans()):
        turns = [turn("system", draw(TEXT))] + turns
    answers = [turn("assistant", chosen), turn("assistant", rejected)]
    shapes = [
        {"prompt": turns, "chosen": chosen, "rejected": rejected},
        {"prompt": turns, "chosen": answers[0], "rejected": [answers[1]]},
        {"chosen": turns + answers[:1], "rejected": turns + answers[1:]},
        {**row, "chosen": turns + answers[:1], "rejected": turns + answers[1:]},
    ]
    return draw(st.sampled_from(shapes)), (turns, chosen, rejected)


def with_keys(draw):
    """Keys beyond role and content, that the template here does not use, and a system column."""
    row, (turns, chosen, rejected) = plain(draw)
    call = {"function": {"name": draw(TEXT), "arguments": {draw(TEXT): draw(st.integers() | TEXT)}}}
    keys = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "tool_calls": st.just([call]),
                "reasoning_content": TEXT,
                "name": TEXT | st.none(),
                "weight": st.floats(allow_nan=False),
                "\u2028": st.lists(TEXT, max_size=2),
            },
        )
    )
    content = draw(st.sampled_from([chosen, [{"type": "text", "text": chosen}]]))
    more = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "tools": st.sampled_from([[], [{"type": "function"}], '[{"a": 1}]', None]),
                "documents": st.sampled_from([[], [{"title": "x"}]]),
                "chat_template_kwargs": st.sampled_from([{}, {"enable_thinking": True}]),
                "images": st.sampled_from([None, ["a.png"]]),
                "score_chosen": st.floats(),
                "score_rejected": st.integers() | st.none(),
            },
        )
    )
    system = draw(st.sampled_from(["", " ", None, "S" + draw(TEXT)]))
    if system is not None:
        more["system"] = system
    if system and system.strip():
        turns = [turn("system", system), *turns]
    answer = {"role": "assistant", "content": content, **keys}
    return {**row, "chosen": answer, **more}, (turns, chosen, rejected)


def other_shape(draw):
    """The same pair as others write it down."""
    row, (turns, chosen, rejected) = plain(draw)
    del row["prompt"]
    prompt = turns[0]["content"]
    answers = [(chosen, 9), ("x", 5), (rejected, draw(st.integers(-9, 4)))]
    shapes = [
        {"question": prompt, **row},
        {"instruction": prompt, "input": " ", **row},
        {"messages": turns, **row},
        {"conversations": [{"from": "human", "value": prompt}], **row},
        {
            "chosen": [{"from": "human", "value": prompt}, {"from": "gpt", "value": chosen}],
            "rejected": {"from": "gpt", "value": rejected},
        },
        {
            "prompt": prompt,
            "responses": [text for text, _ in answers],
            "scores": [score for _, score in answers],
        },
        {"query": prompt, "answers": [{"text": t, "reward": str(s)} for t, s in answers]},
    ]
    return draw(st.sampled_from(shapes)), (turns, chosen, rejected)


def huge(draw):
    row, (turns, chosen, rejected) = plain(draw)
    size = draw(st.sampled_from([400, 5000, 300_000]))
    return {**row, "chosen": chosen + "ä" * size}, (turns, chosen + "ä" * size, rejected)


GOOD = {
    "plain": plain,
    "messages": messages,
    "huge": huge,
    "keys": with_keys,
    "other shape": other_shape,
}


# ------------------------------------------------------------ broken rows: JSON, and the reason
# that must be given


def changed(draw, **columns):
    return {**plain(draw)[0], **columns}


def one_of(draw, *names):
    return draw(st.sampled_from(names or ("prompt", "chosen", "rejected")))


def twice(draw):
    row, name = plain(draw)[0], one_of(draw)
    value = draw(st.sampled_from([row[name], "other", None]))
    return members(draw, row, [f"{json.dumps(name)}: {json.dumps(value)}"]), f"key '{name}' twice"


def twice_in_message(draw):
    row = plain(draw)[0]
    said = draw(
        st.sampled_from(
            [
                '"role": "user", "role": "assistant", "content": "x"',
                '"role": "assistant", "content": "x", "content": "y"',
            ]
        )
    )
    return members(
        draw, {k: row[k] for k in ("prompt", "rejected")}, ['"chosen": {' + said + "}"]
    ), "twice"


def lacking(draw):
    row, name = plain(draw)[0], one_of(draw)
    del row[name]
    return row, f"no column '{name}'"


def same(draw):
    row = plain(draw)[0]
    return {**row, "chosen": row["rejected"]}, "chosen equals rejected"


def same_when_cut(draw):
    return changed(
        draw, chosen="x" * MOST + "a", rejected="x" * MOST + "b"
    ), "equal after truncation"


def unknown_role(draw):
    role = draw(st.sampled_from(["human", "", "User", "\x1b[2J", "ipython", "x" * 1000]))
    return changed(draw, prompt=[turn(role, "x")]), "unknown role"


def out_of_order(draw):
    roles = draw(st.sampled_from(["ss", "us", "ua", "a", "uu", "usu", "sa", "auu"]))
    turns = [turn({"u": "user", "a": "assistant", "s": "system"}[letter], "x") for letter in roles]
    return changed(draw, prompt=turns), "roles out of order"


def differing(draw):
    chosen, rejected = (
        [turn("user", text), turn("assistant", text)] for text in ("x", "y" + draw(TEXT))
    )
    return {"chosen": chosen, "rejected": rejected}, "prompts of chosen and rejected differ"


def half_a_pair(draw):
    row = {**changed(draw), one_of(draw): "a" + draw(st.sampled_from(["\ud800", "\udfff"]))}
    return json.dumps(row), "not valid Unicode"


BAD = {
    "key twice": twice,
    "key twice in a message": twice_in_message,
    "column missing": lacking,
    "null": lambda draw: ({**plain(draw)[0], one_of(draw): None}, "is null"),
    "wrong type": lambda draw: (
        {**plain(draw)[0], one_of(draw): draw(JUNK)},
        "not a|no role|empty|role is null",
    ),
    "empty prompt": lambda draw: (changed(draw, prompt=draw(BLANK)), "empty prompt"),
    "empty response": lambda draw: (
        {**plain(draw)[0], one_of(draw, "chosen", "rejected"): draw(BLANK)},
        "empty response: ",
    ),
    "equal": same,
    "equal after truncation": same_when_cut,
    "unknown role": unknown_role,
    "roles out of order": out_of_order,
    "ends with user": lambda draw: (changed(draw, chosen=turn("user", "x")), "ends with user"),
    "content no text": lambda draw: (
        changed(draw, chosen=turn("assistant", draw(JUNK))),
        "content.* is .*, not a string|content has a part of type",
    ),
    "prompts differ": differing,
    "part of another type": lambda draw: (
        changed(draw, prompt=[turn("user", [{"type": draw(TEXT) + "x", "text": "a"}])]),
        "content has a part of type '",
    ),
    "tools no list": lambda draw: (
        changed(draw, tools=draw(st.sampled_from(["x", "{", {"a": 1}, 7, "7", True]))),
        "tools is ",
    ),
    "system no text": lambda draw: (
        changed(draw, system=draw(st.sampled_from([7, True, ["x"], {"a": 1}]))),
        "system is .*, not a string",
    ),
    "another system": lambda draw: (
        changed(draw, system="a", prompt=[turn("system", "b"), turn("user", "x")]),
        "the column 'system' differs",
    ),
    "a call alone, which this template does not write": lambda draw: (
        changed(draw, chosen={**turn("assistant", None), "tool_calls": [{"function": draw(TEXT)}]}),
        "empty response after the chat template",
    ),
    "scores tie": lambda draw: (
        {"prompt": "x", "responses": ["a", "b"], "scores": [3, 3.0]},
        "have the same score",
    ),
    "key twice in a key": lambda draw: (
        '{"prompt": "x", "chosen": "a", "rejected": {"role": "assistant", "content": "b", '
        '"tool_calls": [{"a": 1, "a": 2}]}}',
        "has the key 'a' twice",
    ),
    "control token in a key": lambda draw: (
        changed(
            draw, chosen={**turn("assistant", "x"), "tool_calls": [draw(st.sampled_from(CONTROL))]}
        ),
        "control token",
    ),
    "half a surrogate pair in a key": lambda draw: (
        json.dumps(changed(draw, tools=[{"name": "\ud800"}])),
        "tools is not valid Unicode",
    ),
    "half a surrogate pair": half_a_pair,
    "control token": lambda draw: (
        {**plain(draw)[0], one_of(draw): "x" + draw(st.sampled_from(CONTROL)) + "y"},
        "control token",
    ),
    "no object": lambda draw: (
        draw(st.sampled_from(['"x"', "7", "null", "true", "NaN", "[]", '[{"prompt": 1}]'])),
        "the row is",
    ),
    "nested": lambda draw: ('{"prompt": ' + "[" * 50_000 + "]" * 50_000 + "}", "nested too deeply"),
}

# Lines that no reader of JSON lines could make sense of, and bytes that are no UTF-8.
FATAL = [
    b'{"prompt": "x"',
    b"{} {}",
    b'{"prompt": "x"} trailing',
    b"{'prompt': 1}",
    b"prompt",
    b'{"a": "\x01"}',
    b"\x00",
    b'{"a": "\xff"}',
    b'{"a": "\xed\xa0\x80"}',
    '{"a": "ä"}'.encode("utf-16"),
    b'{"a": 1,}',
    '{"a": "ä"}'.encode("latin-1"),
    b'{"a": nan}',
    b'{"a": 0x1}',
    b'{"a": "\\x"}',
    b"// {}",
    b'{"a": "x',
    b"[1, 2",
    b"}",
]


def members(draw, row, more=()):
    """A JSON object whose members stand in any order, escaped or not."""
    ascii_only = draw(st.booleans())

    def write(value):
        return json.dumps(value, ensure_ascii=ascii_only)

    parts = [f"{write(name)}: {write(value)}" for name, value in row.items()] + list(more)
    comma = draw(st.sampled_from([", ", ",", " ,\t"]))
    return "{" + comma.join(draw(st.permutations(parts))) + "}"


def drawn(draw, kinds, most):
    """Up to `most` of `kinds`, each as likely as the others: hypothesis on its own prefers the
    first.
    """
    random = draw(st.randoms(use_true_random=True))
    return random.choices(kinds, k=random.randint(1, most))


def rows_of(draw, seen, skip=()):
    """(JSON text, pair or None, reason or None) each; one at least is sound."""
    kinds = drawn(draw, [*GOOD] * 3 + [kind for kind in BAD if kind not in skip], 12)
    kinds.insert(len(kinds) // 2, "plain")
    rows = []
    for kind in kinds:
        seen[kind] += 1
        if kind in GOOD:
            row, pair = GOOD[kind](draw)
            clutter = draw(st.lists(st.sampled_from(CLUTTER), max_size=2, unique=True))
            rows.append((members(draw, row, clutter), pair, None))
        else:
            row, reason = BAD[kind](draw)
            rows.append((row if isinstance(row, str) else members(draw, row), None, reason))
    return rows


def check(path, tokenizer, rows):
    """Collect `path` and compare with (anything, pair or None, reason or None) a row."""
    data = collect([str(path)], tokenizer, max_length=MOST, max_prompt_length=MOST_PROMPT)
    sound = [i for i, (_, pair, _) in enumerate(rows) if pair]
    assert data.rows.tolist() == sound, [d.reason for d in data.dropped if d.row in sound]
    for place, i in enumerate(sound):
        found = data.group(place)
        assert (found.prompt, found.responses) == group_of(*rows[i][1]), rows[i]
    listed = {d.row: d.reason for d in data.dropped}
    assert len(listed) == len(data.dropped) == len(rows) - len(sound) and not set(listed) & set(
        sound
    )
    for i, (text, _, reason) in enumerate(rows):
        if reason:
            assert re.search(reason, listed[i]), (str(text)[:200], listed[i])
            assert listed[i].isprintable() and len(listed[i]) < 400


def refused(path, tokenizer, line):
    """`path` is refused as a whole, and the message names it and the line."""
    with pytest.raises(DataError) as error:
        collect([str(path)], tokenizer, max_length=MOST, max_prompt_length=MOST_PROMPT)
    assert f"{path}, line {line}" in str(error.value) and str(error.value).isprintable()


# ------------------------------------------------------------ files


def json_lines(draw, path, tokenizer, seen):
    rows = rows_of(draw, seen)
    lines = [text.encode() for text, *_ in rows]
    fatal = draw(st.sampled_from([None] * 3 + FATAL))
    if fatal is not None:
        lines.insert(draw(st.integers(0, len(lines))), fatal)
    content = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    for line in lines:
        if line == fatal:
            at = content.count(b"\n") + 1
        content += line + draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \t\r\n"]))
    path.write_bytes(content if draw(st.booleans()) else content.rstrip(b"\r\n"))
    if fatal is None:
        check(path, tokenizer, rows)
    else:
        seen["no JSON or no UTF-8"] += 1
        refused(path, tokenizer, at)


def json_array(draw, path, tokenizer, seen):
    rows = rows_of(
        draw, seen, skip=["nested"]
    )  # where such an element ends nobody can say: the file is refused
    texts = [text for text, *_ in rows]
    broken = draw(st.sampled_from([None] * 3 + ["x", "{", "'", "1 2", "", '{"a": "\t"}', "]"]))
    place = draw(st.integers(0, len(texts)))
    if broken is not None:
        texts.insert(place, broken)
    path.write_bytes(
        draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + ("[\n" + ",\n".join(texts) + "\n]").encode()
    )
    if broken is None:
        check(path, tokenizer, rows)
    else:
        seen["no JSON or no UTF-8"] += 1
        with pytest.raises(DataError) as error:
            collect([str(path)], tokenizer, max_length=MOST, max_prompt_length=MOST_PROMPT)
        line = int(re.match(re.escape(f"{path}, line ") + r"(\d+)", str(error.value))[1])
        assert line - (place + 2) in (
            0,
            1,
        )  # an element that is not there is missed on the next line


def table_of_text(draw, path, tokenizer, seen):
    """CSV: every field is text, 42 and NaN too."""
    rows, file = [], io.StringIO(newline="")
    writer = csv.writer(
        file, quoting=csv.QUOTE_ALL, lineterminator=draw(st.sampled_from(["\n", "\r\n"]))
    )
    order = draw(st.permutations(["prompt", "chosen", "rejected", "more"]))
    writer.writerow(order)
    for kind in drawn(draw, ["sound"] * 3 + ["few", "many", "empty", "equal", "control"], 12):
        row = {
            name: value.replace("\0", "") for name, value in plain(draw)[0].items()
        }  # Python 3.10's csv refuses NUL
        pair = ([turn("user", row["prompt"])], row["chosen"], row["rejected"])
        row["more"] = draw(TEXT).replace("\0", "")
        seen["csv: " + kind] += 1
        spoilt = {
            "empty": {"chosen": " "},
            "equal": {"chosen": row["rejected"]},
            "control": {"prompt": CONTROL[2]},
        }
        row |= spoilt.get(kind, {})
        fields = [row[name] for name in order]
        writer.writerow(
            fields[:2] if kind == "few" else fields + ["x"] if kind == "many" else fields
        )
        reasons = {
            "few": "not 4 fields",
            "many": "not 4 fields",
            "empty": "empty response",
            "equal": "chosen equals",
            "control": "control token",
            "sound": None,
        }
        rows.append((fields, pair if kind == "sound" else None, reasons[kind]))
    content = file.getvalue().encode()
    broken = draw(st.sampled_from([None] * 4 + [b'"', b'"a"b,c\n', b"\xff\n"]))
    path.write_bytes(content + (broken or b""))
    if broken is None:
        check(path, tokenizer, rows)
    else:
        seen["no CSV or no UTF-8"] += 1
        refused(path, tokenizer, content.count(b"\n") + 1)


TURNS = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
# Types of a column of answers: what makes a value of a text, and why such a value is refused (None:
# it is taken).
COLUMNS = {
    "string": (pyarrow.string(), str, None),
    "large_string": (pyarrow.large_string(), str, None),
    "dictionary": (pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), str, None),
    "messages": (TURNS, lambda text: [turn("assistant", text)], None),
    "binary": (pyarrow.binary(), str.encode, "is bytes, not a string"),
    "int64": (pyarrow.int64(), len, "is a number, not a string"),
    "bool": (pyarrow.bool_(), bool, "is a boolean, not a string"),
    "null": (pyarrow.null(), lambda text: None, "is null, not a string"),
    "list": (pyarrow.list_(pyarrow.string()), lambda text: [text], "message 0 is a string"),
    "map": (
        pyarrow.map_(pyarrow.string(), pyarrow.string()),
        lambda text: [("role", "assistant")],
        "message 0 is a list",
    ),
    "date": (pyarrow.date32(), len, "is date, not a string"),
}
UNUSED = {
    "decimal": lambda n: pyarrow.array([None] * n, pyarrow.decimal256(70, 3)),
    "half": lambda n: pyarrow.array([1.5] * n, pyarrow.float32()).cast(pyarrow.float16()),
    "struct": lambda n: pyarrow.array([{"a": [1], "b": None}] * n),
    "year 300000": lambda n: pyarrow.array([9 * 10**12] * n, pyarrow.timestamp("s")),
    "no UTF-8": lambda n: pyarrow.array([b"\xff"] * n).cast(pyarrow.string(), safe=False),
    "bytes": lambda n: pyarrow.array([b"ab"] * n, pyarrow.binary(2)),
    "duration": lambda n: pyarrow.array([5] * n, pyarrow.duration("ns")),
}


def arrow_table(draw, path, tokenizer, seen):
    """Parquet: columns of any type, among them values that Python cannot hold."""
    pairs = [plain(draw)[1] for _ in range(draw(st.integers(1, 8)))]
    random = draw(st.randoms(use_true_random=True))
    kinds = dict(
        zip(("chosen", "rejected"), random.choices([*COLUMNS] + ["string"] * 8, k=2), strict=True)
    )
    spoilt = random.choices([None, None, None, "null", "bytes"], k=len(pairs))
    columns, rows = {}, []
    for number, (pair, spoil) in enumerate(zip(pairs, spoilt, strict=True)):
        reasons = [COLUMNS[kind][2] for kind in kinds.values() if COLUMNS[kind][2]]
        if spoil:
            reasons.append("prompt is null" if spoil == "null" else "prompt is unreadable")
            seen["parquet: " + spoil] += 1
        rows.append((number, None if reasons else pair, "|".join(reasons) or None))
    prompts = [
        {None: pair[0][0]["content"].encode(), "null": None, "bytes": b"a\xffb"}[spoil]
        for pair, spoil in zip(pairs, spoilt, strict=True)
    ]
    columns["prompt"] = pyarrow.array(prompts, pyarrow.binary()).cast(pyarrow.string(), safe=False)
    for (name, kind), side in zip(kinds.items(), (1, 2), strict=True):
        seen["parquet: " + kind] += 1
        made, make, _ = COLUMNS[kind]
        columns[name] = pyarrow.array([make(pair[side]) for pair in pairs], made)
    for kind in random.sample([*UNUSED], 3):
        seen["parquet, unused: " + kind] += 1
        columns[f"unused {kind}"] = UNUSED[kind](len(pairs))
    pyarrow.parquet.write_table(
        pyarrow.table(columns), path, row_group_size=draw(st.integers(1, 8))
    )
    check(path, tokenizer, rows)


FILES = {
    "a.jsonl": json_lines,
    "a.json": json_array,
    "a.csv": table_of_text,
    "a.parquet": arrow_table,
}
LIGHT = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
PHASES = [Phase.generate]  # no shrinking: it takes minutes, and the assertions name the row


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("examples", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_no_row_is_lost_and_none_is_a_traceback(letters, tmp_path, name, examples):
    seen = collections.Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=LIGHT,
        phases=PHASES,
    )
    @given(st.data())
    def one(data):
        seen["files"] += 1
        FILES[name](data.draw, tmp_path / name, letters, seen)

    one()
    files = seen.pop("files")
    print(
        f"\n{name}: {files} files, {sum(seen.values())} rows and columns of {len(seen)} kinds: {dict(seen)}"
    )
    expected = {
        "a.jsonl": {*GOOD, *BAD, "no JSON or no UTF-8"},
        "a.json": {*GOOD, *BAD, "no JSON or no UTF-8"} - {"nested"},
        "a.csv": {"csv: sound", "csv: few", "csv: many", "csv: control", "no CSV or no UTF-8"},
        "a.parquet": {
            "parquet: string",
            "parquet: messages",
            "parquet: bytes",
            *(f"parquet, unused: {k}" for k in UNUSED),
        },
    }
    assert examples < 600 or expected[name] <= set(seen)  # or the numbers above say little
