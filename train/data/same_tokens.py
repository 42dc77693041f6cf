"""Whether two models read the same token ids: what policy, reference and evaluation ask before they
are compared.
"""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from train.data.chat import QUESTION, tokenise
from train.data.dataset import Tokenised

CONVERSATIONS = 256  # of a data set, that are tokenised by both


def same_tokens(
    tokenizer: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    texts: Sequence[str],
    ids: Iterable[int] = (),
) -> None:
    """ValueError, which says where, unless both tokenizers make the same ids of what is in use.

    `texts`: answers or whole conversations; each is compared as it is, and rendered as an answer by
    the first tokenizer's chat template, end tokens included, which is what both models read. `ids`:
    token ids in use, which must name the same token in both. Sizes of vocabularies are not
    compared: a token that no text reaches is no difference.
    """
    for i in ids:
        ours, theirs = tokenizer.convert_ids_to_tokens(i), _token(other, i)
        if ours != theirs:
            raise ValueError(f"token {i} is {ours!r} in one and {theirs!r} in the other")
    texts = [*texts, *_rendered(tokenizer, texts)]
    texts += [token for token in (tokenizer.eos_token, tokenizer.bos_token) if token]
    for _, ours, theirs in zip(
        texts, tokenise(tokenizer, texts), tokenise(other, texts), strict=True
    ):
        if ours != theirs:
            at = next(
                (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
                min(len(ours), len(theirs)),
            )
            raise ValueError(
                f"{_near(tokenizer, ours, at)!r} has ids {ours[at : at + 4]} in one and "
                f"{theirs[at : at + 4]} in the other"
            )


def in_use(tokenizer: PreTrainedTokenizerBase, data: Tokenised) -> tuple[list[str], list[int]]:
    """(texts, ids) for `same_tokens` from tokenised data: some whole conversations, spread evenly
    over it, and every id that occurs.
    """
    ids = sorted({int(i) for i in set(data.ids.tolist())})
    step = max(len(data) // CONVERSATIONS, 1)
    texts = []
    for number in range(0, len(data), step):
        group = data.group(number)
        texts += [
            tokenizer.decode(
                [*group.prompt, *response],
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
            for response in group.responses
        ]
    return texts, ids


def _rendered(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """Each text as the answer of a conversation; none where the tokenizer has no template, or one
    that refuses it.
    """
    try:
        return tokenizer.apply_chat_template(
            [QUESTION + [{"role": "assistant", "content": text}] for text in texts],
            tokenize=False,
        )
    # No template: plain text is compared then. One that refuses a text: that text is in no data.
    except Exception:
        return []


def _token(tokenizer: PreTrainedTokenizerBase, i: int) -> str | None:
    return tokenizer.convert_ids_to_tokens(i) if 0 <= i < len(tokenizer) else None


def _near(tokenizer: PreTrainedTokenizerBase, ids: list[int], at: int) -> str:
    return tokenizer.decode(ids[max(at - 3, 0) : at + 4], clean_up_tokenization_spaces=False)
