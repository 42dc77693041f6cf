"""From a batch's log-probabilities to what preference training minimises.

Most losses judge an example by itself. KTO, BCO and AOT couple the examples of a step: each is
compared with a statistic of all of them (a KL estimate, a mean reward) or with its rank among them.
Over part of a step they would be another loss, so packing and ranks must not cut them: the whole step
is scored first without gradient, batch by batch, on all ranks; the losses and their derivatives by
each response's score follow from all of them at once; then the batches are gone through again, and
backward takes each score times its derivative.

Legend: T scored tokens, N responses and B examples (pairs, or responses with labels) of a batch or of
the step; k responses of an example; M mismatched responses.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from train.data.packing import Group, PackedBatch, plan_batches
from train.data.steps import plan_pass
from train.engine import dist, sweep
from train.losses.composition import Loss, RunningMean
from train.losses.logprobs import damped, sum_per_response, wpo_weights
from train.losses.preference import Labelled, Pairs


class Scored(NamedTuple):
    """A batch's examples as the loss sees them."""

    examples: Pairs | Labelled
    weights: torch.Tensor | None  # (B,) WPO's, without gradient
    scores: torch.Tensor  # (k B,) nats in fp64, the policy's summed log-probs, with their graph
    mismatched: torch.Tensor  # (M,) nats, log-ratios of responses to other prompts
    # Of a loss that couples the step, from the pass over all of it:
    step_losses: torch.Tensor | None = None  # (B,) fp64
    # (k B,) fp64, the derivative of the step's summed loss by each score
    step_gradient: torch.Tensor | None = None


class Objective:
    """What a step of preference training computes, for one loss, policy and reference."""

    def __init__(
        self,
        run,
        loss: Loss,
        policy,
        reference,
        data,
        *,
        max_length: int,
        reference_every: int = 0,
        reference_mixup: float = 1.0,
    ):
        """data: what steps are drawn from. max_length: tokens of a prompt with a mismatched response.
        reference_every: steps after which the reference moves (TR-DPO), by the share
        reference_mixup; 0: it stands still.
        """
        self.run, self.loss, self.policy, self.reference = run, loss, policy, reference
        self.data, self.max_length = data, max_length
        self.reference_every, self.reference_mixup = reference_every, reference_mixup
        self.running_mean = RunningMean()  # of BCO's rewards; survives a restart
        self._mean_before = self.running_mean.state_dict()
        self._whole_step: _WholeStep | None = None  # of a coupled loss, within a step

    def begin(self, step):
        """Score the whole step first, where the loss couples it; else do nothing.

        step: a run.loop.Step. Every rank calls this.
        """
        self._mean_before = self.running_mean.state_dict()
        if not self.loss.couples:
            return
        data, plan = self.data, step.groups_of_batches
        if self.loss.needs_mismatched:  # larger groups, so other batches
            data = Mismatched(data, step.groups, self.max_length)
            batches = plan_batches(data.tokens(), self.run.plan.batch_tokens, dist.world_size())[
                dist.rank()
            ]
            plan = [tuple(step.groups[i] for i in batch) for batch in batches]
        found = self.collect(plan, step.groups, data, self.reference)
        losses, gradient = self.loss.over_step(
            found.examples, self.running_mean, found.mismatched, found.weights
        )
        places = {int(self.data.rows[group]): i for i, group in enumerate(step.groups)}
        self._whole_step = _WholeStep(places, found.examples, losses, gradient)

    def ref_logps(self, batch: PackedBatch) -> torch.Tensor | None:
        """log pi_ref of the batch's scored tokens, (T,) nats, without gradient.

        None where `begin` has scored the step: it asked the reference then. Every rank calls this.
        """
        return None if self._whole_step is not None else self.reference(batch)

    def score(self, logps, ref_logps, batch: PackedBatch) -> Scored:
        """The batch's examples from its tokens' log-probabilities.

        logps: what the policy gave: (T,) nats, with log sum p^2 (T,) beside it for WPO. ref_logps:
        what `ref_logps` gave. Of a coupled loss the examples are those of the pass over the whole
        step, and the batch adds the policy's scores, through which the gradient goes.
        """
        if self._whole_step is None:
            return score_batch(logps, ref_logps, batch, self.loss)
        if self.loss.shared.use_weighting:
            logps, _ = logps  # the weights are known
        scores = response_scores(logps, batch.lengths, self.loss)
        return self._whole_step.of_batch(batch, scores)

    def losses(self, scored: Scored) -> torch.Tensor:
        """One number an example, (B,); their sum's gradient is the loss's, coupled or not."""
        if scored.step_losses is None:
            return self.loss(scored.examples, scored.weights)
        return _WithGradient.apply(scored.scores, scored.step_losses, scored.step_gradient)

    def end(self, step, update):
        """Settle what the step has changed beside the policy. Every rank calls this.

        A step that was not applied takes its share of the running mean back; the reference moves
        where it is time.
        """
        # whether it was applied is not asked where it does not matter: the device may not know yet
        if self.loss.couples and not update.applied:
            self.running_mean.load_state_dict(self._mean_before)
        every = self.reference_every
        if every and (step.number + 1) % every == 0 and update.applied:
            self.reference.follow(self.policy, self.reference_mixup)
        self._whole_step = None

    @torch.no_grad()
    def collect(self, plan, order, data, reference, watch=iter) -> "_Collected":
        """The examples of the groups `order`, in that order, scored on all ranks without gradient.

        In fp64 on every CPU. data: where groups come from. reference: called once a batch of the
        plan, in its order. Every rank calls this.
        """
        labelled = self.data.labels is not None

        def score_examples(batch):
            ref_logps = reference(batch)  # (T,) nats
            logps = self.policy(batch, log_p2=self.loss.shared.use_weighting)
            scored = score_batch(logps, ref_logps, batch, self.loss)
            counts = sweep.responses_per_group(batch)
            if not counts:
                return []
            k = 1 if labelled else 2
            columns = torch.stack([x.double().cpu() for x in scored.examples], 1)  # (B, fields)
            extra = scored.mismatched.double().cpu().split([count - k for count in counts])
            weight = torch.ones(len(counts)) if scored.weights is None else scored.weights
            return zip(columns, weight.double().cpu(), extra, strict=True)

        results = sweep.score_groups(plan, order, data, self.run.device, score_examples, watch)
        columns, weight, extra = zip(*results, strict=True)
        columns = torch.stack(columns).unbind(1)
        if labelled:
            *columns, desired = columns
            examples = Labelled(*columns, desired.bool())
        else:
            examples = Pairs(*columns)
        return _Collected(
            examples,
            torch.stack(weight) if self.loss.shared.use_weighting else None,
            torch.cat(extra) if self.loss.needs_mismatched else None,
        )


class HeldOut:
    """A held-out data set that is scored again and again; a reference that stands still is asked
    once.
    """

    def __init__(self, objective: Objective, data):
        self.objective, self.data = objective, data
        self.source = data
        if objective.loss.needs_mismatched:
            self.source = Mismatched(data, range(len(data)), objective.max_length)
        self.plan = None
        self._ref_logps = []  # of each batch of the plan
        self._version = 0  # of the reference that gave them

    def num_batches(self) -> int:
        """This rank's batches of one pass. Every rank calls this."""
        if self.plan is None:  # not before a resumed run has found its token budget
            mismatched = self.objective.loss.needs_mismatched
            sizes = self.source.tokens() if mismatched else self.data.lengths.sum(1)
            self.plan = plan_pass(
                sizes,
                self.objective.run.plan.batch_tokens,
                rank=dist.rank(),
                world=dist.world_size(),
            )
        return len(self.plan)

    def evaluate(self, watch: Callable = iter) -> tuple[Pairs | Labelled, torch.Tensor]:
        """Every example exactly once: (examples, losses (B,)) in the data's order.

        The loss's running mean is read and not changed. watch: wraps the iterator over batches.
        Every rank calls this.
        """
        self.num_batches()
        objective = self.objective
        if objective.reference.version != self._version:
            self._ref_logps, self._version = [], objective.reference.version
        known, made = iter(self._ref_logps), []

        def reference(batch):
            if self._ref_logps:
                return next(known)
            made.append(objective.reference(batch))
            return made[-1]

        everything = range(len(self.data))
        found = objective.collect(self.plan, everything, self.source, reference, watch)
        self._ref_logps = self._ref_logps or made
        if objective.loss.couples:
            losses, _ = objective.loss.over_step(
                found.examples,
                objective.running_mean,
                found.mismatched,
                found.weights,
                update=False,
            )
            return found.examples, losses
        return found.examples, objective.loss(found.examples, found.weights)


def score_batch(logps, ref_logps: torch.Tensor, batch: PackedBatch, loss: Loss) -> Scored:
    """A batch's examples from its tokens' log-probabilities.

    logps: (T,) nats of the policy, or that and log sum p^2 (T,) where the loss weighs by it.
    ref_logps: (T,) nats. Where the loss needs mismatched responses, they stand behind each group's
    own.
    """
    log_p2 = None
    if loss.shared.use_weighting:
        logps, log_p2 = logps
    lengths = batch.lengths  # (N,)
    labelled = batch.labels is not None
    mismatched = logps.new_zeros(0)
    if loss.needs_mismatched and batch.num_responses:
        k = 1 if labelled else 2  # the first k responses of a group are its own
        own = np.array([j < k for _, *sizes in batch.shape for j in range(len(sizes))])  # (N,) bool
        # nothing predicts the first token of plain text
        scored = [size - (not prompt) for prompt, *sizes in batch.shape for size in sizes]
        own_tokens = np.repeat(own, scored)  # (T,) bool

        def places(mask):
            # made on the host: how many they are would have to be asked of the device
            return torch.from_numpy(mask.nonzero()[0]).to(logps.device, non_blocking=True)

        other, other_tokens = lengths[places(~own)], places(~own_tokens)
        mismatched = sum_per_response(logps[other_tokens].detach(), other)
        mismatched = mismatched - sum_per_response(ref_logps[other_tokens], other)
        own_tokens = places(own_tokens)
        logps, ref_logps = logps[own_tokens], ref_logps[own_tokens]
        lengths = lengths[places(own)]
        log_p2 = log_p2[own_tokens] if log_p2 is not None else None
    of_each = wpo_weights(logps, log_p2, lengths) if log_p2 is not None else None  # (N,)
    scores = response_scores(logps, lengths, loss)  # (N,) nats
    ref_scores = response_scores(ref_logps, lengths, loss)  # (N,) nats
    if labelled:
        examples = Labelled(scores, ref_scores, lengths, batch.labels)
    else:
        examples = Pairs.of(scores, ref_scores, lengths)
        if of_each is not None:
            of_each = of_each[0::2] * of_each[1::2]  # (B,)
    return Scored(examples, of_each, scores, mismatched)


def response_scores(logps: torch.Tensor, lengths: torch.Tensor, loss: Loss) -> torch.Tensor:
    """The sum of each response's log-probs, (T,), (N,) -> (N,) nats, damped where LD-DPO is on.

    The same for policy and reference.
    """
    alpha = loss.shared.ld_alpha
    if alpha < 1:
        logps = damped(logps, lengths, alpha)
    return sum_per_response(logps, lengths)


class Mismatched:
    """Groups with the responses of the next group that has another prompt, for KTO's estimate of the
    KL.

    Of `chosen`, taken as a circle; none where all have one prompt. Cut at `max_length` tokens with
    the prompt.
    """

    def __init__(self, data, chosen, max_length: int):
        self.data, self.chosen, self.max_length = data, tuple(chosen), max_length
        self._place = {i: number for number, i in enumerate(self.chosen)}

    def group(self, i) -> Group:
        """Group i: its own responses, then the others'."""
        own, count = self.data.group(i), len(self.chosen)
        for distance in range(1, count):
            other = self.data.group(self.chosen[(self._place[i] + distance) % count])
            if tuple(other.prompt) != tuple(own.prompt):
                room = self.max_length - len(own.prompt)
                extra = tuple(response[:room] for response in other.responses if room > 0)
                return own._replace(responses=(*own.responses, *extra))
        return own

    def tokens(self) -> list[int]:
        """Sizes of the groups, in the order of `chosen`."""
        return [self.group(i).tokens for i in self.chosen]


class _Collected(NamedTuple):
    """Examples of a whole step or data set, in fp64 on every CPU."""

    examples: Pairs | Labelled
    weights: torch.Tensor | None  # (B,)
    mismatched: torch.Tensor | None  # (M,) nats


class _WholeStep(NamedTuple):
    """What the pass over a whole step leaves for the pass that goes backward."""

    places: dict[int, int]  # number of the data row -> place in the tensors below
    examples: Pairs | Labelled  # (B,) on the CPU
    losses: torch.Tensor  # (B,)
    gradient: torch.Tensor  # (k B,)

    def of_batch(self, batch, scores: torch.Tensor) -> Scored:
        """The part of one batch: its examples, losses and derivatives, beside its scores (k B,)."""
        places = [self.places[row] for row in batch.group_rows]
        places = torch.tensor(places, dtype=torch.int64)
        gradient = self.gradient.view(len(self.losses), -1)  # (B, k)
        return Scored(
            # to where the losses go: whoever adds them up takes both
            examples=type(self.examples)(*(x[places].to(scores.device) for x in self.examples)),
            weights=None,  # they are in the losses
            scores=scores,
            mismatched=scores.new_zeros(0),
            step_losses=self.losses[places],
            step_gradient=gradient[places].flatten(),
        )


class _WithGradient(torch.autograd.Function):
    """Losses that are known, whose sum has a known gradient by the scores that made them."""

    @staticmethod
    def forward(ctx, scores, losses, gradient):
        """(k B,), (B,), (k B,) -> (B,)"""
        ctx.save_for_backward(gradient.to(scores))
        return losses.to(scores.device, copy=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        k = len(gradient) // max(len(grad), 1)
        return grad.to(gradient.dtype).repeat_interleave(k) * gradient, None, None
