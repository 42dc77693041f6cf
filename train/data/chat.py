"""Chat template -> token ids of prompt and responses, the ids that inference sees.

The prompt's ids are what `apply_chat_template(..., add_generation_prompt=True)` feeds. The
response's ids are what the model would have to write after them:

* Where the prompt's ids are a prefix of the whole conversation's ids, the rest of those, to and
  including the end token, exactly once. A text is never tokenised apart and glued on:
  sentencepiece-like tokenizers put a space of their own before it.
* Where the conversation is rendered otherwise (a thought is opened in the assistant's header, a
  system text moves), the inference prompt stands, and the answer follows it as the template
  renders it. The two are tokenised as one text.
* Where a token would run across the border of the two, the answer is tokenised behind another text
  that no token of it merges with, if that decodes to the same conversation.

What is rendered is compared with what was asked for: an answer that is not there in full, and keys
that change nothing, are not lost in silence. What cannot be is a RowError. Templates run in
transformers' sandbox (`apply_chat_template`) and nowhere else.

Text of a conversation, by the names used here:

    ...<|user|>Hi<|end|>\\n <|assistant|>\\n  Hello! <|end|>\\n
    |----------- prompt -------------------| answer |-tail-|
                           |--- header ---|
"""

import functools
import inspect
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from train.data.errors import RowError, one_line
from train.data.rows import SYSTEM_ROLES

QUESTION = [{"role": "user", "content": "probe question"}]
ANSWER = "probe answer"
OTHER_ANSWER = "some words"  # which begins and ends with other letters
CALL_ARGUMENTS = {"probe_key": "probe value"}
# What a response is tokenised behind where it cannot be tokenised behind its prompt.
ANCHORS = ("\n", ".", ":", "a")
# Tokens that open or close a thought: an answer may hold them
THOUGHT = re.compile(r"</?think(?:ing)?>|\[/?THINK\]|<\|?/?(?:begin|end)_of_thought\|?>")
OPENS_THOUGHT = re.compile(r"(?:<think(?:ing)?>|\[THINK\]|<\|?begin_of_thought\|?>)\s*\Z")


class Request(NamedTuple):
    """What is to be rendered: a prompt and the answers to it."""

    messages: list[dict]  # the prompt
    answers: Sequence[dict]  # messages of the assistant
    template_args: dict  # tools, documents, chat_template_kwargs


class Rendered(NamedTuple):
    """A prompt and its answers as text."""

    request: Request
    prompt: str
    texts: tuple[str, ...]  # of each answer: prompt, answer and end token
    remarks: tuple[str, ...]  # what the template made of the row, where that is worth saying

    @property
    def all_texts(self) -> tuple[str, ...]:
        return self.prompt, *self.texts


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
        """The first control token in a text."""
        match = self._pattern.search(text) if self.tokens else None
        return match.group() if match else None

    def at_end(self, text: str) -> str | None:
        """The control token that a text ends with."""
        return next((token for token in self.tokens if text.endswith(token)), None)

    def check(self, text: str) -> None:
        """Raises RowError where a text has one: as a token it would end a turn, or begin one, in
        the user's name.
        """
        if not self.allowed and (token := self.first(text)) is not None:
            raise RowError(f"control token {token!r} in the text (--allow_control_tokens keeps it)")


def _frames(token: str, conversation: str) -> bool:
    """Whether an added token is one of the conversation's marks: neither a word nor white space, nor
    what opens or closes a thought, which answers to train on may have.
    """
    return (
        len(token.strip()) > 2
        and not THOUGHT.fullmatch(token)
        and not (token[0].isalnum() or token[-1].isalnum())
        and token in conversation
    )


def use_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> None:
    """Give the tokenizer the chat template in the file `path`, a template or a tokenizer's or
    processor's JSON that has one; None: leave it its own. Raises ValueError.
    """
    if path is None:
        return
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")
        found = _parsed(text)  # as a template it would render its own braces, too
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"--chat_template {path}: cannot be read: {said}") from error
    template = found.get("chat_template") if isinstance(found, dict) else text
    if not isinstance(template, str):
        raise ValueError(
            f"--chat_template {path}: its JSON has no template as 'chat_template', or has several; put "
            "the one that is meant into a file of its own"
        )
    tokenizer.chat_template = template


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


def tokenise_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[str]]
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


def tail_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the chat template puts behind an answer, its end token and a newline say: what two
    conversations end in whose answers have nothing in common.
    """
    conversations = [
        [*QUESTION, {"role": "assistant", "content": text}] for text in (ANSWER, OTHER_ANSWER)
    ]
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    return os.path.commonprefix([ids[::-1] for ids in tokenise(tokenizer, texts)])[::-1]


class Chat:
    """A tokenizer with its chat template, probed once.

    `end` is the text of the end-of-turn token, `end_id` its id, `header_length` the number of
    tokens of the assistant's header. `allow_template_changes`: keep an answer that the template
    cuts or changes, as it is rendered. `keep_tail`: an answer reaches to the end of what is
    rendered, so that the ids of prompt and answer are those of the finished conversation as
    everybody feeds it to a model that judges it. Raises ValueError: no template or no end token; a
    template that cannot be used, and why.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        allow_control_tokens: bool = False,
        allow_template_changes: bool = False,
        keep_tail: bool = False,
    ):
        self.tokenizer = tokenizer
        self.keep_tail = False  # until the template is known
        self._takes_objects = True  # so is this
        self.allow_template_changes = allow_template_changes
        self.control = ControlTokens(tokenizer, allow_control_tokens)
        name = tokenizer.name_or_path or "this model"
        try:
            tokenizer.get_chat_template()
        except ValueError as error:
            raise ValueError(
                f"the tokenizer of {name} has no chat template: use an instruct model, put chat_template.jinja in "
                f"the model's directory, or pass --chat_template FILE ({error})"
            ) from error
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {name} has no eos_token: set 'eos_token' in its tokenizer_config.json"
            )
        of_object = self._renders_call(CALL_ARGUMENTS)
        of_text = self._renders_call(json.dumps(CALL_ARGUMENTS))
        self._writes_calls = of_object or of_text
        self._takes_objects = of_object or not of_text
        self._probe(name)
        self.keep_tail = keep_tail

    def _renders_call(self, arguments: dict | str) -> bool:
        """Whether the template writes a tool call with arguments of this type."""
        function = {"name": "probe_tool", "arguments": arguments}
        call = {"id": "probe0123", "type": "function", "function": function}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        self._takes_objects = isinstance(arguments, dict)
        text = self._render_one([*QUESTION, turn], False, {})
        return isinstance(text, str) and CALL_ARGUMENTS["probe_key"] in text

    def _probe(self, name: str) -> None:
        """Find what the template puts around an answer. The end token is eos where that ends turns,
        else the first control token behind the answer, or else eos.
        """
        answer = [{"role": "assistant", "content": ANSWER}]
        bare, prompt, whole, finished = (
            self._render_one(messages, header, {})
            for messages, header in (
                (QUESTION, False),
                (QUESTION, True),
                (QUESTION + answer, False),
                (QUESTION + answer + QUESTION, False),
            )
        )
        for text in (prompt, whole):
            if isinstance(text, RowError):
                raise ValueError(
                    f"the chat template of {name} cannot render a question and its answer: {text}; "
                    "pass --chat_template FILE with one that can"
                )
        around = self._around_answer(QUESTION, {})
        if around is None:
            raise ValueError(
                f"the chat template of {name} leaves out the assistant's answer: {whole!r}; pass "
                "--chat_template FILE with one that writes it"
            )
        before, self._tail = around
        rendered_answer = whole[len(before) : len(whole) - len(self._tail)]
        bare = "" if isinstance(bare, RowError) else bare
        self._header = prompt[len(bare) :] if bare and prompt.startswith(bare) else ""
        self._lead = _lead(prompt, before, bare)
        finished = "" if isinstance(finished, RowError) else finished
        # What frames a turn frames one that is over. Not <think>, which stands before an answer, or
        # in a turn that is not over: answers to train on may have that.
        frames = finished.replace(self._lead + rendered_answer, rendered_answer)
        self.control = ControlTokens(self.tokenizer, self.control.allowed, frames)
        between = finished[len(before) + len(rendered_answer) :]
        between = between.rpartition(QUESTION[0]["content"])[0]
        # Another control token may stand before eos: <|END_RESPONSE|><|END_OF_TURN_TOKEN|>. Or an eos
        # behind the last turn alone, which nobody would write: <|end|>\n<|endoftext|>.
        eos = self.tokenizer.eos_token
        ends_turns = eos in self._tail and eos in between
        end = eos if ends_turns else self.control.first(self._tail)
        self.end = self.tokenizer.eos_token if end is None else end
        self.end_id = self.tokenizer.convert_tokens_to_ids(self.end)
        self._anchors = [self.end, *ANCHORS]
        if end is None:
            # No model would learn to stop at white space.
            self._kept_tail = self._tail.rstrip() + self.end
        else:
            self._kept_tail = self._tail[: self._tail.index(end) + len(end)]
        self._user_header = between.removeprefix(self._tail)
        self.header_length = len(tokenise(self.tokenizer, [self._header])[0])
        allowed = self.allow_template_changes
        self.allow_template_changes = True  # what a template makes of an answer is judged by row
        ids = self.response_ids(QUESTION, ANSWER)
        self.allow_template_changes = allowed
        if ids[-1] != self.end_id or ids.count(self.end_id) != 1:
            text = self._lead + ANSWER + self._kept_tail
            raise ValueError(
                f"the tokenizer of {name} does not end {text!r} with one token {self.end!r}: {ids}"
            )
        # What a response of no characters that the tokenizer knows comes to.
        prompt_ids, lead_ids, *tails = tokenise(
            self.tokenizer, [prompt, prompt + self._lead + self._kept_tail, self._kept_tail]
        )
        self.empty_ids = [lead_ids[len(prompt_ids) :], *tails]

    # ------------------------------------------------------------ text

    def render(self, requests: Sequence[Request]) -> list[Rendered | RowError]:
        """The texts of each request, or the RowError that drops it."""
        calls, places = [], []
        for messages, answers, args in requests:
            places.append(slice(len(calls), len(calls) + 1 + len(answers)))
            calls.append((messages, True, args))
            calls += [(messages + [self._turn(answer)], False, args) for answer in answers]
        texts = self._render(calls)
        return [
            self._compose(request, texts[place])
            for request, place in zip(requests, places, strict=True)
        ]

    def _turn(self, answer: dict) -> dict:
        """The answer without an end token of its own at its end, which the template adds."""
        text = answer["content"]
        bare = text.rstrip()
        return answer | {
            "content": bare.removesuffix(self.end) if bare.endswith(self.end) else text
        }

    def _render(self, calls: Sequence[tuple[list, bool, dict]]) -> list[str | RowError]:
        """Render (messages, with the assistant's header?, template_args) each; a RowError in place
        of what the template refuses.
        """
        alike = {}
        for place, (_, header, args) in enumerate(calls):
            key = (header, json.dumps(args, sort_keys=True) if args else "")
            alike.setdefault(key, []).append(place)
        rendered = [None] * len(calls)
        for (header, _), places in alike.items():
            conversations = [calls[i][0] for i in places]
            args = calls[places[0]][2]
            try:
                # Many at once cost half of one by one (16 against 33 us each).
                texts = self._apply(conversations, header, args)
            except Exception:
                # One is refused: find out which.
                texts = [self._render_one(messages, header, args) for messages in conversations]
            for place, text in zip(places, texts, strict=True):
                rendered[place] = text
        return rendered

    def _render_one(self, messages: list, header: bool, args: dict) -> str | RowError:
        try:
            return self._apply([messages], header, args)[0]
        # A template is a program: raise_exception(), a type error, an undefined name.
        except Exception as error:
            return RowError(f"the chat template refuses it: {one_line(error)}")

    def _apply(self, conversations: list, header: bool, args: dict) -> list[str]:
        more = args.get("chat_template_kwargs", {})
        if reserved := _reserved_names(type(self.tokenizer)) & {*more}:
            raise ValueError(f"chat_template_kwargs may not hold {sorted(reserved)[0]!r}")
        return self.tokenizer.apply_chat_template(
            [self._with_arguments(messages) for messages in conversations],
            tools=args.get("tools"),
            documents=args.get("documents"),
            tokenize=False,
            add_generation_prompt=header,
            **more,
        )

    def _with_arguments(self, messages: list) -> list:
        """The messages with the arguments of their tool calls as the template takes them, objects as a
        rule, and texts if only those will do.

        Data have them as either. An object's JSON, as OpenAI sends it, would be written as a string
        in quotation marks, which no model is asked to write, where a template takes objects.
        """
        if not any(turn.get("tool_calls") for turn in messages):
            return messages
        return [
            turn | {"tool_calls": [self._with_call_arguments(call) for call in turn["tool_calls"]]}
            if isinstance(turn.get("tool_calls"), list)
            else turn
            for turn in messages
        ]

    def _with_call_arguments(self, call: Any) -> Any:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or "arguments" not in function:
            return call
        arguments = function["arguments"]
        if self._takes_objects:
            arguments = _parsed(arguments)
        elif isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = function | {"arguments": arguments}
        return call | {"function": function} if "function" in call else function

    def _compose(self, request: Request, rendered: list[str | RowError]) -> Rendered | RowError:
        """The request's texts, from the prompt and the whole conversations as rendered."""
        messages, answers, args = request
        try:
            for turn in (*messages, *answers):
                self.control.check(turn["content"])
                if len(turn) > 2:
                    self._check_others(
                        {k: v for k, v in turn.items() if k not in ("role", "content")}
                    )
            self._check_others(args)
            for text in rendered:
                if isinstance(text, RowError):
                    raise text
            prompt, *wholes = rendered
            remarks = []
            texts = []
            for whole, answer in zip(wholes, answers, strict=True):
                answer = self._turn(answer)
                end, kept_tail = self._end_of(whole, answer)
                said, is_complete = self._said(request, prompt, whole[:end], answer)
                if not is_complete:
                    if not self.allow_template_changes:
                        missing = _difference(answer["content"], said)
                        what = f"{missing!r} is" if missing else "its tool calls are"
                        raise RowError(
                            "the chat template leaves out or changes part of the answer, or "
                            f"{what} not in what it renders (--chat_template FILE for one that "
                            "keeps it, --allow_template_changes to train what it renders)"
                        )
                    remarks.append("the chat template leaves out or changes part of an answer")
                is_open = OPENS_THOUGHT.search(prompt) and not THOUGHT.search(said)
                if is_open and not self.keep_tail:
                    remarks.append(
                        "the chat template opens a thought that an answer does not close, and so it is "
                        "learnt (--chat_template FILE for one that opens none)"
                    )
                texts.append(whole if self.keep_tail else prompt + said + kept_tail)
            remarks += self._left_out(messages, prompt)
            remarks += self._unused(request, rendered)
            if self.keep_tail and not all(whole.startswith(prompt) for whole in wholes):
                # as it is rendered once it is answered; `_said` has found that it can be
                prompt, _ = self._around_answer(request.messages, request.template_args)
            return Rendered(request, prompt, tuple(texts), tuple(dict.fromkeys(remarks)))
        except RowError as error:
            return error

    def _check_others(self, value: Any) -> None:
        """Raises RowError where any string within a value has a control token."""
        if isinstance(value, str):
            self.control.check(value)
        elif isinstance(value, dict):
            for name, inner in value.items():
                self.control.check(name)
                self._check_others(inner)
        elif isinstance(value, list):
            for inner in value:
                self._check_others(inner)

    def _end_of(self, whole: str, answer: dict) -> tuple[int, str]:
        """(where an answer ends in the conversation as rendered, what is trained behind it: its end
        token). Raises RowError.
        """
        if whole.endswith(self._tail):
            return len(whole) - len(self._tail), self._kept_tail
        text = whole.rstrip()
        # calls may end in a token of their own: <|call|>, <|eom_id|>
        if answer.get("tool_calls") and (token := self.control.at_end(text)):
            return len(text) - len(token), token
        raise RowError(
            "the chat template ends this answer otherwise than a plain one (--chat_template FILE for "
            "one that ends all alike)"
        )

    def _said(self, request: Request, prompt: str, whole: str, answer: dict) -> tuple[str, bool]:
        """(what `whole`, the conversation to the end of the answer, says behind the prompt, whether
        the answer is in it in full, outer white space apart). Raises RowError.
        """
        asked = answer["content"].strip()
        if whole.startswith(prompt):
            said = body = whole[len(prompt) :]
            if asked not in body and self._header and prompt.endswith(self._header):
                # The header may have opened what the answer begins with: a thought.
                body = self._header + body
        else:
            # The template renders the prompt otherwise once an answer follows: find the answer by
            # the place that another one has.
            around = self._around_answer(request.messages, request.template_args)
            if around is None or not whole.startswith(around[0]):
                raise RowError(
                    "the chat template renders the prompt otherwise once it is answered (a key in "
                    "chat_template_kwargs, or --chat_template FILE, for a prompt that fits the answer)"
                )
            body = whole[len(around[0]) :]
            said = self._lead + body
        if not body.strip():
            what = "tool calls" if answer.get("tool_calls") else "such answers"
            raise RowError(
                f"empty response after the chat template, which leaves out {what} (--chat_template "
                "FILE for one that keeps them)"
            )
        # a template that writes no calls is another matter, which `_unused` tells
        in_full = asked in body and (not self._writes_calls or _calls_are_in(answer, body))
        return said, in_full

    def _around_answer(self, messages: list[dict], args: dict) -> tuple[str, str] | None:
        """What is rendered before and behind an answer to these messages, however the template
        changes the answer itself; None where it leaves it out. Raises RowError.
        """
        texts = []
        for content in (ANSWER, OTHER_ANSWER):
            probe = messages + [{"role": "assistant", "content": content}]
            text = self._render_one(probe, False, args)
            if isinstance(text, RowError):
                raise text
            before, found, behind = text.rpartition(content)
            if found:
                return before, behind
            texts.append(text)
        if texts[0] == texts[1]:
            return None
        # written in capitals, or cut: around it is what two answers have in common
        before = os.path.commonprefix(texts)
        behind = os.path.commonprefix([text[len(before) :][::-1] for text in texts])[::-1]
        return before, behind

    def _left_out(self, messages: list[dict], prompt: str) -> Iterator[str]:
        """A remark for turns of the prompt that are not in it as rendered. Of the assistant's turns
        thoughts are left out as a rule, and meant to be; what a tool says may be written as JSON.
        """
        texts = []
        for turn in messages:
            text = turn["content"]
            if turn["role"] == "assistant":
                text = text.rpartition("</think>")[2]
            texts.append(text.strip())
        for turn, text in zip(messages, texts, strict=True):
            # a short text may well stand within another turn's: it is there as often as it was said
            often = sum(other.count(text) for other in texts) if text else 0
            is_there = prompt.count(text) >= often if text else True
            if turn["role"] == "tool":
                is_there = is_there or _is_written(text, prompt) or _is_json(text)
            if not is_there:
                yield f"the chat template leaves out or changes a turn of {turn['role']}"

    def _unused(self, request: Request, rendered: list[str]) -> Iterator[str]:
        """A remark for each key, beyond role and content, that changes nothing in what is rendered."""
        keys = _keys(request)
        if not keys:
            return
        if len(keys) > 1 and self._rendered_without(request, keys) == rendered:
            unused = keys
        else:
            unused = [key for key in keys if self._rendered_without(request, [key]) == rendered]
        for place, name in unused:
            yield f"the chat template does not use {name!r} of {place}"

    def _rendered_without(self, request: Request, keys: list) -> list[str | RowError]:
        of_messages = {name for place, name in keys if place == "messages"}
        of_row = {name for place, name in keys if place == "the row"}

        def bare(turn):
            return {name: value for name, value in turn.items() if name not in of_messages}

        args = {name: value for name, value in request.template_args.items() if name not in of_row}
        messages = [bare(turn) for turn in request.messages]
        answers = [bare(self._turn(answer)) for answer in request.answers]
        calls = [(messages, True, args)]
        return self._render(calls + [(messages + [answer], False, args) for answer in answers])

    # ------------------------------------------------------------ token ids

    def split(self, rendered: Rendered, ids: Sequence[list[int]]) -> tuple[list, list[list]]:
        """(prompt (P,), responses (R_i,) each) from the ids of `rendered.all_texts`, each response
        to and including its end token, or with `keep_tail` to the end of the text. Raises RowError.
        """
        prompt, *wholes = ids
        if self.keep_tail:
            # Nobody writes these answers: where a token runs across the border, it is the answer's.
            prompt = os.path.commonprefix([prompt, *wholes])
            if any(whole == prompt for whole in wholes):
                raise RowError("no tokens: the tokenizer makes nothing of a response")
        count = len(prompt)
        responses = [
            whole[count:] if whole[:count] == prompt else self._across(rendered, i, prompt, whole)
            for i, whole in enumerate(wholes)
        ]
        return prompt, responses

    def _across(self, rendered: Rendered, i: int, prompt: list, whole: list) -> list[int]:
        """The ids of an answer whose first token would begin within the prompt. Raises RowError."""
        answer = rendered.texts[i][len(rendered.prompt) :]
        wanted = self._decode(whole)
        for anchor in self._anchors:
            anchor_ids, ids = tokenise(self.tokenizer, [anchor, anchor + answer])
            count = len(anchor_ids)
            is_apart = ids[:count] == anchor_ids
            if is_apart and self._decode(prompt + ids[count:]) == wanted:
                # What has helped once will help again.
                self._anchors.remove(anchor)
                self._anchors.insert(0, anchor)
                return ids[count:]
        raise RowError("no tokens of the answer alone: the prompt's last one would run into it")

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def prompt_ids(self, messages: list, template_args: dict | None = None) -> list[int]:
        """Token ids (P,) of the prompt up to and including the assistant's header. Raises RowError."""
        return self._ids(Request(messages, (), template_args or {}))[0]

    def response_ids(
        self, messages: list, answer: str | dict, template_args: dict | None = None
    ) -> list[int]:
        """Token ids (R,) of an answer up to and including its end token. Raises RowError."""
        if isinstance(answer, str):
            answer = {"role": "assistant", "content": answer}
        return self._ids(Request(messages, (answer,), template_args or {}))[1][0]

    def finished_ids(
        self, messages: list, answer: str, template_args: dict | None = None
    ) -> list[int]:
        """Token ids of a whole conversation as it is rendered, whatever the template makes of the
        answer. Raises RowError where it refuses one.
        """
        turn = self._turn({"role": "assistant", "content": answer})
        text = self._render_one([*messages, turn], False, template_args or {})
        if isinstance(text, RowError):
            raise text
        return tokenise(self.tokenizer, [text])[0]

    def _ids(self, request: Request) -> tuple[list, list[list]]:
        [rendered] = self.render([request])
        if isinstance(rendered, RowError):
            raise rendered
        [ids] = tokenise_rows(self.tokenizer, [rendered.all_texts])
        if isinstance(ids, RowError):
            raise ids
        return self.split(rendered, ids)

    def head_ids(self, rendered: Rendered, prompt: list[int]) -> list[int]:
        """The first of a prompt's ids, to the end of its system turn: bos, the system turn or the
        one that the template adds; [] where the prompt does not begin with either.
        """
        messages, _, args = rendered.request
        system = messages[:1] if messages[0]["role"] in SYSTEM_ROLES else []
        text = self._head_text(json.dumps([system, args]))
        if text and rendered.prompt.startswith(text):
            [ids] = tokenise(self.tokenizer, [text])
            return os.path.commonprefix([ids, prompt])
        # bos, unless it begins every turn
        bos = self.tokenizer.bos_token_id
        return prompt[:1] if prompt[:1] == [bos] and prompt.count(bos) == 1 else []

    @functools.lru_cache(maxsize=64)  # noqa: B019 - a Chat lives as long as its data is tokenised
    def _head_text(self, key: str) -> str:
        """What is rendered before the header of the first user's turn."""
        system, args = json.loads(key)
        text = self._render_one(system + QUESTION, True, args)
        if isinstance(text, RowError):
            return ""
        return text.rpartition(QUESTION[0]["content"])[0].removesuffix(self._user_header)


def _lead(prompt: str, before: str, bare: str) -> str:
    """What the template writes between the assistant's header and the answer of a finished turn,
    from a prompt, the text before its answer, and the prompt without the header.
    """
    if before.startswith(prompt):
        return before[len(prompt) :]
    if not (bare and prompt.startswith(bare) and before.startswith(bare)):
        return ""
    opened, finished = prompt[len(bare) :], before[len(bare) :]
    shared = len(os.path.commonprefix([opened, finished]))
    # "<think>" and "</think>" share "<": such a mark is written whole.
    begun = max(finished.rfind("<", 0, shared), finished.rfind("[", 0, shared))
    if begun >= 0 and not re.search(r"[>\]]", finished[begun:shared]):
        shared = begun
    return finished[shared:]


def _calls_are_in(answer: dict, body: str) -> bool:
    """Whether the names and arguments of an answer's tool calls stand in what is rendered."""
    return all(_is_written(word, body) for word in _words(answer.get("tool_calls") or []))


def _is_written(text: str, body: str) -> bool:
    """Whether a text stands in what is rendered, as it is or as JSON spells it."""
    spelt = (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
    return any(each in body for each in spelt)


def _words(value: Any) -> Iterator[str]:
    """The names and the texts of arguments in tool calls."""
    if isinstance(value, list):
        for inner in value:
            yield from _words(inner)
    elif isinstance(value, dict):
        function = value.get("function", value)
        if isinstance(function, dict):
            if isinstance(function.get("name"), str):
                yield function["name"]
            arguments = _parsed(function.get("arguments"))
            values = arguments.values() if isinstance(arguments, dict) else ()
            yield from (text for text in values if isinstance(text, str))


def _parsed(value: Any) -> Any:
    """A value, as an object where it is the JSON of one."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value  # a call that is rejected for its arguments may be broken
    return found if isinstance(found, dict) else value


def _is_json(text: str) -> bool:
    """Whether a tool's result is JSON, which templates write anew."""
    return text[:1] in ("{", "[", '"')


def _difference(asked: str, said: str) -> str:
    """A few characters of the answer from about where it is no longer in what is rendered."""
    asked = asked.strip()
    low, high = 0, len(asked)  # asked[:low] is in `said`, asked[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if asked[:middle] in said else (low, middle)
    return asked[max(low - 10, 0) : low + 30]


def _keys(request: Request) -> list[tuple[str, str]]:
    """("messages" or "the row", key) of all that the template gets besides role and content."""
    turns = [*request.messages, *request.answers]
    names = dict.fromkeys(name for turn in turns for name, value in turn.items() if value)
    of_messages = [("messages", name) for name in names if name not in ("role", "content")]
    return of_messages + [("the row", name) for name in request.template_args]


@functools.cache
def _reserved_names(tokenizer_class: type) -> set[str]:
    """What apply_chat_template takes itself; a row of data must not set it."""
    return {*inspect.signature(tokenizer_class.apply_chat_template).parameters}


def check_fit(
    config, tokenizer: PreTrainedTokenizerBase, max_length: int, data=(), of: str = "the model"
) -> None:
    """ValueError where a data set uses ids that the model has no embedding for, or rows may outrun
    its positions.

    `config`: the model's, as transformers has it; no weight is needed. `data`: every Tokenised in
    use. The size of the vocabulary says nothing: some tokenizers have tokens that no text reaches.
    `of`: whose configuration it is, for the message.
    """
    config = config.get_text_config()
    largest = max((int(each.ids.max()) for each in data if len(each.ids)), default=-1)
    if largest >= config.vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"the data has token {largest:,}, {token!r}, and {of}'s vocabulary is "
            f"{config.vocab_size:,}: take a tokenizer and a model that came together"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise ValueError(
            f"--max_length {max_length} is more than {of}'s {positions} positions: lower it"
        )
