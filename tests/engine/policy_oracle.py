"""The gradient of an update of reinforcement learning, written down a second time: fp64, one sequence
at a time, all logits, plain autograd, advantages by their definitions.

Of the table of algorithms it takes the cells (tests/losses/test_policy_gradients.py holds those), and
no code.
"""

import math

import torch

from tests.engine import made_rollouts
from tests.engine.made_rollouts import MOST_TOKENS, PROMPTS, SAMPLES, SETTINGS, TEMPERATURE
from train.losses.algorithms import ALGORITHMS
from train.methods import rollout as rollouts


class Oracle:
    """Of a causal language model and a model with one score, both fp64."""

    def __init__(self, lm, critic):
        self.lm, self.critic = lm, critic
        self.answers = made_rollouts.made_answers()
        self.lengths = self.answers.lengths.tolist()
        sequences = [
            (torch.tensor([*self.answers.prompts[i // SAMPLES], *completion.ids]), i // SAMPLES)
            for i, completion in enumerate(self.answers.completions)
        ]
        self.logps, self.values = [], []  # of each answer, (n,), with gradient
        for ids, prompt in sequences:
            first = len(self.answers.prompts[prompt])
            logits = lm(input_ids=ids[None], use_cache=False).logits[0] / TEMPERATURE
            logps = torch.log_softmax(logits, -1)[first - 1 : -1]
            self.logps.append(logps.gather(1, ids[first:, None]).squeeze(1))
            hidden = critic.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            self.values.append((hidden @ critic.score.weight[0])[first - 1 : -1])
        now = [torch.cat(x).detach() for x in (self.logps, self.values)]
        # what the rollout knows, by algorithm
        self.made = {name: made_rollouts.made_tokens(name, *now) for name in ALGORITHMS}

    def gradients(self, name, number):
        """{"policy": {parameter: gradient}}, and of a critic where there is one, of the update
        `number`.
        """
        row = made_rollouts.algorithm_row(name)
        old, ref, values = (
            self.made[name][part].double().split(self.lengths) for part in ("old", "ref", "values")
        )
        advantages, returns = advantages_of(row, old, ref, values)
        samples = [i * SAMPLES + k for i in groups_of(number) for k in range(SAMPLES)]
        tokens = sum(self.lengths[s] for s in samples)
        total = 0.0
        for s in samples:
            losses = losses_of(row, self.logps[s], old[s], ref[s], advantages[s])
            if row.denominator == "tokens":
                total = total + losses.sum() / tokens
            elif row.denominator == "samples":
                total = total + losses.mean() / len(samples)
            else:
                total = total + losses.sum() / (len(samples) * MOST_TOKENS)
        found = {"policy": gradient_of(total, self.lm)}
        if row.needs_critic:
            errors = [value_losses_of(row, self.values[s], values[s], returns[s]) for s in samples]
            found["critic"] = gradient_of(sum(e.sum() for e in errors) / tokens, self.critic)
        return found


def gradient_of(loss, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    return dict(zip(names, gradients, strict=True))


def groups_of(number):
    """The groups of an update."""
    parts = rollouts.minibatches(
        [1] * PROMPTS, made_rollouts.MINIBATCHES, 10**6, seed=made_rollouts.SEED, number=0
    )
    order = rollouts.order_of_updates(len(parts), epochs=1, seed=made_rollouts.SEED, number=0)
    return parts[order[number]].groups


def advantages_of(row, old, ref, values):
    """(advantages, returns) of each answer, (n,) in fp32 as a rollout keeps them."""
    score = made_rollouts.made_scores().tolist()
    in_reward = row.kl.coef if row.kl.place == "reward" else 0.0
    penalties = [in_reward * (o - r) for o, r in zip(old, ref, strict=True)]  # of tokens
    advantages, returns = [], []
    for i, penalty in enumerate(penalties):
        n = len(penalty)
        if row.advantage == "group":
            found = [over_its_group(row, score, penalties, i)] * n
        else:
            reward = (-penalty).tolist()
            reward[-1] += 0.0 if math.isnan(score[i]) else score[i]
            value = [*values[i].tolist(), 0.0] if row.advantage == "gae" else [0.0] * (n + 1)
            found = estimated(reward, value, SETTINGS["lam"] if row.advantage == "gae" else 1.0)
            to_learn = estimated(reward, value, SETTINGS["value_lam"])
            returns.append(torch.tensor([a + v for a, v in zip(to_learn, value, strict=False)]))
        advantages.append(torch.tensor(found, dtype=torch.float64))
    counts = [not math.isnan(x) for x in score]
    if row.whiten:
        everything = torch.cat([a for a, c in zip(advantages, counts, strict=True) if c])
        mean, deviation = everything.mean(), (everything.var() + 1e-8).sqrt()
        advantages = [(a - mean) / deviation for a in advantages]
    for i, known in enumerate(counts):
        if not known:
            advantages[i] = torch.zeros_like(advantages[i])
            returns[i : i + 1] = [values[i]] * bool(returns)
    return [a.float().double() for a in advantages], [r.float().double() for r in returns]


def estimated(reward, value, lam):
    """Generalised advantage estimates: the double sum."""
    n, gamma = len(reward), SETTINGS["gamma"]
    delta = [reward[t] + gamma * value[t + 1] - value[t] for t in range(n)]
    return [
        sum((gamma * lam) ** (later - t) * delta[later] for later in range(t, n)) for t in range(n)
    ]


def over_its_group(row, score, penalties, i):
    """What answer i's score is above its group's baseline, over their deviation."""
    first = i - i % SAMPLES
    group = {
        k: score[k] - float(penalties[k].sum())
        for k in range(first, first + SAMPLES)
        if not math.isnan(score[k])
    }
    if i not in group or max(group.values()) == min(group.values()):
        return 0.0
    others = [x for k, x in group.items() if k != i or row.baseline == "mean"]
    deviation = torch.tensor(list(group.values()), dtype=torch.float64).std().item()
    above = group[i] - sum(others) / len(others)
    return above / deviation if row.scale == "group" else above


def losses_of(row, logps, old, ref, advantages):
    """(n,) of one answer. No ratio may lie where fp32 could take it for one beyond a bound."""
    log_ratio = logps - old
    of_answer = {"mean": log_ratio.mean(), "sum": log_ratio.sum()}.get(row.ratio)
    ratio = (log_ratio if of_answer is None else of_answer.expand_as(log_ratio)).exp()
    a = advantages
    if row.ratio == "weight":
        away = (ratio - row.clip_high).abs()
        losses = -torch.where(ratio > row.clip_high, row.clip_high, ratio).detach() * a * logps
    elif row.ratio == "gate":
        away = torch.ones(1)
        tau = [row.clip_high if x > 0 else row.clip_low for x in a.tolist()]
        gates = [4 / t / (1 + torch.exp(-t * (r - 1))) for t, r in zip(tau, ratio, strict=True)]
        losses = -torch.stack(gates) * a
    else:
        bound = torch.where(a > 0, 1 + row.clip_high, 1 - row.clip_low)
        away = (ratio - bound).abs()
        is_beyond = torch.where(a > 0, ratio > bound, ratio < bound)
        losses = -torch.where(is_beyond, bound, ratio) * a
    assert away.min() > 2e-6, "another seed"
    if row.kl.place == "loss":
        d = logps - ref
        k3 = log_ratio.exp() * ((-d).exp() - 1 + d)
        losses = losses + row.kl.coef * (d**2 / 2 if row.kl.estimator == "k2" else k3)
    return losses


def value_losses_of(row, values, old, returns):
    """(n,) of one answer: half the larger of two squared errors."""
    near = torch.minimum(torch.maximum(values, old - row.value_clip), old + row.value_clip)
    assert ((values - old).abs() - row.value_clip).abs().min() > 2e-6, "another seed"
    plain, held = (values - returns) ** 2, (near - returns) ** 2
    return torch.where(held > plain, held, plain) / 2
