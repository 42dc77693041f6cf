"""The evaluation's one forward pass: every response of a data set scored by every model, on all
ranks.

Rows are planned once for the whole job (train/data/steps.py) and dealt to the ranks, so that each
holds the same groups whatever the world size. Ranks hand over values of single responses, never
sums: rank 0 puts them into the data's order and adds them up in fp64 there, so the world size
cannot change a digit.

Legend: N groups, k responses each, M models, T scored tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from train.data.steps import plan_pass
from train.engine import dist, memory
from train.engine.prefetch import ahead
from train.losses.logprobs import score

LESS = (
    "lower it, then --max_length, or shard the models with --ds_config ds_configs/frozen_zero3.json"
)


class Scores(NamedTuple):
    """A data set under M models, in the data's order; complete on every rank."""

    rows: np.ndarray  # (N,) int64 numbers of the data rows
    prompts: (
        np.ndarray
    )  # (N,) int64 hash of the prompt or of the plain text: the unit that is resampled
    lengths: np.ndarray  # (N, k) int64 scored tokens
    sums: np.ndarray  # (M, N, k) fp64 nats, log-probability of each response
    tokens: (
        np.ndarray
    )  # (M, T) fp32 nats, log-probability of each scored token, response after response


@torch.no_grad()
def score_all(
    data, models: Sequence[Callable], budget: int, device: torch.device, title: str
) -> Scores:
    """Score every group of `data` (Tokenised) once, in rows of at most `budget` tokens. Every rank
    calls this.
    """
    plan = plan_pass(data.lengths.sum(1), budget, rank=dist.rank(), world=dist.world_size())
    rows = ahead(plan, data, device, rows_of=lambda groups: [groups])
    watched = tqdm(
        rows,
        total=len(plan),
        desc=title,
        unit="row",
        disable=not dist.is_main(),
        dynamic_ncols=True,
    )
    mine = []  # (index of the group, (k,) lengths, (M, k) sums, k token arrays (M, .)) of each
    for groups, (row,) in watched:
        size = row.input_ids.shape[0]
        with memory.room_for(
            f"a row of {size:,} tokens", f"(--micro_tokens is {budget:,}: {LESS})"
        ):
            logps = torch.stack([model(row) for model in models])  # (M, T)
        sums = (
            torch.stack([score(values.double(), row.lengths) for values in logps]).cpu().numpy()
        )  # (M, responses)
        lengths = row.lengths.cpu().numpy()
        tokens = (
            np.split(logps.float().cpu().numpy(), np.cumsum(lengths)[:-1], axis=1)
            if len(groups)
            else []
        )
        k = len(lengths) // max(len(groups), 1)
        for number, index in enumerate(groups):
            mine.append(
                (
                    index,
                    *(values[..., number * k : (number + 1) * k] for values in (lengths, sums)),
                    np.concatenate(tokens[number * k : (number + 1) * k], axis=1),
                )
            )
    everyone = sorted(
        (item for part in dist.all_gather(mine) for item in part), key=lambda item: item[0]
    )
    assert [item[0] for item in everyone] == list(range(len(data))), (
        "a group was scored twice or never"
    )
    index, lengths, sums, tokens = zip(*everyone, strict=True)
    return Scores(
        data.rows, data.prompts, np.stack(lengths), np.stack(sums, 1), np.concatenate(tokens, 1)
    )
