"""Rows of Arrow tables: parquet files, folders that `save_to_disk` wrote, data sets on the hub.

Values are taken as Arrow holds them and nothing is decoded: no image is opened, no address in a
column is asked for. A value that Python cannot hold spoils its own column of its own row.
"""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pyarrow.parquet

from train import hub as model_hub
from train.data.errors import DataError, RowError, listed, one_line
from train.files import near_names

JSON = "extension<arrow.json>"  # a type of Arrow: text that is JSON
BATCH = 1024  # rows turned into Python objects at once


def parquet(path: str) -> Iterator[dict]:
    """The rows of one file, read by its exact name: `load_dataset` takes [, * and ? in it for a
    pattern.
    """

    def batches():
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(BATCH)

    return _rows(path, batches)


def saved_folder(source: str, path: str, split: str) -> Iterator[dict]:
    """The rows of what `save_to_disk` wrote to `path`; of several splits the named one."""
    return _rows(source, lambda: _batches(_load(path, split)))


def hub(source: str, name: str, config: str | None, split: str) -> Iterator[dict]:
    """The rows of a data set on the hub, or in the hub's cache on this machine."""
    model_hub.settle()

    def batches():
        try:
            return _batches(datasets.load_dataset(name, config, split=split))
        except ValueError as error:
            said = one_line(error)
            if said.startswith("Unknown split"):
                how = f"{name}{f':{config}' if config else ''}@SPLIT"
            elif said.startswith(("Config name is missing", "BuilderConfig")):
                how = f"{name}:CONFIG"
            else:
                raise
            said = said.partition(" Example of usage")[0].rstrip(".")
            raise DataError(f"{source}: {said}; name one as {how}") from error

    offline = model_hub.why_offline()
    problem = f"neither a file here{near_names(source)} nor "
    problem += f"in the hub's cache ({offline})" if offline else "readable from the hub"
    return _rows(source, batches, problem)


def _load(path: str, split: str) -> datasets.Dataset:
    """Raises DataError."""
    written = [os.path.join(path, name) for name in ("state.json", "dataset_dict.json")]
    if not any(map(os.path.isfile, written)):
        raise DataError(
            f"{path}: a folder that save_to_disk did not write; name the files in it one by one"
        )
    saved = datasets.load_from_disk(path)
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise DataError(
            f"{path}: no split {split!r}; found {listed(saved)}; name one as {path}@SPLIT"
        )
    return saved[split]


def _batches(data: datasets.Dataset) -> Iterator:
    return data.with_format("arrow").iter(BATCH)


def _rows(
    source: str, batches: Callable[[], Iterator], problem: str = "cannot be read"
) -> Iterator[dict]:
    """The rows of all `batches()`, without progress bars; whatever reading them raises becomes a
    DataError.
    """
    bars_were_shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        for batch in batches():
            columns = batch.schema.names
            if len(set(columns)) < len(columns):
                raise DataError(f"{source}: a column stands twice in {listed(columns)}")
            yield from _objects(batch)
    except DataError:
        raise
    # Readers and the hub's client raise a dozen unrelated types, and the cure is the same.
    except Exception as error:
        # datasets wraps "Expected 2 fields, saw 3" in "An error occurred".
        while error.__cause__ is not None:
            error = error.__cause__
        raise DataError(
            f"{source}: {problem}: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        if bars_were_shown:
            datasets.enable_progress_bars()


def _objects(batch) -> list[dict]:
    """A batch's rows; where they cannot be had at once, value by value, to find those at fault."""
    try:
        rows = batch.to_pylist()
    except Exception:  # bytes that are no UTF-8, the year 300000, a field twice in a struct
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        rows = [
            {name: _value(values, i) for name, values in columns.items()}
            for i in range(batch.num_rows)
        ]
    rows = [{name: _without_null(value) for name, value in row.items()} for row in rows]
    for field in batch.schema:
        if JSON in str(field.type):
            for row in rows:
                row[field.name] = _parsed(row[field.name], field.type)
    return rows


def _parsed(value: Any, kind: pyarrow.DataType) -> Any:
    """A value of a type that has JSON in it, as what that spells: the `Json` of datasets."""
    if value is None or isinstance(value, RowError):
        return value
    if JSON == str(kind):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            return RowError(one_line(error))
    if isinstance(value, list) and JSON in str(kind):
        return [_parsed(each, kind.value_type) for each in value]
    if isinstance(value, dict) and JSON in str(kind):
        return {name: _parsed(each, kind.field(name).type) for name, each in value.items()}
    return value


def _without_null(value: Any) -> Any:
    """A value without the members of structs that are null.

    Arrow has one type a column: a key that one message has, all have, null where it was not given.
    """
    if isinstance(value, dict):
        return {name: _without_null(v) for name, v in value.items() if v is not None}
    return [_without_null(v) for v in value] if isinstance(value, list) else value


def _value(values, i: int) -> Any:
    try:
        return values[i].as_py()
    except Exception as error:
        return RowError(one_line(error))
