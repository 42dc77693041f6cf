"""Rows of the user's data, checked one by one.

What is wrong with a whole file is a DataError. What is wrong with one row is a RowError: that row
is dropped with the reason, the others stand. A row that names a key twice, or a message in it that
does, is dropped: nobody knows which of the two is meant.
"""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

from train.data.errors import DataError, MissingColumn, RowError, listed
from train.data.sources import TwoValues

ROLES = ("system", "user", "assistant")
PAIR_COLUMNS = ("prompt", "chosen", "rejected")
LABELLED_COLUMNS = ("prompt", "completion", "label")
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


def columns_missing(source: str, column: str, found: list, columns: Sequence[str]) -> DataError:
    """The error for a source without `column`: what it has instead, and the nearest name."""
    lower = {str(name).lower(): name for name in found}
    near = [lower[name] for name in difflib.get_close_matches(column, list(lower), 2, 0.5)]
    advice = f"; rename {near[0]!r}?" if near else ""
    return DataError(
        f"{source}: no column {column!r}; found {listed(found)}; expected {listed(columns)}{advice}"
    )


def check_pair(row: Any) -> tuple[list, str, str]:
    """Return (messages of the prompt, chosen, rejected) of one row; other columns are ignored.

    prompt: a string (one user's turn) or messages. chosen, rejected: a string, one assistant
    message (a dict or a list of one), or a whole conversation, which then must share all but its
    last turn with the other and agree with `prompt` where there is one (as messages: be equal; as a
    string: be one of its users' turns). Raises RowError.
    """
    for column in ("chosen", "rejected"):
        _need(row, column)
    prompt = _prompt(row["prompt"]) if row.get("prompt") is not None else None
    chosen_prompt, chosen = _response(row["chosen"], "chosen")
    rejected_prompt, rejected = _response(row["rejected"], "rejected")
    if chosen_prompt and rejected_prompt and chosen_prompt != rejected_prompt:
        raise RowError("prompts of chosen and rejected differ")
    shared = chosen_prompt or rejected_prompt
    if shared is None and prompt is None:
        raise RowError("prompt is null") if "prompt" in row else MissingColumn("prompt")
    if shared is not None and prompt is not None:
        if prompt != shared and not (isinstance(row["prompt"], str) and prompt[0] in shared):
            raise RowError("prompt differs from the conversation in chosen and rejected")
    messages = shared or prompt
    _check_turns(messages)
    if chosen == rejected:
        raise RowError("chosen equals rejected")
    return messages, chosen, rejected


def check_labelled(row: Any) -> tuple[list, str, bool]:
    """Return (messages of the prompt, answer, whether it is desirable) of one row; other columns
    are ignored.

    prompt and completion: as prompt and chosen of a pair. label: true or false, 1 or 0. Raises
    RowError.
    """
    for column in ("completion", "label"):
        _need(row, column)
    label = row["label"].strip().lower() if isinstance(row["label"], str) else row["label"]
    if not isinstance(label, (bool, int, float, str)) or label not in LABELS:
        raise RowError(f"label is {_type(label)} other than true and false")
    conversation, completion = _response(row["completion"], "completion")
    has_prompt = row.get("prompt") is not None
    if not has_prompt and conversation is None:
        raise RowError("prompt is null") if "prompt" in row else MissingColumn("prompt")
    messages = conversation or _prompt(row["prompt"])
    if conversation is not None and has_prompt and _prompt(row["prompt"]) != conversation:
        raise RowError("prompt differs from the conversation in completion")
    _check_turns(messages)
    return messages, completion, LABELS[label]


def check_text(row: Any) -> str:
    """Return the text of one row of plain text. Raises RowError."""
    _need(row, "text")
    text = _string(row["text"], "text")
    if not text.strip():
        raise RowError("empty text")
    return text


def _need(row: Any, column: str) -> None:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError(f"the row is {_type(row)}, not an object")
    _unambiguous(row, "the row")
    if column not in row:
        raise MissingColumn(column)


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


def _messages(value: list, name: str) -> list[dict]:
    """Messages with their role and content and nothing else. Raises RowError."""
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise RowError(
                f"{name} message {number} is {_type(message)}, not an object with role and content"
            )
        _unambiguous(message, f"{name} message {number}")
        role = _string(message.get("role"), f"{name} message {number}: role")
        if role not in ROLES:
            raise RowError(f"unknown role {role[:40]!r} in {name}; known: {', '.join(ROLES)}")
        content = _string(message.get("content"), f"{name} message {number}: content")
        messages.append({"role": role, "content": content})
    return messages


def _prompt(value: Any) -> list[dict]:
    if isinstance(value, str):
        messages = [{"role": "user", "content": _string(value, "prompt")}]
    elif isinstance(value, (list, tuple)):
        messages = _messages(value, "prompt")
    else:
        raise RowError(f"prompt is {_type(value)}, not a string or messages")
    if not any(message["content"].strip() for message in messages):
        raise RowError("empty prompt")
    return messages


def _response(value: Any, name: str) -> tuple[list[dict] | None, str]:
    """(the conversation before the last turn, or None where the answer stands alone; the answer's
    text).
    """
    before = None
    if isinstance(value, str):
        text = _string(value, name)
    elif isinstance(value, (dict, list, tuple)):
        messages = _messages([value] if isinstance(value, dict) else value, name)
        if messages and messages[-1]["role"] != "assistant":
            raise RowError(
                f"roles out of order: {name} ends with {messages[-1]['role']}, not with assistant"
            )
        before = messages[:-1] or None
        text = messages[-1]["content"] if messages else ""
    else:
        raise RowError(f"{name} is {_type(value)}, not a string or messages")
    if not text.strip():
        raise RowError(f"empty response: {name}")
    return before, text


def _check_turns(messages: list[dict]) -> None:
    """At most one system message, first; then user and assistant in turn, the user first and last.
    Raises RowError.
    """
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if len(turns) % 2 == 0 or any(
        role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)
    ):
        shown = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
        raise RowError(
            f"roles out of order: {shown}; expected user and assistant in turn, the prompt ending with user"
        )
    for message in messages:
        if message["role"] != "system" and not message["content"].strip():
            raise RowError(f"empty prompt: a turn of {message['role']} has no text")
