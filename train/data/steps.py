"""Which groups, at which step, on which rank, in which row: pure functions of (seed, epoch, step,
rank, world).

A step is drawn first and packed afterwards, so that neither the number of ranks nor the token
budget can change what a step is made of.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from train.data.packing import plan_batches


class PlannedStep(NamedTuple):
    """One optimiser step: the groups of all ranks, and the rows of one rank."""

    number: int  # 0-based, over all epochs
    epoch: int
    groups: tuple[int, ...]  # the whole step's groups, as indices into the data set
    rows: tuple[
        tuple[int, ...], ...
    ]  # this rank's rows, each a tuple of groups; as many on every rank


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The epoch's order: a permutation of range(count), (count,) int64, from numpy's counter-based
    Philox.
    """
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def num_steps(count: int, batch_size: int, epochs: float, max_steps: int = 0) -> int:
    """Steps in `epochs` passes over `count` groups; each pass ends with a smaller step where it
    must.

    `max_steps` above 0 bounds them. A broken number of epochs rounds the last pass up to a whole
    pair and step.
    """
    per_epoch = -(-count // batch_size)
    whole, part = divmod(epochs, 1)
    plan_steps = int(whole) * per_epoch + -(-math.ceil(part * count - 1e-9) // batch_size)
    return min(plan_steps, max_steps) if max_steps > 0 else plan_steps


def plan_steps(
    tokens: Sequence[int],
    batch_size: int,
    budget: int,
    *,
    seed: int,
    total: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[PlannedStep]:
    """Steps `start` to `total` for one rank. `tokens`: each group's size, (len(data),). Starts
    anywhere at no cost.
    """
    count, per_epoch = len(tokens), -(-len(tokens) // batch_size)
    order, drawn = None, -1
    for number in range(start, total):
        epoch, within = divmod(number, per_epoch)
        if epoch != drawn:
            order, drawn = shuffled(count, seed, epoch), epoch
        groups = tuple(int(i) for i in order[within * batch_size : (within + 1) * batch_size])
        plan = plan_batches([int(tokens[i]) for i in groups], budget, world)[rank]
        yield PlannedStep(
            number, epoch, groups, tuple(tuple(groups[i] for i in row) for row in plan)
        )


def plan_pass(
    tokens: Sequence[int], budget: int, *, rank: int = 0, world: int = 1
) -> list[tuple[int, ...]]:
    """One pass over everything in rows, for evaluation: this rank's rows, of as many on every rank.

    The rows are planned for the whole job and dealt afterwards, so each holds the same groups
    whatever the number of ranks, and no digit of what is measured depends on it.
    """
    rows = plan_batches([int(n) for n in tokens], budget)[0]
    rows += [[]] * (-len(rows) % world)
    return [tuple(row) for row in rows[rank::world]]
