"""Which rows a model is evaluated on where --data names none: those that its own training held out,
as run.json says; the built-in held-out pairs where there are none, and why.
"""

import itertools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

from train.data import shapes
from train.data.dataset import Tokenised, split_by_prompt
from train.data.errors import DataError, RowError
from train.data.sources import read_rows
from train.files import ROOT
from train.run import card
from train.run.folder import rows_fingerprint
from train.settings import Data, Policy, sources

BUILT_IN = str(ROOT / "train/data/builtin/held_out.jsonl")
LOOKED_AT = 50  # first rows of the data that are asked whether they are pairs


class Rows(NamedTuple):
    """Rows to evaluate on."""

    sources: list[str]
    columns: list[str] | None  # as --columns has them
    which: str  # for people, without a local path
    max_dropped: float
    split: tuple[float, int] | None = None  # the held-out side of a split: share and seed
    is_own: bool = False  # what training held out
    fingerprint: str | None = None  # of what training held out, where that is known

    def held_out(self, data):
        """The rows of `data`, a Tokenised of the sources, that are meant."""
        return split_by_prompt(data, *self.split)[1] if self.split else data

    def said(self, data: Tokenised) -> str:
        """`which`, and whether these are the very rows that training had."""
        if self.fingerprint and rows_fingerprint(data) != self.fingerprint:
            return f"{self.which}; but not the same rows: the data has changed since, or is read otherwise"
        return self.which


def choose(settings, record: dict, check: Callable) -> Rows:
    """The rows that --data names, else those of the run of `record`, else the built-in pairs.

    check: what a row has to pass, data.rows.check_pair say.
    """
    if settings.data:
        return Rows(settings.data, settings.columns, "--data", settings.max_dropped)
    built_in = Rows(
        [BUILT_IN], settings.columns, "the built-in held-out pairs", settings.max_dropped
    )
    if not record:
        return built_in
    rows, why_not = of_run(settings, record)
    if rows and not (why_not := _unlike(rows, check)):
        # of a policy the prompts were read, each once, whatever the answers
        return rows._replace(fingerprint=None) if record.get("task") == "policy" else rows
    return built_in._replace(which=f"the built-in held-out pairs: {why_not}")


def of_run(settings, record: dict) -> tuple[Rows | None, str]:
    """(what the run of `record` held out, ""), or (None, why there is nothing)."""
    flags = record["flags"]
    named = SimpleNamespace(
        data=flags.get("data"),
        eval_data=flags.get("eval_data"),
        eval_split=flags.get("eval_split") or 0.0,
        builtin_data=(Policy if record.get("task") == "policy" else Data).builtin_data,
    )
    train, held_out = sources(named)
    which, split = "the rows that training held out", None
    if held_out is None and named.eval_split:
        split = named.eval_split, flags.get("data_split_seed") or 0
        which += f", the same split: {split[0]:.4g} of the prompts by seed {split[1]}"
    elif held_out is None:
        return None, "training held nothing out"
    rows = Rows(
        held_out or train,
        settings.columns or flags.get("columns"),
        which,
        max(settings.max_dropped, flags.get("max_dropped") or 0.0),
        split,
        is_own=True,
        fingerprint=(record.get("eval_data") or {}).get("rows_fingerprint"),
    )
    if missing := [source for source in rows.sources if not _is_there(source)]:
        return None, f"{card.shown(missing[0])}, of which training held rows out, cannot be found"
    return rows, ""


def _is_there(source: str) -> bool:
    """Whether a source is a file or folder here, or a name on the hub, which may or may not answer."""
    path = os.path.expanduser(source)
    return os.path.exists(path) or os.path.exists(path.rpartition("@")[0]) or card.is_hub(source)


def _unlike(rows: Rows, check: Callable) -> str:
    """Why the rows are not what `check` takes, or nothing."""
    renamed = shapes.parse_columns(rows.columns)
    try:
        for _, _, row in itertools.islice(read_rows(rows.sources), LOOKED_AT):
            try:
                check(shapes.rename(row, renamed))
                return ""
            except RowError:
                continue
    except DataError:  # say of a hub that does not answer
        return f"{card.shown(rows.sources[0])}, of which training held rows out, cannot be read"
    return "what training held out are no pairs of answers"
