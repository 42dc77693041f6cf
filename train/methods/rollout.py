"""Rollouts: what the policy answers to a step's prompts, and all that its updates need to know of it.

A rollout stands whole on every rank (token ids, flags, a few numbers a token), so that statistics
over groups, whitening and checkpoints do not depend on the number of ranks. What is drawn is a
function of the weights, the prompts and (seed, draw, sample, position) alone: see models/generate.py.

Legend: P prompts, k samples of each, B = P k samples, T tokens of all answers, F sources of reward.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch

from train.data.mixing import shuffled
from train.data.packing import Group, PackedBatch
from train.data.steps import plan_pass
from train.engine import dist, preemption, sharded_state, sweep
from train.methods import decoding
from train.models.generate import Completion, check

PER_TOKEN = ("old", "ref", "values", "entropy", "advantages", "returns")
# those of them that an update's loss is computed from
OF_UPDATES = ("old", "ref", "values", "advantages", "returns")


class Answers(NamedTuple):
    """What the policy wrote, in the prompts' order: the samples of a prompt are neighbours."""

    groups: tuple[int, ...]  # (P,) prompts, as numbers into the data set
    prompts: tuple[tuple[int, ...], ...]  # (P,) token ids
    completions: tuple[Completion, ...]  # (B,)

    @property
    def samples_per_prompt(self) -> int:
        """k"""
        return len(self.completions) // len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int64, tokens of each answer, the end token included."""
        return np.array([len(c.ids) for c in self.completions], dtype=np.int64)

    @property
    def ended(self) -> np.ndarray:
        """(B,) bool: an end token was drawn; else the answer was cut."""
        return np.array([c.ended for c in self.completions], dtype=bool)

    def group(self, i: int) -> Group:
        """Prompt i with its samples, as scoring and training take it."""
        k = self.samples_per_prompt
        responses = tuple(c.ids for c in self.completions[i * k : (i + 1) * k])
        return Group(self.prompts[i], responses, row=i)

    @property
    def sizes(self) -> list[int]:
        """(P,) tokens of each prompt with its samples."""
        return [self.group(i).tokens for i in range(len(self.prompts))]

    def replaced(self, places: Sequence[int], others: "Answers") -> "Answers":
        """These with the answers to the prompts at `places` taken from `others`, which has only
        those.
        """
        k = self.samples_per_prompt
        completions = list(self.completions)
        for n, i in enumerate(places):
            completions[i * k : (i + 1) * k] = others.completions[n * k : (n + 1) * k]
        return self._replace(completions=tuple(completions))


class Rollout(NamedTuple):
    """Answers, their rewards, and what their tokens' updates need."""

    answers: Answers
    scores: np.ndarray  # (B, F) fp64, each source's own; NaN where it does not apply
    score: np.ndarray  # (B,) fp64, what is maximised; NaN where no source applies
    # (T,) fp32 each, in the order of the samples, or None
    old: torch.Tensor  # nats, the policy's before the updates
    ref: torch.Tensor | None  # nats, the reference's
    values: torch.Tensor | None  # of the states before the tokens
    entropy: torch.Tensor | None  # nats, of the distributions that the tokens were drawn from
    advantages: torch.Tensor
    returns: torch.Tensor | None

    def of_batch(self, batch: PackedBatch) -> "Known":
        """What is known of a batch's tokens, on its device."""
        device = batch.target.device
        k = self.answers.samples_per_prompt
        lengths = self.answers.lengths
        ends = np.cumsum(lengths)
        samples = [i * k + s for i in batch.group_rows for s in range(k)]
        index = [np.arange(ends[s] - lengths[s], ends[s]) for s in samples]
        index = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *index]))
        columns = {name: getattr(self, name) for name in OF_UPDATES}
        known = {name: values for name, values in columns.items() if values is not None}
        taken = torch.stack([values[index] for values in known.values()])  # (columns, T) fp32
        if device.type == "cuda":
            taken = taken.pin_memory()  # else the host would wait for the copy
        on_device = taken.to(device, non_blocking=True)
        found = dict(zip(known, on_device, strict=True))
        return Known(**dict.fromkeys(columns) | found, lengths=batch.lengths)


class Known(NamedTuple):
    """What is known of a batch's T tokens before it is trained on, (T,) each or None."""

    old: torch.Tensor
    ref: torch.Tensor | None
    values: torch.Tensor | None
    advantages: torch.Tensor
    returns: torch.Tensor | None
    lengths: torch.Tensor  # (N,) tokens of each answer


class Sampler:
    """Decodes with the policy's weights: the policy itself where it stands whole on each rank, else a
    copy that follows it.
    """

    def __init__(self, policy, make_copy: Callable, ends: Collection[int], settings, run):
        """policy: a TrainedModel. make_copy: called where it is sharded; gives an unsharded model of
        transformers with the same adapters. ends: token ids that end an answer. run: its plan says how
        many answers are decoded at once. Every rank calls this.
        """
        self.policy, self.ends, self.settings, self.run = policy, ends, settings, run
        self.copy = make_copy() if policy.stage == 3 else None
        if self.copy is not None:
            self._trained = [p for p in self.copy.parameters() if p.requires_grad]
            self.copy.requires_grad_(False)

    @property
    def lm(self):
        """The model of transformers that decodes."""
        return self.policy.module.lm if self.copy is None else self.copy

    def check(self, prompts: Sequence[Sequence[int]]):
        """ValueError where `answer` would raise it: to be asked before other work begins."""
        settings = self.settings
        check(self.lm, prompts, settings.max_new_tokens, settings.temperature)

    @torch.no_grad()
    def follow(self):
        """Take on the policy's weights, in place. Every rank calls this before it decodes."""
        if self.copy is None:
            return
        weights = sharded_state.full_weights(self.policy)
        for p, whole in zip(self._trained, weights, strict=True):
            p.copy_(whole.to(p.device))

    def answer(
        self,
        groups: Sequence[int],
        prompts: Sequence[Sequence[int]],
        draws: Sequence[int],
        *,
        samples_per_prompt: int,
        seed: int,
        logps: bool = False,
        progress: Callable[[int], object] = lambda num_done: None,
    ) -> Answers:
        """Answer every prompt `samples_per_prompt` times, on every rank. Every rank calls this.

        draws: what the noise knows each prompt by. logps: as `generate`'s. Raises Preempted between
        two batches where a rank has been told to stop; a rank that is told while it decodes leaves the
        batch at once.
        """
        settings, at_once = self.settings, self.run.plan.decode_batch
        completions = decoding.answer(
            self.lm,
            prompts,
            draws,
            decoding.plan_of_rank(prompts, at_once, samples_per_prompt),
            advice=f"(--decode_batch is {at_once}: lower it)",
            samples_per_prompt=samples_per_prompt,
            # a batch that was left is dropped with the rollout
            between=preemption.raise_if_preempted,
            eos_token_ids=self.ends,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=seed,
            autocast=self.policy.module.autocast,
            progress=progress,
            stop=preemption.told_to_stop,
            logps=logps,
        )
        return Answers(tuple(groups), tuple(map(tuple, prompts)), tuple(completions))


class Part(NamedTuple):
    """A minibatch, planned."""

    groups: tuple[int, ...]  # all that it is made of, the same on every rank
    # this rank's batches of those that are trained on; as many on every rank, at least one
    batches: list[tuple[int, ...]]


def minibatches(
    tokens: Sequence[int],
    count: int,
    batch_tokens: int,
    *,
    seed: int,
    number: int,
    idle: Collection[int] = (),
) -> list[Part]:
    """The `count` minibatches of a rollout: whole groups, drawn once.

    tokens: (P,) of each group. number: of the rollout. idle: groups without a gradient, which no
    batch holds. Fewer minibatches where there are fewer prompts.
    """
    order = [int(i) for i in shuffled(len(tokens), seed, number)]
    count = min(count, len(order))
    parts = [order[len(order) * m // count : len(order) * (m + 1) // count] for m in range(count)]
    return [
        Part(tuple(part), batches_of([i for i in part if i not in idle], tokens, batch_tokens))
        for part in parts
    ]


def batches_of(
    groups: Sequence[int], tokens: Sequence[int], batch_tokens: int
) -> list[tuple[int, ...]]:
    """This rank's batches of some of the groups; as many on every rank, at least one. tokens: (P,) of
    all groups.
    """
    sizes = [tokens[i] for i in groups]
    plan = plan_pass(sizes, batch_tokens, rank=dist.rank(), world=dist.world_size())
    return [tuple(sorted(groups[i] for i in batch)) for batch in plan]


def order_of_updates(count: int, epochs: int, *, seed: int, number: int) -> list[int]:
    """The minibatches of a rollout in the order of its updates: each once an epoch, in another order
    each time. What a minibatch is made of stays.
    """
    found = []
    for epoch in range(epochs):
        # streams of their own beside those of `minibatches`, which has (seed, number)
        stream = np.random.Generator(
            np.random.Philox(key=[seed, (number << 16) + epoch + (1 << 62)])
        )
        found += stream.permutation(count).tolist()
    return found


def score_tokens(
    answers: Answers, plan: list[tuple[int, ...]], device, models: "Scored", watch=iter
) -> dict[str, torch.Tensor | None]:
    """The answers' tokens under each model, (T,) fp32 in the samples' order on every rank: old and
    entropy, ref, values; None where there is no such model. Every rank calls this.

    plan: this rank's batches; the very ones that will be trained on, so that the first ratio is
    exactly 1.
    """

    def score(batch):
        logps, entropy = models.policy(batch, temperature=models.temperature, entropy=True)
        found = [logps, entropy]
        found.append(
            models.reference(batch, temperature=models.temperature) if models.reference else None
        )
        found.append(models.critic(batch, at="before") if models.critic else None)
        sizes = [sum(sizes) for _, *sizes in batch.shape] if batch.num_responses else []
        parts = [
            x.float().cpu().split(sizes) if x is not None else [None] * len(sizes) for x in found
        ]
        return list(zip(*parts, strict=True))

    order = range(len(answers.prompts))
    rows = sweep.score_groups(plan, order, answers, device, score, watch)
    columns = [
        torch.cat(column) if column[0] is not None else None for column in zip(*rows, strict=True)
    ]
    return dict(zip(("old", "entropy", "ref", "values"), columns, strict=True))


class Scored(NamedTuple):
    """The models that score a rollout's tokens."""

    policy: Callable
    reference: Callable | None
    critic: Callable | None
    temperature: float


class Kept:
    """The rollout that is being trained on, as a part of checkpoints (run/checkpoint.py).

    Before its first update nothing has moved: it is not saved, and drawn again. From then on it
    cannot be drawn again, and is saved with the number of updates done.
    """

    def __init__(self):
        self.number, self.updates = -1, 0  # of the rollout; updates that it was used for
        self.rollout: Rollout | None = None
        self.facts = {}  # of the rollout, for the board: JSON

    def take(self, number: int, rollout: Rollout, facts: dict):
        """Train on this one from now on."""
        self.number, self.updates, self.rollout, self.facts = number, 0, rollout, facts

    def state_dict(self) -> dict:
        """Where it stands, for JSON."""
        if not self.updates:
            return {"number": -1, "updates": 0, "facts": {}}
        return {"number": self.number, "updates": self.updates, "facts": self.facts}

    def load_state_dict(self, state: dict):
        """Continue from `state_dict`."""
        self.number, self.updates = state["number"], state["updates"]
        self.facts = state["facts"]

    def rank_tensors(self) -> Callable[[], dict[str, torch.Tensor]]:
        """What makes the rollout's tensors, on rank 0, where an update of it is done."""
        rollout = self.rollout
        if not self.updates or not dist.is_main():
            return dict
        return lambda: _as_tensors(rollout)

    def load_rank_tensors(self, of_ranks: list[dict[str, torch.Tensor]]):
        """Continue from `rank_tensors`. Every rank calls this."""
        found = [tensors for tensors in of_ranks if tensors]
        tensors = dist.broadcast(found[0] if found else None)
        self.rollout = _from_tensors(tensors) if tensors else None


def _as_tensors(rollout: Rollout) -> dict[str, torch.Tensor]:
    answers = rollout.answers
    prompts = [token for prompt in answers.prompts for token in prompt]
    ids = [token for completion in answers.completions for token in completion.ids]
    tensors = {
        "groups": torch.tensor(answers.groups),
        "prompts": torch.tensor(prompts),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in answers.prompts]),
        "ids": torch.tensor(ids),
        "lengths": torch.from_numpy(answers.lengths),
        "ended": torch.from_numpy(answers.ended),
        "scores": torch.from_numpy(rollout.scores),
        "score": torch.from_numpy(rollout.score),
    }
    values = {name: getattr(rollout, name) for name in PER_TOKEN}
    return tensors | {name: value for name, value in values.items() if value is not None}


def _from_tensors(tensors: dict[str, torch.Tensor]) -> Rollout:
    prompts = tensors["prompts"].split(tensors["prompt_lengths"].tolist())
    ids = tensors["ids"].split(tensors["lengths"].tolist())
    answers = Answers(
        groups=tuple(tensors["groups"].tolist()),
        prompts=tuple(tuple(prompt.tolist()) for prompt in prompts),
        completions=tuple(
            Completion(tuple(part.tolist()), ended)
            for part, ended in zip(ids, tensors["ended"].tolist(), strict=True)
        ),
    )
    return Rollout(
        answers=answers,
        scores=tensors["scores"].numpy(),
        score=tensors["score"].numpy(),
        **{name: tensors.get(name) for name in PER_TOKEN},
    )


def per_answer(values: torch.Tensor, lengths: np.ndarray) -> np.ndarray:
    """(B,) fp64: the sums of (T,) values over each answer's tokens."""
    return np.add.reduceat(values.double().numpy(), np.cumsum(lengths) - lengths)
