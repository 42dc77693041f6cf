"""A pair's tokens one by one: what the batched way of train/data/tokens.py is held against."""

from typing import NamedTuple

from train.data.chat import Request, tokenise
from train.data.encoders import ConversationEncoder
from train.data.packing import Group
from train.data.rows import RowError


class Pair(NamedTuple):
    messages: list
    chosen: str
    rejected: str
    row: int


def encode(chat, pair, max_length, max_prompt_length=None):
    """The pair as a group, truncated. Raises RowError; ValueError for lengths that leave no room."""
    encoder = ConversationEncoder(chat, max_length, max_prompt_length)
    answers = [{"role": "assistant", "content": text} for text in (pair.chosen, pair.rejected)]
    (rendered,) = chat.render([Request(pair.messages, answers, {})])
    if isinstance(rendered, RowError):
        raise rendered
    encoded = encoder.finish(rendered, tokenise(chat.tokenizer, rendered.all_texts))
    return Group(tuple(encoded.prompt), tuple(tuple(ids) for ids in encoded.responses), pair.row)
