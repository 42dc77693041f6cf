"""What the chat template makes of a row: keys it uses and does not, answers it changes, prompts that
are cut, a template of the user's own, plain text that begins with bos, implausible data.
"""

import json
import re

import pytest

from tests.data import families
from train.data import plausible, tokens
from train.data.chat import Chat, use_template
from train.data.rows import DataError, check_pair
from train.data.same_tokens import in_use, same_tokens
from train.data.tokens import collect, prepare

# Uses tools and tool_calls; reasoning_content too, of the last turn.
TOOLS = (
    "{% for m in messages %}{{ '<|user|>' if m.role != 'assistant' else '<|bot|>' }}"
    "{% if loop.first and tools %}{{ 'Tools: ' + (tools | tojson) + '\n' }}{% endif %}"
    "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ ' call ' + (c.function | tojson) }}{% endfor %}"
    "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"
)
CALL = [{"function": {"name": "tide", "arguments": {"port": "P0"}}}]
OTHER_CALL = [{"function": {"name": "tide", "arguments": {"port": "P1"}}}]
WHERE = {"prompt": "Where does the ferry land?", "chosen": "Here.", "rejected": "There."}


def answer(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def tools():
    return families.tokenizer("byte-level", TOOLS)


@pytest.fixture
def collected(tmp_path):
    def collected(tokenizer, *rows, **options):
        path = write(tmp_path / "rows.jsonl", *rows)
        return collect([path], tokenizer, **{"max_length": 1000, **options})

    return collected


# ------------------------------------------------------------ keys that carry meaning


def test_keys_reach_the_template(tools, collected):
    listed = [{"type": "function", "function": {"name": "tide"}}]
    row = {
        "prompt": "When?",
        "tools": listed,
        "chosen": answer("One moment.", tool_calls=CALL),
        "rejected": answer("One moment.", tool_calls=OTHER_CALL, reasoning_content="Hm."),
    }
    data = collected(tools, row)
    group = data.group(0)
    assert (
        tools.decode(group.prompt) == f"<|user|>Tools: {json.dumps(listed)}\nWhen?<|end|>\n<|bot|>"
    )
    assert tools.decode(group.responses[0]) == (
        'One moment. call {"name": "tide", "arguments": {"port": "P0"}}<|end|>'
    )
    assert tools.decode(group.responses[1]).startswith("<think>Hm.</think>One moment. call ")
    assert data.notes() == []
    # Ids as transformers has them.
    whole = tools.apply_chat_template(
        [{"role": "user", "content": "When?"}, row["chosen"]], tools=listed, return_dict=False
    )
    assert [*group.prompt, *group.responses[0]] == whole[:-1]  # without the newline at the end


def test_pairs_that_differ_in_keys_alone_are_judged_as_rendered(tools, collected):
    pair = {
        "prompt": "When?",
        "chosen": answer("One moment.", tool_calls=CALL),
        "rejected": answer("One moment.", tool_calls=OTHER_CALL),
    }
    unlike_ids = {**pair, "rejected": answer("One moment.", tool_calls=CALL, id=7)}
    data = collected(tools, pair, {**pair, "rejected": pair["chosen"]}, unlike_ids)
    assert data.rows.tolist() == [0]
    assert [each.reason for each in data.dropped] == [
        "chosen equals rejected",
        "equal after the chat template",
    ]
    silent = collected(families.tokenizer("byte-level", "after a marker"), pair)
    assert [each.reason for each in silent.dropped] == ["equal after the chat template"]


def test_keys_that_the_template_does_not_use_are_said_once(collected):
    tokenizer = families.tokenizer("byte-level", "after a marker")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"When {i}?", "name": "Ann", "seen": False}],
            "tools": [{"type": "function"}],
            "chosen": answer("One moment.", tool_calls=CALL, reasoning_content="Hm."),
            "rejected": answer("Never."),
        }
        for i in range(3)
    ]
    data = collected(
        tokenizer, *rows, {**WHERE, "chat_template_kwargs": {"enable_thinking": False}}
    )
    assert sorted(data.notes()) == [
        "the chat template does not use 'chat_template_kwargs' of the row (1 row)",
        "the chat template does not use 'name' of messages (3 rows)",
        "the chat template does not use 'reasoning_content' of messages (3 rows)",
        "the chat template does not use 'tool_calls' of messages (3 rows)",
        "the chat template does not use 'tools' of the row (3 rows)",
    ]
    again = collected(
        tokenizer, *rows, {**WHERE, "chat_template_kwargs": {"enable_thinking": False}}
    )
    assert again.notes() == data.notes()  # from the cache too


def test_arguments_of_the_template_come_from_the_row(collected):
    template = families.MARKER.replace("{{ '<s>' }}", "{{ '<s>' + (mood or '') }}")
    tokenizer = families.tokenizer("byte-level", template)
    rows = [
        {**WHERE, "chat_template_kwargs": {"mood": "calm"}},
        {**WHERE, "chat_template_kwargs": {"tokenize": True}},
        {**WHERE, "chat_template_kwargs": {"mood": "a</s>b"}},
    ]
    data = collected(tokenizer, *rows)
    assert tokenizer.decode(data.group(0).prompt).startswith("<s>calm<|user|>Where")
    assert [each.reason for each in data.dropped] == [
        "the chat template refuses it: chat_template_kwargs may not hold 'tokenize'",
        "control token '</s>' in the text (--allow_control_tokens keeps it)",
    ]


def test_control_tokens_in_keys(tools, collected):
    row = {**WHERE, "chosen": answer("Here.", tool_calls=[{"function": {"name": "a<|end|>"}}])}
    assert [each.reason for each in collected(tools, row).dropped] == [
        "control token '<|end|>' in the text (--allow_control_tokens keeps it)"
    ]


def test_system_texts_that_are_lost_are_said(collected):
    template = families.TEMPLATES["after a marker"].replace("'<|sys|>' + m['content'] + ''", "''")
    row = {**WHERE, "system": "Be brief."}
    data = collected(families.tokenizer("byte-level", template), row)
    assert data.notes() == ["the chat template leaves out or changes a turn of system (1 row)"]
    assert collected(families.tokenizer("byte-level", "after a marker"), row).notes() == []
    last_only = families.MARKER.replace("for m in messages", "for m in messages[-2:]")
    turns = [("user", "One"), ("assistant", "Two"), ("user", "Three")]
    row = {**WHERE, "prompt": [{"role": role, "content": text} for role, text in turns]}
    data = collected(families.tokenizer("byte-level", last_only), row)
    assert data.notes() == ["the chat template leaves out or changes a turn of user (1 row)"]


# ------------------------------------------------------------ answers that the template changes


@pytest.mark.parametrize(
    ("change", "rendered"),
    [
        ("m['content'].split('</think>')[-1]", "Pebble, I think."),
        ("m['content'] | upper", "<THINK>A CAT.</THINK>PEBBLE, I THINK."),
        ("m['content'] | replace('Peb', '')", "<think>A cat.</think>ble, I think."),
        ("m['content'][:-1]", "<think>A cat.</think>Pebble, I think"),
        ("m['content'] | replace(' ', '_')", "<think>A_cat.</think>Pebble,_I_think."),
    ],
)
def test_changed_answers_are_dropped_or_kept_as_rendered(collected, change, rendered):
    template = families.TEMPLATES["after a marker"].replace(
        "'<|bot|>' + m['content']",
        f"'<|bot|>' + ({change} if 'Pebble' in m['content'] else m['content'])",
    )
    tokenizer = families.tokenizer("byte-level", template)
    row = {**WHERE, "chosen": "<think>A cat.</think>Pebble, I think."}
    [dropped] = collected(tokenizer, row).dropped
    assert dropped.reason.startswith("the chat template leaves out or changes part of the answer")
    kept = collected(tokenizer, row, allow_template_changes=True)
    assert tokenizer.decode(kept.group(0).responses[0]) == f"{rendered}</s>"
    assert kept.notes() == ["the chat template leaves out or changes part of an answer (1 row)"]


def test_an_answer_that_stands_elsewhere_is_not_there(collected):
    """Its text is in the header and in the end token, and nowhere between."""
    template = families.MARKER.replace(
        "'<|bot|>' + m['content']", "'<|bot|>' + m['content'] | replace('bot', '')"
    )
    row = {**WHERE, "chosen": "x bot", "rejected": "y"}
    data = collected(families.tokenizer("byte-level", template), row)
    assert "the chat template leaves out" in data.dropped[0].reason


def test_a_thought_opened_in_the_header(collected):
    """The answer's own thought is the rest of the one that the header has opened, where a finished
    turn keeps it; an answer without one follows the header.
    """
    tokenizer = families.tokenizer("byte-level", "a thought opened in the header")
    row = {**WHERE, "chosen": "<think>\nA pier.\n</think>\n\nHere.", "rejected": "There."}
    data = collected(tokenizer, row)
    group = data.group(0)
    assert tokenizer.decode(group.prompt).endswith("<|bot|><think>\n")
    assert tokenizer.decode(group.responses[0]) == "A pier.\n</think>\n\nHere.</s>"
    assert tokenizer.decode(group.responses[1]) == "There.</s>"
    [note] = data.notes()  # of the second: who learns it never ends a thought
    assert note.startswith("the chat template opens a thought that an answer does not close")
    assert not collected(tokenizer, row, keep_tail=True).notes()  # what is judged opens none
    both = {**row, "rejected": "<think>\nWhere?\n</think>\n\nThere."}
    assert not collected(tokenizer, both).notes()


def test_a_thought_that_is_closed_in_finished_turns(collected):
    """Header "<think>", finished turns "</think>": the two share a "<", which is no border."""
    template = families.MARKER.replace("{{ '<|bot|>' }}", "{{ '<|bot|><think>' }}").replace(
        "'<|bot|>' + m['content']", "'<|bot|></think>' + m['content']"
    )
    tokenizer = families.tokenizer("byte-level", template)
    group = collected(tokenizer, WHERE).group(0)
    assert tokenizer.decode(group.responses[0]) == "</think>Here.</s>"


# ------------------------------------------------------------ length limits


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece, legacy", "metaspace first"])
def test_cut_prompts_keep_what_is_asked(collected, kind):
    tokenizer = families.tokenizer(kind, "after a marker")
    system = {"role": "system", "content": "Be good."}
    row = {**WHERE, "prompt": [system, {"role": "user", "content": "the old stone pier " * 20}]}
    whole = Chat(tokenizer).prompt_ids(row["prompt"])
    head = tokenizer("<s><|sys|>Be good.", add_special_tokens=False)["input_ids"]
    limits = {"max_length": 60, "max_prompt_length": 40}
    by_end = collected(tokenizer, row, **limits)
    assert list(by_end.group(0).prompt) == whole[-40:]
    kept = collected(tokenizer, row, truncate_prompt="keep_system_and_end", **limits)
    assert list(kept.group(0).prompt) == head + whole[len(head) - 40 :]
    assert kept.fingerprint != by_end.fingerprint
    # No room for the system turn: bos; none for that either: the end.
    small = {"max_length": 30, "truncate_prompt": "keep_system_and_end"}
    size = len(head)
    narrow = collected(tokenizer, row, max_prompt_length=size, **small)
    assert list(narrow.group(0).prompt) == whole[:1] + whole[1 - size :]
    one = collected(tokenizer, row, max_prompt_length=1, **small)
    assert list(one.group(0).prompt) == whole[-1:]
    # Without a system turn: what the template begins with.
    bare = collected(
        tokenizer,
        {**row, "prompt": row["prompt"][1:]},
        truncate_prompt="keep_system_and_end",
        **limits,
    )
    assert list(bare.group(0).prompt) == whole[:1] + whole[-39:]


def test_a_system_turn_that_the_template_adds_is_kept(letters, collected):
    row = {**WHERE, "prompt": "x" * 300}
    data = collected(
        letters, row, max_length=200, max_prompt_length=150, truncate_prompt="keep_system_and_end"
    )
    text = letters.decode(data.group(0).prompt)
    assert text.startswith("<|im_start|>system\nYou are helpful.<|im_end|>\nxxx")
    assert (
        text.endswith("xxx<|im_end|>\n<|im_start|>assistant\n") and len(data.group(0).prompt) == 150
    )


def test_the_share_of_cut_rows_is_said(letters, collected):
    rows = [{**WHERE, "prompt": "x" * n, "chosen": "y" * n} for n in (10, 20, 200, 300)]
    data = collected(letters, *rows, max_length=220, max_prompt_length=200)
    assert data.notes() == [
        "cut to the length limits: the prompt of 2 (50.0%) and an answer of 2 (50.0%) of 4 rows"
    ]
    with pytest.raises(
        ValueError, match="truncate_prompt 'end'; expected one of keep_end, keep_sys"
    ):
        collected(letters, *rows, truncate_prompt="end")


# ------------------------------------------------------------ a template of the user's own


def test_chat_template_from_a_file(letters, tmp_path):
    letters.chat_template = None
    with pytest.raises(ValueError, match="pass --chat_template FILE"):
        Chat(letters)
    (tmp_path / "own.jinja").write_text(families.TEMPLATES["after a space, no end token"])
    use_template(letters, str(tmp_path / "own.jinja"))
    [prompt] = letters.batch_decode([Chat(letters).prompt_ids([{"role": "user", "content": "Hi"}])])
    assert prompt == "USER: Hi\nASSISTANT: "
    template = letters.chat_template
    for name, text in (
        ("mark.jinja", "\ufeff" + template.replace("\n", "\r\n")),  # of an editor on Windows
        ("chat_template.json", json.dumps({"chat_template": template})),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        use_template(letters, str(tmp_path / name))
        assert letters.chat_template == template
    for found in ({}, {"chat_template": [{"name": "default", "template": template}]}):
        (tmp_path / "config.json").write_text(json.dumps(found))
        with pytest.raises(ValueError, match="no template as 'chat_template', or has several"):
            use_template(letters, str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match="--chat_template .*none.jinja: cannot be read: "):
        use_template(letters, str(tmp_path / "none.jinja"))


# ------------------------------------------------------------ plain text


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece, legacy"])
def test_plain_text_begins_as_the_tokenizer_begins_texts(tmp_path, kind):
    path = write(
        tmp_path / "texts.jsonl", {"text": "the old pier"}, {"text": "a"}, {"text": "b" * 99}
    )
    for adds_bos in (False, True):
        tokenizer = families.tokenizer(kind, "after a marker", adds_bos)
        data = collect([path], tokenizer, kind="text", max_length=9)
        beginning = (1,) if adds_bos else ()
        for i, text in enumerate(("the old pier", "a", "b" * 99)):
            group = data.group(i)
            assert group.prompt == beginning
            assert [*group.prompt, *group.responses[0]] == tokenizer(text)["input_ids"][:9]
        assert data.truncated[:, 0].tolist() == [False] * 3 and data.lengths[2].sum() == 9


# ------------------------------------------------------------ data that nobody can have meant

LONG = "Where does the old ferry land in winter?"
RULES = "You are a harbour master who knows every tide by heart, and you answer in one line."
ASKED = [{"role": "system", "content": RULES}, {"role": "user", "content": LONG}]
DUMPS = [
    '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]',
    "[{'role': 'assistant', 'content': 'Hello.'}]",
    '{"from": "gpt", "value": "Hello."}',
    "array([{'content': 'Hello.', 'role': 'assistant'}], dtype=object)",
    '{"messages": [{"role": "user", "content": "Hi"}]}',
    ' [ { "content": "Hi", "role": "user" } ]',
]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        *(({**WHERE, "chosen": text}, "written out as JSON or Python") for text in DUMPS),
        ({**WHERE, "prompt": DUMPS[1]}, "written out as JSON or Python"),
        ({"prompt": LONG, "chosen": LONG + " Here.", "rejected": "No."}, "begins with its prompt"),
        (
            {"prompt": LONG, "chosen": "No.", "rejected": f"### Q:\n{LONG}\nA"},
            "begins with its prompt",
        ),
        (
            {"prompt": LONG, "chosen": LONG.replace(" ", "\n").upper() + " A.", "rejected": "No."},
            "begins with its prompt",
        ),
        (
            {"prompt": "A grey cat?", "chosen": "A grey cat? Ash.", "rejected": "A grey cat? No."},
            "all answers begin with their prompt",
        ),
        ({**WHERE, "chosen": "User: Hi\nAssistant: Hello."}, "turns of a whole conversation"),
        ({**WHERE, "chosen": "\n\nHuman: Hi\n\nAssistant: Ho"}, "turns of a whole conversation"),
        (
            {**WHERE, "chosen": "System: Be brief.\nUser: Hi\nAssistant: Hello."},
            "turns of a whole conversation",
        ),
        (
            {"prompt": LONG, "chosen": "I will think. " * 8 + f"\n\n{LONG}\n", "rejected": "No."},
            "begins with its prompt",
        ),
        (
            {"prompt": LONG, "chosen": "a b " * 30 + f'You ask: "{LONG}" Here.', "rejected": "No."},
            "begins with its prompt",
        ),
        (
            {"prompt": ASKED, "chosen": f"{RULES}\n\n{LONG}\nHere.", "rejected": "No."},
            "begins with its prompt",
        ),
        ({**WHERE, "score_chosen": 1.0, "score_rejected": "2"}, "lower score than rejected"),
    ],
)
def test_implausible_rows(row, what):
    found, _ = plausible.suspect(check_pair(row))
    assert what in found


@pytest.mark.parametrize(
    "row",
    [
        WHERE,
        {**WHERE, "prompt": "Hello!", "chosen": "Hello! How are you?"},
        {**WHERE, "chosen": '{"name": "Ann", "age": 3}'},
        {**WHERE, "chosen": '[1, 2] and {"role": "x"} then'},
        {**WHERE, "chosen": "Send this:\n" + DUMPS[0]},
        {**WHERE, "chosen": "User: a word for who uses a thing."},
        {"prompt": LONG, "chosen": "You ask: where does it land? " * 3 + LONG, "rejected": "No."},
        {"prompt": LONG, "chosen": "x" * 900 + "\n" + LONG, "rejected": "No."},
        {"prompt": LONG, "chosen": f"{'At the pier! ' * 5}Tell me, {LONG}", "rejected": "No."},
        {**WHERE, "chosen": "System: a word.\nAssistant: another."},
        {**WHERE, "score_chosen": 2, "score_rejected": 2},
        {**WHERE, "score_chosen": None, "score_rejected": 2},
    ],
)
def test_plausible_rows(row):
    assert plausible.suspect(check_pair(row)) is None


def test_implausible_data_is_said_and_refused_above_a_share(letters, tmp_path):
    odd = {"prompt": LONG, "chosen": f"{LONG} Here.", "rejected": f"{LONG} There."}
    good = [{**WHERE, "prompt": f"Where {i}?"} for i in range(6)]
    path = write(tmp_path / "a.jsonl", *good, *[odd] * 4)
    options = {"max_length": 400}
    [note] = prepare([path], letters, **options).notes()
    assert note.startswith("implausible: 4 of 10 rows: an answer begins with its prompt; ")
    assert note.count(f"{path} row ") == plausible.SHOWN and f"{path} row 6: 'Where does" in note
    for share in (0.39, 0.0):
        with pytest.raises(
            DataError, match="implausible data: 4 of 10 .*pass --max_implausible 1; else"
        ):
            prepare([path], letters, max_implausible=share, **options)
    assert len(prepare([path], letters, max_implausible=0.4, **options)) == 10
    path = write(tmp_path / "b.jsonl", *[odd] * 4)
    with pytest.raises(DataError, match="implausible data: 4 of 4 rows"):
        prepare([path], letters, **options)
    assert len(prepare([path], letters, max_implausible=1, **options)) == 4


def test_rendered_conversations_are_refused_with_what_takes_them_as_they_are(letters, tmp_path):
    """Not by the control tokens in them: whoever allows those alone renders them twice."""
    plain = {"prompt": "Where?", "chosen": "Here.", "rejected": "There."}
    turns = [{"role": "user", "content": plain["prompt"]}]
    prompt = letters.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ends = {name: plain[name] + letters.eos_token for name in ("chosen", "rejected")}
    path = write(tmp_path / "a.jsonl", {"prompt": prompt, **ends})
    for allowed in (False, True):
        with pytest.raises(
            DataError, match="implausible data: .* --max_implausible 1, and "
        ) as error:
            prepare([path], letters, max_length=400, allow_control_tokens=allowed)
    wanted = prepare([write(tmp_path / "b.jsonl", plain)], letters, max_length=400).group(0)
    letters.chat_template = str(error.value).partition("FILE with ")[2].partition(", which")[0]
    options = {"allow_control_tokens": True, "max_implausible": 1}
    found = prepare([path], letters, max_length=400, **options).group(0)
    assert (found.prompt, found.responses) == (wanted.prompt, wanted.responses)


# ------------------------------------------------------------ two models' tokens


def test_same_tokens(collected):
    texts = ["Sure, Pebble.", "I do not know that."]
    one, other = (families.tokenizer("byte-level", "after a newline") for _ in range(2))
    other.add_special_tokens({"pad_token": "[PAD]"})
    other.chat_template = None  # a base model's; the conversation is the first one's
    same_tokens(one, other, texts, range(300))
    other.add_tokens(["ebb"])  # splits a text in use otherwise
    with pytest.raises(ValueError, match="has ids .* in one and .* in the other"):
        same_tokens(one, other, texts)
    for kind in ("metaspace first", "wordpiece"):
        with pytest.raises(ValueError, match="in one and"):
            same_tokens(one, families.tokenizer(kind, "after a newline"), texts)


def test_same_tokens_looks_at_the_ends_of_turns(letters, merged):
    """The same bytes and merges, and no token for the end of a turn: texts alone would not tell."""
    core = json.loads(letters.backend_tokenizer.to_str())
    core["added_tokens"] = [t for t in core["added_tokens"] if t["content"] != "<|im_end|>"]
    core["model"]["vocab"]["<|other|>"] = core["model"]["vocab"].pop("<|im_end|>")
    other = type(letters)(
        tokenizer_object=type(letters.backend_tokenizer).from_str(json.dumps(core))
    )
    assert other("ok")["input_ids"] == letters("ok", add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match=re.escape("<|im_end|>")):
        same_tokens(letters, other, ["ok"])


def test_texts_and_ids_in_use(letters, collected):
    rows = [{**WHERE, "chosen": f"ok {i}"} for i in range(5)]
    texts, ids = in_use(letters, collected(letters, *rows))
    assert len(texts) == 10 and texts[2].endswith("<|im_start|>assistant\nok 1<|im_end|>")
    assert 2 in ids and ids == sorted(set(ids))
    same_tokens(letters, letters, texts, ids)


def test_kinds_are_told_by_their_columns(tmp_path):
    rows = [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d", "label": True},
    ]
    kinds = [tokens.kind_of([write(tmp_path / f"{i}.jsonl", row)]) for i, row in enumerate(rows)]
    assert kinds == ["labelled", "pair"]
