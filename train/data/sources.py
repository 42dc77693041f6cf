"""Where rows come from.

A source is one of

    pairs.jsonl, pairs.json    one JSON object a line; a .json may also be one array of objects
    pairs.csv, pairs.parquet
    a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, or folder@split
    org/name, org/name:config, org/name@split, org/name:config@split
                               on the hub; a split such as train[:10%] too

A file or folder that exists goes before a hub name. Globs and plain folders of files are refused.
JSON is read here, line by line, because Arrow allows one type a column and would refuse a whole
file for one odd row.
"""

import csv
import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from train.data import arrow
from train.data.errors import DataError, RowError, listed

# With an organisation always: `load_dataset("csv")` would read whatever lies in the working folder.
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")

JSON_SHAPES = "one JSON object a line (.jsonl, .json) or one array of objects (.json)"


class TwoValues(dict):
    """A JSON object that names a key twice; `key` is that key. As a dict it holds the last value."""

    def __init__(self, pairs: list):
        super().__init__(pairs)
        self.key = Counter(key for key, _ in pairs).most_common(1)[0][0]


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
    folder, _, named_split = path.rpartition("@")
    if os.path.isdir(path):
        return arrow.saved_folder(source, path, split)
    if os.path.isdir(folder):
        return arrow.saved_folder(source, folder, named_split)
    if "://" in source:
        # What follows the host may hold a password or a signature, and this line goes to a log.
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
    return arrow.hub(source, hub["name"], hub["config"], hub["split"] or split)


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
                    # The byte order mark that some editors put first.
                    line = line.removeprefix(b"\xef\xbb\xbf")
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
    """An integer of JSON; as a float where it has more digits than Python parses (4,300).

    One in a column that nobody reads is no reason to stop.
    """
    return int(digits) if len(digits) < 4000 else float(digits)


def _object(pairs: list) -> dict:
    members = dict(pairs)
    return members if len(members) == len(pairs) else TwoValues(pairs)


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
        rest = text[error.pos :]
        found = f"found {rest[:40]!r}" if rest.strip() else "it ends too early"
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
        for row in reader:
            # csv puts fields beyond the header under the key None, and None for those missing.
            is_odd = None in row or None in row.values()
            yield RowError(f"not {len(names)} fields, as the header has") if is_odd else row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: not CSV: {error}") from error


READERS = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": arrow.parquet,
}
