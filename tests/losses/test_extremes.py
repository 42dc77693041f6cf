"""Every loss at both ends, certain answers and hopeless ones, in fp64 and fp32, against mpmath with 60
digits: values and gradients are finite, and right.
"""

import itertools
from types import SimpleNamespace

import mpmath
import pytest
import torch
from mpmath import mp, mpf

from train.losses import policy
from train.losses.algorithms import ALGORITHMS
from train.losses.composition import DIVERGENCES, LOSSES, choose
from train.losses.preference import CERTAIN, Pairs
from train.losses.reward import LOSSES as REWARD_LOSSES
from train.losses.reward import ScoredAnswers, ScoredPairs

BETA = 0.5
LENGTHS = 4, 5
REF = -24, -30  # log pi_ref of both
# log-probabilities a token: (nearly) certain, ordinary, and far below what exp can hold in fp32, in
# fp64
MEANS = (-1e-12, -1e-6, -0.3, -2.0, -15.0, -100.0, -800.0, -5000.0)


def L(x):
    """-log sigmoid(x), log(1 + e^-x)."""
    return mp.log1p(mp.exp(-x))


def S(x):
    """The logistic function."""
    return 1 / (1 + mp.exp(-x))


def log_odds(a):
    return a - mp.log(-mp.expm1(a))


class At:
    """The quantities of the formulas at log-probabilities w of chosen and l of rejected."""

    def __init__(self, w, l):
        m, n = LENGTHS
        self.w, self.l, self.u, self.v = w, l, w - REF[0], l - REF[1]
        self.a, self.z = w / m, l / n
        self.h, self.d = BETA * (self.u - self.v), self.u / m - self.v / n


FORMULAS = {
    "sigmoid": lambda p: L(p.h),
    "robust": lambda p: (mpf(9) / 10 * L(p.h) - mpf(1) / 10 * L(-p.h)) / (mpf(8) / 10),
    "hinge": lambda p: max(mpf(0), 1 - p.h),
    "ipo": lambda p: (p.d - 1 / (2 * mpf(BETA))) ** 2,
    "exo_pair": lambda p: (
        S(p.h) * (-L(p.h) - mp.log(1 - mpf(1e-3))) + S(-p.h) * (-L(-p.h) - mp.log(mpf(1e-3)))
    ),
    "nca_pair": lambda p: L(BETA * p.u) + L(-BETA * p.u) / 2 + L(-BETA * p.v) / 2,
    "bco_pair": lambda p: L(BETA * p.u) + L(-BETA * p.v),
    "sppo_hard": lambda p: (p.u - 1) ** 2 + (p.v + 1) ** 2,
    "aot": lambda p: L(p.h),  # of one pair
    "aot_unpaired": lambda p: L(p.h),
    "apo_zero": lambda p: S(-BETA * p.u) + S(BETA * p.v),
    "apo_down": lambda p: S(BETA * p.u) + S(-p.h),
    "discopop": lambda p: S(-p.h / mpf(0.05)) * L(p.h) + S(p.h / mpf(0.05)) * mp.exp(-p.h),
    "sft": lambda p: -p.a,
    "sigmoid_norm": lambda p: L(BETA * p.d),
    "simpo": lambda p: L(BETA * (p.a - p.z) - mpf(0.5)),
    "orpo": lambda p: -p.a + BETA * L(log_odds(p.a) - log_odds(p.z)),
    "cpo": lambda p: L(BETA * (p.w - p.l)) - p.a,
    "kto": lambda p: (S(-BETA * p.u) + S(BETA * p.v)) / 2,
    "dpop": lambda p: L(p.h - BETA * 50 * max(mpf(0), -p.u)),
    "rpo": lambda p: L(p.h) - p.a,
    "rdpo": lambda p: L(p.h + mpf(0.01) * (LENGTHS[0] - LENGTHS[1])),
}


def pair(chosen, rejected, dtype):
    """One pair of given sums."""
    columns = torch.tensor([chosen, rejected, *REF], dtype=dtype).view(4, 1)
    return Pairs(*columns, *torch.tensor(LENGTHS).view(2, 1))


def value_and_slopes(loss, pairs):
    leaves = pairs.chosen.clone().requires_grad_(), pairs.rejected.clone().requires_grad_()
    losses = loss(pairs._replace(chosen=leaves[0], rejected=leaves[1]))
    slopes = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
    return [losses.item(), *(slope.item() for slope in slopes)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_at_both_ends(name, dtype):
    assert set(FORMULAS) == set(LOSSES)
    loss, formula = choose(name, BETA, {}), FORMULAS[name]
    near, far = (1e-9, 1e-9) if dtype == torch.float64 else (1e-4, 1e-3)
    with mpmath.workdps(60):
        for means in itertools.product(MEANS, repeat=2):
            pairs = pair(means[0] * LENGTHS[0], means[1] * LENGTHS[1], dtype)
            w, l = mpf(pairs.chosen.item()), mpf(pairs.rejected.item())
            found = value_and_slopes(loss, pairs)
            expected = [formula(At(w, l))]
            for which in ((1, 0), (0, 1)):
                expected.append(mp.diff(lambda *x: formula(At(*x)), (w, l), which))
            for ours, exact in zip(found, expected, strict=True):
                assert mp.isfinite(mpf(ours)), (means, found)
                error = abs(mpf(ours) - exact)
                assert error <= near * max(1, abs(exact)) + far * 1e-3, (means, found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_infinite_where_an_answer_is_certain_or_impossible(name, dtype):
    """At probabilities of 1, and down to log-probs that only the type's range ends."""
    loss = choose(name, BETA, {})
    lowest = -1e15  # of which a square is finite in fp32, too
    for means in itertools.product((0.0, -1e-30, -1.0, lowest), repeat=2):
        found = value_and_slopes(loss, pair(means[0] * 4, means[1] * 5, dtype))
        assert all(map(mp.isfinite, map(mpf, found))), (means, found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_orpo_where_answers_are_certain(dtype):
    """Rejected certain: its odds are those at CERTAIN, without a slope; chosen certain: the odds term
    is 0, with slope -beta odds_l; both: they are level.
    """
    loss = choose("orpo", BETA, {})
    with mpmath.workdps(60):
        value, by_chosen, by_rejected = value_and_slopes(loss, pair(-4.0, 0.0, dtype))
        difference = log_odds(mpf(-1)) - log_odds(mpf(CERTAIN))
        assert value == pytest.approx(float(1 + BETA * L(difference)), rel=1e-6)
        slope = -1 - BETA * S(-difference) / (1 - mp.exp(-1))
        assert by_chosen == pytest.approx(float(slope) / 4, rel=1e-6) and by_rejected == 0
        value, by_chosen, by_rejected = value_and_slopes(loss, pair(0.0, -10.0, dtype))
        odds = float(mp.exp(log_odds(mpf(-2))))
        assert value == 0 and by_rejected == 0
        assert by_chosen == pytest.approx((-1 - BETA * odds) / 4, rel=1e-6)
    value, by_chosen, by_rejected = value_and_slopes(loss, pair(0.0, 0.0, dtype))
    assert value == pytest.approx(BETA * float(mp.log(2)), rel=1e-6)
    assert by_chosen == -1 / 4 and by_rejected == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("name", [name for name, row in LOSSES.items() if row.f_divergence])
def test_nothing_is_infinite_under_an_f_divergence(name, kind, dtype):
    loss = choose(name, BETA, {"f_divergence_type": kind})
    for means in itertools.product((0.0, -1e-6, -2.0, -100.0, -5000.0), repeat=2):
        found = value_and_slopes(loss, pair(means[0] * 4, means[1] * 5, dtype))
        assert all(map(mp.isfinite, map(mpf, found))), (means, found)


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_losses_of_reward_models_at_both_ends(name):
    row = REWARD_LOSSES[name]
    for first, second in itertools.product((-1e15, -5000.0, 0.0, 800.0, 1e15), repeat=2):
        scores = torch.tensor([[first], [second]], dtype=torch.float64, requires_grad=True)
        if row.takes_pairs:
            losses = row.function(ScoredPairs(scores[0], scores[1], torch.zeros(1)))
            exact = L(mpf(first) - mpf(second))
        else:
            target = torch.ones(1, dtype=torch.float64)
            losses = row.function(ScoredAnswers(scores[0], target))
            exact = {"logistic": L(mpf(first)), "squared": (mpf(first) - 1) ** 2}[name]
        assert losses.item() == pytest.approx(float(exact), rel=1e-12, abs=1e-300)
        (slopes,) = torch.autograd.grad(losses.sum(), scores)
        assert torch.isfinite(slopes).all()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_losses_of_policies_at_both_ends(name):
    """Tokens that became certain or impossible since they were drawn, or are so to the reference."""
    logps = torch.tensor([0.0, -5000.0, -0.5, -0.5, -5000.0, 0.0], dtype=torch.float64)
    known = SimpleNamespace(
        old=torch.tensor([-5000.0, 0.0, -0.5, -0.5, -5000.0, 0.0]),
        ref=torch.tensor([-0.5, -0.5, -5000.0, 0.0, 0.0, -5000.0]),
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]),
        lengths=torch.tensor([4, 2]),
    )
    leaf = logps.requires_grad_()
    found = policy.policy_loss(ALGORITHMS[name], leaf, known)
    (slopes,) = torch.autograd.grad(found.loss, leaf)
    assert all(torch.isfinite(x).all() for x in (*found, slopes)), (found, slopes)
