"""The losses of reinforcement learning, side by side with what they are derived from: the four corners
of a clip by hand, gradients against finite differences in fp64, KL estimators by enumeration, and the
table against its columns written down once more.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from train.losses import advantages as adv
from train.losses import policy
from train.losses.algorithms import ALGORITHMS, KL, Algorithm

CASES = json.loads((Path(__file__).parent / "golden_estimators.json").read_text())["cases"]
ROLLOUT = json.loads((Path(__file__).parent / "golden_policy.json").read_text())["rollout"]
LENGTHS = torch.tensor(ROLLOUT["lengths"])


def double(values, **kwargs):
    return torch.tensor(values, dtype=torch.float64, **kwargs)


def flat(rows):
    """(T,) of a list an answer, cut at the answers' lengths."""
    return double([x for row, n in zip(rows, LENGTHS.tolist(), strict=True) for x in row[:n]])


OLD, NEW, REF = (flat(ROLLOUT[f"{name}_logps"]) for name in ("old", "new", "ref"))
ADVANTAGES = adv.over_groups(double(ROLLOUT["score"]), 4, "mean", "group").repeat_interleave(
    LENGTHS
)


def known(**changed):
    tensors = dict(old=OLD, ref=REF, advantages=ADVANTAGES, lengths=LENGTHS)
    return SimpleNamespace(**tensors | changed)


def at_ratio(algorithm, ratio, advantage):
    """(loss, its gradient by log pi, tokens counted as clipped) of an answer of one token."""
    logps = double([ratio]).log().requires_grad_()
    answer = known(old=double([0.0]), advantages=double([advantage]), lengths=torch.tensor([1]))
    found = policy.policy_loss(algorithm, logps, answer)
    found.loss.backward()
    return found.loss.item(), logps.grad.item(), found.clipped.item()


@pytest.mark.parametrize("ratio_of", ["token", "mean", "sum"])
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.5, 1.0, -1.28, 0.0, 1),  # likelier by more than the upper bound: no more of it
        (0.5, 1.0, -0.5, -0.5, 0),  # gone the wrong way: the whole gradient back
        (0.5, -1.0, 0.8, 0.0, 1),  # less likely by more than the lower bound
        (1.5, -1.0, 1.5, 1.5, 0),
        (1.25, 2.0, -2.5, -2.5, 0),  # between 1 + low and 1 + high
    ],
)
def test_the_corners_of_a_clip(ratio_of, ratio, advantage, loss, gradient, clipped):
    row = Algorithm("", "group", 4, ratio=ratio_of, clip_low=0.2, clip_high=0.28)
    found = at_ratio(row, ratio, advantage)
    assert found == pytest.approx((loss, gradient, clipped), abs=1e-14)


def test_dual_clip_bounds_what_a_bad_token_costs():
    """At a negative advantage only, and only above the bound."""
    row = Algorithm("", "group", 4, dual_clip=1.2)
    assert at_ratio(row, 1.5, -2.0) == pytest.approx((2.4, 0.0, 1), abs=1e-14)
    assert at_ratio(row, 1.1, -2.0) == pytest.approx((2.2, 2.2, 0), abs=1e-14)
    assert at_ratio(row, 0.5, -2.0) == pytest.approx((1.6, 0.0, 1), abs=1e-14)
    assert at_ratio(row, 1.1, 2.0) == pytest.approx((-2.2, -2.2, 0), abs=1e-14)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_cispo_weighs_by_a_ratio_without_gradient(advantage):
    """-w A log pi with w = min(r, bound): no token's gradient is lost, and none has more than w."""
    row = ALGORITHMS["cispo"]._replace(clip_high=1.2)
    for ratio, weight in ((0.1, 0.1), (1.1, 1.1), (1.5, 1.2)):
        loss, gradient, bound = at_ratio(row, ratio, advantage)
        assert gradient == pytest.approx(-weight * advantage, abs=1e-14)
        assert bound == (ratio > 1.2)
        log_pi = double(ratio).log().item()
        assert loss == pytest.approx(-weight * advantage * log_pi, abs=1e-14)


def test_sapo_s_temperatures():
    """The gate's slope by r is 4 p (1 - p), p = sigmoid(tau (r - 1)), tau another for each sign."""
    for advantage, tau in ((2.0, 1.0), (-2.0, 1.05)):
        loss, gradient, _ = at_ratio(ALGORITHMS["sapo"], 1.5, advantage)
        p = 1 / (1 + double(-tau * 0.5).exp().item())
        assert loss == pytest.approx(-4 / tau * p * advantage, abs=1e-14)
        assert gradient == pytest.approx(-1.5 * 4 * p * (1 - p) * advantage, abs=1e-14)


@pytest.mark.parametrize("dual_clip", [0.0, 1.5])
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "cispo"])
def test_gradients_are_finite_differences(name, dual_clip):
    """Central differences in fp64, at new log-probabilities away from the bounds of each clip. CISPO's
    ratio has no gradient on purpose: above.
    """
    row = ALGORITHMS[name]._replace(dual_clip=dual_clip)

    def loss(logps):
        return policy.policy_loss(row, logps, known()).loss

    assert torch.autograd.gradcheck(loss, NEW.clone().requires_grad_(), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("value_clip", [0.0, 0.2])
def test_a_value_s_gradient_is_a_finite_difference(value_clip):
    row = Algorithm("", "gae", 1, value_clip=value_clip)
    answer = SimpleNamespace(values=flat(ROLLOUT["values"]), returns=flat(ROLLOUT["values"]) + 0.3)

    def loss(values):
        return policy.value_loss(row, values, answer).loss

    values = (flat(ROLLOUT["new_values"]) + 1e-3).requires_grad_()  # off the bounds of the clip
    assert torch.autograd.gradcheck(loss, values, eps=1e-7, atol=1e-6)


def test_a_value_is_held_only_on_its_way_to_the_return():
    """Old value 0, clip 0.2, value 0.5. The return 1: 0.64 > 0.25, without gradient. 0: 0.25 > 0.04."""
    row = Algorithm("", "gae", 1, value_clip=0.2)
    for returns, loss, gradient, clipped in ((1.0, 0.32, 0.0, 1), (0.0, 0.125, 0.5, 0)):
        values = double([0.5], requires_grad=True)
        answer = SimpleNamespace(values=double([0.0]), returns=double([returns]))
        found = policy.value_loss(row, values, answer)
        found.loss.backward()
        assert found.loss.item() == pytest.approx(loss, abs=1e-15)
        assert values.grad.item() == gradient and found.clipped.item() == clipped


# ------------------------------------------------------------ the KL

P, Q = double([0.5, 0.3, 0.2]), double([0.2, 0.3, 0.5])
DIVERGENCE = CASES["KL(p||q) of a categorical"]["value"]


def expected(estimator):
    """(its expectation under P, that of its gradient by the logits), on policy."""
    logits = P.log().requires_grad_()
    logps = torch.log_softmax(logits, 0)
    term = policy.kl_in_loss(estimator, logps, Q.log(), (logps - P.log()).exp())
    value = (P * term).sum()
    return value.item(), torch.autograd.grad(value, logits)[0].tolist()


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_estimators_of_tokens(estimator):
    found = policy.kl_in_loss(estimator, OLD, REF, torch.ones_like(OLD))
    assert torch.allclose(found, flat(CASES[estimator]["value"]), rtol=1e-12, atol=1e-15)


def test_bias_and_gradient_of_the_kl_in_the_loss():
    """k3 is unbiased; k2 is not, though its gradient is: it equals the KL to second order only."""
    value, gradient = expected("k3")
    assert value == pytest.approx(DIVERGENCE["expectation"], abs=1e-14)
    assert gradient == pytest.approx(DIVERGENCE["expected_gradient"], abs=1e-14)
    value, gradient = expected("k2")
    assert value == pytest.approx(CASES["k2's expectation"]["value"], abs=1e-14)
    assert gradient == pytest.approx(DIVERGENCE["expected_gradient"], abs=1e-14)


def test_without_its_ratio_k3_pulls_the_other_way_round():
    logits = P.log().requires_grad_()
    logps = torch.log_softmax(logits, 0)
    value = (P * policy.kl_in_loss("k3", logps, Q.log(), torch.ones_like(P))).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    other_way = CASES["KL(q||p) of a categorical"]["value"]["expected_gradient"]
    assert gradient.tolist() == pytest.approx(other_way, abs=1e-14)


def test_the_kl_in_the_reward_has_the_divergence_s_gradient():
    """Every token of the vocabulary is an answer, and counts with its probability: the gradient of the
    policy's loss on rewards of -k1 is the divergence's. On rewards of -k3 it is not: refused.
    """
    case = CASES["KL in the REWARD: expected policy gradient"]
    lengths = torch.ones(3, dtype=torch.int64)

    def gradient(kl):
        logits = P.log().requires_grad_()
        rewards = adv.token_rewards(torch.zeros(3), lengths, kl, coef=1.0)
        answers = known(
            old=P.log(), advantages=P * adv.to_go(rewards, lengths, 1.0), lengths=lengths
        )
        row = ALGORITHMS["reinforce++"]
        policy.policy_loss(row, torch.log_softmax(logits, 0), answers).loss.backward()
        return logits.grad.tolist()

    d = P.log() - Q.log()
    assert gradient(d) == pytest.approx(case["value"]["expected_gradient"], abs=1e-14)
    assert gradient(torch.expm1(-d) + d) == pytest.approx(
        case["k3"]["expected_gradient"], abs=1e-14
    )


def test_a_kl_in_the_loss_is_divided_like_the_loss():
    """grpo: the mean over samples of the means over tokens, of the loss and of the KL alike."""
    row = ALGORITHMS["grpo"]
    found = policy.policy_loss(row, NEW, known()).loss.item()
    without = policy.policy_loss(row._replace(kl=KL()), NEW, known()).loss.item()
    d, ratio = NEW - REF, (NEW - OLD).exp()
    means = [x.mean().item() for x in (ratio * (torch.expm1(-d) + d)).split(LENGTHS.tolist())]
    assert found - without == pytest.approx(0.04 * sum(means), abs=1e-14)


# ------------------------------------------------------------ the table

COLUMNS = (
    "advantage samples baseline scale whiten place estimator coef ratio clip_low clip_high "
    "denominator epochs minibatches resamples"
)
TABLE = """
ppo                  gae   1 none          none  True  reward k1 0.05 token  0.2    0.2    tokens   4 1 0
rloo                 group 4 leave_one_out none  False reward k1 0.05 sum    0.2    0.2    samples  1 1 0
reinforce++          to_go 1 none          none  True  reward k1 0.01 token  0.2    0.2    tokens   1 4 0
reinforce++_baseline group 4 mean          none  True  loss   k2 0.01 token  0.2    0.2    tokens   1 4 0
grpo                 group 8 mean          group False loss   k3 0.04 token  0.2    0.2    samples  1 1 0
dr_grpo              group 8 mean          none  False none   -  0.0  token  0.2    0.2    constant 1 1 0
dapo                 group 8 mean          group False none   -  0.0  token  0.2    0.28   tokens   1 4 2
gspo                 group 8 mean          group False none   -  0.0  mean   0.0003 0.0004 samples  1 4 0
cispo                group 8 mean          group False none   -  0.0  weight 0.2    5.0    tokens   1 4 0
sapo                 group 8 mean          group False none   -  0.0  gate   1.05   1.0    samples  1 4 0
"""


def test_the_table_is_what_the_papers_and_their_practice_say():
    found = []
    for name, row in ALGORITHMS.items():
        cells = row._asdict() | row.kl._asdict() | {"estimator": row.kl.estimator or "-"}
        found.append([name, *(str(cells[column]) for column in COLUMNS.split())])
    assert found == [line.split() for line in TABLE.strip().splitlines()]
    assert {name for name, row in ALGORITHMS.items() if row.needs_critic} == {"ppo"}
    assert all(row.dual_clip == 0 and row.value_clip == 0.2 for row in ALGORITHMS.values())
