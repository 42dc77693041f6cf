"""Tokenised storage: what goes in comes out, is found again, and is made anew when what matters has
changed.
"""

import concurrent.futures
import json

import numpy as np
import pytest
import tokenizers
import transformers

from tests import tiny
from tests.data.alone import Pair, encode
from train.data import tokens
from train.data.chat import Chat
from train.data.dataset import split_by_prompt
from train.data.packing import Group
from train.data.rows import DataError, Dropped
from train.data.tokens import prepare

LENGTHS = dict(max_length=120, max_prompt_length=90)
ROWS = [
    {"prompt": "Hi", "chosen": "ok", "rejected": "no"},
    {"prompt": "", "chosen": "ok", "rejected": "no"},
    {"prompt": "Hi", "chosen": "okay" * 10, "rejected": "no"},
    {"prompt": "x" * 90, "chosen": "a<|im_end|>", "rejected": "no"},
    {"prompt": "Bye", "chosen": "a" * 40, "rejected": "a" * 39 + "b"},
    {"prompt": "y" * 90, "chosen": "c", "rejected": "d"},
]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "pairs.jsonl", ROWS)


def files(tmp_path):
    return sorted((tmp_path / "cache" / "tokens").iterdir())


def test_groups_in_and_out(letters, source):
    """Three of six rows are left: one whole, one with a cut answer, one with a cut prompt."""
    chat = Chat(letters)
    frame = len(chat.prompt_ids([{"role": "user", "content": "x"}])) - 1
    tokenised = prepare(
        [source], letters, max_dropped=0.5, max_length=frame + 40, max_prompt_length=frame + 8
    )
    assert len(tokenised) == 3
    assert tokenised.rows.tolist() == [0, 2, 5]
    assert tokenised.lengths.tolist() == [[frame + 2, 3, 3], [frame + 2, 38, 3], [frame + 8, 2, 2]]
    assert tokenised.truncated.tolist() == [
        [False, False, False],
        [False, True, False],
        [True, False, False],
    ]
    hi = tuple(chat.prompt_ids([{"role": "user", "content": "Hi"}]))
    assert tokenised.group(0) == Group(hi, ((81, 77, 2), (80, 81, 2)), 0)
    assert tokenised.group(1) == Group(hi, ((81, 77, 67, 91) * 9 + (81, 77), (80, 81, 2)), 2)
    last = chat.prompt_ids([{"role": "user", "content": "y" * 90}])
    assert tokenised.group(2) == Group(tuple(last[-frame - 8 :]), ((69, 2), (70, 2)), 5)
    assert all(type(i) is int for i in (*tokenised.group(0).prompt, tokenised.group(0).row))
    assert tokenised.dropped == [
        Dropped(source, 1, "empty prompt"),
        Dropped(
            source, 3, "control token '<|im_end|>' in the text (--allow_control_tokens keeps it)"
        ),
        Dropped(source, 4, "equal after truncation"),
    ]
    with pytest.raises(IndexError):
        tokenised.group(3)


def test_equals_one_by_one(merged, tmp_path):
    """The batch is what one by one gives, over several chunks."""
    rows = [
        {"prompt": f"Hi {i}", "chosen": "the answer " * (i % 7 + 1), "rejected": f"no {i}"}
        for i in range(50)
    ]
    chunk, tokens.CHUNK = tokens.CHUNK, 16
    try:
        tokenised = prepare(write(tmp_path / "a.jsonl", rows), merged, **LENGTHS)
    finally:
        tokens.CHUNK = chunk
    chat = Chat(merged)
    for i, row in enumerate(rows):
        pair = Pair([{"role": "user", "content": row["prompt"]}], row["chosen"], row["rejected"], i)
        assert tokenised.group(i) == encode(chat, pair, 120, 90)


def test_several_sources_number_on(letters, tmp_path):
    a, b = write(tmp_path / "a.jsonl", ROWS[:2]), write(tmp_path / "b.jsonl", [{}, *ROWS[:1]])
    tokenised = prepare([a, b], letters, max_dropped=0.5, **LENGTHS)
    assert tokenised.rows.tolist() == [0, 3]
    assert tokenised.dropped == [Dropped(a, 1, "empty prompt"), Dropped(b, 0, "no column 'chosen'")]


def test_too_many_dropped(letters, source, tmp_path):
    with pytest.raises(
        DataError,
        match=r"2 of 6 rows \(33.3%\).* more than the 5.0% .*row 1: empty prompt; .*row 3: control",
    ):
        prepare([source], letters, max_length=200)
    assert len(prepare([source], letters, max_length=200, max_dropped=2 / 6)) == 4
    with pytest.raises(DataError, match="1 of 1 rows"):
        prepare([write(tmp_path / "b.jsonl", ROWS[1:2])], letters, max_dropped=1.0, **LENGTHS)
    with pytest.raises(DataError, match="no source"):
        prepare([], letters, **LENGTHS)


def test_missing_columns(letters, tmp_path):
    rows = [{"Prompt": "Hi", "chosen": "a", "rejectd": "b"}] * 2
    with pytest.raises(DataError) as error:
        prepare([write(tmp_path / "a.jsonl", rows)], letters, **LENGTHS)
    assert str(error.value) == (
        f"{tmp_path}/a.jsonl: no column 'rejected'; found 'Prompt', 'chosen', 'rejectd'; "
        "expected 'prompt', 'chosen', 'rejected'; if these are the columns meant, pass "
        "--columns prompt=Prompt rejected=rejectd"
    )
    rows = [{"Prompt": "Hi", "chosen": "a", "rejected": "b"}] * 2
    for odd in ([], [7], [{"Prompt": "Hi", "chosen": "a"}]):  # another row that is of no use either
        with pytest.raises(DataError, match="no column 'prompt'; .*--columns prompt=Prompt"):
            prepare([write(tmp_path / "a.jsonl", odd + rows)], letters, **LENGTHS)
    rows = [
        {"prompt": "Hi", "chosen": "a"},
        {"prompt": "Hi", "rejected": "b"},
    ]  # each column is there somewhere
    with pytest.raises(
        DataError, match="2 of 2 rows .*row 0: no column 'rejected'; .*row 1: no column 'chosen'"
    ):
        prepare([write(tmp_path / "a.jsonl", rows)], letters, **LENGTHS)


def test_plain_text(letters, tmp_path):
    path = write(tmp_path / "wiki.jsonl", [{"text": "okay"}, {"text": ""}, {"text": "z"}])
    tokenised = prepare([path], letters, kind="text", max_length=3, max_dropped=0.5)
    assert [tokenised.group(i) for i in range(2)] == [
        Group((), ((81, 77, 67),), 0),
        Group((), ((92,),), 2),
    ]
    assert tokenised.lengths.tolist() == [[0, 3], [0, 1]] and tokenised.truncated.tolist() == [
        [False, True],
        [False, False],
    ]
    assert tokenised.dropped == [Dropped(path, 1, "empty text")]
    letters(
        ["a", "b b"], padding=True, truncation=True, max_length=1
    )  # leaves its settings in the tokenizer
    assert (
        prepare([path], letters, kind="text", max_length=3, max_dropped=0.5).fingerprint
        == tokenised.fingerprint
    )
    with pytest.raises(
        ValueError, match="kind 'pairs' of data; expected one of pair, labelled, margin, "
    ):
        prepare([path], letters, kind="pairs", **LENGTHS)
    with pytest.raises(ValueError, match="max_prompt_length must be None"):
        prepare([path], letters, kind="text", **LENGTHS)


@pytest.mark.parametrize(
    "model, reason",
    [
        ("BPE", "no tokens: the tokenizer makes nothing of a response"),
        (
            "WordLevel",
            "the tokenizer refuses it: WordLevel error: Missing [UNK] token from the vocabulary",
        ),
    ],
)
def test_characters_that_a_tokenizer_does_not_know(tmp_path, model, reason):
    """Without bytes to fall back on, BPE leaves them out and WordLevel gives up: on their rows, not
    on the others.
    """
    letters = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(32, 127)), "\n"]
    core = tokenizers.Tokenizer(
        getattr(tokenizers.models, model)(
            {letter: i for i, letter in enumerate(letters)},
            **({"merges": []} if model == "BPE" else {}),
        )
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        bos_token="<|im_start|>",
    )
    tokenizer.chat_template = tiny.CHATML
    rows = [
        {"prompt": "Hi", "chosen": f"a{i}", "rejected": "\u4f60" if i in (3, 7) else "b"}
        for i in range(9)
    ]
    tokenised = prepare(
        write(tmp_path / "a.jsonl", rows), tokenizer, max_dropped=0.5, max_length=200
    )
    assert tokenised.rows.tolist() == [0, 1, 2, 4, 5, 6, 8]
    assert [(d.row, d.reason) for d in tokenised.dropped] == [(3, reason), (7, reason)]
    assert tokenised.group(5).responses == (
        (letters.index("a"), letters.index("6"), 2),
        (letters.index("b"), 2),
    )


# ------------------------------------------------------------ the cache


def counted(monkeypatch):
    """Rows that were really tokenised since."""
    done, encode = [], tokens._encode
    monkeypatch.setattr(
        tokens, "_encode", lambda rows, *rest: done.append(len(rows)) or encode(rows, *rest)
    )
    return done


def same(a, b):
    return a.fingerprint == b.fingerprint and [a.group(i) for i in range(len(a))] == [
        b.group(i) for i in range(len(b))
    ]


def test_found_again_by_content(letters, source, tmp_path, monkeypatch):
    done = counted(monkeypatch)
    options = dict(LENGTHS, max_dropped=0.5)
    first = prepare([source], letters, **options)
    other = write(tmp_path / "other.jsonl", [{**row, "votes": 1} for row in ROWS])
    again = prepare([other], letters, **options)
    assert done == [5] and same(first, again)
    assert [d.source for d in again.dropped] == [other] * len(first.dropped) and len(
        first.dropped
    ) >= 2
    changed = [{**ROWS[0], "chosen": "oK"}, *ROWS[1:]]
    variants = [
        prepare([write(tmp_path / "changed.jsonl", changed)], letters, **options),
        prepare([source], letters, **{**options, "max_length": 121}),
        prepare([source], letters, **{**options, "max_prompt_length": 91}),
        prepare([source], letters, **options, allow_control_tokens=True),
    ]
    letters.chat_template = letters.chat_template.replace("helpful", "kind")
    variants.append(prepare([source], letters, **options))
    letters.add_tokens(["ok"])
    variants.append(prepare([source], letters, **options))
    assert len({first.fingerprint, *(v.fingerprint for v in variants)}) == 7 and len(done) == 7
    assert len(files(tmp_path)) == 7  # and no temporary file


def test_damage_is_noticed(letters, source, tmp_path, monkeypatch):
    options = dict(LENGTHS, max_dropped=0.5)
    first = prepare([source], letters, **options)
    [path] = files(tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-10] ^= 1
    done = counted(monkeypatch)
    damaged = [
        whole[:-1],
        whole[:20],
        b"",
        b"\0" * len(whole),
        bytes(flipped),
        whole.replace(b"control token", b"Control token"),
    ]
    for times, content in enumerate(damaged, 1):
        assert content != whole
        path.unlink()  # `first` still maps the old file
        path.write_bytes(content)
        assert same(first, prepare([source], letters, **options)) and len(done) == times
        assert (
            same(first, prepare([source], letters, **options)) and len(done) == times
        )  # it is sound again


def test_cache_folder_that_cannot_be_written(letters, source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write the token cache .*ZEROPREF_CACHE"):
        prepare([source], letters, max_dropped=0.5, cache_dir=tmp_path / "file", **LENGTHS)


def test_writers_at_once(letters, source, tmp_path):
    def one(_):
        return prepare([source], letters, max_dropped=0.5, **LENGTHS)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(one, range(4))
    assert all(same(first, other) for other in others) and len(files(tmp_path)) == 1


def test_storage_is_mapped(letters, source, tmp_path):
    tokenised = prepare([source], letters, max_dropped=0.5, **LENGTHS)
    address = tokenised.ids.ctypes.data
    [path] = files(tmp_path)
    regions = [line.split() for line in open("/proc/self/maps") if str(path) in line]
    assert any(
        int(r[0].split("-")[0], 16) <= address < int(r[0].split("-")[1], 16) for r in regions
    )


# ------------------------------------------------------------ views and splits


def many(tmp_path, order, name="many.jsonl"):
    rows = [{"prompt": f"p{i // 3}", "chosen": f"c{i}", "rejected": "no"} for i in range(300)]
    return write(tmp_path / name, [rows[i] for i in order])


def test_select_is_a_view(letters, tmp_path):
    whole = prepare([many(tmp_path, range(300))], letters, **LENGTHS)
    view = whole.select([7, 2, 2])
    assert [view.group(i) for i in range(3)] == [whole.group(7), whole.group(2), whole.group(2)]
    assert (
        np.shares_memory(view.ids, whole.ids)
        and view.lengths.tolist() == whole.lengths[[7, 2, 2]].tolist()
    )
    assert len({whole.fingerprint, view.fingerprint, whole.select([2, 7, 2]).fingerprint}) == 3
    assert view.fingerprint == whole.select(np.array([7, 2, 2])).fingerprint
    assert view.select([0]).group(0) == whole.group(7) and len(whole.select([])) == 0


def test_split_by_prompt(letters, tmp_path):
    """100 prompts of 3 rows each: no prompt on both sides, whatever the order, the template, the
    lengths.
    """

    def held_prompts(data):
        train, held = split_by_prompt(data, 0.3, seed=5)
        sides = [
            {letters.decode(part.group(i).prompt[-15:]) for i in range(len(part))}
            for part in (train, held)
        ]
        assert (
            not sides[0] & sides[1]
            and len(train) + len(held) == 300
            and len(held) == 3 * len(sides[1])
        )
        return sides[1]

    whole = prepare([many(tmp_path, range(300))], letters, **LENGTHS)
    held = held_prompts(whole)
    assert 15 <= len(held) <= 45  # binomial: 30 expected, 4.6 the standard deviation
    shuffled = np.random.default_rng(0).permutation(300)
    assert held_prompts(prepare([many(tmp_path, shuffled, "b.jsonl")], letters, **LENGTHS)) == held
    rows_of = sorted(split_by_prompt(whole, 0.3, 5)[1].rows.tolist())
    assert rows_of != sorted(split_by_prompt(whole, 0.3, 6)[1].rows.tolist())
    letters.chat_template = letters.chat_template.replace("helpful", "kind")
    renamed = prepare([many(tmp_path, range(300))], letters, max_length=40)
    assert sorted(split_by_prompt(renamed, 0.3, 5)[1].rows.tolist()) == rows_of


def test_split_edges(letters, source):
    data = prepare([source], letters, max_dropped=0.5, **LENGTHS)
    train, held = split_by_prompt(data, 0.0, 0)
    assert len(held) == 0 and train.rows.tolist() == data.rows.tolist()
    with pytest.raises(DataError, match="leaves none held out"):
        split_by_prompt(data, 1e-9, 0)
    with pytest.raises(DataError, match="leaves none to train on"):
        split_by_prompt(data, 1 - 1e-9, 0)
    for share in (-0.1, 1, 1.5):
        with pytest.raises(ValueError, match="expected 0 <= share < 1"):
            split_by_prompt(data, share, 0)


def test_answers_with_labels(merged, tmp_path):
    """k = 1, the label beside it, and every spelling of one; what is no label is dropped and
    listed.
    """
    answer = {"prompt": "Hi!", "completion": "Hello there."}
    labels = [True, False, 1, 0, "true", "False", 1.0, None, "maybe", 2, [True], 0.5]
    rows = [answer | {"label": label} for label in labels]
    rows += [
        {
            "completion": [
                {"role": "user", "content": "Hi!"},
                {"role": "assistant", "content": "Yes."},
            ],
            "label": True,
        },
        {
            "prompt": "Other",
            "completion": [
                {"role": "user", "content": "Hi!"},
                {"role": "assistant", "content": "Yes."},
            ],
            "label": True,
        },
        {"prompt": "Hi!", "label": True, "completion": " "},
    ]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tokens.kind_of([str(path)]) == "labelled"
    data = tokens.prepare(
        [str(path)], merged, max_length=200, kind="labelled", cache_dir=tmp_path, max_dropped=1.0
    )
    assert data.labels.tolist() == [True, False, True, False, True, False, True, True]
    assert data.rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 12]
    assert [drop.row for drop in data.dropped] == [7, 8, 9, 10, 11, 13, 14]
    assert {drop.reason for drop in data.dropped[:5]} <= {
        f"label is {kind} other than true and false"
        for kind in ("null", "a string", "a number", "a list")
    }
    assert data.group(1).label is False and len(data.group(1).responses) == 1
    assert data.select([1, 7]).labels.tolist() == [False, True]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        json.dumps(
            {"prompt": "Hi!", "chosen": "a", "rejected": "b", "completion": "c", "label": True}
        )
    )
    assert tokens.kind_of([str(pairs)]) == "pair"
