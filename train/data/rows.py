"""Rows of the user's data, read from files, folders and the hub, and checked one by one.

A source is one of
    pairs.jsonl, pairs.json    one JSON object a line; a .json may also be one array of objects
    pairs.csv, pairs.parquet a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk`
    wrote, or folder@split org/name, org/name:config, org/name@split, org/name:config@split    on
    the hub; a split such as train[:10%] too
A file or folder that exists goes before a hub name. Globs and plain folders of files are refused.

What is wrong with a whole file is a DataError. What is wrong with one row is a RowError: that row
is dropped with the reason, the others stand. JSON is read here, line by line, because Arrow allows
one type a column and would refuse a whole file for one odd row. A row that names a key twice, or a
message in it that does, is dropped: nobody knows which of the two is meant.
"""

import csv
import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from train.data import tables
from train.data.errors import DataError, MissingColumn, RowError, listed

ROLES = ("system", "user", "assistant")
PAIR_COLUMNS = ("prompt", "chosen", "rejected")
LABELLED_COLUMNS = ("prompt", "completion", "label")
TEXT_COLUMNS = ("text",)
LABELS = {
    True: True,
    False: False,
    "true": True,
    "false": False,
    "1": True,
    "0": False,
}  # text: of a CSV
# With an organisation always: `load_dataset("csv")` would read whatever lies in the working folder.
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")
JSON_SHAPES = "one JSON object a line (.jsonl, .json) or one array of objects (.json)"


class TwoValues(dict):
    """A JSON object that names a key twice; `key` is that key. As a dict it holds the last value."""

    def __init__(self, pairs: list):
        super().__init__(pairs)
        self.key = Counter(key for key, _ in pairs).most_common(1)[0][0]


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


def read_rows(sources: Sequence[str], split: str = "train") -> Iterator[tuple[str, int, Any]]:
    """Yield (source, number of the row within it, row) of every source in order.

    `split` is taken from hub data sets and saved DatasetDicts that name none. A row is whatever
    stands there: a dict if the data is sound, a RowError where Python cannot hold it. Raises
    DataError for a source that is not there, is not what its name says, is not UTF-8 or not JSON,
    or has no rows.
    """
    for source in [sources] if isinstance(sources, str) else sources:
        index = -1
        for index, row in enumerate(_read(source, split)):
            yield source, index, row
        if index < 0:
            raise DataError(f"{source}: no rows in it")


def _read(source: str, split: str) -> Iterator[Any]:
    """Choose the reader. Raises DataError where there is none."""
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        suffix = os.path.splitext(path)[1].lower()
        if suffix not in READERS:
            raise DataError(
                f"{source}: files of type {suffix!r} are not read; expected one of {', '.join(READERS)}"
            )
        return READERS[suffix](path)
    folder, _, named = path.rpartition("@")
    if os.path.isdir(path):
        return tables.saved_folder(source, path, split)
    if os.path.isdir(folder):
        return tables.saved_folder(source, folder, named)
    if (
        "://" in source
    ):  # what follows the host may hold a password or a signature, and this line goes to a log
        scheme, _, rest = source.partition("://")
        host = re.split("[/?#]", rest)[0].rpartition("@")[2]
        raise DataError(
            f"{scheme}://{host}/...: addresses are not read; fetch the file and name it here"
        )
    hub = HUB_NAME.fullmatch(source)
    if source.lower().endswith(tuple(READERS)) or source.startswith((".", "/", "~")):
        raise DataError(f"{source}: no such file or folder{_neighbours(path)}")
    if hub is None:
        raise DataError(
            f"{source}: no such file or folder{_neighbours(path)}, nor org/name as on the hub"
        )
    return tables.hub(source, hub["name"], hub["config"], hub["split"] or split)


def _neighbours(path: str) -> str:
    """ " (did you mean ...?)" with the nearest names in the path's folder, or nothing."""
    folder, name = os.path.split(path)
    try:
        near = difflib.get_close_matches(name, os.listdir(folder or "."), 2)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        near = []
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _open_lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line). Raises DataError where the file is unreadable or a line is
    not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(
                        b"\xef\xbb\xbf"
                    )  # the byte order mark that some editors put first
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError as error:
                    found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
                    raise DataError(
                        f"{path}, line {number}: not UTF-8, found {found} in {line[:40]!r}"
                    ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _integer(digits: str) -> int | float:
    """Python refuses to parse integers of more than 4,300 digits; one in an unused column is no
    reason to stop.
    """
    return int(digits) if len(digits) < 4000 else float(digits)


def _object(pairs: list) -> dict:
    found = dict(pairs)
    return found if len(found) == len(pairs) else TwoValues(pairs)


DECODER = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_object)


def _parse(text: str, path: str, line: int) -> Any:
    """Parse one JSON value that begins on `line`; a RowError instead where it is nested beyond
    Python's stack.
    """
    try:
        return DECODER.decode(text)
    except RecursionError:
        return RowError("nested too deeply")
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        found = (
            f"found {text[error.pos : error.pos + 40]!r}"
            if text[error.pos :].strip()
            else "it ends too early"
        )
        raise DataError(
            f"{where}: not JSON ({error.msg}): {found}; expected {JSON_SHAPES}"
        ) from error


def _read_lines(path: str) -> Iterator[Any]:
    for number, line in _open_lines(path):
        if line.strip():
            yield _parse(line.rstrip("\r\n"), path, number)


def _read_json(path: str) -> Iterator[Any]:
    """A .json is an array when its first character is "[", else JSON lines. Blank lines stay, for
    the line numbers.
    """
    text = "".join(line for _, line in _open_lines(path))
    if not text.lstrip().startswith("["):
        return _read_lines(path)
    rows = _parse(text, path, 1)
    if isinstance(rows, RowError):
        raise DataError(f"{path}: {rows}; in a .jsonl file only the row would be dropped")
    return iter(rows)


def _read_csv(path: str) -> Iterator[Any]:
    """Every field is text. Not through pandas: it makes numbers of "42", null of "NA", and names no
    row that is odd.
    """
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than csv's 131,072 characters
    reader = csv.DictReader((line for _, line in _open_lines(path)), strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise DataError(
                f"{path}, line {reader.line_num}: a column stands twice in {listed(names)}"
            )
        for row in reader:  # fields beyond the header come under None, missing ones as None
            odd = None in row or None in row.values()
            yield RowError(f"not {len(names)} fields, as the header has") if odd else row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: not CSV: {error}") from error


READERS = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": tables.parquet,
}


def columns_missing(source: str, column: str, found: list, columns: Sequence[str]) -> DataError:
    lower = {str(name).lower(): name for name in found}
    near = [lower[name] for name in difflib.get_close_matches(column, list(lower), 2, 0.5)]
    return DataError(
        f"{source}: no column {column!r}; found {listed(found)}; expected {listed(columns)}"
        + (f"; rename {near[0]!r}?" if near else "")
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
    before, completion = _response(row["completion"], "completion")
    if row.get("prompt") is None and before is None:
        raise RowError("prompt is null") if "prompt" in row else MissingColumn("prompt")
    messages = before or _prompt(row["prompt"])
    if before is not None and row.get("prompt") is not None and _prompt(row["prompt"]) != before:
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


def _unambiguous(found: dict, name: str) -> None:
    if isinstance(found, TwoValues):
        raise RowError(f"{name} has the key {found.key[:40]!r} twice")


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
        messages.append(
            {
                "role": role,
                "content": _string(message.get("content"), f"{name} message {number}: content"),
            }
        )
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
