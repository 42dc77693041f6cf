"""One rollout after the other: drawn, rewarded, scored, turned into advantages, and used for updates.

Legend: P prompts, k samples of each, B = P k samples, T tokens of all answers.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from train.data import mixing
from train.data.packing import PackedBatch
from train.data.steps import num_drawn
from train.engine import dist, memory, prefetch
from train.losses import advantages as adv
from train.losses import policy as losses
from train.losses.algorithms import ALGORITHMS, Algorithm
from train.methods import rollout as rollouts
from train.methods import setup
from train.methods.policy_setup import Models, Rewards, samples_of
from train.methods.rollout import Answers, Kept, Part, Rollout, per_answer
from train.run import export


def choose_algorithm(settings) -> Algorithm:
    """The row that --algorithm names with the numbers that flags override. ValueError where they do not
    go together; flags that change nothing under it are refused by their `needs` (train/settings.py).
    """
    row = ALGORITHMS[settings.algorithm]
    given = {
        "samples": settings.samples_per_prompt,
        "epochs": settings.epochs_per_rollout,
        "minibatches": settings.minibatches,
        "clip_low": settings.clip_low,
        "clip_high": settings.clip_high,
        "dual_clip": settings.dual_clip,
        "scale": settings.scale_advantages,
        "value_clip": settings.value_clip,
        "resamples": settings.max_resamples,
    }
    row = row._replace(**{name: value for name, value in given.items() if value is not None})
    if settings.kl_coef is not None:
        row = row._replace(kl=row.kl._replace(coef=settings.kl_coef))
    if row.needs_groups and row.samples < 2:
        raise ValueError(
            f"--samples_per_prompt {row.samples}: {settings.algorithm} compares samples of a prompt, "
            "of which there have to be 2"
        )
    if row.kl.coef:
        row.kl.check()
    if row.ratio == "gate" and not min(row.clip_low, row.clip_high) > 0:
        raise ValueError(
            f"--clip_low, --clip_high: of {settings.algorithm} they are the gate's temperatures for "
            "negative and positive advantages, and above 0"
        )
    return row


class Minibatch:
    """The groups of one update, and this rank's batches of them."""

    def __init__(self, collector: "Collector", step, number: int, part: Part, answers: Answers):
        """number: of the update within the rollout."""
        self._collector, self._step, self.number = collector, step, number
        self.trains_policy = collector.trains_policy(step)
        self._part, self._answers = part, answers
        k = answers.samples_per_prompt
        lengths = answers.lengths.reshape(-1, k)[list(part.groups)]  # (groups, k)
        self.num_samples, self.num_tokens = lengths.size, int(lengths.sum())
        # (2,): k2 of this rank's tokens, nats, and their number; it stays on the device, whose ranks
        # cannot add up what lies on the host
        self._moved = 0.0
        self.ratios = []  # of this rank's tokens, (T,) a batch
        self.denominator = losses.denominator(
            collector.algorithm,
            self.num_samples,
            self.num_tokens,
            collector.settings.max_new_tokens,
        )

    def batches(self) -> Iterator[PackedBatch]:
        """This rank's batches: as many on every rank, the last ones may be empty. Raises Preempted
        before a batch where any rank has been told to stop.
        """
        for batch in self._packed(self._part.batches):
            self._step.computes(batch)
            yield batch

    def _packed(self, batches) -> Iterator[PackedBatch]:
        plans = ((None, [groups]) for groups in batches)
        ahead = prefetch.packed(plans, self._answers, self._collector.run.device)
        return (batch for _, (batch,) in ahead)

    def first_batch(self) -> PackedBatch:
        """The first of `batches` once more."""
        return next(self._packed(self._part.batches[:1]))

    def moved(self) -> float:
        """How far the policy was from what it was when the rollout was drawn, as this minibatch met it:
        k2 a token over all ranks, nats. Every rank calls this, after its batches.
        """
        total, tokens = dist.all_reduce(self._moved).tolist()
        return total / max(tokens, 1)

    def sums(self, found, of_values) -> torch.Tensor:
        """What a batch adds to the measures."""
        self.ratios.append(found.ratios)
        self._moved = self._moved + torch.stack([found.moved, found.tokens])
        return losses.sums(found, of_values, self.denominator, self.num_tokens)

    def finish(self):
        """Update the models: a checkpoint may be made from here on. Every rank calls this."""
        self._collector.update(self._step, self)


class Collector:
    """Makes rollouts of a run's prompts, and their minibatches."""

    def __init__(self, run, settings, algorithm, models: Models, rewards: Rewards, prompts, report):
        self.run, self.settings, self.algorithm = run, settings, algorithm
        self.models, self.rewards, self.prompts, self.report = models, rewards, prompts, report
        self.kept = Kept()

    @property
    def state(self) -> dict:
        """Its parts of a checkpoint."""
        parts = {"rollout": self.kept}
        if self.models.critic is not None:
            parts["value"] = self.models.critic
        return parts

    # A rollout.

    def collect(self, step) -> Rollout:
        """The rollout of a step: drawn, or what a checkpoint has kept of it. Every rank calls this."""
        if self.kept.number == step.number:
            return self.kept.rollout
        answers = self._draw(step, range(len(step.groups)), attempt=0)
        answers, samples, scores, score = self._reward(step, answers)
        with self.report.timed("score"):
            tokens = self._score_tokens(step, answers, score)
            rollout = self._with_advantages(answers, scores, score, tokens)
        facts = self._facts(rollout) | {"episode": float(self._episodes(step.number + 1))}
        facts |= self._facts_of_sources(step.groups, rollout)
        self.kept.take(step.number, rollout, facts)
        self.report.take(step.number, rollout, facts, samples)
        return rollout

    def _draw(self, step, places, attempt: int) -> Answers:
        """Answers to the prompts at `places` of the step; each attempt has other noise."""
        sampler = self.models.sampler
        size = self.settings.batch_size
        first = (step.number * (1 + self.algorithm.resamples) + attempt) * size
        groups = [step.groups[i] for i in places]
        with self.report.timed("generate"):
            if not attempt:
                sampler.follow()
            return sampler.answer(
                groups,
                [self.prompts.ids(i) for i in groups],
                [first + i for i in places],
                samples_per_prompt=self.algorithm.samples,
                seed=self.settings.seed,
                logps=True,
            )

    def _reward(self, step, answers: Answers):
        """(the answers, what rewards see of them, their scores (B, F), what is maximised (B,)); prompts
        whose samples all have the same reward are answered anew, as often as the algorithm says.
        """
        samples = self._samples_of(answers)
        scores, score = self._score(samples)
        for attempt in range(1, self.algorithm.resamples + 1):
            flat = adv.is_flat(torch.from_numpy(score), answers.samples_per_prompt)
            places = flat.nonzero().flatten().tolist()
            if not places:
                break
            others = self._draw(step, places, attempt)
            answers = answers.replaced(places, others)
            new_samples = self._samples_of(others)
            k = answers.samples_per_prompt
            index = [i * k + s for i in places for s in range(k)]
            scores[index], score[index] = self._score(new_samples)
            for i, sample in zip(index, new_samples, strict=True):
                samples[i] = sample
        return answers, samples, scores, score

    def _samples_of(self, answers: Answers):
        tokenizer = self.models.policy.tokenizer
        return samples_of(answers, self.prompts, tokenizer, self.settings.max_new_tokens)

    def _score(self, samples):
        with self.report.timed("score"):
            return self.rewards.score(samples)

    def _idle(self, score: np.ndarray, samples_per_prompt: int) -> list[int]:
        """The prompts without a gradient: all their samples are worth the same, and nothing but their
        comparison trains the policy.
        """
        algorithm = self.algorithm
        if algorithm.advantage != "group" or algorithm.whiten or algorithm.kl.coef:
            return []
        return adv.is_flat(torch.from_numpy(score), samples_per_prompt).nonzero().flatten().tolist()

    def _parts(self, step_number: int, answers: Answers, idle: list[int]) -> list[Part]:
        """The rollout's minibatches."""
        return rollouts.minibatches(
            answers.sizes,
            self.algorithm.minibatches,
            self.run.plan.batch_tokens,
            seed=self.settings.seed,
            number=step_number,
            idle=idle,
        )

    def _score_tokens(self, step, answers: Answers, score: np.ndarray) -> dict:
        models = self.models
        scored = rollouts.Scored(
            models.policy,
            models.reference if self.algorithm.kl.coef else None,
            models.critic,
            self.settings.temperature,
        )
        idle = self._idle(score, answers.samples_per_prompt)
        parts = self._parts(step.number, answers, idle)
        plan = [batch for part in parts for batch in part.batches]
        if idle:  # measured, but not trained on
            plan += rollouts.batches_of(idle, answers.sizes, self.run.plan.batch_tokens)
        with (
            memory.room_for("scoring a rollout", "lower --micro_tokens"),
            models.reference.at_hand(),
        ):
            return rollouts.score_tokens(answers, plan, self.run.device, scored)

    def _with_advantages(self, answers, scores, score, tokens) -> Rollout:
        """The rollout with its advantages and returns, in fp64 over all of it, kept in fp32."""
        algorithm, settings = self.algorithm, self.settings
        lengths = torch.from_numpy(answers.lengths)
        total = torch.from_numpy(score)  # (B,), NaN where no reward applies
        kl = None
        if algorithm.kl.place == "reward" and algorithm.kl.coef:
            kl = tokens["old"].double() - tokens["ref"].double()  # (T,) nats, k1
        returns = None
        if algorithm.advantage == "group":
            if kl is not None:  # of the whole answer, inside the baseline
                total = total - algorithm.kl.coef * torch.from_numpy(
                    per_answer(kl, answers.lengths)
                )
            of_answer = adv.over_groups(
                total, answers.samples_per_prompt, algorithm.baseline, algorithm.scale
            )
            found = of_answer.repeat_interleave(lengths)
        else:
            rewards = adv.token_rewards(total.nan_to_num(nan=0.0), lengths, kl, algorithm.kl.coef)
            if algorithm.advantage == "gae":
                values = tokens["values"]
                found = adv.gae(rewards, values, lengths, settings.gamma, settings.lam)
                lam = settings.lam if settings.value_lam is None else settings.value_lam
                returns = found + values.double()
                if lam != settings.lam:
                    returns = values.double() + adv.gae(
                        rewards, values, lengths, settings.gamma, lam
                    )
            else:
                found = adv.to_go(rewards, lengths, settings.gamma)
        # answers that no reward applies to teach nothing, and count in no statistic
        counted = torch.from_numpy(np.isfinite(score)).repeat_interleave(lengths)
        if algorithm.whiten:
            found[counted] = adv.whiten(found[counted])
        found = torch.where(counted, found, 0.0)
        if returns is not None:
            returns = torch.where(counted, returns, tokens["values"].double())
        return Rollout(
            answers=answers,
            scores=scores,
            score=score,
            advantages=found.float(),
            returns=None if returns is None else returns.float(),
            **tokens,
        )

    def _facts(self, rollout: Rollout) -> dict[str, float]:
        """What the board says of a rollout."""
        answers = rollout.answers
        lengths, ended = answers.lengths, answers.ended
        score = torch.from_numpy(rollout.score)
        flat = adv.is_flat(score, answers.samples_per_prompt)
        counted = rollout.score[
            np.isfinite(rollout.score)
        ]  # of answers that some reward applies to
        facts = {
            "objective/scores": float(counted.mean()) if len(counted) else math.nan,
            "objective/entropy": float(per_answer(rollout.entropy, lengths).mean()),
            "policy/entropy_avg": float(rollout.entropy.double().mean()),
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": float(lengths.min()),
            "completions/max_length": float(lengths.max()),
            "completions/clipped_ratio": float(1 - ended.mean()),
            "completions/total_tokens": float(lengths.sum()),
            "val/num_eos_tokens": float(ended.sum()),
            "frac_reward_zero_std": float(flat.double().mean())
            if answers.samples_per_prompt > 1
            else 0.0,
        }
        facts |= _sampling_gap(answers, rollout.old)
        if ended.any():
            of_ended = lengths[ended]
            facts |= {
                "completions/mean_terminated_length": float(of_ended.mean()),
                "completions/min_terminated_length": float(of_ended.min()),
                "completions/max_terminated_length": float(of_ended.max()),
            }
        if len(counted) > 1:
            facts["reward_std"] = float(counted.std(ddof=1))
        for name, column in zip(self.rewards.names, rollout.scores.T, strict=True):
            known = column[np.isfinite(column)]
            if len(known):
                facts[f"rewards/{name}/mean"] = float(known.mean())
            if len(known) > 1:
                facts[f"rewards/{name}/std"] = float(known.std(ddof=1))
        if rollout.ref is not None:
            kl = per_answer(rollout.old.double() - rollout.ref.double(), lengths)
            facts["objective/kl"] = float(kl.mean())
            if self.algorithm.kl.place == "reward":
                facts["objective/non_score_reward"] = (
                    -self.algorithm.kl.coef * facts["objective/kl"]
                )
                facts["objective/rlhf_reward"] = (
                    facts["objective/scores"] + facts["objective/non_score_reward"]
                )
        if rollout.returns is not None:
            facts["val/explained_variance"] = adv.explained_variance(
                rollout.values, rollout.returns
            )
        return facts

    def _facts_of_sources(self, groups, rollout: Rollout) -> dict[str, float]:
        """The mean reward and length of the answers to each source's prompts, where there are several.

        groups: the rollout's prompts, as numbers into the data set.
        """
        sources = mixing.sources_of(self.prompts.data)
        k = rollout.answers.samples_per_prompt
        score, lengths = rollout.score.reshape(-1, k), rollout.answers.lengths.reshape(-1, k)
        facts = {}
        places = sources.split(self.prompts.data.rows[list(groups)])
        for name, index in zip(sources.several, places, strict=True):
            counted = score[index][np.isfinite(score[index])]
            if len(counted):
                facts[f"train/{name}/reward"] = float(counted.mean())
            if len(index):
                facts[f"train/{name}/length"] = float(lengths[index].mean())
        return facts

    def _episodes(self, rollouts: int) -> int:
        """Answers in so many rollouts, of which an epoch's last may be smaller."""
        count = mixing.mix_of(self.prompts.data).count
        return num_drawn(rollouts, count, self.settings.batch_size) * self.algorithm.samples

    # Its updates.

    def minibatches(self, step, rollout: Rollout) -> Iterator[Minibatch]:
        """The minibatches of a rollout's updates, from where it was interrupted, until the policy has
        moved too far. Every rank goes through them.
        """
        answers = rollout.answers
        idle = self._idle(rollout.score, answers.samples_per_prompt)
        parts = self._parts(step.number, answers, idle)
        order = rollouts.order_of_updates(
            len(parts), self.algorithm.epochs, seed=self.settings.seed, number=step.number
        )
        for number, m in enumerate(order):
            if number < self.kept.updates:
                continue
            with self.report.timed("train"):
                yield Minibatch(self, step, number, parts[m], answers)
            if self.kept.updates <= number:  # this one was dropped
                break
        self.kept.updates = 0  # it is used up: no checkpoint needs it any more
        with self.report.timed("train"):  # here the host waits for the last update
            step.settle()
            for model in self._trained():
                model.advance()  # schedules count rollouts, whatever became of their updates

    def trains_policy(self, step) -> bool:
        """Whether the policy learns in this rollout: not while a value model warms up."""
        return self.models.critic is None or step.number >= self.settings.value_warmup

    def _trained(self) -> list:
        return [model for model in (self.models.policy, self.models.critic) if model is not None]

    def update(self, step, minibatch: Minibatch):
        """Let the optimisers step at the end of a minibatch; where the policy has moved too far, forget
        its gradients instead, and with them what is left of the rollout.
        """
        policy, critic = self.models.policy, self.models.critic
        step.settle()
        if dist.is_main():
            self.report.add(losses.one_update(self.run.device))
        self.report.ratios = minibatch.ratios
        if self.settings.target_kl and minibatch.trains_policy:
            moved = minibatch.moved()
            if moved > losses.KL_SLACK * self.settings.target_kl:
                batch = minibatch.first_batch()
                policy.drop(batch, temperature=self.settings.temperature)
                if critic is not None:
                    critic.drop(batch, at="before")
                self.report.stopped(step.number, minibatch.number, moved)
                return
        updates = [("policy", policy.step(advance=False))] if minibatch.trains_policy else []
        if critic is not None:
            updates.append(("value", critic.step(advance=False)))
        self.kept.updates = minibatch.number + 1
        self.report.updates = updates
        step.updated(minibatch.number + 1, updates)

    # The end.

    def export(self):
        """(how far OUTPUT/model, loaded again, is from the policy; the value model's folder or None).
        Every rank calls this.
        """
        gap = setup.export_model(self.settings, self.run, self.models.policy, self.report)
        critic = self.models.critic
        if critic is None:
            return gap, None
        folder = self.run.folder.path / "value_model"
        export.model_directory(
            critic.module,
            critic.tokenizer,
            folder,
            self.run.first_batches,
            export_dtype=self.settings.export_dtype,
            trust_remote_code=self.settings.trust_remote_code,
        )
        return gap, folder


def _sampling_gap(answers: Answers, old: torch.Tensor) -> dict[str, float]:
    """How far the log-probabilities that tokens were drawn at are from those that are trained from, by
    TRL's names: rounding, since both are of the same weights.
    """
    drawn = [value for c in answers.completions for value in c.logps]
    gap = old.double() - torch.tensor(drawn, dtype=torch.float64)  # (T,) nats
    ratio = gap.exp()
    difference, weight = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
    return {
        f"{difference}/mean": float(gap.abs().mean()),
        f"{difference}/max": float(gap.abs().max()),
        f"{weight}/min": float(ratio.min()),
        f"{weight}/mean": float(ratio.mean()),
        f"{weight}/max": float(ratio.max()),
    }
