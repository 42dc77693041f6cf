"""Rows of the user's data, checked one by one.

What is wrong with a whole file is a DataError. What is wrong with one row is a RowError: that row
is dropped with the reason, the others stand. A row that names a key twice, or a message in it that
does, is dropped: nobody knows which of the two is meant.

A message keeps every key it has (tool_calls, reasoning_content, name, ...), for the chat template
to use; a content that is a list of text parts is joined, a content that is null is empty.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from train.data import shapes
from train.data.errors import DataError, MissingColumn, RowError, listed
from train.data.sources import TwoValues, in_python

SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")
# Roles as ShareGPT's from/value messages name them.
SHAREGPT_ROLES = {
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"},
    **{"observation": "tool", "tool_response": "tool"},
    **{role: role for role in ROLES},
}
# Keys of a message by which two prompts differ; others (an id, a time) are no difference.
TELLING_KEYS = (
    *("role", "content", "name", "tool_calls", "function_call", "tool_call_id"),
    *("reasoning_content", "reasoning", "thinking"),
)
PAIR_COLUMNS = ("prompt", "chosen", "rejected")
SCORED_PAIR_COLUMNS = (*PAIR_COLUMNS, *shapes.SCORE_PAIRS[0])
LABELLED_COLUMNS = ("prompt", "completion", "label")
PROMPT_COLUMNS = ("prompt",)
TEXT_COLUMNS = ("text",)
# Values of a label; 1, 0 and 1.0 equal True and False as keys. Text: of a CSV.
LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
TYPE_WORDS = {
    dict: "an object",
    TwoValues: "an object",
    list: "a list",
    tuple: "a list",
    str: "a string",
    bool: "a boolean",
    type(None): "null",
    int: "a number",
    float: "a number",
}


class Dropped(NamedTuple):
    """A row that is not used."""

    source: str  # as the user named it
    row: int  # number within the source, counted from 0 (blank lines of a file are no rows)
    reason: str


class Pair(NamedTuple):
    """A prompt and two answers to it."""

    messages: list[dict]  # the prompt; the last turn is user's or a tool's
    chosen: dict  # a message of the assistant
    rejected: dict
    template_args: dict  # what else the chat template gets: tools, documents, ...
    remarks: Sequence[str] = ()  # how the row was read, where that is worth saying

    @property
    def answers(self) -> tuple[dict, ...]:
        return self.chosen, self.rejected


class Labelled(NamedTuple):
    """A prompt and an answer that was judged on its own."""

    messages: list[dict]
    completion: dict
    label: bool  # whether the answer is desirable
    template_args: dict
    remarks: Sequence[str] = ()

    @property
    def answers(self) -> tuple[dict, ...]:
        return (self.completion,)


class Asked(NamedTuple):
    """A prompt to be answered."""

    messages: list[dict]
    template_args: dict
    remarks: Sequence[str] = ()
    answers: tuple = ()


class Candidates(NamedTuple):
    """A prompt and the answers to choose from."""

    messages: list[dict]
    answers: tuple[dict, ...]  # messages of the assistant, the chosen ones first
    num_chosen: int
    template_args: dict
    remarks: Sequence[str] = ()


class Compared(NamedTuple):
    """A pair, and by how much chosen is better."""

    messages: list[dict]
    chosen: dict
    rejected: dict
    template_args: dict
    remarks: Sequence[str]
    target: float

    @property
    def answers(self) -> tuple[dict, ...]:
        return self.chosen, self.rejected


class Rated(NamedTuple):
    """A prompt and an answer that has a score."""

    messages: list[dict]
    completion: dict
    template_args: dict
    remarks: Sequence[str]
    target: float

    @property
    def answers(self) -> tuple[dict, ...]:
        return (self.completion,)


def columns_missing(source: str, column: str, found: list, columns: Sequence[str]) -> DataError:
    """The error for a source without `column`: what it has instead, and what to do about it."""
    missing = [name for name in columns if name not in found] or [column]
    return DataError(
        f"{source}: no column {column!r}; found {listed(found)}; expected {listed(columns)}; "
        f"{shapes.advice(missing, found, in_python(source))}"
    )


def check_pair(row: Any) -> Pair:
    """The pair of one row, whose columns are PAIR_COLUMNS or what shapes.py makes of others.

    prompt: a string (one user's turn) or messages. chosen, rejected: a string, one assistant
    message (a dict or a list of one), or a whole conversation, which then must share all but its
    last turn with the other and agree with `prompt` where there is one (as messages: be equal; as a
    string: be one of its users' turns). Raises RowError.
    """
    _check_object(row)
    row, remarks = shapes.canonical(row)
    for column in ("chosen", "rejected"):
        if column not in row:
            raise MissingColumn(column)
    prompt = _prompt(row["prompt"]) if row.get("prompt") is not None else None
    chosen_prompt, chosen = _response(row["chosen"], "chosen")
    rejected_prompt, rejected = _response(row["rejected"], "rejected")
    if (
        chosen_prompt
        and rejected_prompt
        and not _same_turns(chosen_prompt, rejected_prompt, strictly=True)
    ):
        raise RowError("prompts of chosen and rejected differ")
    conversation = chosen_prompt or rejected_prompt
    if conversation is None and prompt is None:
        raise _no_prompt(row)
    if conversation is not None and prompt is not None:
        if not _is_of(prompt, conversation, row["prompt"]):
            raise RowError("prompt differs from the conversation in chosen and rejected")
    messages = _with_system(conversation or prompt, row)
    _check_turns(messages)
    if chosen == rejected:
        raise RowError("chosen equals rejected")
    return Pair(messages, chosen, rejected, _template_args(row), remarks)


def check_candidates(row: Any) -> Candidates:
    """The answers of one row to choose from: those of a pair, or several, where `chosen` or
    `rejected` is a list of answers (texts, or conversations), as in RewardBench 2. Raises RowError.
    """
    _check_object(row)
    if not any(_is_several(row.get(column)) for column in ("chosen", "rejected")):
        pair = check_pair(row)
        return Candidates(pair.messages, pair.answers, 1, pair.template_args, pair.remarks)
    several = {}
    for column in ("chosen", "rejected"):
        if column not in row:
            raise MissingColumn(column)
        several[column] = row[column] if _is_several(row[column]) else [row[column]]
        if not several[column]:
            raise RowError(f"{column} has no answer in it")
    chosen, rejected = several["chosen"], several["rejected"]
    pairs = [check_pair(row | {"chosen": c, "rejected": rejected[0]}) for c in chosen]
    pairs += [check_pair(row | {"chosen": chosen[0], "rejected": r}) for r in rejected[1:]]
    first = pairs[0]
    if any(pair.messages != first.messages for pair in pairs):
        raise RowError("prompts of the answers differ")
    right = [pair.chosen for pair in pairs[: len(chosen)]]
    wrong = [first.rejected, *(pair.rejected for pair in pairs[len(chosen) :])]
    if any(answer in right for answer in wrong):
        raise RowError("chosen equals rejected")
    answers = (*right, *wrong)
    return Candidates(first.messages, answers, len(right), first.template_args, first.remarks)


def _is_several(value: Any) -> bool:
    """Whether a column holds a list of answers: of texts or of conversations. A list of objects is
    one conversation.
    """
    return isinstance(value, (list, tuple)) and all(isinstance(v, (str, list)) for v in value)


def check_margin(row: Any) -> Compared:
    """A pair whose target is its column `margin`; 0 where that is not there or null. Raises RowError."""
    pair = check_pair(row)
    margin = row.get("margin")
    return Compared(*pair, 0.0 if margin is None else _number(margin, "margin"))


def check_score_margin(row: Any) -> Compared:
    """A pair whose target is score_chosen - score_rejected. Raises RowError."""
    pair = check_pair(row)
    for columns in shapes.SCORE_PAIRS:
        if all(row.get(column) is not None for column in columns):
            chosen, rejected = (_number(row[column], column) for column in columns)
            return Compared(*pair, _number(chosen - rejected, " - ".join(columns)))
        if null := [column for column in columns if column in row and row[column] is None]:
            raise RowError(f"{null[0]} is null")
    raise MissingColumn(shapes.SCORE_PAIRS[0][0])


def check_scored(row: Any) -> Rated:
    """An answer that was judged on its own, as check_labelled reads it, with a number for a target:
    the column `score`, or else `label` (true and false are 1 and 0). Raises RowError.
    """
    _check_object(row)
    column = "label" if row.get("score") is None else "score"
    if row.get(column) is None:
        raise MissingColumn("label")
    label = row[column].strip().lower() if isinstance(row[column], str) else row[column]
    if isinstance(label, (bool, str)) and label in LABELS:
        label = float(LABELS[label])
    target = _number(label, column)
    row, remarks = shapes.canonical({name: row[name] for name in row if name != column})
    messages, completion = _judged(row)
    return Rated(messages, completion, _template_args(row), remarks, target)


def check_prompt(row: Any) -> Asked:
    """The prompt of one row, whatever answers it has: of preference data too, where the answers may
    bring the prompt along; of a conversation all turns but the assistant's last. Raises RowError.
    """
    _check_object(row)
    row, remarks = shapes.canonical(shapes.without_answers(row))
    prompt = _prompt(row["prompt"]) if row.get("prompt") is not None else None
    conversation = None
    for name in ("chosen", "rejected", "completion"):
        if conversation is None and row.get(name):
            try:
                conversation, _ = _response(row[name], name)
            except RowError:  # an answer that nobody could train on is no fault of its prompt
                if prompt is None:
                    raise
    if prompt and conversation and conversation[0]["role"] in ("assistant", "tool"):
        conversation = None  # an answer of several turns
    if conversation is None and prompt is None:
        raise _no_prompt(row)
    if conversation is not None and prompt is not None:
        if not _is_of(prompt, conversation, row["prompt"]):
            raise RowError("prompt differs from the conversation in the answers")
    messages = _with_system(conversation or prompt, row)
    _check_turns(messages)
    return Asked(messages, _template_args(row), remarks)


def check_labelled(row: Any) -> Labelled:
    """The judged answer of one row.

    prompt and completion: as prompt and chosen of a pair. label: true or false, 1 or 0. Raises
    RowError.
    """
    _check_object(row)
    row, remarks = shapes.canonical(row)
    for column in ("completion", "label"):
        if column not in row:
            raise MissingColumn(column)
    label = row["label"].strip().lower() if isinstance(row["label"], str) else row["label"]
    if not isinstance(label, (bool, int, float, str)) or label not in LABELS:
        raise RowError(f"label is {_type(label)} other than true and false")
    messages, completion = _judged(row)
    return Labelled(messages, completion, LABELS[label], _template_args(row), remarks)


def _judged(row: dict) -> tuple[list[dict], dict]:
    """The prompt and the answer of a row that has one answer. Raises RowError."""
    if "completion" not in row:
        raise MissingColumn("completion")
    conversation, completion = _response(row["completion"], "completion")
    prompt = _prompt(row["prompt"]) if row.get("prompt") is not None else None
    if prompt is None and conversation is None:
        raise _no_prompt(row)
    if conversation is not None and prompt is not None:
        if not _is_of(prompt, conversation, row["prompt"]):
            raise RowError("prompt differs from the conversation in completion")
    messages = _with_system(conversation or prompt, row)
    _check_turns(messages)
    return messages, completion


def check_text(row: Any) -> str:
    """Return the text of one row of plain text. Raises RowError."""
    _check_object(row)
    if "text" not in row:
        raise MissingColumn("text")
    text = _string(row["text"], "text")
    if not text.strip():
        raise RowError("empty text")
    return text


def turns_of(messages: list[dict]) -> list[dict]:
    """The messages with their role and content alone: what makes two prompts the same prompt."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in messages]


def _check_object(row: Any) -> None:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        hint = " (a file that is one array is a .json)" if isinstance(row, list) else ""
        raise RowError(f"the row is {_type(row)}, not an object{hint}")
    _unambiguous(row, "the row")


def _unambiguous(members: dict, name: str) -> None:
    if isinstance(members, TwoValues):
        raise RowError(f"{name} has the key {members.key[:40]!r} twice")


def _type(value: Any) -> str:
    if isinstance(value, RowError):
        return f"unreadable ({value})"
    return TYPE_WORDS.get(type(value), type(value).__name__)


def _string(value: Any, name: str) -> str:
    """A string that can be written as UTF-8: tokenizers refuse half a surrogate pair, which JSON's
    \\ud800 makes.
    """
    if not isinstance(value, str):
        raise RowError(f"{name} is {_type(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"{name} is not valid Unicode: {value[error.start]!r} at character {error.start}"
        ) from None
    return value


def _number(value: Any, name: str) -> float:
    """A finite number, a CSV's text included."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        shown = repr(value)[:40] if isinstance(value, (str, int, float)) else _type(value)
        raise RowError(f"{name} is {shown}, not a finite number")
    return number


def _content(value: Any, name: str, is_optional: bool) -> str:
    """The text of a message: a string, a list of text parts, or null where other keys say it all."""
    if value is None and is_optional:
        return ""
    if not isinstance(value, list) or not any(isinstance(part, dict) for part in value):
        return _string(value, name)
    texts = []
    for part in value:
        if not isinstance(part, dict):
            raise RowError(f"{name} has a part that is {_type(part)}, not an object with its text")
        _unambiguous(part, f"a part of {name}")
        if part.get("type", "text") != "text":
            kind = part["type"] if isinstance(part["type"], str) else _type(part["type"])
            raise RowError(f"{name} has a part of type {kind[:40]!r}; only text is trained on")
        texts.append(_string(part.get("text"), f"{name}: text of a part"))
    return "".join(texts)


def _plain(value: Any, name: str) -> Any:
    """A value that JSON can hold, as the template gets it. Raises RowError."""
    if isinstance(value, str):
        return _string(value, name)
    if isinstance(value, dict):
        _unambiguous(value, name)
        return {_string(str(key), name): _plain(inner, name) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, name) for inner in value]
    if isinstance(value, RowError):
        raise RowError(f"{name} is {_type(value)}")
    # Dates and bytes, which a parquet may have.
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)


def _messages(value: Sequence, name: str) -> list[dict]:
    """Messages with their role, their content and whatever else they hold. Raises RowError."""
    messages = []
    for number, message in enumerate(value):
        label = f"{name} message {number}"
        if not isinstance(message, dict):
            raise RowError(f"{label} is {_type(message)}, not an object with role and content")
        _unambiguous(message, label)
        keys = ("role", "content")
        if "role" not in message and "from" in message:  # ShareGPT
            keys = ("from", "value")
        role = _string(message.get(keys[0]), f"{label}: {keys[0]}")
        known = SHAREGPT_ROLES if keys[0] == "from" else dict.fromkeys(ROLES)
        if role not in known:
            raise RowError(f"unknown role {role[:40]!r} in {name}; known: {', '.join(known)}")
        try:
            others = {
                key: _plain(inner, f"{label}: {key[:40]!r}")
                for key, inner in message.items()
                if key not in keys and inner is not None
            }
        except RecursionError:
            raise RowError(f"{label} is nested too deeply") from None
        if isinstance(others.get("tool_calls"), str):  # of a parquet whose calls are unlike
            calls = shapes.from_json(others["tool_calls"], f"{label}: tool_calls")
            others["tool_calls"] = _plain(calls, f"{label}: tool_calls")
        content = _content(
            message.get(keys[1]), f"{label}: {keys[1]}", bool(others.get("tool_calls"))
        )
        messages.append({"role": known[role] or role, "content": content, **others})
    return messages


def _prompt(value: Any) -> list[dict]:
    if isinstance(value, str):
        messages = [{"role": "user", "content": _string(value, "prompt")}]
    elif isinstance(value, (dict, list, tuple)):
        messages = _messages([value] if isinstance(value, dict) else value, "prompt")
    else:
        raise RowError(f"prompt is {_type(value)}, not a string or messages")
    if not any(message["content"].strip() for message in messages):
        raise RowError("empty prompt")
    return messages


def _no_prompt(row: dict) -> RowError:
    """What to say of a row whose prompt is neither in a column of its own nor in its answers."""
    for name in ("chosen", "rejected", "completion"):
        if isinstance(row.get(name), str) and shapes.is_written_out(row[name]):
            return RowError(
                f"no prompt, and {name} is a conversation written out as text: make messages of it by "
                "json.loads, or by ast.literal_eval where the quotes are Python's"
            )
    return RowError("prompt is null") if "prompt" in row else MissingColumn("prompt")


def _response(value: Any, name: str) -> tuple[list[dict] | None, dict]:
    """(the conversation before the last turn, or None where the answer stands alone; the answer as
    a message).
    """
    conversation = None
    message = {"role": "assistant", "content": ""}
    if isinstance(value, str):
        message["content"] = _string(value, name)
    elif isinstance(value, (dict, list, tuple)):
        messages = _messages([value] if isinstance(value, dict) else value, name)
        if messages and messages[-1]["role"] != "assistant":
            raise RowError(
                f"roles out of order: {name} ends with {messages[-1]['role']}, not with assistant"
            )
        conversation = messages[:-1] or None
        message = messages[-1] if messages else message
    else:
        raise RowError(f"{name} is {_type(value)}, not a string or messages")
    if not message["content"].strip() and not message.get("tool_calls"):
        raise RowError(f"empty response: {name}")
    return conversation, message


def _is_of(prompt: list[dict], conversation: list[dict], value: Any) -> bool:
    """Whether a prompt is that of a conversation. value: as the row has it; a string may be any of
    its turns.
    """
    if isinstance(value, str) and any(_same_turns(prompt, [turn]) for turn in conversation):
        return True
    if _same_turns(prompt, conversation):
        return True
    if conversation[0]["role"] in ("assistant", "tool"):
        raise RowError(
            "an answer begins with further turns of assistant and tool: put all but its last turn "
            "into the prompt"
        )
    return False


def _same_turns(one: list[dict], other: list[dict], strictly: bool = False) -> bool:
    """Whether two lists of messages say the same.

    Keys that say nothing (an id, a time) do not count; nor, unless `strictly`, does a key that only
    one of them has, or outer white space: a prompt may be written out in less detail than the
    conversation it begins.
    """
    return len(one) == len(other) and all(
        _same_values(a.get(key) or None, b.get(key) or None, strictly)
        for a, b in zip(one, other, strict=True)
        for key in TELLING_KEYS
        if strictly or (key in a and key in b)
    )


def _same_values(one: Any, other: Any, strictly: bool) -> bool:
    if not strictly and isinstance(one, str) and isinstance(other, str):
        return one.strip() == other.strip()
    return one == other


def _with_system(messages: list[dict], row: dict) -> list[dict]:
    """The messages behind the system turn that a column of its own holds. Raises RowError."""
    said = [row[name] for name in shapes.SYSTEMS if row.get(name)]
    if any(other != said[0] for other in said[1:]):
        raise RowError(f"the columns {' and '.join(map(repr, shapes.SYSTEMS))} contradict")
    for name in shapes.SYSTEMS:
        if not row.get(name):
            continue
        text = _string(row[name], name)
        if not text.strip():
            continue
        if messages[0]["role"] not in SYSTEM_ROLES:
            return [{"role": "system", "content": text}, *messages]
        if messages[0]["content"].strip() != text.strip():
            raise RowError(f"the column {name!r} differs from the system turn in the messages")
    return messages


def _template_args(row: dict) -> dict:
    try:
        found = shapes.template_args(row)
        return {name: _plain(value, name) for name, value in found.items()} if found else found
    except RecursionError:
        raise RowError("tools or documents are nested too deeply") from None


def _check_turns(messages: list[dict]) -> None:
    """At most one system message, first; then user and assistant in turn, the user first. Tools may
    speak after the assistant; the user or a tool speaks last. Raises RowError.
    """
    roles = [message["role"] for message in messages]
    before = "system"
    in_order = True
    for role in roles[1:] if roles[0] in SYSTEM_ROLES else roles:
        in_order &= role in {
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("tool", "assistant"),
        }.get(before, ())
        before = role
    if not in_order or before not in ("user", "tool"):
        shown = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
        raise RowError(
            f"roles out of order: {shown}; expected user and assistant in turn, the prompt ending with user"
        )
    for message in messages:
        says_nothing = not message["content"].strip() and not message.get("tool_calls")
        if says_nothing and message["role"] in ("user", "assistant"):
            raise RowError(f"empty prompt: a turn of {message['role']} has no text")
