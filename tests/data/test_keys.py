"""Keys that carry meaning, in every place where a row may hold them: rendered, said or dropped."""

import json

import pytest

from tests.data import families
from train.data.rows import check_pair
from train.data.tokens import collect

ANSWER = "'<|bot|>\\n' + m['content']"
THOUGHT = "('<think>' + m['reasoning_content'] + '</think>' if m['reasoning_content'] else '')"
CALLS = "((m['tool_calls'] | tojson) if m['tool_calls'] else '')"
FIRST_CALL = "((m['tool_calls'][0] | tojson) if m['tool_calls'] else '')"
NAME = "(m['name'] + ': ' if m['name'] else '')"


def user(text, **keys):
    return {"role": "user", "content": text, **keys}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def calls(*names):
    return [{"type": "function", "function": {"name": n, "arguments": {"of": n}}} for n in names]


@pytest.fixture
def read(tmp_path):
    def read(row, template=families.NEWLINE):
        """(texts of the responses or None, what is said of the row)."""
        tokenizer = families.tokenizer("byte-level", template)
        tokenizer.chat_template = template
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        data = collect([str(path)], tokenizer, max_length=2000)
        said = " | ".join([*data.notes(), *(dropped.reason for dropped in data.dropped)])
        responses = data.group(0).responses if len(data) else None
        return responses and [tokenizer.decode(list(ids)) for ids in responses], said

    return read


KEYS = families.NEWLINE.replace(ANSWER, f"'<|bot|>\\n' + {THOUGHT} + m['content'] + {CALLS}")


def test_ranked_answers_keep_their_keys(read):
    row = {
        "prompt": "Hi there",
        "completions": [
            {"content": "x", "reasoning_content": "deep", "score": 2},
            {"content": "x", "reasoning_content": "wrong", "score": 1},
        ],
    }
    assert read(row, KEYS)[0] == ["<think>deep</think>x<|end|>", "<think>wrong</think>x<|end|>"]
    row["completions"] = [
        {"role": "assistant", "content": "x", "tool_calls": calls("tide"), "score": 2},
        {"role": "assistant", "content": "y", "score": 1},
    ]
    chosen, rejected = read(row, KEYS)[0]
    assert '"tide"' in chosen and rejected == "y<|end|>"


@pytest.mark.parametrize(
    "one, other",
    [
        (user("Hi", name="al"), user("Hi", name="bob")),
        (assistant("k", reasoning="p"), assistant("k", reasoning="q")),
        (assistant("k", tool_calls=calls("f")), assistant("k")),
    ],
)
def test_prompts_that_differ_in_a_key_are_not_one(read, one, other):
    turns = [[user("Hi"), one, user("b")], [user("Hi"), other, user("b")]]
    if one["role"] == "user":
        turns = [[one], [other]]
    row = {"chosen": [*turns[0], assistant("x")], "rejected": [*turns[1], assistant("y")]}
    assert read(row) == (None, "prompts of chosen and rejected differ")


def test_calls_that_are_written_in_part(read):
    template = families.NEWLINE.replace(ANSWER, f"{ANSWER} + {FIRST_CALL}")
    row = {
        "prompt": "Hi",
        "chosen": assistant("", tool_calls=calls("soup", "tea")),
        "rejected": "n",
    }
    texts, said = read(row, template)
    assert texts is None and "its tool calls are not in what it renders" in said
    row["chosen"] = assistant("", tool_calls=calls("soup"))
    assert '"soup"' in read(row, template)[0][0]


def test_an_answer_that_names_a_call_s_argument_under_a_template_without_calls(read):
    call = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    chosen = assistant("How is it in Paris?", tool_calls=[call])
    texts, said = read({"prompt": "Hi", "chosen": chosen, "rejected": "n"})
    assert texts[0] == "How is it in Paris?<|end|>" and "tool_calls" in said


@pytest.mark.parametrize(
    "more, said",
    [
        ({"reasoning_content": "r"}, "the column 'reasoning_content' is not read"),
        ({"tool_calls": calls("f")}, "the column 'tool_calls' is not read"),
        ({"system_message": "Be a cat"}, "the column 'system_message' is not read"),
        ({"messages": [user("first")]}, "the column 'messages' is not read: there is a 'prompt'"),
        ({"question": "Other?"}, "the column 'question' is not read: there is a 'prompt'"),
    ],
)
def test_columns_beside_a_prompt_are_said(read, more, said):
    texts, notes = read({"prompt": "hi", "chosen": "a", "rejected": "b", **more})
    assert texts == ["a<|end|>", "b<|end|>"] and said in notes


def test_a_system_column_that_differs_in_outer_white_space_is_no_other():
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    row = {"prompt": prompt, "chosen": "a", "rejected": "b", "system": " Be brief.\n"}
    assert check_pair(row).messages == prompt


def test_systems_that_contradict(read):
    row = {"prompt": "hi", "chosen": "a", "rejected": "b", "system": "A", "system_prompt": "B"}
    assert read(row) == (None, "the columns 'system' and 'system_prompt' contradict")


def test_a_turn_that_is_left_out_although_its_text_stands_elsewhere(read):
    row = {"system": "cat", "prompt": "Is a cat grey?", "chosen": "x", "rejected": "y"}
    without = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>\n{{ m['content'] }}<|end|>\n"
    )
    without += "{% elif m['role'] == 'assistant' %}<|bot|>\n{{ m['content'] }}<|end|>\n{% endif %}"
    without += "{% endfor %}{% if add_generation_prompt %}<|bot|>\n{% endif %}"
    assert "leaves out or changes a turn of system" in read(row, without)[1]
    assert "leaves out" not in read({**row, "system": "Be brief."}, families.NEWLINE)[1]


@pytest.mark.parametrize(
    "prompt",
    [
        "Human: Hi\nAssistant:",
        "### Human: Hi\n### Assistant:",
        "User: Hi\n\nAssistant: Sure,",
        "[INST] Hi [/INST]",
        "<|im_start|>user\nHi<|im_end|>",
        "<bos><start_of_turn>user\nHi<end_of_turn>\n",
        "<start_of_turn>user\nHi<end_of_turn>\n",
        "<|turn>user\nHi<turn|>\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
        "<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>Hi<\uff5cAssistant\uff5c>",
        "[gMASK]<sop><|user|>\nHi<|assistant|>\n",
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>",
        "<|start|>user<|message|>Hi<|end|><|start|>assistant",
    ],
)
def test_prompts_with_turns_in_them_are_said(read, prompt):
    assert "a prompt holds turns" in read({"prompt": prompt, "chosen": "a", "rejected": "b"})[1]


@pytest.mark.parametrize(
    "text, is_dump",
    [
        ('[{"id": 1, "role": "user", "content": "Hi"}]', True),
        ('{"message": {"role": "assistant", "content": "Hi"}}', True),
        ("({'role': 'user', 'content': 'Hi'},)", True),
        ("ChatCompletionMessage(content='Hi', role='assistant')", True),
        ('```json\n[{"role": "user", "content": "Hi"}]\n```', True),
        ('[{\\"role\\": \\"user\\", \\"content\\": \\"Hi\\"}]', True),
        ('[{"value": 0, "unit": "C"}]', False),
        ('{"content": "a page", "title": "T"}', False),
        ('{"from": "me", "text": "see you"}', False),
        ('{"role": "wizard", "text": "level 3"}', False),
    ],
)
def test_dumps_of_conversations(read, text, is_dump):
    notes = read({"prompt": "What is it?", "chosen": text, "rejected": "no"})[1]
    assert ("written out as JSON or Python" in notes) == is_dump


def test_a_thought_opened_in_the_header_and_kept_in_finished_turns(read):
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|bot|>{% if '<think>' not in "
        "m['content'] %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|end|>{% else %}<|user|>"
        "{{ m['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|bot|><think>"
        "{{ '\n' }}{% endif %}"
    )
    row = {
        "prompt": "Hi",
        "chosen": "<think>\nwhy\n</think>\n\nSure",
        "rejected": "<think>\nno\n</think>\n\nNo",
    }
    texts, _ = read(row, template)
    assert texts == ["why\n</think>\n\nSure<|end|>", "no\n</think>\n\nNo<|end|>"]
