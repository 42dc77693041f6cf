"""Prompt and response ids against token lists spelt out by hand (fixture `letters`: a token a
byte).
"""

import types

import numpy as np
import pytest
import transformers

from tests.data.alone import Pair, encode
from train.data.chat import Chat, Request, check_fit, tokenise
from train.data.encoders import ConversationEncoder, TextEncoder, check_lengths
from train.data.packing import Group
from train.data.rows import RowError

START, END = 1, 2
HI = [{"role": "user", "content": "Hi"}]
SYSTEM = "<|im_start|>system\nYou are helpful.<|im_end|>\n"
HI_TEXT = SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"  # noqa: E501
TRIMMED = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] | trim + '<|im_end|>\n<|endoftext|>' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"  # noqa: E501


def spell(text):
    """Token ids by the byte-level alphabet: printable ASCII from "!" (3) on, see SPACE for the
    rest.
    """
    ids = []
    while text:
        special = next(
            (s for s in ("<|endoftext|>", "<|im_start|>", "<|im_end|>") if text.startswith(s)), None
        )
        if special:
            ids.append(["<|endoftext|>", "<|im_start|>", "<|im_end|>"].index(special))
        else:
            ids.append({" ": SPACE, "\n": NEWLINE}.get(text[0], ord(text[0]) - ord("!") + 3))
        text = text[len(special or text[0]) :]
    return ids


# 3 control tokens, 94 printable ASCII, 12 + 82 of Latin-1, then the bytes 0, 1, ... that have no
# letter of their own
SPACE = 3 + 94 + 12 + 82 + 32
NEWLINE = 3 + 94 + 12 + 82 + 10


def pair(chosen="ok", rejected="no", messages=HI, row=0):
    return Pair(messages, chosen, rejected, row)


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def test_ids_by_hand(letters):
    chat = Chat(letters)
    # <|im_start|> a s s i s t a n t \n
    header = [START, 67, 85, 85, 75, 85, 86, 67, 80, 86, NEWLINE]
    # <|im_start|> u s e r \n H i <|im_end|> \n
    hello = [START, 87, 85, 71, 84, NEWLINE, 42, 75, END, NEWLINE]
    assert chat.prompt_ids(HI) == spell(SYSTEM) + hello + header == spell(HI_TEXT)
    # o k <|im_end|>, without the newline behind it
    assert chat.response_ids(HI, "ok") == [81, 77, END]
    assert (chat.end, chat.end_id, chat.header_length) == ("<|im_end|>", END, 11)
    assert encode(chat, pair(row=7), 200) == Group(
        tuple(spell(HI_TEXT)), ((81, 77, END), (80, 81, END)), 7
    )


def test_multi_turn(letters):
    turns = [
        {"role": "system", "content": "S"},
        *HI,
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "?"},
    ]
    text = (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
        "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert Chat(letters).prompt_ids(turns) == spell(text)
    assert Chat(letters).response_ids(turns, "ok") == [81, 77, END]


def test_no_token_crosses_the_border(merged):
    """With merges, prompt and response are what they are alone, joined."""
    chat = Chat(merged)
    assert merged.decode(chat.prompt_ids(HI)) == HI_TEXT
    answer = chat.response_ids(HI, "the answer")
    assert answer == merged("the answer", add_special_tokens=False)["input_ids"] + [END]
    assert len(answer) < len("the answer")  # merged, or this test shows nothing


def test_template_without_end_token_gets_eos(letters):
    chat = Chat(with_template(letters, PLAIN))
    assert chat.prompt_ids(HI) == spell("user: Hi\nassistant: ")
    assert chat.response_ids(HI, "ok") == [81, 77, END]
    # The answer's own newline stays, the template's goes.
    assert chat.response_ids(HI, "ok\n") == [81, 77, NEWLINE, END]
    assert chat.header_length == len("assistant: ")


def test_template_that_trims_and_goes_on_after_the_end(letters):
    chat = Chat(with_template(letters, TRIMMED))
    assert chat.prompt_ids([{"role": "user", "content": " Hi\n"}]) == spell(
        "[user]Hi<|im_end|>\n<|endoftext|>[assistant]"
    )
    assert chat.response_ids(HI, " ok \n") == [81, 77, END]
    with pytest.raises(RowError, match="equal after the chat template"):
        encode(chat, pair("ok", "ok "), 100)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template.*chat_template.jinja"),
        (
            "{{ raise_exception('never') }}",
            "cannot render a question and its answer: .*never.*--chat_template FILE",
        ),
        ("{% if m %}{{ 1 + '1' }}{% endif %}{{ messages[0].content + 1 }}", "cannot render"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "leaves out the assistant's answer.*--chat_template FILE",
        ),
    ],
)
def test_templates_refused_at_the_door(letters, template, message):
    with pytest.raises(ValueError, match=message):
        Chat(with_template(letters, template))


def test_missing_tokens(letters):
    """An end token is needed; nothing is padded, so a pad token is not."""
    letters.pad_token = None
    assert Chat(letters).response_ids(HI, "ok") == [81, 77, END]
    letters.eos_token = None
    with pytest.raises(ValueError, match="no eos_token: set 'eos_token'"):
        Chat(letters)


def test_row_that_the_template_refuses(letters):
    picky = letters.chat_template.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if 'X' in m.content %}{{ raise_exception('no X') }}{% endif %}",
    )  # noqa: E501
    moody = PLAIN.replace(
        "'assistant: '", "'assistant: ' if 'X' not in messages[0].content else 'bot: '"
    )
    with pytest.raises(RowError, match="the chat template refuses it: no X"):
        encode(Chat(with_template(letters, picky)), pair("X"), 100)
    # In one batch: only one of them goes.
    requests = [Request(HI, [{"role": "assistant", "content": text}], {}) for text in ("ok", "X")]
    good, bad = Chat(letters).render(requests)
    assert good.all_texts == (HI_TEXT, HI_TEXT + "ok<|im_end|>") and isinstance(bad, RowError)
    # A header of its own for the prompt of this row: the answer follows that.
    group = encode(
        Chat(with_template(letters, moody)), pair(messages=[{"role": "user", "content": "X"}]), 100
    )
    assert group.prompt == tuple(spell("user: X\nbot: ")) and group.responses[0] == (81, 77, END)
    fickle = "{{ messages[-1]['content'][:1] }}" + PLAIN  # the answer changes what stands before
    with pytest.raises(RowError, match="renders the prompt otherwise once it is answered"):
        encode(Chat(with_template(letters, fickle)), pair("zebra", "yak"), 100)


def test_truncation(letters):
    chat = Chat(letters)
    prompt = tuple(spell(HI_TEXT))
    # the prompt keeps its end, 13 of its tokens: <|im_end|> \n and the header of 11; 3 tokens are
    # left of 16
    assert encode(chat, pair("okay", "no"), 16, 13) == Group(
        prompt[-13:], ((81, 77, 67), (80, 81, END)), 0
    )
    assert prompt[-13:] == (END, NEWLINE, *spell("<|im_start|>assistant\n"))
    answers = [{"role": "assistant", "content": text} for text in ("okay", "no")]
    (rendered,) = chat.render([Request(HI, answers, {})])
    ids = tokenise(letters, rendered.all_texts)
    encoded = ConversationEncoder(chat, 16, 13).finish(rendered, ids)
    assert encoded.truncated == (True, True, False)
    # without max_prompt_length one token is left for the responses
    assert encode(chat, pair("ok", "no"), len(prompt)) == Group(prompt[1:], ((81,), (80,)), 0)
    assert encode(chat, pair("ok", "no"), len(prompt) + 3, len(prompt)).responses == (
        (81, 77, END),
        (80, 81, END),
    )
    with pytest.raises(RowError, match="equal after truncation"):
        encode(chat, pair("okay", "okra"), 13, 11)
    assert encode(chat, pair("ok", "okay"), 14, 11).responses == ((81, 77, END), (81, 77, 67))


def test_lengths_that_leave_no_room(letters):
    chat = Chat(letters)
    for lengths, message in [
        (
            (16, 10),
            "a prompt of 10 tokens cannot hold the assistant's header of 11: raise max_prompt_length",
        ),
        ((11, None), "header of 11: raise max_length"),
        (
            (16, 16),
            "--max_prompt_length 16 leaves no room for a response in --max_length 16: lower",
        ),
        ((1, None), "at least 2 and 1"),
        ((16, 0), "at least 2 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ConversationEncoder(chat, *lengths)
    assert check_lengths(16, None) == 15 and check_lengths(16, 11, 11) == 11


def test_model_and_tokenizer_that_do_not_fit(letters):
    """The largest id in use needs an embedding; one that no text reaches does not."""

    def config(size):
        return transformers.LlamaConfig(vocab_size=size, max_position_embeddings=64)

    def data(*ids):
        return types.SimpleNamespace(ids=np.array(ids, dtype=np.int32))

    check_fit(config(259), letters, 64, [data(5, 258)])
    check_fit(config(258), letters, 64, [data(5, 257), data()])
    check_fit(config(258), letters, 64)
    with pytest.raises(ValueError, match="has token 258, .* the model's vocabulary is 258: "):
        check_fit(config(258), letters, 64, [data(5), data(258, 3)])
    with pytest.raises(ValueError, match="--max_length 65 is more than the model's 64 positions"):
        check_fit(config(259), letters, 65)


@pytest.mark.parametrize("place", ["chosen", "rejected", "prompt"])
@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_control_tokens(letters, place, token):
    text = f"a{token}b"
    odd = (
        pair(messages=[{"role": "user", "content": text}])
        if place == "prompt"
        else pair(**{place: text})
    )
    with pytest.raises(RowError) as error:
        encode(Chat(letters), odd, 200)
    assert (
        str(error.value) == f"control token {token!r} in the text (--allow_control_tokens keeps it)"
    )
    group = encode(Chat(letters, allow_control_tokens=True), odd, 200)
    ids = group.prompt if place == "prompt" else group.responses[place == "rejected"]
    assert letters.convert_tokens_to_ids(token) in ids[:-1]


def test_an_allowed_end_token_stands_once(letters):
    chat = Chat(letters, allow_control_tokens=True)
    assert chat.response_ids(HI, "ok<|im_end|>") == [81, 77, END]


def test_added_special_tokens_count_as_control(letters):
    letters.add_tokens(["<|tool|>"], special_tokens=True)
    letters.add_tokens(["<plain>"])
    with pytest.raises(RowError, match="control token"):
        encode(Chat(letters), pair("<|tool|>"), 200)
    assert Chat(letters).response_ids(HI, "<plain>") == [
        letters.convert_tokens_to_ids("<plain>"),
        END,
    ]


def test_tokens_that_frame_turns_are_control_tokens_special_or_not(letters):
    """`<turn>` and `</turn>` are plain added tokens: what the template writes around a turn, no
    text may hold.
    """
    letters.add_tokens(["<turn>", "</turn>", "<think>", "user", "\n\n"])
    template = (
        "{% for m in messages %}{{ '<turn>' + m.role + '\n\n' }}"
        "{{ '<think>' if m.role == 'assistant' and loop.last else '' }}"
        "{{ m.content + '</turn>\n\n' }}{% endfor %}{% if add_generation_prompt %}<turn>assistant\n\n<think>{% endif %}"
    )
    chat = Chat(with_template(letters, template))
    assert (chat.end, chat.end_id) == ("</turn>", letters.convert_tokens_to_ids("</turn>"))
    assert chat.response_ids(HI, "<think>ok\n\nuser")[-1] == chat.end_id
    for token in ("<turn>", "</turn>"):
        with pytest.raises(RowError, match=f"control token '{token}' in the text"):
            encode(chat, pair(f"a{token}b"), 200)


def test_text_encoder(letters):
    encoder = TextEncoder(letters, 3)
    good, bad = encoder.render(["okay", "<|im_end|>"])
    assert good.all_texts == ("okay",)
    assert str(bad) == "control token '<|im_end|>' in the text (--allow_control_tokens keeps it)"
    assert encoder.finish(good, [[81, 77, 67, 91]]) == ([], ([81, 77, 67],), (False, True))
    assert encoder.finish(good, [[81]]) == ([], ([81],), (False, False))
    with pytest.raises(RowError, match="no tokens"):
        encoder.finish(good, [[]])
    assert (
        tokenise(letters, ["okay", "\0"]) == [[81, 77, 67, 91], [NEWLINE - 10]]
        and tokenise(letters, []) == []
    )
