"""The ids that are trained are the ids that inference sees: kind of template x family of tokenizer x
shape of row, against transformers alone.

The oracle renders and tokenises every conversation whole, with `apply_chat_template` and nothing of
ours. Where the prompt's ids are a prefix of the conversation's, the response is the rest, to and
including the first end token. Elsewhere, and only in the documented exceptions, the response must
decode behind the prompt to what the template renders for the answer.
"""

import collections
import functools
import json
import re

import pytest

from tests.data import families
from train.data.chat import Chat
from train.data.tokens import collect

MAX_LENGTH = 4000
QUESTION = "Name a small grey cat."
SYSTEM = {"role": "system", "content": "Please think of the garden."}
CHOSEN, REJECTED = "Sure, Pebble.", "I do not know that."
THOUGHT = "<think>\nA cat, grey.\n</think>\n\nPebble is good."


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


FIRST = [user(QUESTION), assistant("Ash."), user("Could you say more?")]
# shape -> (row, messages of the prompt, chosen, rejected)
SHAPES = {
    "strings": (
        {"prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED},
        ([user(QUESTION)], CHOSEN, REJECTED),
    ),
    "messages": (
        {"prompt": FIRST, "chosen": [assistant(CHOSEN)], "rejected": assistant(REJECTED)},
        (FIRST, CHOSEN, REJECTED),
    ),
    "conversations with a system turn": (
        {
            "chosen": [SYSTEM, user(QUESTION), assistant(CHOSEN)],
            "rejected": [SYSTEM, user(QUESTION), assistant(REJECTED)],
        },
        ([SYSTEM, user(QUESTION)], CHOSEN, REJECTED),
    ),
    "a system column": (
        {"system": SYSTEM["content"], "prompt": FIRST, "chosen": CHOSEN, "rejected": REJECTED},
        ([SYSTEM, *FIRST], CHOSEN, REJECTED),
    ),
    "white space around": (
        {"prompt": f" {QUESTION}\n", "chosen": f" {CHOSEN}\n", "rejected": f"\n\n{REJECTED} "},
        ([user(f" {QUESTION}\n")], f" {CHOSEN}\n", f"\n\n{REJECTED} "),
    ),
    "a thought": (
        {"prompt": QUESTION, "chosen": THOUGHT, "rejected": REJECTED},
        ([user(QUESTION)], THOUGHT, REJECTED),
    ),
    "one letter, emoji": (
        {"prompt": QUESTION, "chosen": "I", "rejected": "é 🐈 \t two  spaces"},
        ([user(QUESTION)], "I", "é 🐈 \t two  spaces"),
    ),
}
CUTS_THOUGHTS = "thoughts cut from finished answers"
# Templates under which the response is not the rest of the whole conversation: why, and the shapes
# of row, all where there is None.
EXCEPTIONS = {
    "a thought opened in the header": ("a finished turn's header lacks the thought's mark", None),
    "after a space": ("the header's last space would be one token with the first word", None),
    "after a space, no end token": (
        "besides, eos stands where the template has no end token",
        None,
    ),
    "system text in the last turn of the user": (
        "the system text goes once the turn of the user is no longer the last",
        ("conversations with a system turn", "a system column"),
    ),
}


@functools.cache
def tokenizer_of(kind, template):
    return families.tokenizer(kind, template)


def oracle(tokenizer, messages, answer, end_id):
    """(prompt, response or None where the prompt's ids are no prefix or no end token follows)."""
    render = functools.partial(tokenizer.apply_chat_template, tokenize=True, return_dict=False)
    prompt = render(messages, add_generation_prompt=True)
    whole = render([*messages, assistant(answer)])
    rest = whole[len(prompt) :]
    if whole[: len(prompt)] != prompt or end_id not in rest:
        return prompt, None
    return prompt, rest[: rest.index(end_id) + 1]


def decode(tokenizer, ids):
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # transformers leaves the byte tokens of the sentencepiece library as they are.
    return re.sub(r"(?:<0x[0-9A-F]{2}>)+", lambda found: _bytes(found.group()), text)


def _bytes(spelt):
    return bytes.fromhex(spelt.replace("<0x", "").replace(">", "")).decode()


def normal(text, is_lossy):
    """An answer as far as the tokenizer keeps it; the thought may have been opened by the prompt."""
    if is_lossy:
        text = "".join(text.lower().replace("\u2028", " ").split())
    # Some tokenizers put a space of their own behind an added token, in whole conversations too.
    return text.replace("think> ", "think>").strip().removeprefix("<think>").strip()


def check_cell(tokenizer, kind, template, data):
    """Compare every row of `data` with the oracle. Returns a mark a shape, for the table."""
    chat = Chat(tokenizer)
    is_lossy = kind in families.LOSSY
    groups = {int(data.rows[i]): data.group(i) for i in range(len(data))}
    dropped = {each.row: each.reason for each in data.dropped}
    marks = {}
    for row, (shape, (_, (messages, *answers))) in enumerate(SHAPES.items()):
        if template == CUTS_THOUGHTS and shape == "a thought":
            assert "the chat template leaves out" in dropped[row]
            marks[shape] = "dropped"
            continue
        if row in dropped:
            # Unigram and WordPiece have unknown characters; BPE here has bytes for all.
            raise AssertionError((kind, template, shape, dropped[row]))
        group = groups[row]
        marks[shape] = "equal"
        for response, answer in zip(group.responses, answers, strict=True):
            prompt, expected = oracle(tokenizer, messages, answer, chat.end_id)
            assert list(group.prompt) == prompt, (kind, template, shape)
            response = list(response)
            assert response[-1] == chat.end_id and response.count(chat.end_id) == 1
            if expected is not None:
                assert response == expected, (kind, template, shape)
            else:
                _, shapes = EXCEPTIONS[template]
                assert shapes is None or shape in shapes, (kind, template, shape)
                marks[shape] = "exception"
            # What a model that learnt it writes is the answer.
            before = decode(tokenizer, prompt)
            written = decode(tokenizer, prompt + response)
            assert written.startswith(before.rstrip() if is_lossy else before)
            written = written[len(before) :].rstrip().removesuffix(chat.end)
            if template == "an empty thought before the answer" and "<think>" not in answer:
                written = written.rpartition("</think>")[2]
            if not (is_lossy and shape == "one letter, emoji"):  # unknown characters
                assert normal(written, is_lossy) == normal(answer, is_lossy), (
                    kind,
                    template,
                    shape,
                )
    return marks


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in SHAPES.values()))
    return str(path)


@pytest.mark.parametrize("template", families.TEMPLATES)
@pytest.mark.parametrize("kind", families.TOKENIZERS)
def test_ids_are_the_conversations(kind, template, rows):
    tokenizer = tokenizer_of(kind, template)
    data = collect([rows], tokenizer, max_length=MAX_LENGTH)
    marks = check_cell(tokenizer, kind, template, data)
    print(f"\n{kind} | {template} | {dict(collections.Counter(marks.values()))}")
    is_cut = template == CUTS_THOUGHTS
    assert list(marks.values()).count("dropped") == int(is_cut) and len(marks) == len(SHAPES)
    if template not in EXCEPTIONS:
        assert {*marks.values()} <= {"equal", "dropped"}


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("legacy", [True, False])
def test_ids_of_the_sentencepiece_library(model_type, legacy, rows, tmp_path):
    pytest.importorskip("sentencepiece")
    for template in families.TEMPLATES:
        tokenizer = families.slow_sentencepiece(tmp_path, legacy, model_type, template)
        data = collect([rows], tokenizer, max_length=MAX_LENGTH)
        kind = f"sentencepiece library, {model_type}, legacy={legacy}"
        print(f"\n{kind} | {template} | {check_cell(tokenizer, kind, template, data)}")
