"""Losses of reinforcement learning: a rollout's advantages in, sums over a batch's tokens out. What each
algorithm does is a row of ALGORITHMS (train/losses/algorithms.py).

The caller divides, by a number of the whole minibatch, and names it (`denominator`).

Legend: T tokens of a batch's answers, N answers, M the most tokens an answer may have.
"""

import math
from typing import NamedTuple

import torch

# the table belongs to these losses: who has them has it
from train.losses.algorithms import ALGORITHMS as ALGORITHMS
from train.losses.algorithms import KL as KL
from train.losses.algorithms import Algorithm
from train.losses.logprobs import per_token, sum_per_response

KL_SLACK = 1.5  # times --target_kl: where updates stop, as in OpenAI's Spinning Up
MOST_NATS = 20.0  # of a log-ratio, either way: e^20 is far outside every clip


class PolicySums(NamedTuple):
    """A batch's sums; without gradient but for the loss."""

    loss: torch.Tensor  # to be divided by the minibatch's denominator
    tokens: torch.Tensor
    clipped: torch.Tensor  # tokens at which the bound of a ratio or a weight holds
    moved: torch.Tensor  # k2 of the policy before the rollout's updates and now, nats
    ratio: torch.Tensor
    squared_ratio: torch.Tensor
    kl: torch.Tensor  # of the KL's estimator in the loss, nats
    ratios: torch.Tensor  # (T,), no sum: each token's


class ValueSums(NamedTuple):
    """A batch's sums of a value model; without gradient but for the loss."""

    loss: torch.Tensor  # to be divided by the minibatch's tokens
    clipped: torch.Tensor  # tokens at which the clipped value counts


def denominator(algorithm: Algorithm, num_samples: int, num_tokens: int, most_tokens: int) -> float:
    """What the losses of a minibatch are divided by, over all ranks; 1 for an empty one.

    most_tokens: M.
    """
    counts = {
        "tokens": num_tokens,
        "samples": num_samples,
        "constant": num_samples * most_tokens,
    }
    return max(counts[algorithm.denominator], 1)


def policy_loss(algorithm: Algorithm, logps: torch.Tensor, known) -> PolicySums:
    """The sums of a batch.

    logps: (T,) nats with gradient. known: has `old`, `advantages` and, where the KL is in the loss,
    `ref`, (T,) each, and `lengths`, (N,).
    """
    logps = logps.double()
    old, advantages = known.old.double(), known.advantages.double()
    lengths = known.lengths
    log_ratio = bounded(logps - old)  # (T,)
    ratio = log_ratio.exp()
    used = answer_ratio(algorithm, log_ratio, lengths)  # (T,)
    losses, is_clipped = clipped_loss(algorithm, used, advantages, logps)
    kl = torch.zeros_like(losses)
    if algorithm.kl.place == "loss" and algorithm.kl.coef:
        kl = kl_in_loss(algorithm.kl.estimator, logps, known.ref.double(), ratio)
        losses = losses + algorithm.kl.coef * kl
    if algorithm.denominator == "samples":
        losses = losses / per_token(lengths, lengths, losses)
    fixed = ratio.detach()
    return PolicySums(
        loss=losses.sum(),
        tokens=lengths.sum().double(),
        clipped=is_clipped.sum().double(),
        moved=(log_ratio.detach().square() / 2).sum(),
        ratio=fixed.sum(),
        squared_ratio=fixed.square().sum(),
        kl=kl.detach().sum(),
        ratios=fixed,
    )


def answer_ratio(algorithm: Algorithm, log_ratio, lengths) -> torch.Tensor:
    """(T,): the ratio that counts at each token, of the token or of its whole answer."""
    if algorithm.ratio not in ("mean", "sum"):
        return log_ratio.exp()
    of_answer = sum_per_response(log_ratio, lengths)  # (N,)
    if algorithm.ratio == "mean":
        of_answer = of_answer / lengths
    return per_token(bounded(of_answer).exp(), lengths, log_ratio)


def bounded(log_ratio):
    """Log-ratios within MOST_NATS, where exp is finite; beyond that a token or an answer has no
    gradient, as in the field's code.
    """
    return clip(log_ratio, -MOST_NATS, MOST_NATS)


def clip(x, low: float, high: float):
    """x within [low, high], with slope 1 at the bounds themselves: torch's clamp has that up to 2.13,
    and 0 from 2.14 on.
    """
    return torch.where(x < low, low, torch.where(x > high, high, x))


def clipped_loss(algorithm: Algorithm, ratio, advantages, logps):
    """((T,) losses, (T,) bool where the bound of a ratio, or of CISPO's weight, holds).

    Schulman et al. 2017, equation 7, with a bound below and one above; with dual_clip c at negative
    advantages no less than c A (Ye et al. 2020, arXiv 1912.09729, equation 5). CISPO: MiniMax 2025
    (arXiv 2506.13585), equations 4 and 5. SAPO: Gao et al. 2025 (arXiv 2511.20347).
    """
    low, high = algorithm.clip_low, algorithm.clip_high
    if algorithm.ratio == "weight":
        weight = ratio.detach().clamp(max=high)
        return -weight * advantages * logps, ratio.detach() > high
    if algorithm.ratio == "gate":
        # filled on the device: `new_tensor` would copy a number from the host, and wait
        tau = torch.where(advantages > 0, torch.full_like(ratio, high), torch.full_like(ratio, low))
        gate = 4 / tau * torch.sigmoid(tau * (ratio - 1))
        return -gate * advantages, torch.zeros_like(ratio, dtype=torch.bool)
    gains = ratio * advantages
    bounded = clip(ratio, 1 - low, 1 + high) * advantages
    is_clipped = bounded < gains
    gains = torch.minimum(gains, bounded)
    if algorithm.dual_clip:
        floor = algorithm.dual_clip * advantages
        is_clipped = is_clipped | ((advantages < 0) & (gains < floor))
        gains = torch.where(advantages < 0, torch.maximum(gains, floor), gains)
    return -gains, is_clipped


def kl_in_loss(estimator: str, logps, ref, ratio) -> torch.Tensor:
    """(T,) nats. k3 counts with the token's ratio, with which its gradient is the divergence's also
    after the first update; its exponential is bounded as ratios are.
    """
    d = logps - ref
    if estimator == "k2":
        return d.square() / 2
    return ratio * (torch.expm1(bounded(-d)) + d)


def value_loss(algorithm: Algorithm, values: torch.Tensor, known) -> ValueSums:
    """The sums of a batch: half the squared error, the larger of it and of the clipped value's.

    Values move no further than `value_clip` from the rollout's before that. values: (T,) with
    gradient. known: has `returns` and `values`, (T,) each. As in the code of Schulman et al. 2017.
    """
    values, returns = values.double(), known.returns.double()
    errors = (values - returns).square()
    is_clipped = torch.zeros_like(errors, dtype=torch.bool)
    if algorithm.value_clip:
        old = known.values.double()
        near = old + clip(values - old, -algorithm.value_clip, algorithm.value_clip)
        bounded = (near - returns).square()
        is_clipped = bounded > errors
        errors = torch.maximum(errors, bounded)
    return ValueSums(loss=errors.sum() / 2, clipped=is_clipped.sum().double())


OF_TOKENS = ("tokens", "clipped", "moved", "ratio", "squared_ratio", "kl")  # of PolicySums
SUMS = ("updates", "loss", *OF_TOKENS, "value_loss", "value_clipped")


def sums(found: PolicySums, of_values: ValueSums | None, denominator: float, num_tokens: int):
    """(columns,) fp64 of SUMS: what a batch adds to the measures of a rollout. Losses are divided
    here, as in the update: by the minibatch's denominator and tokens.
    """
    zero = found.loss.new_zeros(())
    value_sums = (zero, zero)
    if of_values is not None:
        value_sums = of_values.loss.detach() / num_tokens, of_values.clipped
    loss = found.loss.detach() / denominator
    columns = [getattr(found, name) for name in OF_TOKENS]
    return torch.stack([zero, loss, *columns, *value_sums]).double()


def one_update(device) -> torch.Tensor:
    """(columns,) fp64 that counts one update."""
    counted = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
    counted[:1].fill_(1)  # `counted[0] = 1` would copy it from the host, and wait
    return counted


def means(summed: torch.Tensor, has_critic: bool) -> dict[str, float]:
    """The measures of a rollout's updates, by TRL's names, of the sums over all batches and ranks."""
    of = dict(zip(SUMS, summed.tolist(), strict=True))
    tokens, updates = of["tokens"], max(of["updates"], 1)
    found = {"loss/policy_avg": of["loss"] / updates}
    if tokens:  # none where no group is trained on
        ratio = of["ratio"] / tokens
        found |= {
            "policy/approxkl_avg": of["moved"] / tokens,
            "policy/clipfrac_avg": of["clipped"] / tokens,
            "val/ratio": ratio,
            "val/ratio_var": max(of["squared_ratio"] / tokens - ratio * ratio, 0.0),
        }
    if has_critic and tokens:
        found["loss/value_avg"] = of["value_loss"] / updates
        found["val/clipfrac_avg"] = of["value_clipped"] / tokens
    return {name: value if math.isfinite(value) else math.nan for name, value in found.items()}
