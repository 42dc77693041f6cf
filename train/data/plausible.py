"""Rows that can be read, and that nobody can have meant: found by their text, said, and refused
above a share of the data.

Trainers learn such data without a complaint: the model learns to repeat the question, or to write
JSON. Nothing is mended here, because what was meant can only be guessed.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from train.data.rows import Labelled, Pair
from train.data.shapes import SCORES_CONTRADICT, is_written_out

SHOWN = 3  # rows of each sort that a message names
SAID_FROM = 0.001  # share of the rows from which a sort is worth saying
# A shorter prompt may well stand at the head of an answer, "Hello!" and "Hello! How are you?", but
# hardly of all answers to it.
PROMPT_CHARACTERS = 16
SHORT_PROMPT_CHARACTERS = 6
# Before a repeated prompt there may be a mark such as "### Instruction:".
HEAD_CHARACTERS = 40
# Or a preamble, behind which it begins a line or follows a colon: an answer that asks the question
# back ("What about you, do you ...?") repeats it within a sentence.
PREAMBLE_CHARACTERS = 400
AFTER_PREAMBLE = re.compile(r"""(?:^|:)[\s"'*>\u201c]*""", re.MULTILINE)
HEAD = 4000  # characters of a prompt in which turns are looked for
SPEAKER = r"(?:#+\s*|<\|?|\[)?(?:{})(?:\|?>|\])?\s*:"
USER_FIRST = re.compile(
    rf"\s*(?:{SPEAKER.format('System|SYSTEM')}[\s\S]*?\n\s*)?{SPEAKER.format('Human|User|USER')}"
)
ASSISTANT_THEN = re.compile(rf"\n\s*{SPEAKER.format('Assistant|ASSISTANT|AI|Bot')}")


WRITTEN_OUT = "a text is a conversation written out as JSON or Python"
WHOLE_CONVERSATION = "an answer holds the turns of a whole conversation"
PROMPT_FIRST = "an answer begins with its prompt"
SHORT_PROMPT_FIRST = "all answers begin with their prompt"
PROMPT_WITH_TURNS = "a prompt holds turns of a conversation, or another template's marks, as text"
_ANSWERS = 'for name in ("chosen", "rejected", "completion") if name in row'
_WITHOUT_PROMPT = (
    'rows.map(lambda row: {name: row[name].removeprefix(row["prompt"]).strip() '
    f'{_ANSWERS}}}).to_json("pairs.jsonl")'
)
# How such data, read as `rows`, is made into what was meant, if it was that.
CONVERSIONS = {
    WRITTEN_OUT: "rows.map(lambda row: {name: json.loads(text) for name, text in row.items() if "
    'isinstance(text, str) and text.lstrip()[:1] in ("[", "{")}).to_json("pairs.jsonl"), or '
    "ast.literal_eval where the quotes are Python's",
    WHOLE_CONVERSATION: 'rows.map(lambda row: {name: re.split(r"\\n\\s*Assistant:", row[name])'
    f'[-1].strip() {_ANSWERS}}}).to_json("pairs.jsonl")',
    PROMPT_FIRST: _WITHOUT_PROMPT,
    SHORT_PROMPT_FIRST: _WITHOUT_PROMPT,
}


# What has been rendered is rendered once more, in a turn of the user's, unless nothing is done to it.
AS_RENDERED = (
    ", and with it, where the turns are this model's own, --allow_control_tokens true and --chat_template "
    "FILE with {% for m in messages %}{{ m['content'] }}{% endfor %}, which is saved with the model; else "
    "make messages of them"
)
# Turns that were put into one text for another model.
PROMPT_TURNS = re.compile(
    rf"^\s*{SPEAKER.format('Human|User|USER')}[\s\S]*\n\s*"
    rf"{SPEAKER.format('Assistant|ASSISTANT|AI|Bot')}"
    r"|^\s*(?:<s>)?\s*\[INST\]|^\s*(?:<bos>|<start_of_turn>|\[gMASK\]|<BOS_TOKEN>)"
    r"|^\s*<[|\uff5c](?:im_start|user|User|system|start_header_id|begin_of_text|start|startoftext|turn|"
    r"START_OF_TURN_TOKEN|begin\u2581of\u2581sentence)[|\uff5c]?>"
)


class Suspicion(NamedTuple):
    """One sort of implausible rows in the data."""

    what: str
    rows: int
    total: int  # rows that were looked at
    examples: Sequence[str]  # "SOURCE row N: TEXT" of the first ones
    source: str  # of the first one

    def __str__(self) -> str:
        return f"{self.rows} of {self.total} rows: {self.what}; {'; '.join(self.examples)}"


def suspect(item: Pair | Labelled) -> tuple[str, str] | None:
    """(what is odd, where it is seen) of a checked row; None for most."""
    answers = [answer["content"] for answer in item.answers]
    if not answers:
        return None  # a prompt alone
    if SCORES_CONTRADICT in item.remarks:
        return SCORES_CONTRADICT, answers[0]
    for text in (*answers, item.messages[-1]["content"]):
        if is_written_out(text):
            return WRITTEN_OUT, text
    for text in answers:
        if USER_FIRST.match(text) and ASSISTANT_THEN.search(text):
            return WHOLE_CONVERSATION, text
    asked = item.messages[-1]["content"]
    if PROMPT_TURNS.search(asked[:HEAD]):
        return PROMPT_WITH_TURNS, asked
    prompt = _plain(asked)
    # White space may have been changed, and some characters more are looked at for that.
    heads = [_plain(text[: 2 * len(prompt) + HEAD_CHARACTERS]) for text in answers]
    heads = [head[: len(prompt) + HEAD_CHARACTERS] for head in heads]
    if len(prompt) >= PROMPT_CHARACTERS:
        # what stands before the question in the prompt may be repeated with it
        within = PREAMBLE_CHARACTERS + sum(len(turn["content"]) for turn in item.messages[:-1])
        for head, text in zip(heads, answers, strict=True):
            if prompt in head or _follows_preamble(text, prompt, within):
                return PROMPT_FIRST, text
    elif len(prompt) >= SHORT_PROMPT_CHARACTERS:
        if all(head.startswith(prompt) and head != prompt for head in heads):
            return SHORT_PROMPT_FIRST, answers[0]
    return None


def _follows_preamble(text: str, prompt: str, within: int) -> bool:
    """Whether the prompt, as `_plain` makes it, begins a line or follows a colon within the first
    characters of a text.
    """
    return any(
        _plain(text[place.end() : place.end() + 2 * len(prompt)]).startswith(prompt)
        for place in AFTER_PREAMBLE.finditer(text[:within])
    )


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
