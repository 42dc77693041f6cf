"""What the models write: the same prompts and the same seeds before (the reference) and after (the
model).

Each prompt is answered once greedily and once sampled, in batches that are planned for the whole
job and dealt to the ranks. The noise is the same for both models (train/models/generate.py), so
that a completion changes only where a distribution did. Every number is a mean over prompts, or a
count over all answers, made in fp64 in the data's order.

Legend: N prompts, T scored tokens. A side is one of the models: "reference" or "model".
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from eval.intervals import as_estimate, ratio
from eval.models import Models
from eval.scores import score_all
from train.data.chat import Chat
from train.data.dataset import Tokenised
from train.data.rows import PAIR_COLUMNS, check_pair
from train.data.tokens import check_rows
from train.engine import dist, memory
from train.losses.metrics import wilson, wins
from train.methods.rewards import Prompt
from train.models.generate import Completion, batches, generate

MODES = ("greedy", "sampled")
EXAMPLES = 3  # rows that the report itself holds, for the model card
# measures of an answer that are compared prompt by prompt
COMPARED = ("length", "ended", "repetition", "reward")
REPEATED = 4  # tokens of an n-gram that counts as a repetition (seq-rep-4)
NORMAL_975 = 1.959964  # the 97.5 % quantile of the normal distribution


class Decoding(NamedTuple):
    """How answers are decoded."""

    max_new_tokens: int  # most tokens of an answer
    temperature: float = 1.0  # of the sampled answers
    seed: int = 0
    batch_size: int = 32  # answers decoded at once


class Generated(NamedTuple):
    """What the models wrote."""

    # for report.json: settings, then by mode and side the estimates; or {"skipped": the reason}
    report: dict
    # one a prompt, in the data's order, the same keys in each, for tables and parquet; [] if skipped
    rows: list[dict]
    # "sampled/model/length" -> (N,) fp64, and so on: for histograms
    values: dict[str, np.ndarray]


def skipped(reason: str) -> Generated:
    """The models wrote nothing, for this reason."""
    return Generated({"skipped": reason}, [], {})


def prompts_of(
    sources: Sequence[str],
    data: Tokenised,
    most: int | None = None,
    columns: Sequence[str] | None = None,
) -> list[Prompt]:
    """The first `most` distinct prompts of `data`, which `train.data.tokens.prepare` made of the
    pairs in `sources`.
    """
    groups = sorted(np.unique(data.prompts, return_index=True)[1].tolist())[:most]
    rows, _ = check_rows(sources, check_pair, PAIR_COLUMNS, columns=columns)
    messages = {row.number: row.item.messages for row in rows}
    prompts = []
    for i in groups:
        number = int(data.rows[i])
        prompts.append(Prompt(number, tuple(data.group(i).prompt), messages[number]))
    return prompts


def compare(models: Models, prompts: Sequence[Prompt], tokenizer, decoding: Decoding) -> Generated:
    """Let the model, and the reference where there is one, answer every prompt. Every rank calls
    this.

    ValueError where a model cannot be decoded (sharded, or too few positions).
    """
    sides = {"model": models.model}
    if models.reference:
        sides = {"reference": models.reference, "model": models.model}
    ends = ends_of(tokenizer, *(scorer.module.lm for scorer in sides.values()))
    rows = [{"row": p.row, "prompt": p.messages[-1]["content"]} for p in prompts]
    report = {
        "prompts": len(prompts),
        "max_new_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "seed": decoding.seed,
        "end_tokens": tokenizer.convert_ids_to_tokens(sorted(ends)),
    }
    if models.reward_model:
        report["reward_model"] = models.reward_model.description
    values = {}
    for mode in MODES:
        how = decoding if mode == "sampled" else decoding._replace(temperature=0.0)
        answers, columns = {}, {}  # of each side
        for side, scorer in sides.items():
            title = f"{mode} answers of the {side}"
            answers[side] = answer(scorer.module, prompts, ends, how, title)
            columns[side] = columns_of(answers[side], prompts, tokenizer, models.reward_model)
        if models.reference and mode == "sampled" and decoding.temperature == 1:
            columns["model"] |= kl(models, prompts, answers["model"])
        report[mode] = {side: summary(columns[side], answers[side]) for side in sides}
        for side in sides:
            for name, column in columns[side].items():
                key = f"{mode}/{side}/{name}"
                for row, value in zip(rows, column, strict=True):
                    row[key] = value
                if name != "text":
                    values[key] = np.asarray(column, dtype=np.float64)
        if models.reference:
            report[mode] |= against_reference(answers, columns)
    return Generated(report | {"examples": rows[:EXAMPLES]}, rows, values)


def ends_of(tokenizer, *lms) -> set[int]:
    """The token ids that end an answer: the chat template's, the tokenizer's, and those of the
    models' settings.
    """
    ends = {Chat(tokenizer, True).end_id, tokenizer.eos_token_id}
    for lm in lms:
        own = lm.generation_config.eos_token_id if lm.can_generate() else None
        ends |= set(own if isinstance(own, list) else [own]) - {None}
    return ends


def answer(
    backbone, prompts: Sequence[Prompt], ends: Collection[int], decoding: Decoding, title: str
) -> list[Completion]:
    """The completion of every prompt, in order, on every rank. Every rank calls this.

    title: of the progress bar.
    """
    plan = batches([len(prompt.ids) for prompt in prompts], decoding.batch_size)
    plan_of_rank = plan[dist.rank() :: dist.world_size()]
    mine = []  # (place among the prompts, Completion)
    with tqdm(
        total=sum(map(len, plan_of_rank)),
        desc=title,
        unit="answer",
        disable=not dist.is_main(),
        dynamic_ncols=True,
    ) as bar:
        for places in plan_of_rank:
            task = f"{len(places)} answers decoded at once"
            with memory.room_for(task, f"(--batch_size is {decoding.batch_size}: lower it)"):
                completions = generate(
                    backbone.lm,
                    [prompts[i].ids for i in places],
                    eos_token_ids=ends,
                    seed=decoding.seed,
                    max_new_tokens=decoding.max_new_tokens,
                    temperature=decoding.temperature,
                    batch_size=len(places),
                    # the noise knows a prompt by its data row, whatever batch it is in
                    prompt_numbers=[prompts[i].row for i in places],
                    autocast=backbone.autocast,
                    progress=bar.update,
                )
            mine += zip(places, completions, strict=True)
    everyone = sorted(
        (item for part in dist.all_gather(mine) for item in part), key=lambda item: item[0]
    )
    assert [place for place, _ in everyone] == list(range(len(prompts))), (
        "a prompt was answered twice or never"
    )
    return [completion for _, completion in everyone]


def without_end(answer: Completion) -> tuple[int, ...]:
    """An answer's tokens without its end token."""
    return answer.ids[:-1] if answer.ended else answer.ids


def columns_of(
    answers: Sequence[Completion], prompts: Sequence[Prompt], tokenizer, reward_model
) -> dict[str, list]:
    """What is known of each answer by itself, N values each. Every rank calls this: they deal the
    reward model's work among them.
    """
    ids = [without_end(answer) for answer in answers]
    texts = tokenizer.batch_decode([list(each) for each in ids], skip_special_tokens=True)
    columns = {
        "text": texts,
        "length": [len(each) for each in ids],  # tokens
        "ended": [float(answer.ended) for answer in answers],
        "repetition": [repetition(each) for each in ids],
    }
    if reward_model:
        conversations = [prompt.messages for prompt in prompts]
        ended = [answer.ended for answer in answers]
        columns["reward"] = reward_model.score(conversations, texts, ended).tolist()
    return columns


def kl(models: Models, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> dict[str, list]:
    """KL(model || reference) estimated on the model's own samples, N values in nats, and how many
    tokens each is of, the end token included. Every rank calls this.

    With r = log(reference / model) of a sampled token, k1 sums -r and k3 sums exp(r) - 1 - r
    (Schulman 2020, "Approximating KL divergence"). Both have the divergence of the first
    max_new_tokens tokens' distribution as their mean; k1 may be negative, k3 has less noise near 0.
    They hold for answers sampled at temperature 1, and are made for no others.
    """
    data = as_data(
        [prompt.ids for prompt in prompts],
        [answer.ids for answer in answers],
        [prompt.row for prompt in prompts],
    )
    scores = score_all(
        data,
        [models.model, models.reference],
        models.batch_tokens,
        device=models.model.device,
        title="KL to the reference",
    )
    r = scores.tokens[1].astype(np.float64) - scores.tokens[0].astype(np.float64)  # (T,) nats
    tokens = scores.lengths[:, 0]  # (N,)
    starts = np.cumsum(tokens) - tokens
    return {
        "kl_k1": np.add.reduceat(-r, starts).tolist(),
        "kl_k3": np.add.reduceat(np.expm1(r) - r, starts).tolist(),
        "kl_tokens": tokens.tolist(),
    }


def as_data(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], rows: Sequence[int]
) -> Tokenised:
    """Prompts and their responses as token ids, one response each, as the data set that scoring
    reads. rows: numbers of the prompts' data rows.
    """
    pairs = list(zip(prompts, responses, strict=True))
    ids = [token for pair in pairs for part in pair for token in part]
    lengths = np.array([[len(p), len(r)] for p, r in pairs], dtype=np.int32)  # (N, 2)
    ends = np.cumsum(lengths.sum(1, dtype=np.int64))
    numbers = np.array(rows, dtype=np.int64)
    return Tokenised(
        ids=np.array(ids, dtype=np.int32),
        offsets=ends - lengths.sum(1),
        lengths=lengths,
        truncated=np.zeros_like(lengths, dtype=bool),
        rows=numbers,
        prompts=numbers,
        dropped=[],
        fingerprint="generated",
    )


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
        estimates["reward"] = ratio(columns["reward"], prompts)
    return estimates


def against_reference(
    answers: dict[str, list[Completion]], columns: dict[str, dict[str, list]]
) -> dict[str, dict]:
    """The model's answers against the reference's, prompt by prompt: how many are the same, the
    change of each of COMPARED, and with a reward model the win rate. Both are given by side.
    """
    prompts = np.arange(len(answers["model"]))
    same = [float(a == b) for a, b in zip(answers["model"], answers["reference"], strict=True)]
    changes = {  # (N,) each
        name: np.asarray(columns["model"][name], dtype=np.float64)
        - np.asarray(columns["reference"][name], dtype=np.float64)
        for name in COMPARED
        if name in columns["model"]
    }
    estimates = {
        "unchanged": ratio(same, prompts, proportion=True),
        "change": {name: ratio(values, prompts) for name, values in changes.items()},
    }
    if "reward" in changes:
        estimates["win_rate"] = win_rate(changes["reward"])
    return estimates


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
