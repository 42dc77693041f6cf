"""What is measured of answers, one set of them or before against after: evaluation's and reinforcement
learning's own.

Every number is a mean over prompts, or a count over all answers, made in fp64 in the prompts' order.

Legend: N prompts, one answer to each.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from train.data.chat import Chat
from train.losses.metrics import NORMAL_975, wilson, wins
from train.methods.intervals import as_estimate, ratio
from train.models.generate import Completion

# measures of an answer that are compared prompt by prompt
COMPARED = ("length", "ended", "repetition", "reward")
REPEATED = 4  # tokens of an n-gram that counts as a repetition (seq-rep-4)


def ends_of(tokenizer, *lms) -> set[int]:
    """The token ids that end an answer: the chat template's, the tokenizer's, and those of the
    models' settings.
    """
    ends = {Chat(tokenizer, True).end_id, tokenizer.eos_token_id}
    for lm in lms:
        own = lm.generation_config.eos_token_id if lm.can_generate() else None
        ends |= set(own if isinstance(own, list) else [own]) - {None}
    return ends


def without_end(answer: Completion) -> tuple[int, ...]:
    """An answer's tokens without its end token."""
    return answer.ids[:-1] if answer.ended else answer.ids


def columns_of_tokens(answers: Sequence[Completion]) -> dict[str, list]:
    """What is known of each answer by its tokens alone, N values each; the end token is left out."""
    ids = [without_end(answer) for answer in answers]
    return {
        "length": [len(each) for each in ids],  # tokens
        "ended": [float(answer.ended) for answer in answers],
        "repetition": [repetition(each) for each in ids],
    }


def summary(columns: dict[str, list], answers: Sequence[Completion]) -> dict:
    """One side's estimates: means over prompts with bootstrap intervals, distinct-n with a
    jackknife's.
    """
    prompts = np.arange(len(answers))  # each is a cluster by itself
    ids = [without_end(answer) for answer in answers]
    estimates = {
        "length": ratio(columns["length"], prompts),
        "ended": ratio(columns["ended"], prompts, proportion=True),
        "repetition": ratio(columns["repetition"], prompts),
        "distinct_1": distinct(ids, 1),
        "distinct_2": distinct(ids, 2),
    }
    for name in ("kl_k1", "kl_k3"):
        if name in columns:
            estimates[name] = ratio(columns[name], prompts)
            estimates[f"{name}_per_token"] = ratio(columns[name], prompts, columns["kl_tokens"])
    if "reward" in columns:
        estimates["reward"] = _mean(columns["reward"])
    return estimates


def against(same: Sequence[float], before: dict[str, list], after: dict[str, list]) -> dict:
    """Answers after against answers before, prompt by prompt: how many are the same, the change of each
    of COMPARED, and where there is a reward the win rate.

    same: 1 where an answer is the same token for token, (N,). before, after: columns by name, with a
    value a prompt; a reward is NaN where none applies.
    """
    prompts = np.arange(len(same))
    changes = {  # (N,) each
        name: np.asarray(after[name], dtype=np.float64) - np.asarray(before[name], dtype=np.float64)
        for name in COMPARED
        if name in after
    }
    estimates = {
        "unchanged": ratio(same, prompts, proportion=True),
        "change": {name: _mean(values) for name, values in changes.items()},
    }
    if "reward" in changes:
        gains = changes["reward"][np.isfinite(changes["reward"])]
        if len(gains):
            estimates["win_rate"] = win_rate(gains)
    return estimates


def _mean(values) -> dict:
    """The estimate of the mean over those prompts where there is a value."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    return ratio(values, np.arange(len(values)))


def win_rate(gains: Sequence[float]) -> dict:
    """The share of prompts whose answer scores higher after than before, gain above 0; a tie counts
    one half. Wilson's interval.
    """
    won = float(wins(torch.as_tensor(gains, dtype=torch.float64)).double().mean())
    interval = list(wilson(won, len(gains)))
    return as_estimate(won, (len(gains),), "Wilson, by prompt", interval)


def repetition(ids: Sequence[int], n: int = REPEATED) -> float:
    """1 - distinct n-grams / n-grams of one answer: seq-rep-n (Welleck et al. 2020, arXiv
    1908.04319).
    """
    grams = n_grams(ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(answers: Sequence[Sequence[int]], n: int) -> dict:
    """Distinct n-grams of token ids over all n-grams, of all answers together (Li et al. 2016,
    arXiv 1510.03055).

    The interval is the delete-one jackknife's over answers (Tukey 1958): in a bootstrap an answer
    drawn twice would be its own repetition.
    """
    sizes = (len(answers),)
    grams = [Counter(n_grams(ids, n)) for ids in answers]  # of each answer, with how often
    holders = Counter(gram for own in grams for gram in own)  # n-gram -> answers that have it
    total = sum(own.total() for own in grams)
    if not total:
        return as_estimate(math.nan, sizes, "none: no n-grams")
    value = len(holders) / total
    without_one = []  # the value without each answer; an answer takes with it what only it has
    for own in grams:
        kinds = len(holders) - sum(holders[gram] == 1 for gram in own)
        if count := total - own.total():
            without_one.append(kinds / count)
    if len(without_one) < 2:
        return as_estimate(value, sizes, "none: one answer")
    values = np.array(without_one)
    gaps = values - values.mean()
    half = NORMAL_975 * math.sqrt((len(gaps) - 1) / len(gaps) * float((gaps**2).sum()))
    interval = [max(value - half, 0.0), min(value + half, 1.0)]
    return as_estimate(value, sizes, "delete-one jackknife over answers", interval)


def n_grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All n-grams of a sequence, in order."""
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
