"""From a row's log-probabilities to what is minimised, for losses of one example and for those that
couple a step.

A coupled loss is one of the whole step: it is scored first without gradient, row by row, on all
ranks; the loss and its derivative by each response's score follow from all of them at once; then
the rows are gone through again and each score is weighed with its derivative. Packing and ranks
change neither.

Legend: T scored tokens, N responses, B examples (pairs, or responses with labels) of a row or of
the step; k responses of an example; M mismatched responses.
"""

from typing import NamedTuple

import torch

from train.data.packing import Group, plan_batches
from train.data.steps import plan_pass
from train.engine import dist
from train.engine.prefetch import ahead
from train.losses.composition import Labelled, Pairs
from train.losses.logprobs import damped, score, weights


class Scored(NamedTuple):
    """A row's examples as the loss sees them."""

    examples: Pairs | Labelled
    weights: torch.Tensor | None  # (B,) WPO's, without gradient
    scores: torch.Tensor  # (k B,) nats, the policy's, with its graph
    mismatched: torch.Tensor  # (M,) nats, log-ratios


def scored(logps, ref_logps, row, loss_of) -> Scored:
    """logps: (T,) nats of the policy, or that and log sum p^2 where the loss weighs by it;
    ref_logps: (T,).
    """
    across, lengths = loss_of.shared, row.lengths
    logps, log_p2 = logps if across.use_weighting else (logps, None)
    labelled, mismatched = row.labels is not None, logps.new_zeros(0)
    if loss_of.needs_mismatched and row.num_responses:  # the first k of a group are its own
        k = 1 if labelled else 2
        own = torch.tensor(
            [j < k for _, *sizes in row.shape for j in range(len(sizes))], device=logps.device
        )
        tokens = own.repeat_interleave(lengths)
        other = lengths[~own]
        mismatched = score(logps[~tokens].detach(), other) - score(ref_logps[~tokens], other)
        logps, ref_logps, lengths = logps[tokens], ref_logps[tokens], lengths[own]
        log_p2 = log_p2[tokens] if log_p2 is not None else None
    of_each = weights(logps, log_p2, lengths) if log_p2 is not None else None
    if across.ld_alpha < 1:
        logps, ref_logps = (
            damped(values, lengths, across.ld_alpha) for values in (logps, ref_logps)
        )
    scores, refs = score(logps, lengths), score(ref_logps, lengths)
    if labelled:
        return Scored(Labelled(scores, refs, lengths, row.labels), of_each, scores, mismatched)
    if of_each is not None:
        of_each = of_each[0::2] * of_each[1::2]
    return Scored(Pairs.of(scores, refs, lengths), of_each, scores, mismatched)


class Mismatched:
    """Groups of `data` with the responses of the next group that has another prompt, for KTO's
    estimate of the KL.

    Of `chosen`, taken as a circle; none where all have one prompt. Cut at `max_length` tokens with
    the prompt.
    """

    def __init__(self, data, chosen, max_length: int):
        self.data, self.chosen, self.max_length = data, tuple(chosen), max_length
        self.place = {i: number for number, i in enumerate(self.chosen)}

    def group(self, i) -> Group:
        """Group i: its own responses, then the others'."""
        own, count = self.data.group(i), len(self.chosen)
        for ahead_by in range(1, count):
            other = self.data.group(self.chosen[(self.place[i] + ahead_by) % count])
            if tuple(other.prompt) != tuple(own.prompt):
                room = self.max_length - len(own.prompt)
                extra = tuple(response[:room] for response in other.responses if room > 0)
                return own._replace(responses=(*own.responses, *extra))
        return own

    def tokens(self) -> list[int]:
        """Sizes of the groups, in the order of `chosen`."""
        return [self.group(i).tokens for i in self.chosen]


class Step(NamedTuple):
    """Examples of a whole step or data set, in fp64 on every CPU, in an order that no rank or row
    changes.
    """

    examples: Pairs | Labelled
    weights: torch.Tensor | None  # (B,)
    mismatched: torch.Tensor | None  # (M,) nats


@torch.no_grad()
def collect(policy, reference, source, plan, place, loss_of, device, watch=iter) -> Step:
    """Score the rows of `plan` on all ranks without gradient. Every rank calls this.

    source: where groups come from; place: group -> its place in the order; watch: wraps the
    iterator over rows.
    """
    mine = []  # (place, columns of the example, weight, mismatched log-ratios)
    for groups, (row,) in watch(ahead(plan, source, device, rows_of=lambda groups: [groups])):
        ref_logps = reference(row)
        found = scored(policy(row, loss_of.shared.use_weighting), ref_logps, row, loss_of)
        if not groups:
            continue
        k = 1 if row.labels is not None else 2
        columns = torch.stack([x.double().cpu() for x in found.examples], 1)
        extra = found.mismatched.double().cpu().split([len(sizes) - k for _, *sizes in row.shape])
        weight = torch.ones(len(groups)) if found.weights is None else found.weights
        mine += zip([place[i] for i in groups], columns, weight.double().cpu(), extra, strict=True)
    everyone = sorted(
        (item for part in dist.all_gather(mine) for item in part), key=lambda item: item[0]
    )
    _, columns, weight, extra = zip(*everyone, strict=True)
    columns = torch.stack(columns).unbind(1)
    labelled = len(columns) == len(Labelled._fields)
    examples = Labelled(*columns[:-1], columns[-1].bool()) if labelled else Pairs(*columns)
    return Step(
        examples,
        torch.stack(weight) if loss_of.shared.use_weighting else None,
        torch.cat(extra) if loss_of.needs_mismatched else None,
    )


class Share(NamedTuple):
    """What a first pass over a step leaves for one row of the second."""

    examples: Pairs | Labelled  # (B,) on the CPU
    losses: torch.Tensor  # (B,)
    gradient: torch.Tensor  # (k B,) the derivative of the step's summed loss by each score


def whole_step(
    policy, reference, data, step, loss_of, running, budget, max_length, device
) -> list[Share]:
    """Score all of a step and couple it: a share for each of this rank's rows. Every rank calls
    this.
    """
    source, rows = data, step.rows
    if loss_of.needs_mismatched:
        source = Mismatched(data, step.groups, max_length)
        plan = plan_batches(source.tokens(), budget, dist.world_size())[dist.rank()]
        rows = [tuple(step.groups[i] for i in row) for row in plan]
    place = {group: number for number, group in enumerate(step.groups)}
    examples, weight, mismatched = collect(policy, reference, source, rows, place, loss_of, device)
    losses, gradient = loss_of.over_step(examples, running, mismatched, weight)
    gradient = gradient.view(len(losses), -1)
    shares = []
    for groups in step.rows:
        at = torch.tensor([place[i] for i in groups], dtype=torch.int64)
        shares.append(
            Share(type(examples)(*(x[at] for x in examples)), losses[at], gradient[at].flatten())
        )
    return shares


def of_row(policy, reference, row, loss_of, share: Share | None = None):
    """A row's examples, their losses (B,), and the sum to go backward from. `share`: of the first
    pass, if any.
    """
    if share is not None:
        logps = policy(row, loss_of.shared.use_weighting)
        scores = scored(
            logps, torch.zeros(row.target.shape, device=row.target.device), row, loss_of
        ).scores
        return share.examples, share.losses, (scores * share.gradient.to(scores)).sum()
    ref_logps = reference(row)  # first, while the policy's activations are not there yet
    found = scored(policy(row, loss_of.shared.use_weighting), ref_logps, row, loss_of)
    losses = loss_of(found.examples, found.weights)
    return found.examples, losses, losses.sum()


class HeldOut:
    """A data set that is scored again and again; a reference that stands still is asked once."""

    def __init__(self, data, budget: int, device: torch.device, loss_of, max_length: int):
        everything = range(len(data))
        self.data, self.device, self.loss_of = data, device, loss_of
        self.source = Mismatched(data, everything, max_length) if loss_of.needs_mismatched else data
        sizes = self.source.tokens() if loss_of.needs_mismatched else data.lengths.sum(1)
        self.plan = plan_pass(sizes, budget, rank=dist.rank(), world=dist.world_size())
        self.place = {i: i for i in everything}
        self.known, self.version = [], 0  # the reference's log-probs of each row of the plan

    def score(self, policy, reference, running, watch=iter):
        """Every example exactly once: (examples, losses (B,)) in the data's order. Every rank calls
        this.

        `running`: statistics of the loss, read and not changed; `watch` wraps the iterator over
        rows.
        """
        if reference.version != self.version:
            self.known, self.version = [], reference.version
        known, made = iter(self.known), []
        ask = (
            (lambda row: next(known))
            if self.known
            else (lambda row: made.append(reference(row)) or made[-1])
        )
        found = collect(
            policy, ask, self.source, self.plan, self.place, self.loss_of, self.device, watch
        )
        self.known = self.known or made
        if self.loss_of.couples:
            losses, _ = self.loss_of.over_step(
                found.examples, running, found.mismatched, found.weights, update=False
            )
            return found.examples, losses
        return found.examples, self.loss_of(found.examples, found.weights)
