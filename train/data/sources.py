"""Where rows come from.

A source is one of

    pairs.jsonl, pairs.json    one JSON object a line; a .json may also be one array of objects, or
                               documents that run over several lines: an object, one with a list of
                               objects in it ({"data": [...]}), or columns ({"prompt": [...], ...},
                               or as pandas writes them, {"prompt": {"0": ...}, ...})
    pairs.csv, pairs.parquet
                               .jsonl, .json and .csv also as .gz or .zst
    a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, or folder@split
    org/name, org/name:config, org/name@split, org/name:config@split
                               on the hub; a split such as train[:10%] too

A file or folder that exists goes before a hub name. Globs and plain folders of files are refused.
JSON is read here, line by line, because Arrow allows one type a column and would refuse a whole
file for one odd row.
"""

import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow

from train.data import arrow
from train.data.errors import DataError, RowError, listed, one_line
from train.files import near_names

# With an organisation always: `load_dataset("csv")` would read whatever lies in the working folder.
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")

JSON_SHAPES = "one JSON object a line (.jsonl, .json) or one array of objects (.json)"
BLANK = re.compile(r"\s*")
COMPRESSED = (".gz", ".zst")


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
        suffix = suffix_of(path)
        if suffix not in READERS:
            raise DataError(
                f"{source}: files of type {suffix!r} are not read; expected one of "
                f"{', '.join(READERS)}, or of {', '.join(TEXT_FILES)} followed by .gz or .zst"
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
    hint = near_names(path)
    if glob.has_magic(source):
        hint = "; patterns are expanded by the shell, outside quotation marks: else name the files"
    if suffix_of(source) in READERS or source.startswith((".", "/", "~")):
        raise DataError(f"{source}: no such file or folder{hint}")
    if hub is None:
        raise DataError(f"{source}: no such file or folder{hint}, nor org/name as on the hub")
    return arrow.hub(source, hub["name"], hub["config"], hub["split"] or split)


def in_python(source: str, split: str = "train") -> str:
    """The Python that reads a source as a data set, for advice."""
    path = os.path.expanduser(source)
    folder, _, named_split = path.rpartition("@")
    if os.path.isfile(path):
        suffix = suffix_of(path)
        kind = suffix.lstrip(".") if suffix in (".csv", ".parquet") else "json"
        return f'datasets.load_dataset("{kind}", data_files="{source}", split="train")'
    if os.path.isdir(path) or os.path.isdir(folder):
        saved, part = (path, split) if os.path.isdir(path) else (folder, named_split)
        is_dict = os.path.isfile(os.path.join(saved, "dataset_dict.json"))
        return f'datasets.load_from_disk("{saved}")' + (f'["{part}"]' if is_dict else "")
    hub = HUB_NAME.fullmatch(source)
    config = f'"{hub["config"]}", ' if hub["config"] else ""
    return f'datasets.load_dataset("{hub["name"]}", {config}split="{hub["split"] or split}")'


def suffix_of(path: str) -> str:
    """The type of a file in small letters: ".jsonl", also of pairs.jsonl.gz; ".parquet.gz" stays."""
    root, suffix = os.path.splitext(path.lower())
    inner = os.path.splitext(root)[1]
    if suffix in COMPRESSED:
        return inner if inner in TEXT_FILES else inner + suffix
    return suffix


def _open(path: str) -> BinaryIO:
    """The bytes of a file, decompressed where its name ends with .gz or .zst."""
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.lower().endswith(".zst"):
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return open(path, "rb")


def _open_lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line). Raises DataError where the file is unreadable or a line is
    not UTF-8.
    """
    try:
        with _open(path) as file:
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
    # gzip says EOFError where a file ends too early; its and pyarrow's OSErrors have no strerror.
    except (OSError, EOFError, zlib.error) as error:
        said = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"{path}: cannot be read: {said}") from error


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
        raise _not_json(error, path, line) from error


def _not_json(error: json.JSONDecodeError, path: str, line: int) -> DataError:
    """The error for a value that begins on `line`, with the place and what stands there."""
    where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
    rest = error.doc[error.pos :]
    found = f"found {rest[:40]!r}" if rest.strip() else "it ends too early"
    # A document over several lines; in a .jsonl a line that ends too early is a damaged row.
    is_opened = error.doc.strip() in ("{", "[")
    advice = "; a document over several lines is read from a .json file" if is_opened else ""
    return DataError(f"{where}: not JSON ({error.msg}): {found}; expected {JSON_SHAPES}{advice}")


def _read_lines(path: str) -> Iterator[Any]:
    for number, line in _open_lines(path):
        if line.strip():
            yield _parse(line.rstrip("\r\n"), path, number)


def _read_json(path: str) -> Iterator[Any]:
    """The rows of a .json: an array when its first character is "[", else JSON lines, or documents
    over several lines when its first line is not a whole one, or is the only one.
    """
    text = "".join(line for _, line in _open_lines(path))  # blank lines stay, for line numbers
    if text.lstrip().startswith("["):
        rows = _parse(text, path, 1)
        if isinstance(rows, RowError):
            raise DataError(f"{path}: {rows}; in a .jsonl file only the row would be dropped")
        return iter(rows)
    if len(text.split("\n", 1)[0].strip()) == len(text.strip()) or _is_document(text):
        return iter(_documents(text, path))
    return _read_lines(path)


def _is_document(text: str) -> bool:
    """Whether the first line that is not blank ends within a JSON object."""
    text = text.lstrip()
    line = text.partition("\n")[0]
    try:
        DECODER.decode(line.strip())
    except RecursionError:
        return False
    except json.JSONDecodeError as error:
        ends_within = not line[error.pos :].strip()
        return text.startswith("{") and len(line) < len(text.rstrip()) and ends_within
    return False


def _documents(text: str, path: str) -> list:
    """The rows of JSON objects that run over several lines, one after the other.

    One object that holds exactly one list of objects, or nothing but lists of one length or objects
    with the same numbers for keys, stands for the rows in it; any other object is a row.
    """
    rows = []
    position = BLANK.match(text).end()
    while position < len(text):
        try:
            row, end = DECODER.raw_decode(text, position)
        except RecursionError as error:
            raise DataError(f"{path}: nested too deeply") from error
        except json.JSONDecodeError as error:
            raise _not_json(error, path, 1) from error
        rows.append(row)
        position = BLANK.match(text, end).end()
    return _rows_within(rows[0]) if len(rows) == 1 else rows


def _rows_within(document: Any) -> list:
    """The rows that one JSON object stands for."""
    if not isinstance(document, dict) or isinstance(document, TwoValues):
        return [document]
    columns = list(document.values())
    if all(map(_is_object, columns)) and len({tuple(column) for column in columns}) == 1:
        # by the number of the row, as pandas' to_json writes a table
        if all(key.isdigit() for key in columns[0]):
            in_rows = zip(*(column.values() for column in columns), strict=True)
            return [dict(zip(document, values, strict=True)) for values in in_rows]
    if {"chosen", "rejected"} <= {*document} or {"completion", "label"} <= {*document}:
        is_one_row = not all(isinstance(value, list) for value in document.values())
        # Two conversations are lists too, but of messages.
        is_one_row |= any(
            isinstance(turn, dict) and {"role", "from"} & {*turn}
            for value in document.values()
            if isinstance(value, list)
            for turn in value
        )
        if is_one_row:
            return [document]
    lists = {name: value for name, value in document.items() if isinstance(value, list)}
    tables = [value for value in lists.values() if value and all(map(_is_object, value))]
    holds_messages = any({"role", "from"} & {*each} for table in tables for each in table)
    if len(tables) == 1 and not holds_messages and "chosen" not in document:
        return tables[0]
    if len(lists) == len(document) and len({len(value) for value in lists.values()}) == 1:
        return [
            dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)
        ]
    return [document]


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


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
        if len(names) == 1 and (found := re.search("[;\t|]", names[0])):
            raise DataError(
                f"{path}, line 1: its one column is {names[0]!r:.60}; fields are separated by commas: "
                f'pandas.read_csv("{path}", sep={found.group()!r}).to_csv("pairs.csv", index=False)'
            )
        for row in reader:
            # csv puts fields beyond the header under the key None, and None for those missing.
            is_odd = None in row or None in row.values()
            yield RowError(f"not {len(names)} fields, as the header has") if is_odd else row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: not CSV: {error}") from error


TEXT_FILES = {".jsonl": _read_lines, ".json": _read_json, ".csv": _read_csv}
READERS = TEXT_FILES | {".parquet": arrow.parquet}
