"""A pair's tokens one by one: what the batched way of train/data/tokens.py is held against."""

from typing import NamedTuple

from train.data.chat import PairEncoder, tokenise
from train.data.packing import Group
from train.data.rows import RowError


class Pair(NamedTuple):
    messages: list
    chosen: str
    rejected: str
    row: int


def encode(chat, pair, max_length, max_prompt_length=None):
    """The pair as a group, truncated. Raises RowError; ValueError for lengths that leave no room."""
    encoder = PairEncoder(chat, max_length, max_prompt_length)
    (texts,) = chat.render([(pair.messages, pair.chosen, pair.rejected)])
    if isinstance(texts, RowError):
        raise texts
    encoded = encoder.finish(tokenise(chat.tokenizer, texts))
    return Group(tuple(encoded.prompt), tuple(tuple(ids) for ids in encoded.responses), pair.row)
