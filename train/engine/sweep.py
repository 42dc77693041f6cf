"""One sweep over a data set, or a part of it: every group is scored exactly once, by all ranks.

Evaluation, coupled losses and the reference cache all do this: plan, pack ahead, score without
gradient, bring together what the ranks found, put it in order. Ranks hand over values of single
groups, never sums, so neither the number of ranks nor the packing can change a digit of what is
added up afterwards.
"""

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter

import torch

from train.engine import dist, preemption, prefetch


@torch.no_grad()
def score_groups(
    plan: Sequence[tuple[int, ...]],
    order: Sequence[int],
    data,
    device: torch.device,
    score: Callable,
    watch: Callable[[Iterable], Iterable] = iter,
) -> list:
    """`score`'s results for the groups `order`, in that order, on every rank. Every rank calls this.

    plan: this rank's batches, tuples of numbers of groups of `data`; as many on every rank, some may
    be empty. score: takes a PackedBatch on `device`, returns one result (on the CPU; it is pickled)
    for each of its groups; called for empty batches too, since sharded models need all ranks. watch:
    wraps the iterator over batches, in a progress bar say. Raises Preempted before a batch where any
    rank has been told to stop.
    """
    mine = []
    batches = prefetch.packed(((groups, [groups]) for groups in plan), data, device)
    for groups, (batch,) in watch(batches):
        preemption.raise_if_preempted()
        mine += zip(groups, score(batch), strict=True)
    everyone = sorted((pair for part in dist.all_gather(mine) for pair in part), key=itemgetter(0))
    results = dict(everyone)
    assert len(everyone) == len(results) == len(order), "a group was scored twice or never"
    return [results[i] for i in order]


def responses_per_group(batch) -> list[int]:
    """k of each group of a PackedBatch; [] for an empty one, whose dummy counts for nothing."""
    return [len(sizes) for _, *sizes in batch.shape] if batch.num_responses else []
