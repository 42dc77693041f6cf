"""What the models write: the same prompts and the same seeds before (the reference) and after (the
model).

Each prompt is answered once greedily and once sampled, in batches that are planned for the whole
job and dealt to the ranks. The noise is the same for both models (train/models/generate.py), so
that a completion changes only where a distribution did. Every number is a mean over prompts, or a
count over all answers, made in fp64 in the data's order.

Legend: N prompts, T scored tokens. A side is one of the models: "reference" or "model".
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from eval.models import Models
from eval.scores import score_all
from train.data.dataset import Tokenised
from train.data.rows import PAIR_COLUMNS, check_pair
from train.data.tokens import check_rows
from train.engine import dist
from train.methods.answers import against, columns_of_tokens, ends_of, summary, without_end
from train.methods.decoding import answer as decode
from train.methods.decoding import plan_of_rank
from train.methods.rewards import Prompt
from train.models.generate import Completion

MODES = ("greedy", "sampled")
EXAMPLES = 3  # rows that the report itself holds, for the model card


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
    items = {row.number: row.item for row in rows}
    prompts = []
    for i in groups:
        number = int(data.rows[i])
        ids = tuple(data.group(i).prompt)
        prompts.append(Prompt(number, ids, items[number].messages, items[number].template_args))
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
            both = zip(answers["model"], answers["reference"], strict=True)
            same = [float(one == other) for one, other in both]
            report[mode] |= against(same, columns["reference"], columns["model"])
    return Generated(report | {"examples": rows[:EXAMPLES]}, rows, values)


def answer(
    backbone, prompts: Sequence[Prompt], ends: Collection[int], decoding: Decoding, title: str
) -> list[Completion]:
    """The completion of every prompt, in order, on every rank. Every rank calls this.

    title: of the progress bar.
    """
    ids = [prompt.ids for prompt in prompts]
    plan = plan_of_rank(ids, decoding.batch_size)
    with tqdm(
        total=sum(map(len, plan)),
        desc=title,
        unit="answer",
        disable=not dist.is_main(),
        dynamic_ncols=True,
    ) as bar:
        return decode(
            backbone.lm,
            ids,
            [prompt.row for prompt in prompts],  # by which the noise knows them
            plan,
            advice=f"(--batch_size is {decoding.batch_size}: lower it)",
            eos_token_ids=ends,
            seed=decoding.seed,
            max_new_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            autocast=backbone.autocast,
            progress=bar.update,
        )


def columns_of(
    answers: Sequence[Completion], prompts: Sequence[Prompt], tokenizer, reward_model
) -> dict[str, list]:
    """What is known of each answer by itself, N values each. Every rank calls this: they deal the
    reward model's work among them.
    """
    ids = [list(without_end(answer)) for answer in answers]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    columns = {"text": texts} | columns_of_tokens(answers)
    if reward_model:
        conversations = [prompt.messages for prompt in prompts]
        ended = [answer.ended for answer in answers]
        args = [prompt.template_args for prompt in prompts]
        columns["reward"] = reward_model.score(conversations, texts, ended, args).tolist()
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
