"""Rows as people have them -> rows with the columns that rows.py checks.

    columns                                                  becomes
    question, query, instruction (with input)                prompt
    messages, conversations, conversation                    prompt (all turns but an answer)
    messages that end with the answer, rejected_response     prompt, chosen, rejected
    "\\n\\nHuman: ...\\n\\nAssistant: ..." as in HH-RLHF          messages
    responses, completions, answers, ... with scores         chosen (the best), rejected (the worst)
    system, system_prompt                                    the system turn
    tools, documents, chat_template_kwargs                   arguments of the chat template

Only what is beyond doubt is read; the rest is refused with the `--columns` that would rename it, or
with the lines of Python that convert it (see `advice`). How a row was read is said where a reader
of the data might have read it otherwise: those remarks are counted, and shown once.
"""

import difflib
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from train.data.errors import RowError

# What a row may hold that training reads, and what --columns may rename to.
COLUMNS = (
    *("prompt", "chosen", "rejected", "completion", "label", "text", "system"),
    *("tools", "documents", "chat_template_kwargs"),
    *("score", "margin", "score_chosen", "score_rejected"),
)
# Those of them that are meant as they are called; a text may well be a prompt.
KEPT = {*COLUMNS} - {"text"}
QUESTIONS = ("question", "query", "instruction")
CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEMS = ("system", "system_prompt")
TEMPLATE_ARGS = {"tools": list, "documents": list, "chat_template_kwargs": dict}
# Columns that say something about the task, and that nothing here reads.
UNREAD = (
    *("images", "image", "videos", "video", "audios", "audio"),
    *("history", "context", "input", "functions"),
    *("tool_calls", "reasoning_content", "reasoning", "thinking", "system_message"),
)
ANSWER_LISTS = ("responses", "completions", "answers", "candidates", "generations", "outputs")
ANSWER_TEXTS = ("response", "completion", "answer", "output", "content", "text", "generated_text")
# Keys of an answer, beside its text, that a chat template may write
ANSWER_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "name")
SCORES = ("score", "scores", "overall_score", "rating", "ratings", "reward", "rewards")
RANKS = ("rank", "ranks", "ranking")  # 1 is the best
# Names that others give to the three columns of a pair, to guess from in a refusal.
GUESSES = {
    "prompt": (*QUESTIONS, "input", "user", "problem", "context", "post", "text", "q"),
    "chosen": (
        *("better", "preferred", "winner", "win", "accepted", "positive", "good", "best"),
        *("response_chosen", "chosen_response", "answer_chosen", "chosen_answer", "w", "yw"),
    ),
    "rejected": (
        *("worse", "dispreferred", "loser", "lose", "refused", "negative", "bad", "worst"),
        *(
            "response_rejected",
            "rejected_response",
            "answer_rejected",
            "rejected_answer",
            "l",
            "yl",
        ),
    ),
    "completion": ("response", "answer", "output", "generated_text"),
    "label": ("desirable", "is_desirable", "thumbs_up", "feedback", "good"),
    "text": ("content", "body", "document", "article"),
}
# What LLaMA-Factory and others call the label of an answer
JUDGED = ("kto_tag", "desirable", "is_desirable", "score")
SCORE_PAIRS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
)
SCORES_CONTRADICT = "chosen has a lower score than rejected"
# Two answers in columns of their own, and the number of the better one, as in PKU-SafeRLHF
BY_NUMBER = {"response_0", "response_1"}
BETTER_NUMBERS = ("better_response_id", "safer_response_id", "better")
# A conversation written out as text: it begins like JSON or Python, and some speaker says something
# in it. Quotes may be escaped once more.
DUMP = re.compile(r"\s*(?:```\w*\s*)?(?:array\()?[\[({\"]?[\[({]|\s*ChatCompletion\w*\(")
SPEAKERS = "user|assistant|system|human|gpt|tool|bot|chatgpt|model"
DUMPED_SPEAKER = re.compile(rf"""(?:role|from)\\*['"]?\s*[:=]\s*\\*['"](?:{SPEAKERS})\\*['"]""")
DUMPED_TEXT = re.compile(r"""(?:content|value|text)\\*['"]?\s*[:=]\s*\\*['"]""")
DUMPED_WITHIN = 4000  # characters of a text in which both are looked for
HUMAN = re.compile(r"\s*Human:")
TURNS = re.compile(r"(?:\A\s*|\n\n\s*)(Human|Assistant):")


def parse_columns(pairs: Sequence[str] | None) -> dict[str, str]:
    """`--columns prompt=question chosen=better` as {"question": "prompt", ...}. Raises ValueError."""
    renamed = {}
    for pair in pairs or ():
        wanted, equals, found = pair.partition("=")
        if not equals or not found or wanted not in COLUMNS:
            raise ValueError(
                f"--columns {pair}: expected WANTED=FOUND, say prompt=question, and one of "
                f"{', '.join(COLUMNS)} before the equals sign"
            )
        if wanted in renamed.values() or found in renamed:
            raise ValueError(f"--columns {pair}: {wanted} or {found} is named twice")
        renamed[found] = wanted
    return renamed


def rename(row: Any, renamed: dict[str, str]) -> Any:
    """The row under the names that training reads; a column of that name gives way."""
    if type(row) is not dict or not any(name in row for name in renamed):
        return row  # a row with a key twice too: it is refused for that
    moved = {wanted: row[found] for found, wanted in renamed.items() if found in row}
    return {name: value for name, value in row.items() if name not in renamed} | moved


def canonical(row: dict) -> tuple[dict, list[str]]:
    """A row with prompt, chosen and rejected, or prompt and completion, and remarks on how it was
    read. The row itself where it has these already. Raises RowError.
    """
    remarks = []
    for name in UNREAD:
        if row.get(name):
            if not (name == "input" and "instruction" in row and "prompt" not in row):
                remarks.append(f"the column {name!r} is not read")
    if row.get("prompt") is not None:
        for name in (*QUESTIONS, *CONVERSATIONS):
            if row.get(name):
                remarks.append(f"the column {name!r} is not read: there is a 'prompt'")
    for better, worse in SCORE_PAIRS:
        if better in row and worse in row:
            scores = _number(row[better]), _number(row[worse])
            if None not in scores and scores[0] < scores[1]:
                remarks.append(SCORES_CONTRADICT)
    if row.get("prompt") is None or row.get("chosen") is None:
        row = _with_answers(dict(row), remarks)
        row = _with_prompt(row, remarks)
    if isinstance(row.get("prompt"), str) or row.get("prompt") is None:
        row = _with_transcript(row, remarks)
    return row, remarks


def without_answers(row: dict) -> dict:
    """A row as one who looks for its prompt alone reads it: without the answer that a conversation ends
    with, nor a list of answers beside the prompt, whatever their scores.
    """
    for name in CONVERSATIONS:
        turns = row.get(name)
        if isinstance(turns, list) and len(turns) > 1 and _role(turns[-1]) == "assistant":
            row = row | {name: turns[:-1]}
    if any(row.get(name) for name in ("prompt", *QUESTIONS, *CONVERSATIONS)):
        row = {name: value for name, value in row.items() if name not in ANSWER_LISTS}
    return row


def _with_answers(row: dict, remarks: list[str]) -> dict:
    """chosen and rejected from a list of scored answers, or from messages and a rejected answer."""
    # null, where a table has rows of several shapes, is not there
    there = {name for name, value in row.items() if value is not None}
    if {"chosen", "rejected"} & there or {"completion", "label"} <= there:
        return row
    turns = row.get("messages")
    if isinstance(turns, list) and turns and isinstance(row.get("rejected_response"), str):
        if _role(turns[-1]) == "assistant":
            remarks.append("chosen is the last of 'messages', rejected is 'rejected_response'")
            return row | {
                "messages": turns[:-1],
                "chosen": turns[-1],
                "rejected": row["rejected_response"],
            }
    lists = [name for name in ANSWER_LISTS if isinstance(row.get(name), list)]
    if len(lists) != 1:
        return row
    answers, scores = _scored(row, lists[0])
    if scores is None:
        return row
    if len(answers) < 2 or min(scores) == max(scores):
        raise RowError(f"all answers in {lists[0]!r} have the same score: none is preferred")
    remarks.append(f"chosen and rejected are the best and the worst scored of {lists[0]!r}")
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    return row | {"chosen": answers[best], "rejected": answers[worst]}


def _scored(row: dict, name: str) -> tuple[list, list[float] | None]:
    """The answers in a column and their scores, the higher the better; None where they have none."""
    answers = row[name]
    if answers and all(isinstance(answer, dict) for answer in answers):
        text = next((key for key in ANSWER_TEXTS if all(key in each for each in answers)), None)
        key = next((key for key in SCORES + RANKS if all(key in each for each in answers)), None)
        if text is None or key is None:
            return answers, None
        values = [each[key] for each in answers]
        answers = [_as_answer(each, text) for each in answers]
    else:
        key = next((key for key in SCORES + RANKS if isinstance(row.get(key), list)), None)
        if key is None:
            return answers, None
        values = row[key]
        if len(values) != len(answers):
            raise RowError(f"{len(answers)} answers in {name!r}, {len(values)} values in {key!r}")
    scores = [_number(value) for value in values]
    if None in scores:
        raise RowError(f"an answer in {name!r} has no number for its {key}")
    return answers, [-score for score in scores] if key in RANKS else scores


def _as_answer(entry: dict, text: str) -> Any:
    """An answer out of a list: its text, or a message where it has more to say than that."""
    keys = {name: entry[name] for name in ANSWER_KEYS if entry.get(name)}
    return {"role": "assistant", "content": entry[text] or "", **keys} if keys else entry[text]


def _number(value: Any) -> float | None:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _with_prompt(row: dict, remarks: list[str]) -> dict:
    """The prompt under the names that it has elsewhere, where the answers do not bring it along."""
    answers = [row.get(name) for name in ("chosen", "rejected", "completion") if row.get(name)]
    if row.get("prompt") is not None or any(map(_is_conversation, answers)):
        return row
    named = [name for name in QUESTIONS + CONVERSATIONS if row.get(name)]
    if len(named) != 1:
        return row  # none, or it is not clear which
    name = named[0]
    value = row[name]
    if name in CONVERSATIONS:
        if isinstance(value, list) and value and _role(value[-1]) == "assistant":
            if not answers:
                return row  # a column is missing, and that is said
            answers = [_text(row.get(column)) for column in ("chosen", "completion")]
            if _text(value[-1]) not in answers:
                raise RowError(
                    f"{name!r} ends with a turn of assistant that is not the answer: leave it out"
                )
            value = value[:-1]
    elif name == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():
        value = f"{value}\n\n{row['input']}"
        remarks.append("'instruction' and 'input' are joined by an empty line")
    return row | {"prompt": value}


def _is_conversation(value: Any) -> bool:
    """Whether an answer brings its prompt along: more than one message, or an HH transcript."""
    if isinstance(value, str):
        return bool(HUMAN.match(value)) and "\n\nAssistant:" in value
    return isinstance(value, (list, tuple)) and len(value) > 1


def is_written_out(text: str) -> bool:
    """Whether a text is a conversation as JSON or Python writes it."""
    if not DUMP.match(text):
        return False
    head = text[:DUMPED_WITHIN]
    return bool(DUMPED_SPEAKER.search(head) and DUMPED_TEXT.search(head))


def _text(answer: Any) -> Any:
    """What an answer says, whether it is a text, a message or a list of one."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return answer.get("content", answer.get("value")) if isinstance(answer, dict) else answer


def _role(message: Any) -> str | None:
    if not isinstance(message, dict):
        return None
    role = message.get("role", message.get("from"))
    return {"gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}.get(role, role)


def _with_transcript(row: dict, remarks: list[str]) -> dict:
    """Messages for strings that hold turns as HH-RLHF writes them: in the answers where there is no
    prompt, or in the prompt and perhaps the answers.
    """
    prompt = row.get("prompt")
    if prompt is not None and not (HUMAN.match(prompt) and "\n\nAssistant:" in prompt):
        return row
    changed = {}
    for name in ("prompt", "chosen", "rejected", "completion"):
        value = row.get(name)
        if isinstance(value, str) and _is_conversation(value):
            turns = _turns(value)
            if name == "prompt" and turns[-1]["role"] == "assistant":
                if turns[-1]["content"]:
                    continue  # the answer is begun already: this is no prompt
                turns.pop()
            changed[name] = turns
        elif isinstance(value, str) and prompt is not None:
            changed[name] = value.strip()  # the space after "Assistant:" is the transcript's
    if not any(isinstance(value, list) for value in changed.values()):
        return row
    remarks.append('turns of "Human:" and "Assistant:" are read as messages')
    return dict(row) | changed


def _turns(transcript: str) -> list[dict]:
    _, *parts = TURNS.split(transcript)
    roles = {"Human": "user", "Assistant": "assistant"}
    names, texts = parts[::2], parts[1::2]
    return [
        {"role": roles[name], "content": text.strip()}
        for name, text in zip(names, texts, strict=True)
    ]


def template_args(row: dict) -> dict:
    """What the chat template gets besides the messages, empty values left out. Raises RowError."""
    found = {}
    for name, kind in TEMPLATE_ARGS.items():
        value = row.get(name)
        if not value:
            continue
        if isinstance(value, str):  # of a CSV, or of a parquet whose rows have unlike tools
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise RowError(f"{name} is a string that is not JSON") from None
        if not isinstance(value, kind):
            raise RowError(f"{name} is not {'a list' if kind is list else 'an object'}")
        if kind is list:
            value = [from_json(each, f"{name}: one of them") for each in value]
        if value:
            found[name] = value
    return found


def from_json(value: Any, name: str) -> Any:
    """A value, parsed where it is a string that begins an object or a list of JSON. RowError where
    such a string is none.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowError(f"{name} is a string that is not JSON") from None


def advice(missing: Sequence[str], found: Sequence[str], reading: str) -> str:
    """How a source without the columns `missing` can be read: the flag, or the lines of Python.

    reading: the Python that reads it as a data set.
    """
    judged = next((name for name in ("label", *JUDGED) if name in found), None)
    answers = [name for name in (*CONVERSATIONS, *GUESSES["completion"]) if name in found]
    if answers and judged and not {"chosen", "rejected", "completion"} & {*found}:
        label = "" if judged in ("label", "score") else f" label={judged}"
        return (
            f"if {judged!r} judges the answer in {answers[0]!r}, pass --columns "
            f"completion={answers[0]}{label}"
        )
    taken, flags = set(), []
    lower = {str(name).lower(): str(name) for name in found}
    for wanted in missing:
        names = [lower[name] for name in (wanted, *GUESSES.get(wanted, ())) if name in lower]
        names += [lower[name] for name in difflib.get_close_matches(wanted, list(lower), 2, 0.6)]
        names = [name for name in names if name not in taken and name not in KEPT]
        if names:
            taken.add(names[0])
            flags.append(f"{wanted}={names[0]}")
    if len(flags) == len(missing):
        return f"if these are the columns meant, pass --columns {' '.join(flags)}"
    if BY_NUMBER <= {*found}:
        best = next((name for name in BETTER_NUMBERS if name in found), "NUMBER")
        row = f'"chosen": row[f"response_{{row[\'{best}\']}}"], '
        row += f'"rejected": row[f"response_{{1 - row[\'{best}\']}}"]'
    else:
        # by the names that were guessed, and blanks to fill in
        guessed = dict(flag.split("=") for flag in flags)
        parts = {name: f'row["{guessed[name]}"]' if name in guessed else "..." for name in missing}
        row = ", ".join(f'"{name}": {value}' for name, value in parts.items())
    return (
        "rename columns with --columns, or convert: "
        f"rows = {reading}; "
        f'rows.map(lambda row: {{{row}}}).to_json("pairs.jsonl")'
    )
