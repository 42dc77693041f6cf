"""From a batch's scores to what a reward model's training minimises, and what its scores are like.

Legend: N responses and B examples of a batch: pairs, or answers judged one by one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from train.data.packing import PackedBatch
from train.data.steps import plan_pass
from train.engine import dist, sweep
from train.losses.reward import Loss, ScoredAnswers, ScoredPairs

NORMALISED_ON = 512  # groups of the training data, where there are no held-out ones


def examples(scores: torch.Tensor, batch: PackedBatch, of_pairs: bool):
    """A batch's examples from its responses' scores (N,): ScoredPairs or ScoredAnswers, (B,) each.

    In fp64, the loss after them too: the scores of a pair nearly cancel, and an example is one
    number. The responses of a pair stand side by side, chosen first. What the data says besides, a
    margin or a target, is 0 where it says nothing.
    """
    scores = scores.double()
    targets = batch.targets
    if targets is None:
        targets = scores.new_zeros(batch.num_responses // (2 if of_pairs else 1))
    if of_pairs:
        chosen, rejected = scores.view(-1, 2).unbind(1)
        return ScoredPairs(chosen, rejected, targets)
    return ScoredAnswers(scores, targets)


def check_targets(loss: Loss, name: str, data):
    """ValueError where the data is not what the loss takes. data: a Tokenised, called `name`."""
    row, of_pairs = loss.row, data.lengths.shape[1] == 3
    if row.takes_pairs != of_pairs:
        kinds = {True: "pairs", False: "single answers with labels or scores"}
        others = {True: "bradley_terry takes those", False: "logistic or squared takes those"}
        raise ValueError(
            f"--loss {loss.name} takes {kinds[row.takes_pairs]}, and {name} has {kinds[of_pairs]}: "
            f"--loss {others[of_pairs]}"
        )
    if not of_pairs:
        wrong = (data.targets < row.least) | (data.targets > row.most)
        if wrong.any():
            i = int(wrong.argmax())
            source, number = data.place(i)
            raise ValueError(
                f"--loss {loss.name} takes targets from {row.least:g} to {row.most:g}, and {source} "
                f"row {number} has {data.targets[i]:g}: --loss squared takes any"
            )


def describe_targets(data) -> str:
    """Margins or targets in a line; nothing where there is none. data: a Tokenised."""
    if data.targets is None or not data.targets.any():
        return ""
    noun = "margins" if data.lengths.shape[1] == 3 else "targets"
    found = data.targets
    return (
        f"{noun}: {found.min():g} to {found.max():g}, mean {found.mean():.4g}; "
        f"{(found == 0).sum():,} of {len(found):,} are 0"
    )


class HeldOut:
    """A data set, or its first groups, that is scored again and again."""

    def __init__(self, run, loss: Loss, model, data, most: int | None = None):
        """model: a TrainedModel of a ScoreModel. data: a Tokenised. most: groups of it."""
        self.run, self.loss, self.model = run, loss, model
        self.data = data if most is None else data.select(range(min(most, len(data))))
        self.plan = None
        self._found, self._updates = None, -1  # what was found, after how many updates

    def num_batches(self) -> int:
        """This rank's batches of one pass. Every rank calls this."""
        if self.plan is None:  # not before a resumed run has found its token budget
            self.plan = plan_pass(
                self.data.lengths.sum(1),
                self.run.plan.batch_tokens,
                rank=dist.rank(),
                world=dist.world_size(),
            )
        return len(self.plan)

    def evaluate(self, watch: Callable = iter):
        """Every example exactly once: (ScoredPairs or ScoredAnswers, losses (B,)) in the data's
        order, in fp64 on every CPU; not a second time after the same update. watch: wraps the
        iterator over batches. Every rank calls this.
        """
        if self._updates == self.model.updates:
            return self._found
        self.num_batches()
        of_pairs = self.loss.row.takes_pairs

        def score(batch):
            found = examples(self.model(batch, at="last"), batch, of_pairs)
            return torch.stack(found, 1).cpu()  # (B, fields)

        everything = range(len(self.data))
        rows = sweep.score_groups(self.plan, everything, self.data, self.run.device, score, watch)
        kind = ScoredPairs if of_pairs else ScoredAnswers
        found = kind(*torch.stack(rows).unbind(1))
        self._found, self._updates = (found, self.loss(found)), self.model.updates
        return self._found


class Scale(NamedTuple):
    """What scores are like: a policy is rewarded with (score - mean) / std, if that is wished."""

    mean: float
    std: float
    answers: int  # that were scored
    data: str  # which ones


def measure_scale(run, loss: Loss, model, data, held_out: HeldOut | None) -> Scale:
    """The mean and the standard deviation of the scores of the held-out answers, or where there are
    none of the first ones of `data`, the training's. Every rank calls this.

    Nothing is divided by them: they are written down beside the model for whoever rewards with it
    (Ziegler et al. 2019, arXiv 1909.08593, fold them into the model).
    """
    name = "held out" if held_out else "training"
    scored = held_out or HeldOut(run, loss, model, data, NORMALISED_ON)
    found, _ = scored.evaluate()
    scores = torch.cat([found.chosen, found.rejected]) if loss.row.takes_pairs else found.scores
    std = float(scores.std()) if len(scores) > 1 else math.nan
    return Scale(float(scores.mean()), std, len(scores), name)
