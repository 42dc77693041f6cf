"""Chat template -> token ids of prompt and responses: who owns the end token, what is cut, what is
refused.

A conversation is rendered twice, as the prompt alone with the assistant's header and as a whole
with its answer. What the whole has beyond the prompt is the response's text. The two texts are
tokenised apart and joined as ids, so no token crosses the border. Templates run in transformers'
sandbox (`apply_chat_template`) and nowhere else.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from train.data.errors import RowError, one_line

QUESTION = [{"role": "user", "content": "probe question"}]
ANSWER = "probe answer"


class Encoded(NamedTuple):
    """One row as token ids after truncation."""

    prompt: list  # (P,) token ids
    responses: tuple  # k lists (R_i,) of token ids
    truncated: tuple  # 1 + k bools: the prompt was cut, each response was cut


class ControlTokens:
    """The strings that a tokenizer reads as control tokens wherever they stand in a text.

    Some models forget to call theirs special: what frames the turns of `conversation`, a rendered
    one, counts too.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, allowed: bool = False, conversation: str = ""
    ):
        added = tokenizer.added_tokens_decoder.values()
        special = {
            token.content
            for token in added
            if token.special or _frames(token.content, conversation)
        }
        self.tokens = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self.allowed = allowed
        self._pattern = re.compile("|".join(map(re.escape, self.tokens)))

    def first(self, text: str) -> str | None:
        found = self._pattern.search(text) if self.tokens else None
        return found.group() if found else None

    def check(self, text: str) -> None:
        """Raises RowError where a text has one: as a token it would end a turn, or begin one, in
        the user's name.
        """
        if not self.allowed and (token := self.first(text)) is not None:
            raise RowError(f"control token {token!r} in the text")


def _frames(token: str, conversation: str) -> bool:
    """Whether an added token is one of the conversation's marks: neither a word nor white space."""
    return (
        len(token.strip()) > 2
        and not (token[0].isalnum() or token[-1].isalnum())
        and token in conversation
    )


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text in one call, which is parallel in Rust; nothing is added and nothing
    cut.
    """
    if not texts:
        return []
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        verbose=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]


class Chat:
    """A tokenizer with its chat template, probed once.

    `end` is the text of the end-of-turn token, `end_id` its id, `header_length` the number of
    tokens of the assistant's header. Raises ValueError: no template, end or pad token; a template
    that cannot be used, and why.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, allow_control_tokens: bool = False):
        self.tokenizer = tokenizer
        self.control = ControlTokens(tokenizer, allow_control_tokens)
        name = tokenizer.name_or_path or "this model"
        try:
            tokenizer.get_chat_template()
        except ValueError as error:
            raise ValueError(
                f"the tokenizer of {name} has no chat template: use an instruct model, or put chat_template.jinja in "
                f"the model's directory ({error})"
            ) from error
        for token in ("eos_token", "pad_token"):
            if getattr(tokenizer, token) is None:
                raise ValueError(
                    f"the tokenizer of {name} has no {token}: set {token!r} in its tokenizer_config.json"
                )
        self._probe(name)

    def _probe(self, name: str) -> None:
        """Find what the template puts behind an answer. The end token is the first control token
        there, or else eos.
        """
        prompt, whole = self._render(
            [(QUESTION, True), (QUESTION + [{"role": "assistant", "content": ANSWER}], False)]
        )
        for text in (prompt, whole):
            if isinstance(text, RowError):
                raise ValueError(
                    f"the chat template of {name} cannot render a question and its answer: {text}"
                )
        if not whole.startswith(prompt):
            raise ValueError(
                f"the chat template of {name} renders {whole!r}, which does not start with the prompt {prompt!r}"
            )
        # Of turns that are over, which keep no <think>: answers to train on may have that.
        turns_over = QUESTION + [{"role": "assistant", "content": ANSWER}] + QUESTION
        turns = self._render([(turns_over, False)])[0]
        self.control = ControlTokens(
            self.tokenizer, self.control.allowed, turns if isinstance(turns, str) else ""
        )
        body, answer, self._tail = whole[len(prompt) :].rpartition(ANSWER)
        if not answer:
            raise ValueError(
                f"the chat template of {name} leaves out the assistant's answer: {whole!r}"
            )
        found = self.control.first(self._tail)
        self.end = self.tokenizer.eos_token if found is None else found
        self.end_id = self.tokenizer.convert_tokens_to_ids(self.end)
        if found is None:
            # No model would learn to stop at white space.
            self._kept_tail = self._tail.rstrip() + self.end
        else:
            self._kept_tail = self._tail[: self._tail.index(found) + len(found)]
        self.tail_ids = tokenise(self.tokenizer, [self._kept_tail])[0]
        ids = self.response_ids(QUESTION, ANSWER)
        if ids[-1] != self.end_id or ids.count(self.end_id) != 1:
            text = body + ANSWER + self._kept_tail
            raise ValueError(
                f"the tokenizer of {name} does not end {text!r} with one token {self.end!r}: {ids}"
            )
        bare = self._render([(QUESTION, False)])[0]
        header = prompt[len(bare) :] if isinstance(bare, str) and prompt.startswith(bare) else ""
        self.header_length = len(tokenise(self.tokenizer, [header])[0])

    def _render(self, requests: Sequence[tuple[list, bool]]) -> list[str | RowError]:
        """Render (messages, with the assistant's header?) each; a RowError in place of what the
        template refuses.
        """
        rendered = [None] * len(requests)
        for header in (True, False):
            places = [i for i, request in enumerate(requests) if request[1] == header]
            conversations = [requests[i][0] for i in places]
            try:
                # Many at once cost half of one by one (16 against 33 us each).
                texts = self._apply(conversations, header) if conversations else []
            except Exception:
                # One is refused: find out which.
                texts = [self._render_one(messages, header) for messages in conversations]
            for place, text in zip(places, texts, strict=True):
                rendered[place] = text
        return rendered

    def _render_one(self, messages: list, header: bool) -> str | RowError:
        try:
            return self._apply([messages], header)[0]
        # A template is a program: raise_exception(), a type error, an undefined name.
        except Exception as error:
            return RowError(f"the chat template refuses it: {one_line(error)}")

    def _apply(self, conversations: list, header: bool) -> list[str]:
        return self.tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=header
        )

    def prompt_ids(self, messages: list) -> list[int]:
        """Token ids (P,) of the prompt up to and including the assistant's header. Raises RowError."""
        return self._ids(messages)[0]

    def response_ids(self, messages: list, text: str) -> list[int]:
        """Token ids (R,) of the answer `text` up to and including its end token. Raises RowError."""
        return self._ids(messages, text)[1]

    def _ids(self, messages: list, *answers: str) -> list[list[int]]:
        texts = self.render([(messages, *answers)])[0]
        if isinstance(texts, RowError):
            raise texts
        return tokenise(self.tokenizer, texts)

    def render(self, items: Sequence[tuple]) -> list[tuple | RowError]:
        """(messages, answer, ...) each -> texts (prompt, response, ...) each, or the RowError that
        drops it.
        """
        requests, places = [], []
        for messages, *answers in items:
            places.append(slice(len(requests), len(requests) + 1 + len(answers)))
            requests.append((messages, True))
            for answer in answers:
                # An allowed end token at the end of a text is the one that the template adds.
                turn = {"role": "assistant", "content": answer.removesuffix(self.end)}
                requests.append((messages + [turn], False))
        rendered = self._render(requests)
        return [
            self._texts(item, rendered[place]) for item, place in zip(items, places, strict=True)
        ]

    def _texts(self, item: tuple, rendered: list) -> tuple | RowError:
        messages, *answers = item
        try:
            for text in [message["content"] for message in messages] + answers:
                self.control.check(text)
            for text in rendered:
                if isinstance(text, RowError):
                    raise text
            return rendered[0], *(self._response(rendered[0], whole) for whole in rendered[1:])
        except RowError as error:
            return error

    def _response(self, prompt: str, whole: str) -> str:
        """What `whole` says beyond the prompt, cut after the end token. Raises RowError."""
        if not whole.startswith(prompt):
            raise RowError("the chat template renders the prompt otherwise once an answer follows")
        if not whole.endswith(self._tail):
            raise RowError("the chat template ends this answer otherwise than its probe")
        body = whole[len(prompt) : len(whole) - len(self._tail)]
        if not body.strip():
            raise RowError("empty response after the chat template")
        return body + self._kept_tail


def tokenise_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple]
) -> list[list[list[int]] | RowError]:
    """Token ids of each row's texts, all in one call; a RowError in place of a row that the
    tokenizer refuses.
    """
    try:
        ids = iter(tokenise(tokenizer, [text for texts in rows for text in texts]))
        return [[next(ids) for _ in texts] for texts in rows]
    # Say, an unknown character and no token for it; halves find the row.
    except Exception as error:
        if len(rows) == 1:
            return [RowError(f"the tokenizer refuses it: {one_line(error)}")]
        half = len(rows) // 2
        return tokenise_rows(tokenizer, rows[:half]) + tokenise_rows(tokenizer, rows[half:])


def check_fit(config, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """ValueError where the tokenizer has ids that the model has no embedding for, or rows outrun
    its positions.

    `config`: the model's, as transformers has it; no weight is needed.
    """
    config = config.get_text_config()
    ids = 1 + max(tokenizer.get_vocab().values(), default=-1)  # not their number: there may be gaps
    if ids > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {ids:,} tokens, the model's vocabulary {config.vocab_size:,}: "
            "they do not belong together"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise ValueError(
            f"--max_length {max_length} is more than the model's {positions} positions"
        )


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
            f"max_prompt_length {limit} leaves no room for a response in max_length {max_length}"
        )
    if limit < header_length:
        raise ValueError(
            f"a prompt of {limit} tokens cannot hold the assistant's header of {header_length}: raise "
            f"{'max_length' if max_prompt_length is None else 'max_prompt_length'}"
        )
    return limit


class PairEncoder:
    """Pairs under length limits: a prompt keeps its end, then each response is cut to what is left
    of max_length.
    """

    def __init__(self, chat: Chat, max_length: int, max_prompt_length: int | None):
        self.chat = chat
        self.max_length = max_length
        self.max_prompt = check_lengths(max_length, max_prompt_length, chat.header_length)

    def render(self, items: Sequence[tuple]) -> list[tuple | RowError]:
        """(messages, chosen, rejected) each -> three texts each."""
        return self.chat.render(items)

    def finish(self, ids: Sequence[list[int]]) -> Encoded:
        """Truncate; a response that is cut gets no end token. Raises RowError for answers empty or
        equal by now.
        """
        prompt, *responses = ids
        if self.chat.tail_ids in responses:  # some tokenizers leave out what they do not know
            raise RowError("no tokens: the tokenizer makes nothing of a response")
        kept = prompt[-self.max_prompt :]
        room = self.max_length - len(kept)
        cut = tuple(response[:room] for response in responses)
        truncated = (len(prompt) > len(kept), *(len(response) > room for response in responses))
        if len(cut) == 2 and cut[0] == cut[1]:
            raise RowError(
                "equal after truncation" if any(truncated[1:]) else "equal after the chat template"
            )
        return Encoded(kept, cut, truncated)


class LabelledEncoder(PairEncoder):
    """Single answers under the same limits."""

    def render(self, items: Sequence[tuple]) -> list[tuple | RowError]:
        """(messages, answer, label) each -> two texts each."""
        return self.chat.render([item[:2] for item in items])


class TextEncoder:
    """Plain text, no template: an empty prompt and one response without an end token, cut to
    max_length.
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

    def render(self, items: Sequence[str]) -> list[tuple | RowError]:
        """The text itself, in a tuple of one."""
        return [self._checked(text) for text in items]

    def _checked(self, text: str) -> tuple | RowError:
        try:
            self.control.check(text)
        except RowError as error:
            return error
        return (text,)

    def finish(self, ids: Sequence[list[int]]) -> Encoded:
        """Truncate. Raises RowError where the tokenizer makes nothing of the text."""
        if not ids[0]:
            raise RowError("no tokens")
        return Encoded([], (ids[0][: self.max_length],), (False, len(ids[0]) > self.max_length))
