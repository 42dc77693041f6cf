"""The preference losses: tensors in, one number an example out, one function a loss.

The caller reduces, and names the denominator. Where TRL 1.16 has a loss of the same name, the value
on the same log-probabilities is the same unless the docstring says why not
(tests/benchmarks/peers_losses.py shows it). composition.py's LOSSES says which of them a run may
choose, and what a run must know of each.

Legend: B pairs, or B responses that are labelled one by one; nats summed over a response's tokens.
y_w chosen, y_l rejected, |y| tokens; log-ratio: log pi - log pi_ref; reward: beta times it; h:
chosen's reward minus rejected's.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Nats a token: the mean of log-probs that come in fp32 is 0, or further from it.
CERTAIN = -(2.0**-52)


class Pairs(NamedTuple):
    """Log-probabilities of both responses of B pairs, under the policy and the reference."""

    chosen: torch.Tensor  # (B,) nats, log pi(y_w | x), with gradient
    rejected: torch.Tensor  # (B,) nats, log pi(y_l | x), with gradient
    ref_chosen: torch.Tensor  # (B,) nats, log pi_ref(y_w | x); 0 without a reference
    ref_rejected: torch.Tensor  # (B,) nats, log pi_ref(y_l | x); 0 without a reference
    chosen_len: torch.Tensor  # (B,) tokens
    rejected_len: torch.Tensor  # (B,) tokens

    @classmethod
    def of(cls, scores, ref_scores, lengths) -> "Pairs":
        """Pairs from the scores of a batch of groups of two, (2B,) each: chosen and rejected in
        turn.
        """
        return cls(
            scores[0::2],
            scores[1::2],
            ref_scores[0::2],
            ref_scores[1::2],
            lengths[0::2],
            lengths[1::2],
        )

    def rewards(self, beta: float):
        """The implicit rewards beta * log(pi / pi_ref) of chosen and rejected, (B,) each.

        Rafailov et al. 2023 (arXiv 2305.18290), equation 5 without beta log Z(x), which depends on
        the prompt alone and cancels in every difference of a pair.
        """
        chosen = beta * (self.chosen - self.ref_chosen)
        rejected = beta * (self.rejected - self.ref_rejected)
        return chosen, rejected

    def margin(self, beta: float) -> torch.Tensor:
        """h, (B,): the difference of the two rewards."""
        chosen, rejected = self.rewards(beta)
        return chosen - rejected

    def per_token(self, chosen: torch.Tensor, rejected: torch.Tensor):
        """Means a token of sums over the tokens of chosen and rejected, (B,) each."""
        # a response may be empty: its sum is 0, and so is its mean
        return chosen / self.chosen_len.clamp(min=1), rejected / self.rejected_len.clamp(min=1)

    def margin_per_token(self) -> torch.Tensor:
        """(B,) nats a token: the difference of the two log-ratios, each a mean over its response's
        tokens.
        """
        chosen, rejected = self.per_token(*self.rewards(1.0))
        return chosen - rejected

    def nll(self) -> torch.Tensor:
        """(B,) nats a token: the negative log-likelihood of chosen."""
        return -self.per_token(self.chosen, self.rejected)[0]

    def split(self) -> "Labelled":
        """The 2B responses one by one, chosen and rejected in turn, as losses of labelled responses
        take them: chosen is the desired one.
        """

        def in_turn(chosen, rejected):
            return torch.stack([chosen, rejected], 1).flatten()  # (B,), (B,) -> (2B,)

        is_chosen = torch.ones_like(self.chosen_len, dtype=torch.bool)
        return Labelled(
            logps=in_turn(self.chosen, self.rejected),
            ref_logps=in_turn(self.ref_chosen, self.ref_rejected),
            lengths=in_turn(self.chosen_len, self.rejected_len),
            desired=in_turn(is_chosen, ~is_chosen),
        )


class Labelled(NamedTuple):
    """Log-probabilities of B responses, each of which is desirable or not on its own (k = 1)."""

    logps: torch.Tensor  # (B,) nats, log pi(y | x), with gradient
    ref_logps: torch.Tensor  # (B,) nats, log pi_ref(y | x)
    lengths: torch.Tensor  # (B,) tokens
    desired: torch.Tensor  # (B,) bool

    def rewards(self, beta: float) -> torch.Tensor:
        """The implicit rewards beta * log(pi / pi_ref), (B,)."""
        return beta * (self.logps - self.ref_logps)


# Losses of the margin h, or of one reward each, against a reference.


def sigmoid(pairs: Pairs, beta: float, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO, (B,): -log sigmoid(h), h = beta times the difference of the two log-ratios.

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7. With `label_smoothing` eps in [0, 0.5) it
    is cDPO (Mitchell 2023): -(1 - eps) log sigmoid(h) - eps log sigmoid(-h), for labels of which a
    share eps is flipped. TRL's sigmoid does not read label_smoothing: the same at 0.
    """
    return _smoothed(pairs.margin(beta), label_smoothing)


def robust(pairs: Pairs, beta: float, *, label_smoothing: float = 0.1) -> torch.Tensor:
    """Robust DPO, (B,): (-(1 - eps) log sigmoid(h) + eps log sigmoid(-h)) / (1 - 2 eps), for labels
    of which a share eps is flipped.

    Chowdhury et al. 2024 (arXiv 2403.00409), section 3.1: unbiased under flips; in cDPO the second
    term has the other sign. Not bounded below: far out it falls by eps / (1 - 2 eps) for each unit
    of h. TRL's default eps is 0.
    """
    _check_label_smoothing(label_smoothing)
    eps = label_smoothing
    h = pairs.margin(beta)
    return (-(1 - eps) * F.logsigmoid(h) + eps * F.logsigmoid(-h)) / (1 - 2 * eps)


def hinge(pairs: Pairs, beta: float) -> torch.Tensor:
    """SLiC, (B,): max(0, 1 - h).

    Zhao et al. 2023 (arXiv 2305.10425), equation 1. Its log-probabilities become log-ratios to the
    reference, as in RSO (Liu et al. 2023, arXiv 2309.06657) and in TRL, and the cross-entropy
    regulariser is left out (add `sft`).
    """
    return torch.relu(1 - pairs.margin(beta))


def ipo(pairs: Pairs, beta: float) -> torch.Tensor:
    """IPO, (B,): (d - 1 / (2 beta))^2, d the difference of the log-ratios a token; beta is the
    paper's tau.

    Azar et al. 2023 (arXiv 2310.12036), equation 17. The paper sums over tokens; its authors'
    results, and TRL, average, so that the target does not depend on the length.
    """
    return (pairs.margin_per_token() - 1 / (2 * beta)) ** 2


def exo_pair(pairs: Pairs, beta: float, *, label_smoothing: float = 1e-3) -> torch.Tensor:
    """EXO of pairs, (B,): KL(p || q) with p = (sigmoid(h), sigmoid(-h)), q = (1 - eps, eps).

    Ji et al. 2024 (arXiv 2402.00856), equation 16. Infinite at eps = 0, which is refused; eps lies
    in (0, 0.5).
    """
    if not label_smoothing > 0:
        raise ValueError(f"label_smoothing of exo_pair lies in (0, 0.5), not at {label_smoothing}")
    _check_label_smoothing(label_smoothing)
    h = pairs.margin(beta)
    chosen_first = torch.sigmoid(h) * (F.logsigmoid(h) - math.log1p(-label_smoothing))
    rejected_first = torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(label_smoothing))
    return chosen_first + rejected_first


def nca_pair(pairs: Pairs, beta: float) -> torch.Tensor:
    """NCA of pairs, (B,): -log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2, r the
    rewards.

    Chen et al. 2024 (arXiv 2402.05369), section 4.1: raises chosen's likelihood itself, not the
    margin only.
    """
    chosen, rejected = pairs.rewards(beta)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def sppo_hard(pairs: Pairs, beta: float) -> torch.Tensor:
    """SPPO with certain labels, (B,): (u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2, u the
    log-ratios.

    Wu et al. 2024 (arXiv 2405.00675), equation 4.7 with win probabilities of 1 and 0 for chosen and
    rejected; the paper estimates them with a model of preferences. 1 / beta is the paper's eta.
    """
    chosen, rejected = pairs.rewards(1.0)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero(pairs: Pairs, beta: float) -> torch.Tensor:
    """APO zero, (B,): 1 - sigmoid(r_w) + sigmoid(r_l): chosen up, rejected down.

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 7. 1 - sigmoid(x) is computed as
    sigmoid(-x).
    """
    chosen, rejected = pairs.rewards(beta)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pairs: Pairs, beta: float) -> torch.Tensor:
    """APO down, (B,): sigmoid(r_w) + 1 - sigmoid(h): both down, rejected more.

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 8.
    """
    chosen, _ = pairs.rewards(beta)
    return torch.sigmoid(chosen) + torch.sigmoid(-pairs.margin(beta))


def discopop(pairs: Pairs, beta: float, *, tau: float = 0.05) -> torch.Tensor:
    """DiscoPOP, (B,): (1 - m) * -log sigmoid(h) + m * exp(-h), m = sigmoid(h / tau).

    Lu et al. 2024 (arXiv 2406.08414), equation 5; TRL calls tau discopop_tau. m exp(-h) is one
    exponential here: at margins below about -80 TRL's factors are infinity and 0, and their product
    NaN.
    """
    if not tau > 0:
        raise ValueError(f"tau of discopop is above 0, not {tau}")
    h = pairs.margin(beta)
    return torch.sigmoid(-h / tau) * -F.logsigmoid(h) + torch.exp(F.logsigmoid(h / tau) - h)


def sigmoid_norm(pairs: Pairs, beta: float) -> torch.Tensor:
    """Length-normalised DPO, (B,): -log sigmoid(beta d), d the difference of log-ratios a token.

    Lambert et al. 2024 (arXiv 2411.15124, Tulu 3), equation 6. beta is larger than DPO's by about a
    response's length.
    """
    return -F.logsigmoid(beta * pairs.margin_per_token())


def dpop(pairs: Pairs, beta: float, *, penalty: float = 50.0) -> torch.Tensor:
    """DPO-positive, (B,): -log sigmoid(h - beta lambda max(0, log pi_ref(y_w) - log pi(y_w))),
    lambda = `penalty`.

    Pal et al. 2024 (arXiv 2402.13228, Smaug), equation 3: chosen may not become less likely than it
    was.
    """
    h = pairs.margin(beta)
    fall = torch.relu(pairs.ref_chosen - pairs.chosen)  # (B,) nats that chosen has lost
    return -F.logsigmoid(h - beta * penalty * fall)


def rpo(pairs: Pairs, beta: float, *, nll_weight: float = 1.0) -> torch.Tensor:
    """RPO, (B,): DPO plus `nll_weight` times chosen's negative log-likelihood a token.

    Pang et al. 2024 (arXiv 2404.19733), equation 1, whose alpha multiplies the DPO term instead and
    whose likelihood is divided by the tokens of prompt and response.
    """
    return -F.logsigmoid(pairs.margin(beta)) + nll_weight * pairs.nll()


def rdpo(pairs: Pairs, beta: float, *, alpha: float = 0.01) -> torch.Tensor:
    """R-DPO, (B,): -log sigmoid(h + alpha (|y_w| - |y_l|)): length pays part of the margin, so it
    is not learned.

    Park et al. 2024 (arXiv 2403.19159), the equation of its length-regularised loss: rewards lose
    `alpha` a token.
    """
    h = pairs.margin(beta)
    excess = (pairs.chosen_len - pairs.rejected_len).to(h.dtype)  # (B,) tokens
    return -F.logsigmoid(h + alpha * excess)


# Losses without a reference.


def sft(pairs: Pairs, beta: float) -> torch.Tensor:
    """Chosen's negative log-likelihood a token, (B,): supervised fine-tuning; beta is not used.

    MPO's generation loss (Wang et al. 2024, arXiv 2411.10442, the equation of L_g). TRL divides the
    sum over a micro-batch by its tokens, so that long answers weigh more and packing matters: the
    same where lengths are equal.
    """
    return pairs.nll()


def simpo(pairs: Pairs, beta: float, *, gamma: float = 0.5) -> torch.Tensor:
    """SimPO, (B,): -log sigmoid(beta (a_w - a_l) - gamma), a the log-probabilities a token.

    Meng et al. 2024 (arXiv 2405.14734), equation 6; beta is 2 to 10 there. TRL calls gamma
    simpo_gamma.
    """
    a_w, a_l = pairs.per_token(pairs.chosen, pairs.rejected)
    return -F.logsigmoid(beta * (a_w - a_l) - gamma)


def orpo(pairs: Pairs, beta: float) -> torch.Tensor:
    """ORPO, (B,): -a_w - beta log sigmoid(log odds(y_w) - log odds(y_l)), odds p / (1 - p), p =
    exp(a).

    Hong et al. 2024 (arXiv 2403.07691), equations 6 and 7, a the log-probabilities a token; beta is
    its lambda. TRL's likelihood term is over prompts too and divided by a micro-batch's tokens; the
    odds term is the same.
    """
    a_w, a_l = pairs.per_token(pairs.chosen, pairs.rejected)
    return -a_w + beta * _log1p_odds_ratio(a_l, a_w)


def _log1p_odds_ratio(a, b):
    """log(1 + odds(e^a) / odds(e^b)) of mean log-probabilities (B,), as they are: 0 down to -inf.

    An answer of `a` = 0 is certain: infinite odds, with an infinite slope. Its odds are taken at
    CERTAIN instead, without a slope: what comes before, log pi of tokens of probability 1, has none
    either. Where both are certain, they are level.
    """
    b = torch.where(a > CERTAIN, b.clamp(max=CERTAIN), b)
    # not by `clamp`, whose slope at its bound is 1 up to torch 2.13 and 0 from 2.14 on
    b = torch.where(b > 0, 0.0, b)
    a = a.clamp(max=CERTAIN)
    # where b is likely, 1 / odds(e^b) = e^-b - 1, which is 0 where b is certain, with a finite slope
    likely = b > -1
    inverse_odds = torch.expm1(-torch.where(likely, b, -1.0))
    near = torch.log1p(torch.exp(a) / -torch.expm1(a) * inverse_odds)
    # elsewhere by the logarithms, which hold where the odds themselves are 0 or infinite
    far = F.softplus(_log_odds(a) - _log_odds(torch.where(likely, -1.0, b)))
    return torch.where(likely, near, far)


def _log_odds(a):
    """log(p / (1 - p)) at p = e^a < 1, any shape."""
    return a - torch.log(-torch.expm1(a))


def cpo(pairs: Pairs, beta: float, *, nll_weight: float = 1.0) -> torch.Tensor:
    """CPO, (B,): -log sigmoid(beta (log pi(y_w) - log pi(y_l))) plus `nll_weight` times chosen's
    negative log-likelihood (NLL) a token.

    Xu et al. 2024 (arXiv 2401.08417), equation 3 and the sum below it, where the NLL is over the
    whole response. TRL (cpo_alpha) divides a micro-batch's NLL by its tokens; the preference term
    is the same.
    """
    return -F.logsigmoid(beta * (pairs.chosen - pairs.rejected)) + nll_weight * pairs.nll()


# Losses that couple the examples of a step: over part of a step they are another loss. `baseline`
# is the statistic of the step that LOSSES names for them.


def bco(examples: Labelled, beta: float, baseline: float = 0.0) -> torch.Tensor:
    """BCO of labelled responses, (B,): -log sigmoid(r - delta) for a desired one, -log
    sigmoid(delta - r) for another.

    Jung et al. 2024 (arXiv 2404.04656), section 4: a classifier whose logit is the reward, shifted
    by delta = `baseline`, the running mean of rewards. Without the paper's weights for differing
    prompt distributions.
    """
    return -F.logsigmoid(_signed(examples, examples.rewards(beta) - baseline))


def bco_pair(pairs: Pairs, beta: float, baseline: float = 0.0) -> torch.Tensor:
    """BCO of pairs, (B,): -log sigmoid(r_w - delta) - log sigmoid(delta - r_l), delta = `baseline`.

    Jung et al. 2024 (arXiv 2404.04656), section 4's equation, the sum of `bco` over both responses.
    In training delta is the running mean of all rewards so far, this step's included; TRL 1.16's
    bco_pair leaves it at 0.
    """
    return bco(pairs.split(), beta, baseline).view(-1, 2).sum(1)


def kto(
    examples: Labelled,
    beta: float,
    baseline: float = 0.0,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """KTO, (B,): w_d (1 - sigmoid(beta (u - z))) for a desired response, w_u (1 - sigmoid(beta (z -
    u))) for another.

    Ethayarajh et al. 2024 (arXiv 2402.01306), equation 7: u the log-ratio, z = `baseline` the
    estimate of KL(pi || pi_ref) in nats, without gradient. In training z is the mean log-ratio of
    the step's mismatched responses, at least 0, where TRL takes each micro-batch's. A pair counts
    as two responses, and its number is the mean of theirs.
    """
    losses = torch.sigmoid(-_signed(examples, examples.rewards(beta) - beta * baseline))
    return torch.where(examples.desired, desirable_weight * losses, undesirable_weight * losses)


def aot(pairs: Pairs, beta: float, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """AOT of pairs, (B,): the step's margins log pi(y_w) - log pi(y_l), sorted, against the
    reference's, sorted.

    Melnyk et al. 2024 (arXiv 2406.05882), section 3's equation for paired data with the logistic
    cost: the k-th smallest minus the k-th smallest, times beta, as in DPO. A pair's number is that
    of its rank under the policy.
    """
    margin = pairs.chosen - pairs.rejected  # (B,) nats
    ref_margin = (pairs.ref_chosen - pairs.ref_rejected).sort(stable=True).values  # (B,) ascending
    # the place of each pair in ascending order; which place it is has no gradient
    rank = margin.detach().argsort(stable=True).argsort()  # (B,)
    return _smoothed(beta * (margin - ref_margin[rank]), label_smoothing)


def aot_unpaired(examples: Labelled, beta: float, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """AOT of labelled responses, (B,): quantiles of the step's desired rewards against those of the
    others.

    Melnyk et al. 2024 (arXiv 2406.05882), section 3's equation for unpaired data with the logistic
    cost: the integral over t in (0, 1) of -log sigmoid(Q_desired(t) - Q_other(t)), exact for any
    two counts; with equal counts it is TRL's mean over ranks. A response's number makes the mean
    over all B the integral. 0 where all are desired, or none.
    """
    _check_label_smoothing(label_smoothing)
    rewards = examples.rewards(beta)  # (B,)
    order = rewards.detach().argsort(stable=True)
    desired = order[examples.desired[order]]  # (n,) indices, ascending by reward
    other = order[~examples.desired[order]]  # (m,) the same
    n, m = len(desired), len(other)
    if not n or not m:
        return 0 * rewards  # and not plain zeros, which would have no gradient
    # Q_desired jumps at multiples of 1 / n, Q_other at multiples of 1 / m; between two jumps both
    # are constant. In units of 1 / (n m) all jumps are whole numbers, so that nothing is rounded.
    jumps_of_desired = torch.arange(1, n + 1, device=rewards.device) * m
    jumps_of_other = torch.arange(1, m + 1, device=rewards.device) * n
    ends = torch.cat([jumps_of_desired, jumps_of_other]).sort().values  # (n + m,) of the stretches
    width = torch.diff(ends, prepend=ends.new_zeros(1)).to(rewards.dtype) / (n * m)  # shares of t
    # (n + m,) the response whose reward the quantile is on each stretch
    at_desired = desired[(ends - 1) // m]
    at_other = other[(ends - 1) // n]
    cost = _smoothed(rewards[at_desired] - rewards[at_other], label_smoothing)
    # half of a stretch to either response, times B because the caller takes the mean over B
    half = width * cost * (n + m) / 2
    return torch.zeros_like(rewards).index_add(0, at_desired, half).index_add(0, at_other, half)


def _smoothed(h, eps):
    """-(1 - eps) log sigmoid(h) - eps log sigmoid(-h), any shape."""
    _check_label_smoothing(eps)
    return -(1 - eps) * F.logsigmoid(h) - eps * F.logsigmoid(-h)


def _check_label_smoothing(label_smoothing):
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing lies in [0, 0.5), not at {label_smoothing}")


def _signed(examples, values):
    """(B,) `values`, with the other sign where the response is not desired."""
    return torch.where(examples.desired, values, -values)
