"""Rows -> token ids, once: checked, rendered, tokenised in parallel, kept in a memory-mapped file
named by its content.

The file's key is a hash of what the rows say, the tokenizer, the chat template and the lengths: the
same rows under another path are found again, one changed letter is not. A kind of data is a row of
the KINDS table: a check that judges one row (rows.py), and an encoder that turns what the check
returned into texts, and the texts' ids into a prompt and responses (encoders.py).

Legend: N groups, k responses each, T tokens in all.
"""

import hashlib
import json
import os
import secrets
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from train.data import plausible, shapes
from train.data.chat import Chat, tokenise_rows
from train.data.dataset import Tokenised, sha256_of_text
from train.data.encoders import ConversationEncoder, TextEncoder
from train.data.errors import DataError, MissingColumn, RowError, listed, one_line
from train.data.rows import (
    LABELLED_COLUMNS,
    PAIR_COLUMNS,
    PROMPT_COLUMNS,
    SCORED_PAIR_COLUMNS,
    TEXT_COLUMNS,
    Dropped,
    check_candidates,
    check_labelled,
    check_margin,
    check_pair,
    check_prompt,
    check_score_margin,
    check_scored,
    check_text,
    columns_missing,
    turns_of,
)
from train.data.sources import in_python, read_rows
from train.files import follow_umask, user_cache

FORMAT = 6  # raise it when the same rows would give other ids or another file
# Rows rendered and tokenised at once: enough for every core, and a bounded peak of memory.
CHUNK = 4096


class Row(NamedTuple):
    """A row that passed its check."""

    source: str
    index: int  # number within the source
    number: int  # number over all sources
    item: Any  # what the check returned


class Kind(NamedTuple):
    """What one sort of training data consists of."""

    check: Callable[[Any], Any]  # row -> item; raises RowError
    columns: tuple  # those named to a user who has none of them
    k: int  # responses a group; of candidates, the fewest
    is_conversation: bool  # a prompt and answers; else plain text
    is_labelled: bool = False  # each answer has a label of its own
    has_target: bool = False  # a number for a score model to learn


KINDS = {
    "pair": Kind(check_pair, PAIR_COLUMNS, 2, True),
    "labelled": Kind(check_labelled, LABELLED_COLUMNS, 1, True, True),
    "margin": Kind(check_margin, PAIR_COLUMNS, 2, True, has_target=True),
    "score_margin": Kind(check_score_margin, SCORED_PAIR_COLUMNS, 2, True, has_target=True),
    "scored": Kind(check_scored, LABELLED_COLUMNS, 1, True, has_target=True),
    "prompt": Kind(check_prompt, PROMPT_COLUMNS, 0, True),
    "candidates": Kind(check_candidates, PAIR_COLUMNS, 2, True),
    "text": Kind(check_text, TEXT_COLUMNS, 1, False),
}


def prepare(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_dropped: float = 0.05,
    max_implausible: float = 0.5,
    **options,
) -> Tokenised:
    """What `collect(sources, tokenizer, **options)` gives, if no more than the share `max_dropped`
    of the rows is lost, and no more than `max_implausible` cannot be meant.

    (wikitext's blank lines need a `max_dropped` of about 0.4.) Raises DataError besides.
    """
    tokenised = collect(sources, tokenizer, **options)
    refuse_too_many(tokenised, max_dropped, max_implausible)
    return tokenised


def collect(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    truncate_prompt: str = "keep_end",
    allow_control_tokens: bool = False,
    allow_template_changes: bool = False,
    columns: Sequence[str] | None = None,
    cache_dir: str | os.PathLike | None = None,
    split: str = "train",
    kind: str = "pair",
    keep_tail: bool = False,
    shares: Sequence[Fraction] = (),
) -> Tokenised:
    """Read, check and tokenise `sources`, or find them done in the cache, however many rows are
    dropped.

    `columns`: names of columns as --columns has them (shapes.py). `cache_dir` stands for
    $ZEROPREF_CACHE or ~/.cache/zeropref; files lie in its subfolder tokens. Several processes may
    do this at once. `keep_tail`: answers reach to the end of what the template renders (chat.py).
    `shares`: of each source, what an epoch takes of it (mixing.py); (): everything.
    Raises DataError for the data, ValueError for the tokenizer, the lengths or the kind, OSError
    for the cache folder.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} of data; expected one of {', '.join(KINDS)}")
    if KINDS[kind].is_conversation:
        chat = Chat(tokenizer, allow_control_tokens, allow_template_changes, keep_tail)
        encoder = ConversationEncoder(chat, max_length, max_prompt_length, truncate_prompt)
    else:
        if max_prompt_length is not None:
            raise ValueError("plain text has no prompt: max_prompt_length must be None")
        encoder = TextEncoder(tokenizer, max_length, allow_control_tokens)
    rows, refused = check_rows(sources, KINDS[kind].check, KINDS[kind].columns, split, columns)
    settings = [
        *(("tail",) if keep_tail else ()),
        *(FORMAT, kind, max_length, max_prompt_length, truncate_prompt),
        *(allow_control_tokens, allow_template_changes, _identity(tokenizer)),
    ]
    key = _key(settings, rows)
    path = user_cache("tokens", cache_dir) / f"{key}.safetensors"
    cached = _load(path, key)
    if cached is None:
        _save(path, key, *_encode(rows, KINDS[kind], encoder, tokenizer))
        cached = _load(path, key)
        if cached is None:
            raise OSError(
                f"{path}: the token cache cannot be read back after writing it; is the disk sound?"
            )
    arrays, of_encoder = cached
    by_number = {row.number: row for row in rows}
    dropped = list(refused)
    for number, reason in of_encoder["dropped"]:
        row = by_number[number]
        dropped.append(Dropped(row.source, row.index, reason))
    used = [by_number[number] for number in arrays["rows"].tolist()]
    remarks = Counter()
    if KINDS[kind].is_conversation:
        remarks.update(remark for row in used for remark in row.item.remarks)
        del remarks[shapes.SCORES_CONTRADICT]  # it stands among the implausible rows
    starts = {(row.source, row.number - row.index) for row in rows}
    starts = tuple(sorted(starts, key=itemgetter(1)))
    return Tokenised(
        **arrays,
        dropped=dropped,
        fingerprint=key,
        contents=np.array([_content_hash(row.item) for row in used], np.int64),
        starts=starts,
        shares=_of_starts(starts, sources, shares) if shares else (),
        remarks=(*remarks.items(), *of_encoder["remarks"].items()),
        suspicions=_suspicions(rows) if KINDS[kind].is_conversation else (),
    )


def _of_starts(starts: tuple, sources: Sequence[str], shares: Sequence[Fraction]) -> tuple:
    """The shares of those sources that have a sound row. A source may be named twice."""
    left = iter(zip(sources, shares, strict=True))
    return tuple(next(share for other, share in left if other == source) for source, _ in starts)


def kind_of(
    sources: Sequence[str], split: str = "train", columns: Sequence[str] | None = None
) -> str:
    """ "labelled" where the first row has an answer with a label and no pair, else "pair". Raises
    DataError.
    """
    _, _, row = next(read_rows(sources, split))
    names = _columns_of(shapes.rename(row, shapes.parse_columns(columns)))
    is_labelled = {"completion", "label"} <= names and "chosen" not in names
    return "labelled" if is_labelled else "pair"


def _columns_of(row: Any) -> set[str]:
    """What a row has, null left out: a table has every column in every row."""
    columns = row if isinstance(row, dict) else {}
    return {name for name, value in columns.items() if value is not None}


def kind_of_scores(
    sources: Sequence[str],
    split: str = "train",
    columns: Sequence[str] | None = None,
    margin: str = "column",
) -> str:
    """What a score model reads of the data, by its first row: "scored" where that has an answer with
    a label or a score, and no pair; else "margin", "score_margin" or "pair" as `margin` has it,
    "column", "scores" or "none". Raises DataError.
    """
    _, _, row = next(read_rows(sources, split))
    names = _columns_of(shapes.rename(row, shapes.parse_columns(columns)))
    if "completion" in names and {"label", "score"} & names and "chosen" not in names:
        return "scored"
    return {"column": "margin", "scores": "score_margin", "none": "pair"}[margin]


def refuse_too_many(tokenised: Tokenised, max_dropped: float, max_implausible: float = 0.5) -> None:
    """Raises DataError when more than the share `max_dropped` of the rows is dropped, or all of
    them, or more than the share `max_implausible` cannot be meant.
    """
    for suspicion in tokenised.suspicions:
        if suspicion.rows > max_implausible * suspicion.total:
            reading = in_python(suspicion.source)
            advice = ""
            if conversion := plausible.CONVERSIONS.get(suspicion.what):
                advice = f"; else convert it: rows = {reading}; {conversion}"
            elif suspicion.what == plausible.PROMPT_WITH_TURNS:
                advice = plausible.AS_RENDERED
            raise DataError(
                f"implausible data: {suspicion}; if it is meant so, pass --max_implausible 1{advice}"
            )
    dropped = tokenised.dropped
    total = len(tokenised) + len(dropped)
    if len(dropped) > max_dropped * total or len(dropped) == total:
        examples = "; ".join(f"{d.source} row {d.row}: {d.reason}" for d in dropped[:5])
        raise DataError(
            f"{len(dropped)} of {total} rows ({len(dropped) / total:.1%}) cannot be used, more than the "
            f"{max_dropped:.1%} allowed or all of them; the first: {examples}"
        )


def check_rows(
    sources: Sequence[str],
    check: Callable[[Any], Any],
    names: Sequence[str],
    split: str = "train",
    columns: Sequence[str] | None = None,
) -> tuple[list[Row], list[Dropped]]:
    """Read every source and keep what `check(row)` returns; rows for which it raises RowError are
    dropped.

    `names`: the columns expected. `columns`: those to rename, as --columns has them. Raises
    DataError: as read_rows does; no source has a column to rename; or no row of a source is sound
    and none has some column.
    """
    renamed = shapes.parse_columns(columns)
    rows, dropped = [], []
    number = -1  # over all sources
    for source in [sources] if isinstance(sources, str) else sources:
        columns_found = {}  # a dict for its order: the message shows them as they stand
        missing = []
        rows_before = len(rows)
        for _, index, row in read_rows([source], split):
            number += 1
            if isinstance(row, dict):
                columns_found.update(dict.fromkeys(row))
            try:
                rows.append(Row(source, index, number, check(shapes.rename(row, renamed))))
            except RowError as error:
                dropped.append(Dropped(source, index, str(error)))
                if isinstance(error, MissingColumn):
                    missing.append(error.column)
        if absent := [name for name in renamed if name not in columns_found]:
            raise DataError(
                f"{source}: no column {absent[0]!r}; found {listed(list(columns_found))}; it is named "
                f"in --columns {renamed[absent[0]]}={absent[0]}"
            )
        known = {renamed.get(name, name) for name in columns_found}
        absent = [column for column in missing if column not in known]
        if absent and len(rows) == rows_before:
            raise columns_missing(source, absent[0], list(columns_found), names)
    if number < 0:
        raise DataError("no source of data was named")
    return rows, dropped


def _suspicions(rows: list[Row]) -> tuple[plausible.Suspicion, ...]:
    """The rows that nobody can have meant, by sort."""
    found = {}
    for row in rows:
        if odd := plausible.suspect(row.item):
            what, text = odd
            found.setdefault(what, []).append((row, text))
    return tuple(
        plausible.Suspicion(
            what,
            len(odd_rows),
            len(rows),
            tuple(
                f"{row.source} row {row.index}: {one_line(text[:60])!r}"
                for row, text in odd_rows[: plausible.SHOWN]
            ),
            odd_rows[0][0].source,
        )
        for what, odd_rows in found.items()
        if len(odd_rows) >= plausible.SAID_FROM * len(rows)
    )


def _filled(rows: list, width: int, dtype) -> np.ndarray:
    """(N, width) of rows that may be shorter, with 0 at their ends."""
    filled = np.zeros((len(rows), width), dtype)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return filled


def _prompt_hash(item: Any) -> int:
    """What two rows with the same prompt have in common, for splitting: the turns, or a text."""
    prompt = item if isinstance(item, str) else turns_of(item.messages)
    return int.from_bytes(sha256_of_text(json.dumps(prompt))[:8], "big", signed=True)


def _content_hash(item: Any) -> int:
    """What two rows with the same prompt and answers have in common, also as another kind of data."""
    if isinstance(item, str):
        return _prompt_hash(item)
    said = [turns_of(item.messages), turns_of(item.answers)]
    return int.from_bytes(sha256_of_text(json.dumps(said))[:8], "big", signed=True)


def _encode(rows: list[Row], kind: Kind, encoder, tokenizer) -> tuple[dict, dict]:
    """Arrays by their names in Tokenised, and what there is to tell: rows dropped on the way as
    [number, reason], remarks and on how many rows each was made.

    Texts are rendered in this process: 170 us a pair, a fifth of what tokenising takes on two
    cores. A worker started without fork (unsafe beside Rust's threads) needs 4 s to import
    transformers: the time of 25,000 pairs.
    """
    flat, lengths, truncated = [], [], []
    numbers, prompts, labels, targets, dropped = [], [], [], [], []
    remarks = Counter()
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        rendered = encoder.render([row.item for row in chunk])
        usable = [texts.all_texts for texts in rendered if not isinstance(texts, RowError)]
        tokenised = iter(tokenise_rows(tokenizer, usable))
        for row, texts in zip(chunk, rendered, strict=True):
            try:
                ids = texts if isinstance(texts, RowError) else next(tokenised)
                if isinstance(ids, RowError):
                    raise ids
                encoded = encoder.finish(texts, ids)
            except RowError as error:
                dropped.append([row.number, str(error)])
                continue
            remarks.update(texts.remarks)
            parts = [encoded.prompt, *encoded.responses]
            flat.extend(np.array(part, dtype=np.int32) for part in parts)
            lengths.append([len(part) for part in parts])
            truncated.append(encoded.truncated)
            numbers.append(row.number)
            if kind.is_labelled:
                labels.append(row.item.label)
            if kind.has_target:
                targets.append(row.item.target)
            prompts.append(_prompt_hash(row.item))
    k = max((len(parts) - 1 for parts in lengths), default=kind.k)
    sizes = _filled(lengths, 1 + k, np.int32)  # (N, 1 + k) tokens
    totals = sizes.sum(axis=1, dtype=np.int64)  # (N,) tokens
    arrays = {
        "ids": np.concatenate([np.zeros(0, dtype=np.int32), *flat]),
        "offsets": np.cumsum(totals) - totals,
        "lengths": sizes,
        "truncated": _filled(truncated, 1 + k, bool),
        "rows": np.array(numbers, dtype=np.int64),
        "prompts": np.array(prompts, dtype=np.int64),
    }
    if kind.is_labelled:
        arrays["labels"] = np.array(labels, dtype=bool)
    if kind.has_target:
        arrays["targets"] = np.array(targets, dtype=np.float64)
    return arrays, {"dropped": dropped, "remarks": dict(remarks)}


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides how this tokenizer renders a conversation and splits a text."""
    if tokenizer.is_fast:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by whoever called the tokenizer last; unused here.
        core.update(padding=None, truncation=None)
    else:
        core = [
            type(tokenizer).__name__,
            sorted(tokenizer.get_vocab().items()),
            repr(tokenizer.init_kwargs),
        ]
    parts = [core, tokenizer.chat_template, tokenizer.special_tokens_map]
    return sha256_of_text(json.dumps(parts, sort_keys=True, default=str)).hex()


def _key(settings: list, rows: list[Row]) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for row in rows:
        digest.update(json.dumps([row.number, row.item]).encode() + b"\n")
    return digest.hexdigest()


def _checksum(arrays: dict, notes: str) -> str:
    """One number over all content, at 1 GB/s or more: a flipped bit or a page of zeros is noticed."""
    total = zlib.crc32(notes.encode())
    for name in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8), total)
    return f"{total:08x}"


def _save(path: Path, key: str, arrays: dict, notes: dict) -> None:
    """Write the file beside and rename it: whoever reads `path`, or writes it at the same time,
    finds a whole file.
    """
    text = json.dumps(notes)
    metadata = {"key": key, "notes": text, "checksum": _checksum(arrays, text)}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            save_file(tensors, temporary, metadata)
            follow_umask(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        advice = "set ZEROPREF_CACHE to a folder that can be written"
        raise OSError(f"{path.parent}: cannot write the token cache ({error}); {advice}") from error


def _load(path: Path, key: str) -> tuple[dict, dict] | None:
    """What _encode made, of a sound file, mapped and not read into memory; None where there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}
    except (OSError, SafetensorError):
        return None
    notes = metadata.get("notes", "")
    if metadata.get("key") != key or metadata.get("checksum") != _checksum(arrays, notes):
        return None
    return arrays, json.loads(notes)
