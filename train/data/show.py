"""Rows as training sees them, for people: text, token ids, where a response begins, what is scored.

`record` makes a row into a dictionary that JSON can hold (`launch/validate.py --show N --json`),
`as_text` into lines for a terminal, `as_markdown` the first rows of a data set into a text for
TensorBoard.
"""

import json
import textwrap
from typing import Any

from transformers import PreTrainedTokenizerBase

from train.data.dataset import Tokenised
from train.data.rows import Dropped
from train.files import ROOT

NAMES = {2: ("chosen", "rejected"), 1: ("completion",)}  # of a row's responses, by their number
BORDER = " ║ "  # between two tokens: the prompt ends, the response begins
WIDTH = 2000  # characters of a dropped row that are shown
FOLDED = 108  # characters of a line of TensorBoard's texts; more would be scrolled to
# ANSI colours of a terminal.
COLOURS = {"prompt": "36", "chosen": "32", "completion": "32", "rejected": "31", "end": "7"}
FAINT = "2"


def record(tokenizer: PreTrainedTokenizerBase, data: Tokenised, i: int, end_id: int) -> dict:
    """Group i of `data`. Keys, for a pair:

    source, row     where the row stands; `row` counts from 0 within the source
    prompt, chosen, rejected               the text of the ids below, control tokens included
    prompt_ids, chosen_ids, rejected_ids   token ids; a response follows its prompt
    tokens          the tokens by name, for each of the three
    scored          for each response whether each of its tokens is scored, a list of booleans
    end             for each response the place of its end token; null where it was cut off
    cut             for each of the three whether it was cut
    dropped         null

    An answer with a label has completion in place of chosen and rejected, and its label. What a
    reward model is to learn, a margin or a score, is in target.
    """
    group = data.group(i)
    names = NAMES[len(group.responses)]
    source, row = data.place(i)
    parts = dict(zip(("prompt", *names), (group.prompt, *group.responses), strict=True))
    found = {"source": source, "row": row, "dropped": None}
    if group.label is not None:
        found["label"] = group.label
    if group.target is not None:
        found["target"] = group.target
    found |= {name: _decode(tokenizer, ids) for name, ids in parts.items()}
    found |= {f"{name}_ids": list(ids) for name, ids in parts.items()}
    found["tokens"] = {
        name: tokenizer.convert_ids_to_tokens(list(ids)) for name, ids in parts.items()
    }
    # The loss takes every token of a response; nothing predicts the first one of a text without
    # a prompt.
    found["scored"] = {
        name: [bool(group.prompt) or place > 0 for place in range(len(parts[name]))]
        for name in names
    }
    found["end"] = {
        name: _last_place(parts[name], end_id) if not cut else None
        for name, cut in zip(names, data.truncated[i, 1:].tolist(), strict=True)
    }
    found["cut"] = dict(zip(parts, data.truncated[i].tolist(), strict=True))
    return found


def dropped_record(dropped: Dropped, row: Any, names: tuple[str, ...]) -> dict:
    """A row that is not used: why, and what stood there; the keys of `record`, without tokens."""
    found = {"source": dropped.source, "row": dropped.row, "dropped": dropped.reason}
    for name in ("prompt", *names):
        value = row.get(name) if isinstance(row, dict) else None
        found[name] = _plain(value)
    found |= {f"{name}_ids": None for name in ("prompt", *names)}
    found |= {"tokens": None, "scored": None, "end": None, "cut": None}
    if not isinstance(row, dict) or not any(name in row for name in ("prompt", *names)):
        found["data"] = _plain(row)
    return found


def as_text(found: dict, colour: bool = False) -> str:
    """A record as lines: where it stands, then text, ids and tokens of prompt and responses.

    The responses' tokens follow the prompt's last ones behind a border. Control characters of the
    data are spelt out: they must not reach a terminal.
    """

    def paint(text, code):
        return f"\033[{code}m{text}\033[0m" if colour else text

    head = f"{_printable(str(found['source']))} row {found['row']}"
    if found["dropped"] is not None:
        what = found.get("data") or {
            name: found[name] for name in ("prompt", *NAMES[2], *NAMES[1]) if found.get(name)
        }
        shown = _printable(json.dumps(what, ensure_ascii=False)[:WIDTH])
        reason = paint(f"dropped: {_printable(found['dropped'])}", COLOURS["rejected"])
        return f"{head}  {reason}\n  {shown}\n"
    cut = [name for name, is_cut in found["cut"].items() if is_cut]
    judged = [f"  {name} {found[name]}" for name in ("label", "target") if name in found]
    lines = [head + "".join(judged)]
    if cut:
        lines[0] += "  " + paint(f"cut: {', '.join(cut)}", COLOURS["rejected"])
    last = [_printable(token) for token in found["tokens"]["prompt"][-3:]]
    for name, tokens in found["tokens"].items():
        ids = found[f"{name}_ids"]
        lines.append(paint(f"  {name}, {len(ids)} tokens", COLOURS[name]))
        lines += [f"    {paint(line, COLOURS[name])}" for line in _lines(found[name])]
        lines.append(paint(f"    ids     {' '.join(map(str, ids))}", FAINT))
        if name == "prompt":
            continue
        spelt = [_printable(token) for token in tokens]
        scored = found["scored"][name]
        # A token that is not scored stands in brackets.
        spelt = [t if yes else f"({t})" for t, yes in zip(spelt, scored, strict=True)]
        end = found["end"][name]
        if end is not None:
            spelt[end] = paint(spelt[end], COLOURS["end"])
        lines.append(f"    tokens  {'|'.join(['...', *last])}{BORDER}{'|'.join(spelt)}")
        if end is None:
            place = "none, the response is cut"
        else:
            which = "the last" if end == len(ids) - 1 else f"number {end + 1}"
            place = f"{which}, {ids[end]}"
        count = "all" if all(scored) else f"{sum(scored)}"
        lines.append(f"    scored  {count} of {len(ids)}; end token: {place}")
    return "\n".join(lines) + "\n"


def as_markdown(
    tokenizer: PreTrainedTokenizerBase, data: Tokenised, end_id: int, rows: int = 3
) -> str:
    """The first rows of a data set as Markdown, in the form of `as_text` with long lines folded: for
    TensorBoard's texts.
    """
    texts = [as_text(record(tokenizer, data, i, end_id)) for i in range(min(rows, len(data)))]
    texts = [text.removeprefix(f"{ROOT}/") for text in texts]  # the built-in rows, on any machine
    # Indented by four, a block is code whatever is in it; a fence could be closed from within.
    blocks = [
        "\n".join("    " + part for line in text.splitlines() for part in _folded(line))
        for text in texts
    ]
    return "\n\n---\n\n".join(blocks)


def _last_place(ids, end_id: int) -> int | None:
    """Where the last end token stands; a template's tail may follow it. None where there is none."""
    return max((place for place, token in enumerate(ids) if token == end_id), default=None)


def _decode(tokenizer: PreTrainedTokenizerBase, ids) -> str:
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def _plain(value: Any) -> Any:
    """A value of a row that JSON can hold."""
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except (ValueError, RecursionError):
        return str(type(value).__name__)
    return json.loads(text) if len(text) <= WIDTH else text[:WIDTH]


def _lines(text: str) -> list[str]:
    return [_printable(line) for line in text.split("\n")]


def _folded(line: str) -> list[str]:
    """A line in parts of at most FOLDED characters, those after the first below its text."""
    start = len(line) - len(line.lstrip())
    if line[start:].startswith(("ids ", "tokens ", "scored ")):
        start += len("tokens  ")
    return textwrap.wrap(
        line,
        FOLDED,
        subsequent_indent=" " * start,
        replace_whitespace=False,
        break_on_hyphens=False,
    ) or [line]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
