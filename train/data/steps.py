"""Which groups, at which step, on which rank, in which batch: pure functions of (seed, epoch,
step, rank, world).

A step is drawn first and packed afterwards, so that neither the number of ranks nor the token
budget can change what a step is made of.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from train.data.mixing import Mix, shuffled
from train.data.packing import plan_batches


class PlannedStep(NamedTuple):
    """One optimiser step: the groups of all ranks, and the batches of one rank."""

    number: int  # 0-based, over all epochs
    epoch: int
    groups: tuple[int, ...]  # the whole step's groups, as indices into the data set
    # This rank's packed batches, each a tuple of groups; as many batches on every rank.
    batches: tuple[tuple[int, ...], ...]


class PlannedRollout(NamedTuple):
    """The prompts of one rollout, of all ranks."""

    number: int  # 0-based, over all epochs
    epoch: int
    groups: tuple[int, ...]  # as indices into the data set


def num_steps(count: int, batch_size: int, epochs: float, max_steps: int = 0) -> int:
    """Steps in `epochs` passes over `count` groups; each pass ends with a smaller step where it
    must.

    `max_steps` above 0 bounds them. A fractional number of epochs rounds the last pass up to a
    whole pair and step.
    """
    per_epoch = -(-count // batch_size)
    whole, part = divmod(epochs, 1)
    # 1e-9: 0.1 * 30 is 3.0000000000000004, and 3 groups were meant.
    in_last_pass = -(-math.ceil(part * count - 1e-9) // batch_size)
    total = int(whole) * per_epoch + in_last_pass
    return min(total, max_steps) if max_steps > 0 else total


def num_drawn(steps: int, count: int, batch_size: int) -> int:
    """Groups that the first `steps` steps draw, where an epoch has `count`."""
    epochs, within = divmod(steps, -(-count // batch_size))
    return epochs * count + min(within * batch_size, count)


def plan_steps(
    tokens: Sequence[int],
    batch_size: int,
    batch_tokens: int,
    *,
    seed: int,
    total: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    mix: Mix | None = None,
) -> Iterator[PlannedStep]:
    """Yield steps `start` to `total` for one rank; starting anywhere costs nothing.

    `tokens`: each group's size, (len(data),). `batch_size`: groups a step, over all ranks.
    `batch_tokens`: the token budget of a packed batch. `mix`: what an epoch is made of; None: of
    everything once.
    """
    per_epoch = -(-(mix.count if mix else len(tokens)) // batch_size)
    order = None
    order_epoch = -1
    for number in range(start, total):
        epoch, within = divmod(number, per_epoch)
        if epoch != order_epoch:
            order = mix.order(seed, epoch) if mix else shuffled(len(tokens), seed, epoch)
            order_epoch = epoch
        groups = tuple(int(i) for i in order[within * batch_size : (within + 1) * batch_size])
        plan = plan_batches([int(tokens[i]) for i in groups], batch_tokens, world)[rank]
        batches = tuple(tuple(groups[i] for i in batch) for batch in plan)
        yield PlannedStep(number, epoch, groups, batches)


def plan_rollouts(
    mix: Mix, batch_size: int, *, seed: int, total: int, start: int = 0
) -> Iterator[PlannedRollout]:
    """Yield rollouts `start` to `total`, of `batch_size` prompts each; an epoch's last one is smaller
    where it must.
    """
    per_epoch = -(-mix.count // batch_size)
    for number in range(start, total):
        epoch, within = divmod(number, per_epoch)
        order = mix.order(seed, epoch)
        groups = order[within * batch_size : (within + 1) * batch_size]
        yield PlannedRollout(number, epoch, tuple(int(i) for i in groups))


def plan_pass(
    tokens: Sequence[int], batch_tokens: int, *, rank: int = 0, world: int = 1
) -> list[tuple[int, ...]]:
    """One pass over everything, for evaluation: this rank's batches, of as many on every rank.

    The batches are planned for the whole job and dealt afterwards, so each holds the same groups
    whatever the number of ranks, and no digit of what is measured depends on it.
    """
    batches = plan_batches([int(n) for n in tokens], batch_tokens)[0]
    batches += [[]] * (-len(batches) % world)  # empty ones, so that every rank has as many
    return [tuple(batch) for batch in batches[rank::world]]
