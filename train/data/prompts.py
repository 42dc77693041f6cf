"""Prompts alone: what a policy is to answer, with all that their data rows say.

Rows with a prompt, or with answers to it, which are not read. Two prompts are one only where all
columns agree: a reward function may read any of them.
"""

import dataclasses
import json
from collections.abc import Sequence

from train.data import dataset, shapes, tokens
from train.data.dataset import Tokenised
from train.data.rows import Asked, check_prompt
from train.data.sources import read_rows


@dataclasses.dataclass(frozen=True)
class Prompts:
    """P prompts."""

    data: Tokenised  # their token ids; a group is a prompt without a response
    rows: dict[int, dict]  # by the number of the data row: its columns, as --columns names them

    def __len__(self) -> int:
        return len(self.data)

    @property
    def columns(self) -> list[str]:
        """The columns that any row has."""
        return [*dict.fromkeys(name for row in self.rows.values() for name in row)]

    def ids(self, i: int) -> tuple[int, ...]:
        """Token ids of prompt i, the assistant's header included."""
        return tuple(self.data.group(i).prompt)

    def row(self, i: int) -> dict:
        """The columns of prompt i."""
        return self.rows[int(self.data.rows[i])]

    def asked(self, i: int) -> Asked:
        """Prompt i as messages, the last of which is the user's or a tool's, and what else the chat
        template gets.
        """
        return check_prompt(self.row(i))

    def split(self, share: float, seed: int) -> tuple["Prompts", "Prompts"]:
        """(train, held out), by prompt: see dataset.split_by_prompt."""
        train, held_out = dataset.split_by_prompt(self.data, share, seed)
        return (
            dataclasses.replace(self, data=train),
            dataclasses.replace(self, data=held_out),
        )


def prepare(sources: Sequence[str], tokenizer, *, columns=None, **options) -> Prompts:
    """The prompts of `sources`. options: those of tokens.prepare, whose errors it raises."""
    data = tokens.prepare(sources, tokenizer, columns=columns, kind="prompt", **options)
    renamed = shapes.parse_columns(columns)
    used = {*data.rows.tolist()}
    rows = {
        number: shapes.rename(row, renamed)
        for number, (_, _, row) in enumerate(read_rows(sources))
        if number in used
    }
    return Prompts(_distinct(data, rows), rows)


def _distinct(data: Tokenised, rows: dict[int, dict]) -> Tokenised:
    """The first of all prompts whose rows say the same in every column."""
    first = {}  # what a row says -> its place; numpy would make all texts as wide as the longest
    for place, number in enumerate(data.rows.tolist()):
        first.setdefault(json.dumps(rows[number], sort_keys=True, default=str), place)
    return data if len(first) == len(data) else data.select([*first.values()])
