"""What a checked row becomes: texts first, then token ids under the length limits.

An encoder renders many items at once (`render`), and makes the ids of a row's texts, tokenised
elsewhere in one call for all, into a prompt and responses (`finish`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from train.data.chat import Chat, ControlTokens, Rendered, Request, tokenise
from train.data.errors import RowError
from train.data.rows import Labelled, Pair

TRUNCATIONS = ("keep_end", "keep_system_and_end")


class Encoded(NamedTuple):
    """One row as token ids after truncation."""

    prompt: list  # (P,) token ids
    responses: tuple  # k lists (R_i,) of token ids
    truncated: tuple  # 1 + k bools: the prompt was cut, each response was cut


def check_lengths(max_length: int, max_prompt_length: int | None, header_length: int = 0) -> int:
    """The most tokens that a prompt may have: one token at least is left to the response. Raises
    ValueError.
    """
    limit = max_length - 1 if max_prompt_length is None else max_prompt_length
    if max_length < 2 or limit < 1:
        raise ValueError(
            f"max_length {max_length}, max_prompt_length {max_prompt_length}: at least 2 and 1 are needed"
        )
    if limit >= max_length:
        raise ValueError(
            f"--max_prompt_length {limit} leaves no room for a response in --max_length {max_length}: lower "
            "the one or raise the other"
        )
    if limit < header_length:
        flag = "max_length" if max_prompt_length is None else "max_prompt_length"
        raise ValueError(
            f"a prompt of {limit} tokens cannot hold the assistant's header of {header_length}: "
            f"raise {flag}"
        )
    return limit


class ConversationEncoder:
    """Prompts and their answers under length limits: a prompt that is too long keeps its end (and
    bos and the system turn before it, if `truncate_prompt` says so and they fit), then each
    response is cut to what is left of max_length.
    """

    def __init__(
        self,
        chat: Chat,
        max_length: int,
        max_prompt_length: int | None,
        truncate_prompt: str = "keep_end",
    ):
        if truncate_prompt not in TRUNCATIONS:
            raise ValueError(
                f"truncate_prompt {truncate_prompt!r}; expected one of {', '.join(TRUNCATIONS)}"
            )
        self.chat = chat
        self.max_length = max_length
        self.max_prompt = check_lengths(max_length, max_prompt_length, chat.header_length)
        self.truncate_prompt = truncate_prompt

    def render(self, items: Sequence[Pair | Labelled]) -> list[Rendered | RowError]:
        """The texts of each item."""
        return self.chat.render(
            [Request(item.messages, item.answers, item.template_args) for item in items]
        )

    def finish(self, rendered: Rendered, ids: Sequence[list[int]]) -> Encoded:
        """Truncate; a response that is cut gets no end token. `ids`: of rendered.all_texts. Raises
        RowError for answers empty or equal by now.
        """
        prompt, responses = self.chat.split(rendered, ids)
        # Some tokenizers leave out what they do not know.
        if any(response in self.chat.empty_ids for response in responses):
            raise RowError("no tokens: the tokenizer makes nothing of a response")
        kept = self._cut(rendered, prompt)
        room = self.max_length - len(kept)
        cut = tuple(response[:room] for response in responses)
        truncated = (len(prompt) > len(kept), *(len(response) > room for response in responses))
        if len(cut) == 2 and cut[0] == cut[1]:
            raise RowError(
                "equal after truncation" if any(truncated[1:]) else "equal after the chat template"
            )
        return Encoded(kept, cut, truncated)

    def _cut(self, rendered: Rendered, prompt: list[int]) -> list[int]:
        """The prompt within its limit; the assistant's header always stays."""
        if len(prompt) <= self.max_prompt:
            return prompt
        head = []
        if self.truncate_prompt == "keep_system_and_end":
            head = self.chat.head_ids(rendered, prompt)
            if self.max_prompt - len(head) < max(self.chat.header_length, 1):
                # No room for both: bos is one token, if there is one.
                bos = self.chat.tokenizer.bos_token_id
                # where it begins turns, too, it would stand there alone
                is_begun = prompt[0] == bos and prompt.count(bos) == 1
                head = prompt[:1] if is_begun else []
            if self.max_prompt - len(head) < max(self.chat.header_length, 1):
                head = []
        return head + prompt[len(prompt) - (self.max_prompt - len(head)) :]


class RenderedText(NamedTuple):
    """A plain text; what an encoder's `finish` gets beside its ids."""

    text: str
    remarks: tuple[str, ...] = ()

    @property
    def all_texts(self) -> tuple[str, ...]:
        return (self.text,)


class TextEncoder:
    """Plain text, no template: one response without an end token, cut to max_length.

    The prompt is what the tokenizer begins its texts with, bos as a rule, so that the text's first
    token is predicted too; for a tokenizer that begins texts with nothing the prompt is empty, and
    nothing predicts the first token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        allow_control_tokens: bool = False,
    ):
        check_lengths(max_length, None)
        self.control = ControlTokens(tokenizer, allow_control_tokens)
        self.max_length = max_length
        self.beginning = beginning_of_texts(tokenizer)

    def render(self, items: Sequence[str]) -> list[RenderedText | RowError]:
        """The texts themselves."""
        return [self._checked(text) for text in items]

    def _checked(self, text: str) -> RenderedText | RowError:
        try:
            self.control.check(text)
        except RowError as error:
            return error
        return RenderedText(text)

    def finish(self, rendered: RenderedText, ids: Sequence[list[int]]) -> Encoded:
        """Truncate. Raises RowError where the tokenizer makes nothing of the text."""
        [text] = ids
        if not text:
            raise RowError("no tokens")
        room = max(self.max_length - len(self.beginning), 1)
        return Encoded(self.beginning, (text[:room],), (False, len(text) > room))


def beginning_of_texts(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before a text of its own accord: [bos], or []."""
    [plain] = tokenise(tokenizer, ["text"])
    whole = tokenizer("text", verbose=False)["input_ids"]
    for count in range(len(whole) - len(plain) + 1):
        if whole[count : count + len(plain)] == plain:
            return whole[:count]
    return []
