"""Rewards that a program gives: built-in verifiers, and anybody's Python function.

    --reward regex:PATTERN exact:COLUMN number:COLUMN length:LO-HI ended overlong:BUFFER repetition json
    --reward my_rewards:correct          # the function `correct` of my_rewards.py

A function of ours takes any of `prompt`, `response` and `row` by these names and is called once a
sample; one of TRL's takes any of `completions`, `completion_ids`, `prompts` and the data's columns,
and is called once with all the samples of a rank, those of a prompt together. As in TRL prompts and
completions are texts where the data's prompts are, and messages where those are messages. Either
gives a number a sample, or None where it does not apply; either may be async. Anything else ends the
run: a reward that fails on a few samples trains the wrong thing.

Legend: B samples, F sources of reward.
"""

import asyncio
import copy
import importlib
import inspect
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from train.data.errors import DataError
from train.data.shapes import QUESTIONS
from train.engine import dist

OURS = ("prompt", "response", "row")
TRLS = ("prompts", "completions", "completion_ids")
SHOWN = 200  # characters of a prompt or an answer in an error
NUMBER = re.compile(
    r"(?:(?<!\w)[-+])?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE]([-+]?\d+))?(?:/\d+)?%?"
)
MOST_DIGITS = 400  # of a power of ten: 1e99999999 would take minutes and a gigabyte to write out
# What LaTeX, and people, write in numbers, and what it stands for.
LATEX = [
    (re.compile("\u2212"), "-"),  # the minus sign of typesetters
    (re.compile(r"\{,\}"), ","),  # 1{,}000
    (re.compile(r"(?<=\d)\\[,!:; ](?=\d)"), ""),  # 12\,000
    (re.compile(r"\\%"), "%"),
    (re.compile(r"(?<=[-+])\\?\$(?=[\d.])"), ""),  # -$5
]
BRACE = re.compile(r"\\f?boxed\s*\{|[{}]")
FRACTION = re.compile(
    r"(?P<whole>(?<!\d)\d+\s*)?\\[dtc]?frac\s*(?:\{\s*(?P<top>-?\d+)\s*\}|(?P<digit>\d))"
    r"\s*(?:\{\s*(?P<bottom>\d+)\s*\}|(?P<last>\d))"
)
LARGEST = 1e100  # reward, whose square has a sum, too
REPEATED = 3  # words of an n-gram that counts as a repetition


class Sample(NamedTuple):
    """An answer, as a reward sees it."""

    messages: list[dict]  # the prompt
    response: str  # the answer's text without control tokens
    ended: bool  # by itself; else it was cut
    row: dict  # all columns of the prompt's data row
    number: int  # of that row, for messages
    ids: tuple[int, ...] = ()  # its tokens, the end token included
    most: int = 0  # tokens that an answer may have
    template_args: dict | None = None  # what else the chat template gets: tools, documents, ...

    @property
    def prompt(self) -> str:
        """The last turn's text."""
        return self.messages[-1]["content"]

    @property
    def length(self) -> int:
        """Tokens, the end token included."""
        return len(self.ids)

    @property
    def text(self) -> str | None:
        """The prompt where the data's row has a text for it; None where it has messages."""
        given = (self.row.get(name) for name in ("prompt", *QUESTIONS))
        given = next((value for value in given if value is not None), None)
        return given if isinstance(given, str) else None


class Source(NamedTuple):
    """One source of reward."""

    name: str  # on the board: rewards/NAME/mean
    # samples -> a number each, None where it does not apply
    score: Callable[[Sequence[Sample]], Sequence[float | None]]
    hint: str = ""  # what may be amiss where it fails


def open_source(spec: str, columns: Sequence[str], of: str = "the data") -> Source:
    """The source that one value of --reward names. columns: of the data, which messages call `of`.

    ValueError for a verifier, a module, a function or a column that is not there.
    """
    kind, colon, rest = spec.partition(":")
    if kind in VERIFIERS:
        verifier = VERIFIERS[kind]
        if bool(colon) != verifier.takes_text:
            wanted = f"{kind}:{verifier.argument}" if verifier.takes_text else kind
            raise ValueError(f"--reward {spec}: expected {wanted}")
        if verifier.argument == "COLUMN" and rest not in columns:
            raise ValueError(
                f"--reward {spec}: {of} has no column {rest!r}; found {', '.join(columns)}"
            )
        judge = verifier.make(rest) if verifier.takes_text else verifier.make()
        return Source(spec if len(spec) <= 40 else kind, lambda samples: [*map(judge, samples)])
    if not colon:
        known = ", ".join(
            f"{name}:{v.argument}" if v.takes_text else name for name, v in VERIFIERS.items()
        )
        raise ValueError(f"--reward {spec}: expected MODULE:FUNCTION or one of {known}")
    return _source_of(_import(kind, rest, spec), rest, spec, columns, of)


def _import(module: str, name: str, spec: str) -> Callable:
    """The function `name` of `module`, which may stand in the folder where the run was started."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever the module's own code raises
        raise ValueError(
            f"--reward {spec} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(function):
        raise ValueError(f"--reward {spec} is no function")
    return function


def _source_of(function, name: str, spec: str, columns: Sequence[str], of: str) -> Source:
    """What calls `function` by the names of its parameters. ValueError for one that nothing fills."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # not written in Python
        raise ValueError(
            f"--reward {spec} does not say what it takes: wrap it in a function of yours"
        ) from None
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    is_trls = any(each in parameters for each in TRLS)
    known = (*TRLS, *columns) if is_trls else OURS
    unknown = [
        p.name
        for p in parameters.values()
        if p.default is p.empty
        and p.kind is not p.VAR_KEYWORD
        and not (takes_any and p.kind is p.VAR_POSITIONAL)
        and (p.name not in known or p.kind is p.POSITIONAL_ONLY)
    ]
    if unknown and is_trls:
        raise ValueError(
            f"--reward {spec} takes {', '.join(unknown)}, and {of} has no such column: give it a default; "
            f"known are {', '.join(dict.fromkeys(known))}"
        )
    if unknown:
        raise ValueError(
            f"--reward {spec} takes {', '.join(unknown)}: expected any of {', '.join(OURS)}, or completions "
            "as TRL calls it"
        )
    if is_trls:
        return Source(
            name,
            lambda samples: _call_all(
                function, None if takes_any else parameters, columns, samples
            ),
            " (completions are texts where the data's prompts are, and else messages)",
        )
    names = [each for each in OURS if each in parameters or takes_any]

    def call(sample):
        # copies: what one function does to its arguments is no other's business
        row = copy.deepcopy(sample.row) | {"ended": sample.ended}
        values = {"prompt": sample.prompt, "response": sample.response, "row": row}
        return function(**{each: values[each] for each in names})

    return Source(name, lambda samples: _awaited([call(sample) for sample in samples]))


def _call_all(function, names, columns: Sequence[str], samples: Sequence[Sample]) -> Sequence:
    """Call a function as TRL does, with a list for each of its parameters. names: of those that it
    takes; None: any.
    """
    if not samples:
        return []
    found = dict.fromkeys([*columns, *(name for sample in samples for name in sample.row)])
    arguments = {name: [sample.row.get(name) for sample in samples] for name in found}
    arguments |= {
        "prompts": [s.messages if s.text is None else s.text for s in samples],
        "completions": [
            [{"role": "assistant", "content": s.response}] if s.text is None else s.response
            for s in samples
        ],
        "completion_ids": [list(s.ids) for s in samples],
    }
    if names is not None:
        arguments = {name: value for name, value in arguments.items() if name in names}
    return _awaited([function(**copy.deepcopy(arguments))])[0]


def _awaited(values: list) -> list:
    """The values, those of coroutines waited for together."""
    if not any(inspect.isawaitable(value) for value in values):
        return values

    async def finished(value):
        return await value if inspect.isawaitable(value) else value

    async def all_of_them():
        return await asyncio.gather(*map(finished, values))

    return asyncio.run(all_of_them())


def score(source: Source, samples: Sequence[Sample]) -> np.ndarray:
    """(B,) fp64, NaN where the source does not apply, on every rank. Every rank calls this.

    Each sample is scored once, by one rank, which has all of the prompt's: a function may compare them.
    DataError where what comes back is no number: it names the source, the row, the prompt and the
    answer.
    """
    groups = [
        list(group) for _, group in groupby(range(len(samples)), key=lambda i: samples[i].number)
    ]
    places = [i for group in groups[dist.rank() :: dist.world_size()] for i in group]
    problem, values = None, []
    try:
        values = _checked(source, [samples[i] for i in places])
    except DataError as error:
        problem = str(error)
    everyone = dist.all_gather((problem, [*zip(places, values, strict=False)]))
    if problems := [other for other, _ in everyone if other]:
        raise DataError(problems[0])
    scores = np.full(len(samples), np.nan)
    for _, pairs in everyone:
        for i, value in pairs:
            scores[i] = value
    return scores


def _checked(source: Source, samples: Sequence[Sample]) -> list[float]:
    """The source's numbers for these samples."""
    values, error = _tried(source, samples)
    if error is not None:
        where = f"{len(samples)} samples"
        for sample in samples:  # one of them, if it is one
            _, same = _tried(source, [sample])
            if same is not None:
                error, where = same, _shown(sample)
                break
        text = "".join(traceback.format_exception(error)).rstrip()
        raise DataError(
            f"the reward {source.name} failed on {where}{source.hint}\n{text}"
        ) from error
    if len(values) != len(samples):
        raise DataError(
            f"the reward {source.name} gave {len(values)} for {len(samples)} samples: expected a list with "
            "a number for each"
        )
    return [_number(source, value, sample) for value, sample in zip(values, samples, strict=True)]


def _tried(source: Source, samples: Sequence[Sample]) -> tuple[list, Exception | None]:
    """(what the source gives, the exception that it raised instead)."""
    try:
        values = source.score(samples)
        if isinstance(values, str | bytes | dict | set) or not isinstance(values, Iterable):
            raise TypeError(f"{type(values).__name__} is no list of rewards")
        return list(values), None
    except Exception as error:  # whatever its own code raises
        return [], error


def _number(source: Source, value: Any, sample: Sample) -> float:
    """A value as a number; NaN for None, which says that the source does not apply."""
    if value is None:
        return math.nan
    if not isinstance(value, str | bytes | list | tuple | dict):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if abs(number) < LARGEST:
            return number
    raise DataError(
        f"the reward {source.name} gave {value!r} for {_shown(sample)}: expected a finite number, no "
        f"larger than {LARGEST:g}, or None where it does not apply"
    )


def _shown(sample: Sample) -> str:
    return (
        f"row {sample.number}, prompt {sample.prompt[:SHOWN]!r}, answer {sample.response[:SHOWN]!r}"
    )


# ------------------------------------------------------------ built-in verifiers


class Verifier(NamedTuple):
    """A reward that comes with the project."""

    make: Callable  # (what stands behind the colon) -> Sample -> number or None
    argument: str = ""  # what stands behind the colon

    @property
    def takes_text(self) -> bool:
        """Whether something stands behind the colon."""
        return bool(self.argument)


def _regex(pattern: str) -> Callable:
    """1 where the pattern is found in the answer, else 0."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--reward regex:{pattern}: {error}") from error
    return lambda sample: float(bool(compiled.search(sample.response)))


def _exact(column: str) -> Callable:
    """1 where the answer is the column's text, white space and case apart; None where it is empty."""

    def judge(sample):
        wanted = sample.row.get(column)
        wanted = "" if wanted is None else _plain(str(wanted))
        return float(_plain(sample.response) == wanted) if wanted else None

    return judge


def _same_number(column: str) -> Callable:
    """1 where the answer's last number, or the one in \\boxed{}, is the column's last one."""

    def judge(sample):
        wanted = last_number(str(sample.row.get(column, "")))
        if wanted is None:
            return None
        return float(last_number(sample.response) == wanted)

    return judge


def _length(bounds: str) -> Callable:
    """1 for as many words as the bounds say, falling to 0 at none, or at twice the upper bound."""
    match = re.fullmatch(r"(\d+)-(\d+)", bounds)
    if not match or not 0 <= int(match[1]) <= int(match[2]) or not int(match[2]):
        raise ValueError(f"--reward length:{bounds}: expected words as LO-HI, say length:20-60")
    low, high = int(match[1]), int(match[2])

    def judge(sample):
        words = len(sample.response.split())
        if words < low:
            return words / low
        return max(0.0, 1 - max(0, words - high) / high)

    return judge


def _ended() -> Callable:
    """1 for an answer that ended by itself, else 0."""
    return lambda sample: float(sample.ended)


def _overlong(buffer: str) -> Callable:
    """0 for an answer that leaves `buffer` tokens unused, then falling to -1 where none is left: soft
    overlong punishment (Yu et al. 2025, arXiv 2503.14476, equation 13).
    """
    if not buffer.isdecimal() or not int(buffer):
        raise ValueError(f"--reward overlong:{buffer}: expected tokens, say overlong:64")
    return lambda sample: -min(1.0, max(0, sample.length - sample.most + int(buffer)) / int(buffer))


def _repetition() -> Callable:
    """Minus the share of three-word sequences that stood in the answer before."""

    def judge(sample):
        words = sample.response.lower().split()
        grams = [tuple(words[i : i + REPEATED]) for i in range(len(words) - REPEATED + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0

    return judge


def _json() -> Callable:
    """1 where the answer is a JSON value, a code fence around it aside; else 0."""

    def judge(sample):
        text = sample.response.strip()
        fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
        try:
            json.loads(fenced[1] if fenced else text)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0

    return judge


VERIFIERS = {
    "regex": Verifier(_regex, "PATTERN"),
    "exact": Verifier(_exact, "COLUMN"),
    "number": Verifier(_same_number, "COLUMN"),
    "length": Verifier(_length, "LO-HI"),
    "ended": Verifier(_ended),
    "overlong": Verifier(_overlong, "BUFFER"),
    "repetition": Verifier(_repetition),
    "json": Verifier(_json),
}


def last_number(text: str) -> Fraction | None:
    """The number in the text's last \\boxed{}, else its last number, exactly; None without one.

    1,000 is a thousand, 50% a half, 3/4 and \\frac{3}{4} three quarters, 2\\frac12 two and a half.
    """
    text = last_boxed(text)
    for pattern, meant in LATEX:
        text = pattern.sub(meant, text)
    text = FRACTION.sub(_as_quotient, text)
    found = [*NUMBER.finditer(text)]
    if not found:
        return None
    match = found[-1]
    number = match[0].replace(",", "")
    is_percent = number.endswith("%")
    top, _, bottom = number.rstrip("%").partition("/")
    try:
        if abs(int(match[1] or 0)) > MOST_DIGITS:
            return None
        value = Fraction(top) / Fraction(bottom or "1")
    except (ValueError, ZeroDivisionError):  # int() refuses thousands of digits, too
        return None
    return value / 100 if is_percent else value


def last_boxed(text: str) -> str:
    """What stands in the text's last \\boxed{} whose braces close; the text where there is none."""
    opened, found = [], (-1, -1)  # of each brace the place behind it; -1 if it is no box's
    for match in BRACE.finditer(text):
        if match[0] != "}":
            opened.append(match.end() if len(match[0]) > 1 else -1)
        elif opened:
            found = max(found, (opened.pop(), match.start()))
    start, end = found
    return text if start < 0 else text[start:end]


def _as_quotient(match: re.Match) -> str:
    """A match of FRACTION as a/b."""
    top, bottom = match["top"] or match["digit"], match["bottom"] or match["last"]
    if match["whole"]:
        top = int(match["whole"]) * int(bottom) + int(top)
    return f"{top}/{bottom}"


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
