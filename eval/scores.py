"""The evaluation's one forward pass: every response of a data set scored by every model, on all
ranks.

Batches are planned once for the whole job (train/data/steps.py) and dealt to the ranks, so that each
holds the same groups whatever the world size. A response's tokens are added up in fp64 by the
rank that has it; what ranks hand over are values of single responses, which are put into the data's
order before anything is made of several, so the world size cannot change a digit.

Legend: N groups, k responses each, M models, T scored tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from train.data.steps import plan_pass
from train.engine import dist, memory, sweep
from train.losses.logprobs import sum_per_response

OUT_OF_MEMORY_ADVICE = (
    "lower it, then --max_length, or shard the models with --ds_config ds_configs/frozen_zero3.json"
)


class Scores(NamedTuple):
    """A data set under M models, in the data's order; complete on every rank."""

    rows: np.ndarray  # (N,) int64 numbers of the data rows
    # (N,) int64 hash of the prompt or of the plain text: what is resampled as one
    prompts: np.ndarray
    lengths: np.ndarray  # (N, k) int64 scored tokens
    sums: np.ndarray  # (M, N, k) fp64 nats, log-probability of each response
    # (M, T) fp32 nats, log-probability of each scored token, response after response
    tokens: np.ndarray


def score_all(
    data, models: Sequence[Callable], batch_tokens: int, device: torch.device, title: str
) -> Scores:
    """Score every group of `data` (Tokenised) once, in batches of at most `batch_tokens` tokens.

    Every rank calls this.
    """
    plan = plan_pass(data.lengths.sum(1), batch_tokens, rank=dist.rank(), world=dist.world_size())

    def score_batch(batch):
        task = f"a batch of {batch.input_ids.shape[0]:,} tokens"
        advice = f"(--micro_tokens is {batch_tokens:,}: {OUT_OF_MEMORY_ADVICE})"
        with memory.room_for(task, advice):
            logps = torch.stack([model(batch) for model in models])  # (M, T) nats
        # (M, responses), added up in fp64
        sums = torch.stack([sum_per_response(values, batch.lengths) for values in logps])
        sums = sums.cpu().numpy()
        lengths = batch.lengths.cpu().numpy()
        tokens = logps.float().cpu().numpy()
        ends = np.cumsum(lengths)
        results, first = [], 0  # of each group: (k,) lengths, (M, k) sums, (M, its tokens) nats
        for k in sweep.responses_per_group(batch):
            responses = slice(first, first + k)
            start = ends[first] - lengths[first]
            of_group = tokens[:, start : ends[first + k - 1]]
            results.append((lengths[responses], sums[:, responses], of_group))
            first += k
        return results

    def watch(batches):
        return tqdm(
            batches,
            total=len(plan),
            desc=title,
            unit="batch",
            disable=not dist.is_main(),
            dynamic_ncols=True,
        )

    everything = range(len(data))
    results = sweep.score_groups(plan, everything, data, device, score_batch, watch)
    lengths, sums, tokens = zip(*results, strict=True)
    return Scores(
        rows=data.rows,
        prompts=data.prompts,
        lengths=np.stack(lengths),
        sums=np.stack(sums, 1),
        tokens=np.concatenate(tokens, 1),
    )
