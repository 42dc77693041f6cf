"""From the rewards of a rollout's answers to the advantages of their tokens, in fp64.

Answers lie one after the other without padding: (T,) values of all tokens and (B,) lengths. Nothing
here depends on how a rollout is split over batches or ranks: it is given whole.

Legend: B samples, k of each prompt, neighbours; T tokens of all samples; n tokens of one.
"""

import torch

EPSILON = 1e-8  # under the root of a variance


def token_rewards(
    score: torch.Tensor, lengths: torch.Tensor, kl: torch.Tensor | None = None, coef: float = 0.0
) -> torch.Tensor:
    """(T,): an answer's score at its last token, and -coef * kl at each.

    score: (B,). kl: (T,) nats, an estimate of each token's divergence from the reference. Ziegler et
    al. 2019 (arXiv 1909.08593), equation 2.
    """
    rewards = torch.zeros(int(lengths.sum()), dtype=torch.float64)
    if kl is not None:
        rewards -= coef * kl.double()
    rewards[lengths.cumsum(0) - 1] += score.double()
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, gamma: float, lam: float
) -> torch.Tensor:
    """(T,) generalised advantage estimates: sum_{l >= t} (gamma lam)^(l - t) delta_l, with delta_l =
    r_l + gamma V_{l + 1} - V_l and V_n = 0.

    Schulman et al. 2016 (arXiv 1506.02438), equation 16. rewards, values: (T,); a value is of the
    state before its token. An answer that was cut ends there like any other: its length is part of
    the task.
    """
    mask = padding_mask(lengths)  # (B, L)
    reward, value = pad(rewards.double(), mask), pad(values.double(), mask)  # (B, L)
    following = torch.cat([value[:, 1:], value.new_zeros(len(value), 1)], 1)
    delta = reward + gamma * following - value
    advantages = torch.zeros_like(delta)
    running = delta.new_zeros(len(delta))
    for t in reversed(range(delta.shape[1])):
        running = torch.where(mask[:, t], delta[:, t] + gamma * lam * running, 0.0)
        advantages[:, t] = running
    return advantages[mask]


def to_go(rewards: torch.Tensor, lengths: torch.Tensor, gamma: float) -> torch.Tensor:
    """(T,): the discounted sum of a token's reward and all that follow in its answer."""
    return gae(rewards, torch.zeros_like(rewards), lengths, gamma, 1.0)


def padding_mask(lengths: torch.Tensor) -> torch.Tensor:
    """(B, L) bool, L the longest: where there is a token."""
    return torch.arange(int(lengths.max())) < lengths[:, None]


def pad(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(T,) values at the tokens of a mask (B, L), 0 elsewhere."""
    padded = values.new_zeros(mask.shape)
    padded[mask] = values
    return padded


def over_groups(
    score: torch.Tensor, samples_per_prompt: int, baseline: str, scale: str
) -> torch.Tensor:
    """(B,): what each sample's score is above its group's baseline, over a scale.

    baseline: "mean" of the group, "leave_one_out", the mean of the others (Ahmadian et al. 2024, arXiv
    2402.14740, equation 7), or "none". scale: "group", the group's unbiased standard deviation (Shao
    et al. 2024, arXiv 2402.03300, section 4.1.2), "batch", that of all scores (Liu et al. 2025, arXiv
    2508.08221), or "none". A score that is NaN counts nowhere and has the advantage 0, and so have
    all of a group whose scores are equal: exactly, whatever rounding makes of their mean.
    """
    grouped = score.double().view(-1, samples_per_prompt)  # (P, k)
    counts = grouped.isfinite()  # (P, k)
    known = torch.where(counts, grouped, 0.0)
    number = counts.sum(1, keepdim=True).double()  # (P, 1)
    mean = known.sum(1, keepdim=True) / number.clamp(min=1)
    centred = torch.where(counts, grouped - mean, 0.0)
    centred = torch.where(is_flat(score, samples_per_prompt)[:, None], 0.0, centred)
    deviation = torch.ones_like(number)
    if scale == "group":
        deviation = (centred.square().sum(1, keepdim=True) / (number - 1).clamp(min=1)).sqrt()
    elif scale == "batch":
        all_scores = grouped[counts]
        spread = all_scores.std() if len(all_scores) > 1 else all_scores.new_zeros(())
        deviation = spread.expand_as(number)
    if baseline == "leave_one_out":
        centred = centred * number / (number - 1).clamp(min=1)
    elif baseline == "none":
        centred = known
    return torch.where(deviation > 0, centred / deviation.clamp(min=1e-300), 0.0).flatten()


def is_flat(score: torch.Tensor, samples_per_prompt: int) -> torch.Tensor:
    """(P,) bool: groups whose scores are all equal, or of which none counts: they teach nothing."""
    grouped = score.double().view(-1, samples_per_prompt)
    highest = grouped.nan_to_num(nan=-torch.inf).amax(1)
    lowest = grouped.nan_to_num(nan=torch.inf).amin(1)
    return highest <= lowest


def whiten(values: torch.Tensor) -> torch.Tensor:
    """(T,) to mean 0 and deviation 1 over all tokens: (x - mean) / sqrt(var + 1e-8), var unbiased, in
    two passes. One value alone, and values that are all equal, become 0.
    """
    values = values.double()
    if len(values) < 2 or values.max() == values.min():
        return torch.zeros_like(values)
    return (values - values.mean()) / (values.var() + EPSILON).sqrt()


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over tokens; NaN where all returns are equal."""
    values, returns = values.double(), returns.double()
    total = returns.var(correction=0)
    if total == 0:
        return float("nan")
    return float(1 - (returns - values).var(correction=0) / total)
