"""Advantages and losses of reinforcement learning against numbers that peers' own functions gave
(golden_policy.json: inputs, and values in fp64 from the definitions), against definitions written out
another way, and by enumeration.

golden_policy.json's rollout has eight answers, two prompts by four; positions behind an answer's end
hold junk, which must not matter.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from train.losses import advantages as adv
from train.losses import policy
from train.losses.algorithms import ALGORITHMS, KL, Algorithm

GOLDEN = json.loads((Path(__file__).parent / "golden_policy.json").read_text())
ROLLOUT = GOLDEN["rollout"]
LENGTHS = torch.tensor(ROLLOUT["lengths"])
SCORE = torch.tensor(ROLLOUT["score"], dtype=torch.float64)
G = ROLLOUT["samples_per_prompt"]
EXACT = dict(rtol=1e-12, atol=1e-12)


def golden(name):
    return GOLDEN["cases"][name]["value"]


def flat(rows):
    """(T,) of a list an answer, cut at the answers' lengths."""
    return torch.tensor(
        [x for row, n in zip(rows, LENGTHS.tolist(), strict=True) for x in row[:n]],
        dtype=torch.float64,
    )


OLD, NEW, REF = (flat(ROLLOUT[f"{name}_logps"]) for name in ("old", "new", "ref"))
VALUES, NEW_VALUES = flat(ROLLOUT["values"]), flat(ROLLOUT["new_values"])
GAE = "gae gamma=1.0 lam=0.95"


def rewards():
    return adv.token_rewards(SCORE, LENGTHS, OLD - REF, ROLLOUT["kl_coef"])


# ------------------------------------------------------------ advantages


def test_rewards_of_tokens():
    assert torch.allclose(rewards(), flat(golden("token_rewards")), **EXACT)
    alone = adv.token_rewards(SCORE, LENGTHS)
    assert alone[LENGTHS.cumsum(0) - 1].tolist() == SCORE.tolist()
    assert float(alone.sum()) == float(SCORE.sum())


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0)])
def test_gae(gamma, lam):
    found = adv.gae(rewards(), VALUES, LENGTHS, gamma, lam)
    assert torch.allclose(
        found, flat(golden(f"gae gamma={gamma} lam={lam}")["advantages"]), **EXACT
    )


def test_gae_is_its_definition():
    """The double sum over all that follows in the answer, one answer at a time."""
    gamma, lam = 0.97, 0.8
    found, start = [], 0
    for n in LENGTHS.tolist():
        r, v = rewards()[start : start + n].tolist(), VALUES[start : start + n].tolist() + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        found += [
            sum((gamma * lam) ** (later - t) * delta[later] for later in range(t, n))
            for t in range(n)
        ]
        start += n
    ours = adv.gae(rewards(), VALUES, LENGTHS, gamma, lam)
    assert torch.allclose(ours, torch.tensor(found, dtype=torch.float64), **EXACT)


def test_rewards_to_go():
    found = adv.to_go(rewards(), LENGTHS, 1.0)
    assert torch.allclose(found, flat(golden("reinforce++ returns")), **EXACT)


def test_whitening():
    found = adv.whiten(flat(golden(GAE)["advantages"]))
    assert torch.allclose(found, flat(golden("whitening")), **EXACT)
    assert abs(float(found.mean())) < 1e-15 and abs(float(found.std()) - 1) < 1e-6
    for constant in (torch.full((5,), 0.3), torch.ones(1)):
        assert adv.whiten(constant).tolist() == [0.0] * len(constant)


@pytest.mark.parametrize(
    ("name", "baseline", "scale"),
    [
        ("grpo advantage (no eps)", "mean", "group"),
        ("dr_grpo advantage", "mean", "none"),
        ("grpo advantage, std of the batch", "mean", "batch"),
        ("rloo advantage", "leave_one_out", "none"),
    ],
)
def test_advantages_over_groups(name, baseline, scale):
    found = adv.over_groups(SCORE, G, baseline, scale)
    assert torch.allclose(found, torch.tensor(golden(name), dtype=torch.float64), **EXACT)


def test_the_kl_stands_within_rloo_s_baseline():
    kl = torch.stack([x.sum() for x in (OLD - REF).split(LENGTHS.tolist())])
    found = adv.over_groups(SCORE - 0.05 * kl, G, "leave_one_out", "none")
    wanted = golden("rloo advantage, KL in the sequence reward")
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_teach_exactly_nothing(scale):
    """0.3 six times has a mean that is not 0.3; a deviation of 3e-8 would make that 0.9."""
    score = torch.tensor([0.3] * 6 + [0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    for baseline in ("mean", "leave_one_out"):
        found = adv.over_groups(score, 6, baseline, scale)
        assert found[:6].tolist() == [0.0] * 6 and found[6:].abs().min() > 0
    assert adv.is_flat(score, 6).tolist() == [True, False]


def test_a_reward_that_does_not_apply_counts_nowhere():
    nan = float("nan")
    found = adv.over_groups(
        torch.tensor([1.0, nan, 2.0, 3.0, nan, nan, nan, 5.0]), 4, "mean", "none"
    )
    assert found.tolist() == [-1.0, 0.0, 0.0, 1.0] + [0.0] * 4
    assert adv.is_flat(torch.tensor([nan, nan, 5.0, nan]), 2).tolist() == [True, True]


def test_explained_variance():
    returns = flat(golden(GAE)["advantages"]) + VALUES
    assert adv.explained_variance(VALUES, returns) == pytest.approx(
        golden("explained variance"), abs=1e-12
    )
    assert adv.explained_variance(returns, returns) == 1


# ------------------------------------------------------------ losses

GROUP = adv.over_groups(SCORE, G, "mean", "group").repeat_interleave(LENGTHS)
LOO = adv.over_groups(SCORE, G, "leave_one_out", "none").repeat_interleave(LENGTHS)


def known(**changed):
    tensors = dict(old=OLD, ref=REF, advantages=GROUP, lengths=LENGTHS, values=VALUES)
    return SimpleNamespace(
        **tensors | {"returns": flat(golden(GAE)["advantages"]) + VALUES} | changed
    )


def row(**changed):
    return Algorithm("", "group", 4, "mean", "group")._replace(**changed)


CASES = {
    "ppo loss, token mean": (row(), {}),
    "ppo loss, clip higher, token mean (dapo)": (row(clip_high=0.28), {}),
    "ppo loss, sequence mean of token means (grpo)": (row(denominator="samples"), {}),
    "ppo loss, constant length (dr_grpo)": (row(denominator="constant"), {}),
    "ppo loss, dual clip c=1.5, token mean": (row(dual_clip=1.5), {}),
    "gspo loss, clip 3e-4/4e-4": (ALGORITHMS["gspo"], {}),
    "gspo loss, clip 0.1/0.1": (ALGORITHMS["gspo"]._replace(clip_low=0.1, clip_high=0.1), {}),
    "cispo loss, weight at most 1.2, token mean": (
        ALGORITHMS["cispo"]._replace(clip_high=1.2),
        {},
    ),
    "sapo loss": (ALGORITHMS["sapo"], {}),
    "rloo loss, sequence ratio": (ALGORITHMS["rloo"], {"advantages": LOO}),
}


def loss_of(algorithm, logps, **changed):
    found = policy.policy_loss(algorithm, logps, known(**changed))
    return found.loss / policy.denominator(algorithm, len(LENGTHS), int(LENGTHS.sum()), 8), found


@pytest.mark.parametrize("name", CASES)
def test_policy_losses_and_their_gradients(name):
    algorithm, changed = CASES[name]
    logps = NEW.clone().requires_grad_()
    loss, _ = loss_of(algorithm, logps, **changed)
    loss.backward()
    assert float(loss) == pytest.approx(golden(name)["loss"], abs=1e-12)
    assert torch.allclose(logps.grad, flat(golden(name)["gradient"]), rtol=1e-9, atol=1e-12)


def test_k3_in_the_loss(monkeypatch):
    """Without the ratio as in the paper's formula; with it, as it is here, by hand."""
    algorithm = row(denominator="samples", kl=KL("loss", "k3", 0.04))
    with_ratio = policy.kl_in_loss
    logps = NEW.clone().requires_grad_()
    loss, found = loss_of(algorithm, logps)
    d = NEW - REF
    k3 = torch.expm1(-d) + d
    assert float(found.kl) == pytest.approx(float(((NEW - OLD).exp() * k3).sum()), abs=1e-12)
    monkeypatch.setattr(
        policy, "kl_in_loss", lambda e, l, r, ratio: with_ratio(e, l, r, torch.ones_like(ratio))
    )
    logps = NEW.clone().requires_grad_()
    loss, _ = loss_of(algorithm, logps)
    loss.backward()
    wanted = golden("grpo loss with k3 in the loss, beta 0.04")
    assert float(loss) == pytest.approx(wanted["loss"], abs=1e-12)
    assert torch.allclose(logps.grad, flat(wanted["gradient"]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [0.2, 0.0])
def test_value_losses(clip):
    name = "value loss, clipped 0.2" if clip else "value loss, unclipped"
    values = NEW_VALUES.clone().requires_grad_()
    found = policy.value_loss(row(value_clip=clip), values, known())
    (found.loss / int(LENGTHS.sum())).backward()
    assert float(found.loss) / int(LENGTHS.sum()) == pytest.approx(golden(name)["loss"], abs=1e-12)
    assert torch.allclose(values.grad, flat(golden(name)["gradient"]), rtol=1e-9, atol=1e-12)
    assert (float(found.clipped) > 0) == bool(clip)


def test_kl_estimators_have_the_kl_s_gradient_where_they_are_allowed():
    """By enumeration over a vocabulary of three: the expected gradient of each place's estimator."""
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]))
    logits = p.log().clone().requires_grad_()
    kl = (torch.softmax(logits, 0) * (torch.log_softmax(logits, 0) - q.log())).sum()
    (true,) = torch.autograd.grad(kl, logits)

    def expected(estimator, ratio_moves):
        logits = p.log().clone().requires_grad_()
        logps = torch.log_softmax(logits, 0)
        ratio = (logps - p.log()).exp()
        ratio = ratio if ratio_moves else ratio.detach()
        term = policy.kl_in_loss(estimator, logps, q.log(), ratio)
        return torch.autograd.grad((p * term).sum(), logits)[0]

    assert torch.allclose(expected("k2", True), true, **EXACT)
    assert torch.allclose(expected("k3", True), true, **EXACT)
    assert not torch.allclose(expected("k3", False), true, atol=1e-2)  # that of KL(q || p)
    for place, estimator in (("loss", "k1"), ("reward", "k2"), ("reward", "k3")):
        with pytest.raises(ValueError, match="gradient"):
            KL(place, estimator, 0.1).check()
    # off-policy: the ratio moves the expectation from what drew to what is
    drew = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    logits = p.log().clone().requires_grad_()
    logps = torch.log_softmax(logits, 0)
    term = policy.kl_in_loss("k3", logps, q.log(), (logps - drew.log()).exp())
    (found,) = torch.autograd.grad((drew * term).sum(), logits)
    assert torch.allclose(found, true, **EXACT)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_starts_at_its_policy_gradient(name):
    """Where nothing has moved, the gradient is that of -A log pi over the denominator, in every row
    but for its KL; half the ways to write a clip lose half of it there.
    """
    algorithm = ALGORITHMS[name]._replace(kl=KL())
    logps = OLD.clone().requires_grad_()
    loss, found = loss_of(algorithm, logps)
    loss.backward()
    weight = {"tokens": 1 / 27, "constant": 1 / 64}.get(algorithm.denominator)
    weight = (
        torch.full_like(OLD, weight)
        if weight
        else (1 / LENGTHS.double().repeat_interleave(LENGTHS)) / 8
    )
    if algorithm.ratio == "sum":  # each token's log-prob counts whole in its answer's
        weight = torch.full_like(OLD, 1 / 8)
    assert torch.allclose(logps.grad, -GROUP * weight, rtol=1e-9, atol=1e-12)
    assert float(found.clipped) == float(found.moved) == 0 and float(found.ratio) == 27
    assert ALGORITHMS[name].kl.coef == 0 or ALGORITHMS[name].kl.check() is None


def test_a_batch_s_sums_add_up():
    """Of two halves as of the whole; an empty batch adds nothing and has a gradient of nothing."""
    algorithm = ALGORITHMS["grpo"]
    whole = policy.policy_loss(algorithm, NEW, known())
    tokens = int(LENGTHS[:4].sum())
    parts = []
    for cut, samples in ((slice(0, tokens), slice(0, 4)), (slice(tokens, None), slice(4, None))):
        part = SimpleNamespace(
            old=OLD[cut], ref=REF[cut], advantages=GROUP[cut], lengths=LENGTHS[samples]
        )
        parts.append(policy.policy_loss(algorithm, NEW[cut], part))
    assert torch.equal(whole.ratios, torch.cat([part.ratios for part in parts]))
    for of_whole, *of_parts in zip(whole[:-1], *(part[:-1] for part in parts), strict=True):
        assert float(of_whole) == pytest.approx(float(sum(of_parts)), abs=1e-12)
    nothing = torch.zeros(0, dtype=torch.float64)
    empty = SimpleNamespace(
        old=nothing, ref=nothing, advantages=nothing, lengths=torch.zeros(0, dtype=torch.int64)
    )
    logps = nothing.clone().requires_grad_()
    found = policy.policy_loss(algorithm, logps, empty)
    found.loss.backward()
    assert float(found.loss) == 0
    assert policy.denominator(algorithm, 0, 0, 8) == 1


def test_a_ratio_that_overflows_has_no_gradient():
    """A thousand tokens at 0.8 nats: the answer's ratio is e^800."""
    logps = torch.full((1000,), -0.2, dtype=torch.float64, requires_grad=True)
    old, lengths = torch.full((1000,), -1.0, dtype=torch.float64), torch.tensor([1000])
    known_of = SimpleNamespace(old=old, ref=old, advantages=-torch.ones(1000), lengths=lengths)
    found = policy.policy_loss(ALGORITHMS["rloo"], logps, known_of)
    found.loss.backward()
    assert torch.isfinite(found.loss) and logps.grad.tolist() == [0.0] * 1000


def test_a_ratio_on_its_bound_is_within_it():
    """torch's clamp has slope 1 at its bounds up to 2.13, and 0 from 2.14 on."""
    x = torch.tensor([-2.0, -1.0, 0.5, 3.0, 3.5], requires_grad=True)
    bounded = policy.clip(x, -1.0, 3.0)
    bounded.sum().backward()
    assert bounded.tolist() == [-1, -1, 0.5, 3, 3] and x.grad.tolist() == [0, 1, 1, 1, 0]


def test_measures():
    sums = policy.sums(policy.policy_loss(row(), NEW, known()), None, 27.0, 27)
    found = policy.means(sums + policy.one_update("cpu"), has_critic=False)
    ratio = (NEW - OLD).exp()
    assert found["val/ratio"] == pytest.approx(float(ratio.mean()))
    assert found["val/ratio_var"] == pytest.approx(float(ratio.var(correction=0)))
    assert found["policy/approxkl_avg"] == pytest.approx(float((NEW - OLD).square().mean() / 2))
    assert found["loss/policy_avg"] == pytest.approx(golden("ppo loss, token mean")["loss"])
    outside = ((ratio > 1.2) & (GROUP > 0)) | ((ratio < 0.8) & (GROUP < 0))
    assert found["policy/clipfrac_avg"] == pytest.approx(float(outside.double().mean()))


def test_measures_of_no_token():
    """Of a rollout whose groups are all flat: a ratio of 0 would say that all has moved."""
    nothing = policy.one_update("cpu")
    assert policy.means(nothing, has_critic=False) == {"loss/policy_avg": 0.0}
