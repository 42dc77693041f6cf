"""What the models write: the same prompts and the same seeds before (the reference) and after (the
model).

Each prompt is answered once greedily and once sampled, in batches that are planned for the whole
job and dealt to the ranks. The noise is the same for both models (train/models/generate.py), so
that a completion changes only where a distribution did. Every number is a mean over prompts, or a
count over all answers, made in fp64 in the data's order.

Legend: N prompts, T scored tokens.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from eval.intervals import point, ratio
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
COMPARED = (
    "length",
    "ended",
    "repetition",
    "reward",
)  # measures of an answer, compared prompt by prompt
REPEATED = 4  # tokens of an n-gram that counts as a repetition (seq-rep-4)


class Generated(NamedTuple):
    """What `compare` found."""

    report: dict  # for report.json: settings, then by mode and side the measures, each value, interval, n, method
    rows: list[
        dict
    ]  # one a prompt, in the data's order, the same keys in each: for tables and parquet
    values: dict[str, np.ndarray]  # "sampled/model/length" -> (N,), and so on: for histograms


def prompts_of(sources: Sequence[str], data: Tokenised, most: int | None = None) -> list[Prompt]:
    """The first `most` distinct prompts of `data`, which `train.data.tokens.prepare` made of the
    pairs in `sources`.
    """
    first = sorted(np.unique(data.prompts, return_index=True)[1].tolist())[:most]
    messages = {row.number: row.item[0] for row in check_rows(sources, check_pair, PAIR_COLUMNS)[0]}
    return [
        Prompt(int(data.rows[i]), tuple(data.group(i).prompt), messages[int(data.rows[i])])
        for i in first
    ]


def compare(
    model,
    reference,
    prompts: Sequence[Prompt],
    tokenizer,
    device: torch.device,
    *,
    budget: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    reward_model=None,
) -> Generated:
    """Let `model` and `reference` (train.methods.reference.Live, or None) answer every prompt. Every
    rank calls this.

    `budget`: tokens a packed row for the KL to the reference. `reward_model`: a RewardModel or
    None. ValueError where a model cannot be decoded (sharded, or too few positions).
    """
    sides = {"reference": reference, "model": model} if reference else {"model": model}
    ends = ends_of(tokenizer, *(side.module.lm for side in sides.values()))
    texts = [prompt.messages[-1]["content"] for prompt in prompts]
    rows = [
        {"row": prompt.row, "prompt": text} for prompt, text in zip(prompts, texts, strict=True)
    ]
    found = {
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "end_tokens": tokenizer.convert_ids_to_tokens(sorted(ends)),
    }
    if reward_model:
        found["reward_model"] = reward_model.description
    values = {}
    for mode in MODES:
        found[mode], written = {}, {}
        for side, one in sides.items():
            heat = temperature if mode == "sampled" else 0.0
            title = f"{mode} answers of the {side}"
            written[side] = write(
                one.module, prompts, ends, max_new_tokens, heat, seed, batch_size, title
            )
            columns = _columns(written[side], prompts, ends, tokenizer, reward_model)
            if mode == "sampled" and side == "model" and reference and temperature == 1:
                columns |= kl(model, reference, prompts, written[side], budget, device)
            found[mode][side] = summary(columns, _bare(written[side], ends))
            for row, *cells in zip(rows, *columns.values(), strict=True):
                row.update(zip((f"{mode}/{side}/{name}" for name in columns), cells, strict=True))
            values |= {
                f"{mode}/{side}/{name}": np.asarray(column, dtype=np.float64)
                for name, column in columns.items()
                if name != "text"
            }
        if reference:
            found[mode] |= _against(
                written,
                *(
                    {
                        name: values[f"{mode}/{side}/{name}"]
                        for name in COMPARED
                        if f"{mode}/{side}/{name}" in values
                    }
                    for side in ("model", "reference")
                ),
            )
    return Generated(found | {"examples": rows[:EXAMPLES]}, rows, values)


def ends_of(tokenizer, *lms) -> set[int]:
    """The token ids that end an answer: the chat template's, the tokenizer's, and those of the
    models' settings.
    """
    ends = {Chat(tokenizer, True).end_id, tokenizer.eos_token_id}
    for lm in lms:
        own = lm.generation_config.eos_token_id if lm.can_generate() else None
        ends |= set(own if isinstance(own, list) else [own]) - {None}
    return ends


def write(
    backbone, prompts, ends, max_new_tokens, temperature, seed, batch_size, title
) -> list[Completion]:
    """The completion of every prompt, in order, on every rank. Every rank calls this."""
    plan = batches([len(prompt.ids) for prompt in prompts], batch_size)
    mine = plan[dist.rank() :: dist.world_size()]
    done = []
    with tqdm(
        total=sum(map(len, mine)),
        desc=title,
        unit="answer",
        disable=not dist.is_main(),
        dynamic_ncols=True,
    ) as bar:
        for places in mine:
            advice = f"(--batch_size is {batch_size}: lower it)"
            with memory.room_for(f"{len(places)} answers decoded at once", advice):
                answers = generate(
                    backbone.lm,
                    [prompts[i].ids for i in places],
                    eos_token_ids=ends,
                    seed=seed,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    batch_size=len(places),
                    prompt_numbers=[prompts[i].row for i in places],
                    autocast=backbone.autocast,
                    progress=bar.update,
                )
            done += zip(places, answers, strict=True)
    everyone = sorted(
        (item for part in dist.all_gather(done) for item in part), key=lambda item: item[0]
    )
    assert [place for place, _ in everyone] == list(range(len(prompts))), (
        "a prompt was answered twice or never"
    )
    return [answer for _, answer in everyone]


def _bare(answers, ends) -> list[tuple]:
    """The answers' tokens without their end token."""
    return [answer.ids[:-1] if answer.ended else answer.ids for answer in answers]


def _columns(answers, prompts, ends, tokenizer, reward_model) -> dict[str, list]:
    """What is known of each answer by itself, (N,) each."""
    bare = _bare(answers, ends)
    texts = tokenizer.batch_decode([list(ids) for ids in bare], skip_special_tokens=True)
    columns = {
        "text": texts,
        "length": list(map(len, bare)),
        "ended": [float(answer.ended) for answer in answers],
        "repetition": list(map(repetition, bare)),
    }
    if reward_model:
        columns["reward"] = reward_model.score(
            [p.messages for p in prompts], texts, [a.ended for a in answers]
        ).tolist()
    return columns


def kl(model, reference, prompts, answers, budget, device) -> dict[str, list]:
    """KL(model || reference) estimated on the model's own samples, (N,) nats each, tokens counted
    with the end token.

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
    scores = score_all(data, [model, reference], budget, device, "KL to the reference")
    r = scores.tokens[1].astype(np.float64) - scores.tokens[0].astype(np.float64)  # (T,)
    starts = np.cumsum(scores.lengths[:, 0]) - scores.lengths[:, 0]
    return {
        "kl_k1": np.add.reduceat(-r, starts).tolist(),
        "kl_k3": np.add.reduceat(np.expm1(r) - r, starts).tolist(),
        "kl_tokens": scores.lengths[:, 0].tolist(),
    }


def as_data(prompts, responses, rows) -> Tokenised:
    """Prompts and their responses, one each, as the data set that scoring reads."""
    lengths = np.array(
        [[len(p), len(r)] for p, r in zip(prompts, responses, strict=True)], dtype=np.int32
    )
    ids = np.array(
        [token for pair in zip(prompts, responses, strict=True) for part in pair for token in part],
        dtype=np.int32,
    )
    ends = np.cumsum(lengths.sum(1, dtype=np.int64))
    uncut, numbers = np.zeros_like(lengths, dtype=bool), np.array(rows, dtype=np.int64)
    return Tokenised(
        ids=ids,
        offsets=ends - lengths.sum(1),
        lengths=lengths,
        truncated=uncut,
        rows=numbers,
        prompts=numbers,
        dropped=[],
        fingerprint="generated",
    )


def summary(columns: dict[str, list], bare: Sequence[Sequence[int]]) -> dict:
    """One model's measures: means over prompts with bootstrap intervals, distinct-n with a
    jackknife's.
    """
    units = np.arange(len(bare))
    found = {
        "length": ratio(columns["length"], units),
        "ended": ratio(columns["ended"], units, share=True),
        "repetition": ratio(columns["repetition"], units),
        "distinct_1": distinct(bare, 1),
        "distinct_2": distinct(bare, 2),
    }
    for name in ("kl_k1", "kl_k3"):
        if name in columns:
            found[name] = ratio(columns[name], units)
            found[f"{name}_per_token"] = ratio(columns[name], units, columns["kl_tokens"])
    if "reward" in columns:
        found["reward"] = ratio(columns["reward"], units)
    return found


def _against(written: dict, ours: dict, theirs: dict) -> dict:
    """The model's answers beside the reference's, prompt by prompt: written, and measures (N,) of
    COMPARED by name.
    """
    units = np.arange(len(written["model"]))
    same = [float(a == b) for a, b in zip(written["model"], written["reference"], strict=True)]
    found = {
        "unchanged": ratio(same, units, share=True),
        "change": {name: ratio(ours[name] - theirs[name], units) for name in ours},
    }
    return found | (
        {"win_rate": win_rate(ours["reward"] - theirs["reward"])} if "reward" in ours else {}
    )


def win_rate(gain) -> dict:
    """The share of prompts whose answer scores higher after than before; a tie counts one half.
    Wilson's interval.
    """
    won = float(wins(torch.as_tensor(gain, dtype=torch.float64)).double().mean())
    return point(won, (len(gain),), "Wilson, by prompt", list(wilson(won, len(gain))))


def repetition(ids: Sequence[int], n: int = REPEATED) -> float:
    """1 - distinct n-grams / n-grams of one answer: seq-rep-n (Welleck et al. 2020, arXiv
    1908.04319).
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(answers: Sequence[Sequence[int]], n: int) -> dict:
    """Distinct n-grams of token ids over all n-grams, of all answers together (Li et al. 2016,
    arXiv 1510.03055).

    The interval is the delete-one jackknife's over answers: a resampled answer would be its own
    repetition.
    """
    grams = [Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)) for ids in answers]
    holders, total = (
        Counter(gram for own in grams for gram in own),
        sum(own.total() for own in grams),
    )
    method = "delete-one jackknife over answers"
    if not total:
        return point(math.nan, (len(answers),), "none: no n-grams")
    value = len(holders) / total
    without = [
        (len(holders) - sum(holders[gram] == 1 for gram in own), total - own.total())
        for own in grams
    ]
    left = np.array([kinds / count for kinds, count in without if count])
    if len(left) < 2:
        return point(value, (len(answers),), "none: one answer")
    half = 1.959964 * math.sqrt(
        (len(left) - 1) / len(left) * float(((left - left.mean()) ** 2).sum())
    )
    return point(value, (len(answers),), method, [max(value - half, 0.0), min(value + half, 1.0)])
