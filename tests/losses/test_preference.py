"""Each loss against a derivation by hand: another expression of its formula and of the formula's
derivative, its limits, and fp32 against fp64 over margins from 0 to 10,000.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from train.losses import preference
from train.losses.composition import LOSSES, choose
from train.losses.preference import Labelled, Pairs

BETA = 0.3


def made(n=64, seed=0):
    """n random pairs in fp64 with lengths of 1 to 60 tokens; log-ratios of some tens of nats either
    way.
    """
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (2, n), generator=random)
    size = {"size": (2, n), "dtype": torch.float64, "generator": random}
    policy = -lengths * (1 + torch.randn(**size).abs())
    ref = policy - lengths.sqrt() * (torch.randn(**size) + 0.3)
    return Pairs(*policy, *ref.clamp(max=-0.1), *lengths)


# Numpy, not torch.


def S(x):
    """The logistic function."""
    return 1 / (1 + np.exp(-x))


def L(x):
    """-log S(x)."""
    return np.logaddexp(0, -x)


class By:
    """The quantities of the formulas: u, v log-ratios of chosen and rejected, h their difference
    times beta.
    """

    def __init__(self, pairs, beta):
        self.c, self.r, self.rc, self.rr, self.m, self.n = (x.double().numpy() for x in pairs)
        self.b, self.u, self.v = beta, self.c - self.rc, self.r - self.rr
        self.h = beta * (self.u - self.v)
        self.d = self.u / self.m - self.v / self.n  # a token


def of_h(p, value, slope):
    """A function of h alone: its value, and its derivatives by chosen and rejected."""
    return value, p.b * slope, -p.b * slope


def sigmoid(p, e=0.0):
    # -(1 - e) log S(h) - e log S(-h) = L(h) + e h, since L(-h) = L(h) + h
    return of_h(p, L(p.h) + e * p.h, S(p.h) - 1 + e)


def robust(p, e):
    # ((1 - e) L(h) - e (L(h) + h)) / (1 - 2 e)
    return of_h(p, L(p.h) - e * p.h / (1 - 2 * e), S(p.h) - 1 - e / (1 - 2 * e))


def hinge(p):
    return of_h(p, np.where(p.h < 1, 1 - p.h, 0), np.where(p.h < 1, -1.0, 0))


def ipo(p):
    # the square of (d - 1/2b), multiplied out
    slope = 2 * p.d - 1 / p.b
    return p.d**2 - p.d / p.b + 1 / (4 * p.b**2), slope / p.m, -slope / p.n


def exo_pair(p, e):
    # -H(q) + cross-entropy, q = S(h); derivative q (1 - q) (h - logit(1 - e)), since log q - log(1
    # - q) = h
    q = S(p.h)
    log_q, log_rest = (np.log(np.maximum(x, 1e-300)) for x in (q, S(-p.h)))
    value = q * log_q + (1 - q) * log_rest - q * np.log(1 - e) - S(-p.h) * np.log(e)
    return of_h(p, value, q * S(-p.h) * (p.h - np.log((1 - e) / e)))


def nca_pair(p):
    # 1.5 L(x) + x/2 + L(y)/2 + y/2 at x, y the rewards
    x, y = p.b * p.u, p.b * p.v
    return 1.5 * L(x) + x / 2 + L(y) / 2 + y / 2, p.b * (1.5 * S(x) - 1), p.b * 0.5 * S(y)


def bco_pair(p, delta):
    x, y = p.b * p.u - delta, p.b * p.v - delta
    return L(x) + L(y) + y, p.b * (S(x) - 1), p.b * S(y)


def sppo_hard(p):
    return (
        p.u**2 + p.v**2 - (p.u - p.v) / p.b + 1 / (2 * p.b**2),
        2 * p.u - 1 / p.b,
        2 * p.v + 1 / p.b,
    )


def aot(p, e):
    # the k-th smallest of the policy's margins against the k-th smallest of the reference's, one by
    # one; there are no ties among random numbers
    margins = p.c - p.r
    ref = sorted(p.rc - p.rr)
    h = np.array([p.b * (margin - ref[sum(margins < margin)]) for margin in margins])
    return of_h(p, L(h) + e * h, S(h) - 1 + e)


def aot_unpaired(p, e):
    # ranks of either side; a pair has the mean of its responses' numbers
    up, down = p.u.argsort().argsort(), p.v.argsort().argsort()
    x, y = p.b * (p.u - np.sort(p.v)[up]), p.b * (np.sort(p.u)[down] - p.v)
    return (L(x) + e * x + L(y) + e * y) / 2, p.b * (S(x) - 1 + e), -p.b * (S(y) - 1 + e)


def apo_zero(p):
    x, y = p.b * p.u, p.b * p.v
    return 1 - S(x) + S(y), -p.b * S(x) * (1 - S(x)), p.b * S(y) * (1 - S(y))


def apo_down(p):
    x = p.b * p.u
    slope_x, slope_h = (p.b * S(z) * (1 - S(z)) for z in (x, p.h))
    return S(x) + 1 - S(p.h), slope_x - slope_h, slope_h


def discopop(p, tau):
    m = S(p.h / tau)
    tail = np.exp(np.minimum(-p.h, -p.h - L(p.h / tau)))  # m exp(-h)
    slope = (1 - m) * (tail - m * L(p.h)) / tau + (1 - m) * (S(p.h) - 1) - tail
    return of_h(p, (1 - m) * L(p.h) + tail, slope)


def sft(p):
    return -p.c / p.m, -1 / p.m, 0 * p.m


def sigmoid_norm(p):
    slope = p.b * (S(p.b * p.d) - 1)
    return L(p.b * p.d), slope / p.m, -slope / p.n


def simpo(p, gamma):
    z = p.b * (p.c / p.m - p.r / p.n) - gamma
    return L(z), p.b * (S(z) - 1) / p.m, -p.b * (S(z) - 1) / p.n


def orpo(p):
    # odds e^a / (1 - e^a); the derivative of log odds by a is 1 / (1 - e^a); q = odds_l / (odds_w +
    # odds_l)
    a, z = p.c / p.m, p.r / p.n
    odds = [np.exp(x) / (1 - np.exp(x)) for x in (a, z)]
    q = odds[1] / (odds[0] + odds[1])
    return (
        -a - p.b * np.log(odds[0] / (odds[0] + odds[1])),
        (-1 - p.b * q / (1 - np.exp(a))) / p.m,
        p.b * q / (1 - np.exp(z)) / p.n,
    )


def cpo(p, w):
    z = p.b * (p.c - p.r)
    return L(z) - w * p.c / p.m, p.b * (S(z) - 1) - w / p.m, -p.b * (S(z) - 1)


def kto(p, z, w, v):
    # 1 - S is a hyperbolic tangent: S(x) = (1 + tanh(x / 2)) / 2; a pair has the mean of its
    # responses' numbers
    x, y = p.b * (p.u - z) / 2, p.b * (p.v - z) / 2
    return (
        (w * (1 - np.tanh(x)) / 2 + v * (1 + np.tanh(y)) / 2) / 2,
        -w * p.b * (1 - np.tanh(x) ** 2) / 8,
        v * p.b * (1 - np.tanh(y) ** 2) / 8,
    )


def dpop(p, lam):
    fell = p.c < p.rc
    z = p.h + p.b * lam * p.u * fell
    return L(z), p.b * (S(z) - 1) * (1 + lam * fell), -p.b * (S(z) - 1)


def rpo(p, w):
    value, up, down = sigmoid(p)
    return value - w * p.c / p.m, up - w / p.m, down


def rdpo(p, alpha):
    z = p.h + alpha * (p.m - p.n)
    return of_h(p, L(z), S(z) - 1)


# loss, its arguments, the baseline that a step gives it, the derivation
BY_HAND = [
    ("sigmoid", {}, 0, sigmoid),
    ("sigmoid", {"label_smoothing": 0.2}, 0, lambda p: sigmoid(p, 0.2)),
    ("robust", {}, 0, lambda p: robust(p, 0.1)),
    ("robust", {"label_smoothing": 0.3}, 0, lambda p: robust(p, 0.3)),
    ("hinge", {}, 0, hinge),
    ("ipo", {}, 0, ipo),
    ("exo_pair", {}, 0, lambda p: exo_pair(p, 1e-3)),
    ("exo_pair", {"label_smoothing": 0.2}, 0, lambda p: exo_pair(p, 0.2)),
    ("nca_pair", {}, 0, nca_pair),
    ("bco_pair", {}, 0.7, lambda p: bco_pair(p, 0.7)),
    ("sppo_hard", {}, 0, sppo_hard),
    ("aot", {}, 0, lambda p: aot(p, 0.0)),
    ("aot", {"label_smoothing": 0.1}, 0, lambda p: aot(p, 0.1)),
    ("aot_unpaired", {"label_smoothing": 0.1}, 0, lambda p: aot_unpaired(p, 0.1)),
    ("apo_zero", {}, 0, apo_zero),
    ("apo_down", {}, 0, apo_down),
    ("discopop", {}, 0, lambda p: discopop(p, 0.05)),
    ("discopop", {"tau": 2.0}, 0, lambda p: discopop(p, 2.0)),
    ("sft", {}, 0, sft),
    ("sigmoid_norm", {}, 0, sigmoid_norm),
    ("simpo", {"gamma": 0.8}, 0, lambda p: simpo(p, 0.8)),
    ("orpo", {}, 0, orpo),
    ("cpo", {"nll_weight": 0.4}, 0, lambda p: cpo(p, 0.4)),
    (
        "kto",
        {"desirable_weight": 1.3, "undesirable_weight": 0.6},
        1.1,
        lambda p: kto(p, 1.1, 1.3, 0.6),
    ),
    ("dpop", {}, 0, lambda p: dpop(p, 50.0)),
    ("rpo", {"nll_weight": 0.4}, 0, lambda p: rpo(p, 0.4)),
    ("rdpo", {"alpha": 0.05}, 0, lambda p: rdpo(p, 0.05)),
]
IDS = [f"{name}{args or ''}" for name, args, *_ in BY_HAND]


def value_and_gradient(loss, pairs, **given):
    leaves = pairs.chosen.clone().requires_grad_(), pairs.rejected.clone().requires_grad_()
    losses = loss(pairs._replace(chosen=leaves[0], rejected=leaves[1]), **given)
    return losses, torch.autograd.grad(
        losses.sum(), leaves, allow_unused=True, materialize_grads=True
    )


@pytest.mark.parametrize(("name", "args", "baseline", "derived"), BY_HAND, ids=IDS)
def test_value_and_gradient_by_hand(name, args, baseline, derived):
    pairs = made()
    losses, gradients = value_and_gradient(
        choose(name, BETA, args), pairs, baselines={name: baseline}
    )
    assert losses.shape == (64,)
    for found, expected in zip(
        (losses.detach(), *gradients), derived(By(pairs, BETA)), strict=True
    ):
        # differences of numbers up to 1e2 cancel in either expression
        assert np.allclose(found.numpy(), expected, rtol=1e-11, atol=1e-12), name


def test_every_loss_is_derived():
    assert {name for name, *_ in BY_HAND} == set(LOSSES) == set(LIMITS)


LN2 = math.log(2)
INF = math.inf


def softplus(x):
    """L(-x), of a number."""
    return math.log1p(math.exp(x))


# (-8, 4 tokens) against (-10, 5 tokens), beta 1/2: beta to 0; policy and reference equal; rejected
# gone; chosen gone
LIMITS = {
    "sigmoid": (LN2, LN2, 0, INF),
    "robust": (LN2, LN2, -INF, INF),  # eps 0.1
    "hinge": (1, 1, 0, INF),
    "ipo": (INF, 1, INF, INF),
    "exo_pair": (*2 * [-math.log(4e-3 * (1 - 1e-3)) / 2], -math.log(1 - 1e-3), -math.log(1e-3)),
    "nca_pair": (2 * LN2, 2 * LN2, 1.5 * LN2, INF),
    "bco_pair": (2 * LN2, 2 * LN2, LN2, INF),
    "sppo_hard": (INF, 2, INF, INF),
    "aot": (LN2, LN2, 0, INF),
    "aot_unpaired": (LN2, LN2, 0, INF),
    "apo_zero": (1, 1, 0.5, 1.5),
    "apo_down": (1, 1, 0.5, 1),
    "discopop": ((LN2 + 1) / 2, (LN2 + 1) / 2, 0, INF),
    "sft": (2, 2, 2, INF),
    "sigmoid_norm": (LN2, LN2, 0, INF),
    "simpo": (softplus(0.5), softplus(0.5), 0, INF),
    "orpo": (2, 2 + LN2 / 2, 2, INF),
    "cpo": (LN2 + 2, softplus(-1) + 2, 2, INF),
    "kto": (0.5, 0.5, 0.25, 0.75),
    "dpop": (LN2, LN2, 0, INF),
    "rpo": (LN2 + 2, LN2 + 2, 2, INF),
    "rdpo": (softplus(0.01), softplus(0.01), 0, INF),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name):
    def one(*values):
        columns = torch.tensor([values], dtype=torch.float64).T
        return Pairs(*columns, torch.tensor([4]), torch.tensor([5]))

    gone = -1e300
    loss = choose(name, 0.5, {})
    found = [
        choose(name, 1e-200, {})(one(-8, -10, -7, -12)),
        loss(one(-8, -10, -8, -10)),
        loss(one(-8, gone, -8, -10)),
        loss(one(gone, -10, -8, -10)),
    ]
    for value, limit in zip(found, LIMITS[name], strict=True):
        if math.isinf(limit):
            assert value.item() * math.copysign(1, limit) > 1e298
        else:
            assert value.item() == pytest.approx(limit, rel=1e-13, abs=1e-150)


@pytest.mark.parametrize("name", LOSSES)
def test_fp32_is_near_fp64_at_any_margin(name):
    # log-probabilities that fp32 holds exactly, so that only the loss's own arithmetic differs
    steps = torch.tensor([0, 2**-8, 0.25, 3, 9, 30, 80, 100, 250, 2000, 10000], dtype=torch.float64)
    moves = torch.cat([steps, -steps])
    zeros = torch.zeros_like(moves)
    base, lengths = torch.full_like(moves, -20000.0), torch.full_like(moves, 512, dtype=torch.int64)
    for chosen, rejected in ((moves, zeros), (zeros, moves), (moves, moves.flip(0))):
        wide = Pairs(base + chosen, base + rejected, base, base, lengths, lengths)
        narrow = Pairs(*(x.float() for x in wide[:4]), lengths, lengths)
        exact, slopes = value_and_gradient(choose(name, 1.0, {}), wide)
        found, near = value_and_gradient(choose(name, 1.0, {}), narrow)
        assert found.dtype == torch.float32 and torch.isfinite(found).all()
        assert torch.allclose(found.double(), exact, rtol=2e-6, atol=1e-6)
        for ours, theirs in zip(near, slopes, strict=True):
            assert torch.isfinite(ours).all()
            assert torch.allclose(ours.double(), theirs, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_empty_batch_stays_in_the_graph(name):
    scores = torch.zeros(0, requires_grad=True)
    no_pairs = Pairs.of(scores, torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    losses = choose(name, BETA, {})(no_pairs)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert scores.grad.shape == (0,)
    if of_labelled := LOSSES[name].of_labelled:
        scores = torch.zeros(0, requires_grad=True)
        none = Labelled(
            scores,
            torch.zeros(0),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0, dtype=torch.bool),
        )
        of_labelled(none, BETA).sum().backward()
        assert scores.grad.shape == (0,)


def labelled(n=64):
    """64 labelled responses, 23 of them desired."""
    pairs = made(n // 2, seed=3).split()
    desired = torch.zeros(n, dtype=torch.bool)
    desired[torch.randperm(n, generator=torch.Generator().manual_seed(1))[:23]] = True
    return pairs._replace(desired=desired)


def slopes_of(function, examples):
    leaf = examples.logps.clone().requires_grad_()
    losses = function(examples._replace(logps=leaf))
    return losses.detach().numpy(), torch.autograd.grad(losses.sum(), leaf)[0].numpy()


def test_labelled_responses_by_hand():
    examples = labelled()
    sign = np.where(examples.desired, 1, -1)
    u = (examples.logps - examples.ref_logps).numpy()
    z = sign * (BETA * u - 0.7)
    losses, slope = slopes_of(lambda x: preference.bco(x, BETA, 0.7), examples)
    assert np.allclose(losses, L(z), rtol=1e-12) and np.allclose(
        slope, sign * BETA * (S(z) - 1), rtol=1e-11
    )
    z, weight = sign * BETA * (u - 1.1), np.where(examples.desired, 1.3, 0.6)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    losses, slope = slopes_of(lambda x: preference.kto(x, BETA, 1.1, **weights), examples)
    assert np.allclose(losses, weight * (1 - np.tanh(z / 2)) / 2, rtol=1e-10, atol=1e-15)
    assert np.allclose(
        slope, -weight * sign * BETA * (1 - np.tanh(z / 2) ** 2) / 4, rtol=1e-9, atol=1e-15
    )


def test_aot_of_unequal_counts_integrates_over_quantiles():
    # the empirical quantile Q(t) is the ceil(t n)-th smallest of n: exact fractions, stretch by
    # stretch
    examples = labelled()
    rewards = (BETA * (examples.logps - examples.ref_logps)).numpy()
    good, bad = (np.flatnonzero(side) for side in (examples.desired, ~examples.desired))
    good, bad = good[rewards[good].argsort()], bad[rewards[bad].argsort()]
    n, m = len(good), len(bad)
    ends = sorted(
        {Fraction(i, n) for i in range(1, n + 1)} | {Fraction(j, m) for j in range(1, m + 1)}
    )
    integral, slope, start = 0.0, np.zeros(n + m), Fraction(0)
    for end in ends:
        up, down = good[math.ceil(end * n) - 1], bad[math.ceil(end * m) - 1]
        h, width = rewards[up] - rewards[down], float(end - start)
        integral, start = integral + width * (L(h) + 0.1 * h), end
        slope[up] += width * BETA * (S(h) - 0.9)
        slope[down] -= width * BETA * (S(h) - 0.9)
    losses, found = slopes_of(
        lambda x: preference.aot_unpaired(x, BETA, label_smoothing=0.1), examples
    )
    assert losses.mean() == pytest.approx(integral, rel=1e-12)
    assert np.allclose(found / (n + m), slope, rtol=1e-11, atol=1e-15)


def test_one_sort_alone_says_nothing():
    examples = labelled()._replace(desired=torch.ones(64, dtype=torch.bool))
    losses, slope = slopes_of(lambda x: preference.aot_unpaired(x, BETA), examples)
    assert not losses.any() and not slope.any()
