"""Answers that the template ends or writes otherwise than a plain one, and shapes that bring them."""

import json

import pytest

from tests.data import families
from train.data.chat import Chat
from train.data.errors import DataError
from train.data.rows import check_pair
from train.data.tokens import check_rows, collect

CALLS = [{"type": "function", "function": {"name": "tide", "arguments": {"port": "P0"}}}]
# Llama 3.1 and gpt-oss: a call ends in a token of its own
OWN_END = (
    "{% for m in messages %}{{ '<|user|>' if m.role != 'assistant' else '<|bot|>' }}{{ m.content }}"
    "{% if m.tool_calls %}{{ (m.tool_calls[0].function | tojson) + '<|sys|>' }}"
    "{% else %}{{ '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"
)
SHOUTS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content + '<|end|>\n' }}"
    "{% else %}{{ '<|bot|>' + (m.content EDIT) + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"
)
CUT_THOUGHTS = SHOUTS.replace("EDIT", ".split('</think>')[-1]")


@pytest.fixture
def collected(tmp_path):
    def collected(template, *rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = families.tokenizer("byte-level", template)
        data = collect([str(path)], tokenizer, **{"max_length": 500, **options})
        return data, tokenizer

    return collected


def texts(found):
    data, tokenizer = found
    return [[tokenizer.decode(ids) for ids in data.group(i).responses] for i in range(len(data))]


def test_a_call_ends_as_the_template_ends_calls(collected):
    call = {"role": "assistant", "content": "", "tool_calls": CALLS}
    row = {"prompt": "When?", "chosen": call, "rejected": "Later."}
    data, tokenizer = found = collected(OWN_END, row)
    assert not data.dropped
    assert texts(found) == [
        ['{"name": "tide", "arguments": {"port": "P0"}}<|sys|>', "Later.<|end|>"]
    ]
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "When?"}, call], return_dict=False
    )
    group = data.group(0)
    assert [*group.prompt, *group.responses[0]] == whole[:-1]  # without the newline at the end


ARGUMENTS = {"port": "P0", "days": [1, 2], "note": "ça va"}
WRITES_CALLS = OWN_END.replace(
    "(m.tool_calls[0].function | tojson)",
    "m.tool_calls[0].function.name + ' ' + (m.tool_calls[0].function.arguments EDIT)",
)


@pytest.mark.parametrize("given", [ARGUMENTS, json.dumps(ARGUMENTS)], ids=["object", "text"])
@pytest.mark.parametrize(
    ("edit", "takes"),
    [
        ("| tojson", ARGUMENTS),  # Qwen2.5, Llama 3.1, gpt-oss
        ("| dictsort | string", ARGUMENTS),  # Qwen3.5, GLM-4.5: no text
        ("+ ''", json.dumps(ARGUMENTS, ensure_ascii=False)),  # DeepSeek-V3: no object
    ],
    ids=["json", "pairs", "text alone"],
)
def test_arguments_of_calls_are_what_the_template_takes(collected, edit, takes, given):
    """Data have them as objects, or as their JSON, as OpenAI sends it: as text in quotation marks no
    model would write them. In the prompt's turns as in answers.
    """

    def turns(arguments):
        function = {"name": "tide", "arguments": arguments}
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
        asked = {"role": "user", "content": "When?"}
        return [asked, call, {"role": "tool", "content": "At two."}], call

    prompt, call = turns(given)
    row = {"prompt": prompt, "chosen": call, "rejected": "Later."}
    data, tokenizer = collected(WRITES_CALLS.replace("EDIT", edit), row)
    assert not data.dropped
    is_kept = isinstance(takes, str) and isinstance(given, str)  # as it is spelt
    prompt, call = turns(given if is_kept else takes)
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*prompt, call], return_dict=False)
    group = data.group(0)
    assert list(group.prompt) == ids
    assert [*group.prompt, *group.responses[0]] == whole[:-1]  # without the newline at the end


def test_a_call_with_broken_arguments_stays_as_it_is(collected):
    """It may be what is rejected."""

    def call(arguments):
        function = {"name": "tide", "arguments": arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}

    row = {"prompt": "When?", "chosen": call('{"port": 1}'), "rejected": call('{"port": ')}
    found = collected(WRITES_CALLS.replace("EDIT", "| tojson"), row)
    assert texts(found) == [['tide {"port": 1}<|sys|>', 'tide "{\\"port\\": "<|sys|>']]


def test_calls_that_the_template_leaves_out_are_named(collected):
    call = {"role": "assistant", "content": "", "tool_calls": CALLS}
    data, _ = collected(CUT_THOUGHTS, {"prompt": "When?", "chosen": call, "rejected": "Later."})
    assert data.dropped[0].reason.endswith(
        "which leaves out tool calls (--chat_template FILE for one that keeps them)"
    )


# Command R7B closes the answer, then the turn; Phi-3 ends a conversation that nothing follows with eos
CLOSES = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content + '</s>' }}"
    "{% else %}{{ '<|bot|>' + m.content + '<|end|></s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"
)
EOS_LAST = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|bot|>' }}"
    "{{ m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|bot|>' if add_generation_prompt else '</s>' }}"
)


@pytest.mark.parametrize(
    ("template", "ending"), [(CLOSES, "<|end|></s>"), (EOS_LAST, "<|end|>")], ids=["closes", "last"]
)
def test_the_end_of_a_turn_is_eos_where_eos_ends_turns(collected, template, ending):
    """What inference stops at, and so what a model has to write."""
    data, tokenizer = found = collected(
        template, {"prompt": "When?", "chosen": "Now.", "rejected": "Later."}
    )
    assert texts(found) == [["Now." + ending, "Later." + ending]]
    assert data.group(0).responses[0][-1] == Chat(tokenizer).end_id


@pytest.mark.parametrize("edit", ["| upper", "| capitalize", "[:6]", "| replace('e', '3')"])
def test_a_template_that_changes_answers_is_judged_by_row(collected, edit):
    """Rows that it leaves as they are stay; others are dropped, or kept as rendered."""
    template = SHOUTS.replace("EDIT", edit)
    tokenizer = families.tokenizer("byte-level", template)
    kept = {"prompt": "Who?", "chosen": "HM.", "rejected": "NO."}
    if edit == "| capitalize":
        kept = {"prompt": "Who?", "chosen": "Hm.", "rejected": "No."}
    changed = {"prompt": "Who?", "chosen": "some people", "rejected": "the people"}
    data, _ = found = collected(template, kept, changed)
    assert texts(found) == [[kept["chosen"] + "<|end|>", kept["rejected"] + "<|end|>"]]
    [dropped] = data.dropped
    assert "the chat template leaves out or changes part of the answer" in dropped.reason
    assert "--chat_template FILE" in dropped.reason
    allowed = texts(collected(template, changed, allow_template_changes=True))
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": changed[side]}],
            tokenize=False,
        ).removeprefix("<|user|>Who?<|end|>\n<|bot|>")
        for side in ("chosen", "rejected")
    ]
    assert allowed == [[text.removesuffix("\n") for text in rendered]]


def test_a_template_without_the_answer_is_refused():
    with pytest.raises(ValueError, match="leaves out the assistant's answer"):
        Chat(families.tokenizer("byte-level", SHOUTS.replace("EDIT", "[:0]")))


def test_thoughts_in_answers_that_the_template_cuts(collected):
    """As R1's template does with finished turns: dropped, or with the flag what is left is trained."""
    row = {"prompt": "Why?", "chosen": "<think>Hm.</think>So.", "rejected": "<think>No.</think>Oh."}
    data, _ = collected(CUT_THOUGHTS, row)
    assert not len(data) and "--allow_template_changes" in data.dropped[0].reason
    kept = collected(CUT_THOUGHTS, row, allow_template_changes=True)
    assert texts(kept) == [["So.<|end|>", "Oh.<|end|>"]]


# ------------------------------------------------------------ bos that begins every turn

TURN = (
    "{% for m in messages %}{{ '<|user|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("system", ["one two three four " * 10, ""])
def test_no_begin_of_a_turn_stands_alone(collected, system, monkeypatch):
    """Where bos is <|im_start|> and no system turn fits, a cut prompt is its end and nothing else."""
    of_family = families.tokenizer

    def with_bos(*args):
        tokenizer = of_family(*args)
        tokenizer.bos_token = "<|user|>"
        return tokenizer

    monkeypatch.setattr(families, "tokenizer", with_bos)
    question = {"role": "user", "content": "five six seven eight " * 10}
    prompt = [{"role": "system", "content": system}, question] if system else [question]
    row = {"prompt": prompt, "chosen": "a", "rejected": "b"}
    limits = {"max_prompt_length": 30, "truncate_prompt": "keep_system_and_end"}
    data, tokenizer = collected(TURN, row, **limits)
    end, _ = collected(TURN, row, max_prompt_length=30)
    assert data.group(0).prompt == end.group(0).prompt
    assert tokenizer.decode(data.group(0).prompt).count("<|user|>") == 1


# ------------------------------------------------------------ shapes


def pair_of(row):
    pair = check_pair(row)
    return [turn["content"] for turn in pair.messages], *(a["content"] for a in pair.answers)


def test_messages_that_end_with_the_chosen_answer():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    for chosen in ("Yes.", turns[1], [turns[1]]):
        row = {"messages": turns, "chosen": chosen, "rejected": "No."}
        assert pair_of(row) == (["Hi"], "Yes.", "No.")


def test_a_document_on_one_line(tmp_path):
    rows = [{"prompt": "Hi", "chosen": "a", "rejected": "b"}] * 2
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": rows}))
    found, _ = check_rows([str(path)], check_pair, ("prompt",))
    assert len(found) == 2
    # one row is one row, on one line or on several, whatever lists are in it
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]
    row = {"messages": messages, "rejected_response": "b", "chosen": "a", "rejected": "b"}
    del row["chosen"], row["rejected"]
    for indent in (None, 1):
        path.write_text(json.dumps(row, indent=indent))
        found, dropped = check_rows([str(path)], check_pair, ("prompt",))
        assert len(found) == 1 and not dropped


def test_calls_and_tools_as_text():
    """As a parquet file holds them whose rows have unlike ones."""
    call = {"role": "assistant", "content": "", "tool_calls": json.dumps(CALLS)}
    row = {"prompt": "Hi", "chosen": call, "rejected": "b", "tools": [json.dumps({"name": "tide"})]}
    pair = check_pair(row)
    assert pair.chosen["tool_calls"] == CALLS
    assert pair.template_args == {"tools": [{"name": "tide"}]}
    row["chosen"] = call | {"tool_calls": "[{"}
    with pytest.raises(ValueError, match="tool_calls is a string that is not JSON"):
        check_pair(row)


def test_turns_between_prompt_and_answer_say_where_they_belong():
    turns = [
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "content": "high"},
        {"role": "assistant", "content": "It is high."},
    ]
    with pytest.raises(ValueError, match="put all but its last turn into the prompt"):
        check_pair(
            {
                "prompt": "When?",
                "chosen": turns,
                "rejected": turns[:2] + [turns[2] | {"content": "No."}],
            }
        )


def test_refusals_name_the_columns_that_were_meant(tmp_path):
    def refusal(row, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError) as caught:
            check_rows([str(path)], check_pair, ("prompt", "chosen", "rejected"), **options)
        return str(caught.value)

    said = refusal({"prompt": "a", "chosen": "b", "rejected": "c"}, columns=["prompt=nope"])
    assert (
        "no column 'nope'; found 'prompt', 'chosen', 'rejected'; it is named in --columns" in said
    )
    pku = {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 1}
    said = refusal(pku)
    line = said.partition("lambda row: ")[2].partition(").to_json")[0]
    converted = eval(f"lambda row: {line}")(pku)  # noqa: S307 - our own advice, as a user would run it
    assert converted == {"chosen": "c", "rejected": "b"}
    said = refusal({"q": "a", "good": "b", "bad": "c"})
    assert "pass --columns prompt=q chosen=good rejected=bad" in said
    said = refusal({"x": "a", "good": "b", "bad": "c"})
    assert '"prompt": ..., "chosen": row["good"], "rejected": row["bad"]' in said
