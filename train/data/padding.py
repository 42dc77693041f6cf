"""The pad token of a model that gives scores.

transformers' classes for sequence classification read a score off the rightmost token whose id is
not the pad's, whatever the attention mask says. Where a text ends in the pad's id (SmolLM's pad is
its end token), the token before it is read instead: another number, and no message. So no text may
end in the pad's id.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from train.data.chat import tail_ids
from train.data.dataset import Tokenised


def last_ids(tokenizer: PreTrainedTokenizerBase, datasets: Sequence[Tokenised]) -> set[int]:
    """The ids that texts end in: those of the data, cut ones included, and of what the template
    renders; every end token too, since whoever stops there or cuts there ends a text with it.
    """
    found = {tokenizer.eos_token_id}
    for data in datasets:
        ends = data.offsets[:, None] + np.cumsum(data.lengths, axis=1, dtype=np.int64)[:, 1:] - 1
        found.update(np.unique(data.ids[ends]).tolist())
    # the tail, token by token: a text may be cut anywhere in it
    found.update(tail_ids(tokenizer))
    return found


def choose(
    tokenizer: PreTrainedTokenizerBase,
    pad_id: int | None,
    vocabulary: int,
    datasets: Sequence[Tokenised],
) -> int:
    """`pad_id` where no text ends in it, else another id that the tokenizer has and no text uses:
    of its added tokens the first, else of all the last. vocabulary: the model's embeddings.

    Raises ValueError where every id is used.
    """
    ends = last_ids(tokenizer, datasets)
    if pad_id is not None and 0 <= pad_id < vocabulary and pad_id not in ends:
        return pad_id
    used = ends | {tokenizer.bos_token_id}
    for data in datasets:
        used.update(np.unique(data.ids).tolist())
    size = min(len(tokenizer), vocabulary)
    for token in [*sorted(tokenizer.added_tokens_decoder), *range(size - 1, -1, -1)]:
        if token < size and token not in used:
            return token
    raise ValueError("no token is left for padding: the data uses all of the vocabulary")


def use(tokenizer: PreTrainedTokenizerBase, config, datasets: Sequence[Tokenised]) -> int:
    """Give tokenizer and model configuration the pad token of `choose`; its id."""
    text_config = config.get_text_config()
    pad_id = text_config.pad_token_id
    if pad_id is None:
        pad_id = tokenizer.pad_token_id
    pad_id = choose(tokenizer, pad_id, text_config.vocab_size, datasets)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    text_config.pad_token_id = pad_id
    return pad_id
