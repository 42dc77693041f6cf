"""How losses are chosen, summed, transformed and coupled over a step; measures. Numbers derived by
hand.
"""

import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch

from train.losses.composition import (
    ALSO_CALLED,
    DIVERGENCES,
    LOSSES,
    RunningMean,
    choose,
    mean_kl,
    parse,
    with_divergence,
)
from train.losses.metrics import (
    LABELS,
    METRICS,
    PAIR_SUMS,
    means,
    preference_sums,
    wilson,
    wins,
)
from train.losses.preference import Labelled, Pairs


def pairs(*rows):
    """Rows of (chosen, rejected, ref_chosen, ref_rejected) in nats; lengths of 4 and 5 tokens."""
    columns = torch.tensor(rows, dtype=torch.float64).T
    return Pairs(*columns, torch.full((len(rows),), 4), torch.full((len(rows),), 5))


def test_sigmoid_by_hand():
    # h = (-10 - -12) - (-9 - -8) = 2 + 1 = 3; beta h = 0.3; -log sigmoid(0.3) = log(1 + e^-0.3)
    (found,) = choose("sigmoid", 0.1, {})(pairs((-10, -9, -12, -8)))
    assert found.item() == pytest.approx(math.log1p(math.exp(-0.3)), rel=1e-14)
    assert found.item() == pytest.approx(0.5543552444685271, rel=1e-12)


def test_equal_policy_and_reference_give_ln_2():
    (found,) = choose("sigmoid", 1.0, {})(pairs((-10, -9, -10, -9)))
    assert found.item() == pytest.approx(math.log(2), rel=1e-15)


def test_gradient_by_hand():
    # d/dh -log sigmoid(beta h) = -beta sigmoid(-beta h)
    p = pairs((-10, -9, -12, -8))
    chosen = p.chosen.clone().requires_grad_()
    choose("sigmoid", 0.1, {})(p._replace(chosen=chosen)).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.1 / (1 + math.exp(0.3)), rel=1e-14)


def test_label_smoothing_is_cdpo():
    # (1 - e) log(1 + e^-0.3) + e log(1 + e^0.3), e = 0.2
    (found,) = choose("sigmoid", 0.1, {"label_smoothing": 0.2})(pairs((-10, -9, -12, -8)))
    assert found.item() == pytest.approx(
        0.8 * math.log1p(math.exp(-0.3)) + 0.2 * math.log1p(math.exp(0.3)), rel=1e-14
    )


def test_far_margins_are_linear_not_infinite():
    found = choose("sigmoid", 1.0, {})(pairs((-10, -9, -10, -2009), (-10, -2009, -10, -9)))
    assert found.tolist() == [2000.0, 0.0]


def test_unknown_loss_names_the_choices():
    with pytest.raises(ValueError, match=r"'sigmiod' \(did you mean sigmoid\?\) is none of: sig"):
        choose("sigmiod", 0.1, {})
    with pytest.raises(ValueError, match="'zzz' is none of: sigmoid, robust"):
        choose("zzz", 0.1, {})
    for name, here in ALSO_CALLED.items():
        assert name not in LOSSES
        named = here.partition(", with ")[0].replace(" or ", ",")
        assert {part.partition(":")[0] for part in named.split(",")} <= set(LOSSES), here
        with pytest.raises(ValueError, match=f"'{name}', here called {re.escape(here)}, is none"):
            choose(name, 0.1, {})


def test_foreign_parameters_are_refused_with_the_list():
    with pytest.raises(ValueError, match="takes no tau; its parameters are: label_smoothing"):
        choose("sigmoid", 0.1, {"tau": 1})


def test_parameters_out_of_range_are_refused_at_once():
    with pytest.raises(ValueError, match=r"label_smoothing lies in \[0, 0.5\)"):
        choose("sigmoid", 0.1, {"label_smoothing": 0.5})


def test_every_loss_cites_its_paper():
    for name, row in LOSSES.items():
        text = row.function.__doc__
        assert re.fullmatch(r"\d{4}\.\d{5}", row.paper) and f"arXiv {row.paper}" in text, name
        assert "equation" in text or "section" in text, name


def test_a_row_says_which_functions_there_are():
    for name, row in LOSSES.items():
        assert (row.of_pairs is None) is row.pair_as_two, name
        assert row.of_labelled is not None or not row.pair_as_two, name
        assert row.needs_mismatched is (row.statistic is mean_kl), name
        for function in filter(None, (row.of_pairs, row.of_labelled)):
            signature = inspect.signature(function).parameters
            assert ("baseline" in signature) is (row.statistic is not None), name
            own = [p.name for p in signature.values() if p.kind is p.KEYWORD_ONLY]
            assert own == list(row.parameters), name  # pairs and labelled responses take the same


def test_readme_lists_every_loss():
    readme = (Path(__file__).parents[2] / "train/README.md").read_text()
    table = readme.split("## Losses")[1].split("\n\nParameters that go with many")[0]
    listed = {row.split("`")[1]: row for row in table.splitlines() if row.startswith("| `")}
    del listed["--loss"]  # the table's head
    for name, row in LOSSES.items():
        for parameter in row.parameters:
            assert f"`{parameter}`" in listed[name], (name, parameter)
        assert row.paper in re.findall(r"abs/([\d.]+)", listed[name]), name
    assert list(listed) == list(LOSSES)


def test_weighted_sums():
    p = pairs((-10, -9, -12, -8), (-10, -9, -10, -9))
    both = choose("sigmoid:0.8, sft:0.2", 0.1, {})
    assert torch.allclose(
        both(p), 0.8 * choose("sigmoid", 0.1, {})(p) + 0.2 * torch.tensor(10 / 4), rtol=1e-14
    )
    assert parse("sigmoid:1e-3,hinge") == {"sigmoid": 1e-3, "hinge": 1.0}
    assert both.needs_reference and not both.couples and not both.takes_labelled


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sigmoid,", "loss '' is none of: sigmoid, robust"),
        ("sigmoid:0", "number above 0, not '0'"),
        ("sigmoid:x", "not 'x'"),
        ("sigmoid:-1", "not '-1'"),
        ("sigmoid:inf", "not 'inf'"),
        ("sft:", "not ''"),
        ("sft:1,sft:2", "stands twice"),
    ],
)
def test_sums_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(spec, 0.1, {})


def test_arguments_go_to_the_loss_that_takes_them():
    p = pairs((-10, -9, -12, -8))
    loss = choose("sigmoid,simpo,robust", 0.1, {"gamma": 2, "robust.label_smoothing": 0.3})
    expected = choose("sigmoid", 0.1, {})(p) + choose("simpo", 0.1, {"gamma": 2})(p)
    expected += choose("robust", 0.1, {"label_smoothing": 0.3})(p)
    assert torch.equal(loss(p), expected)
    with pytest.raises(
        ValueError,
        match="sigmoid and robust take label_smoothing: write sigmoid.label_smoothing or",
    ):
        choose("sigmoid,robust", 0.1, {"label_smoothing": 0.3})
    with pytest.raises(
        ValueError,
        match="takes no simpo.gamma, beta; its parameters are: label_smoothing; those acr",
    ):
        choose("sigmoid", 0.1, {"simpo.gamma": 1, "beta": 1})


@pytest.mark.parametrize(
    ("loss", "args", "message"),
    [
        ("sigmoid", {"label_smoothing": "0.1"}, "label_smoothing is a number, not '0.1'"),
        ("sigmoid", {"use_weighting": 1}, "use_weighting is true or false, not 1"),
        ("sigmoid", {"ld_alpha": True}, "ld_alpha is a number, not True"),
        ("sigmoid", {"ld_alpha": 1.5}, "ld_alpha lies in [0, 1]"),
        ("exo_pair", {"label_smoothing": 0.0}, "lies in (0, 0.5)"),
        ("discopop", {"tau": 0}, "tau of discopop is above 0"),
        ("aot_unpaired", {"label_smoothing": 0.7}, "lies in [0, 0.5)"),
        (
            "sigmoid",
            {"f_divergence_type": "kl"},
            "is none of: reverse_kl, forward_kl, js_divergence, alpha_divergence",
        ),
        ("sigmoid", {"f_alpha_divergence_coef": 0.3}, "is for f_divergence_type alpha_divergence"),
        (
            "apo_zero",
            {"f_divergence_type": "forward_kl"},
            "f_divergence_type is not for apo_zero; it is for: sigmoid, ",
        ),
        (
            "sigmoid,simpo",
            {"f_divergence_type": "forward_kl"},
            "f_divergence_type is not for simpo",
        ),
        ("sft", {"ld_alpha": 0.5}, "ld_alpha is not for sft"),
        (
            "sigmoid,aot",
            {"use_weighting": True},
            "use_weighting is not for aot; it is for: sigmoid",
        ),
    ],
)
def test_arguments_out_of_place_are_refused(loss, args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(loss, 0.1, args)


def test_what_the_table_says():
    said = {
        name: (
            choose(name, 0.1, {}).needs_reference,
            choose(name, 0.1, {}).couples,
            choose(name, 0.1, {}).takes_labelled,
        )
        for name in LOSSES
    }
    assert [name for name, (reference, *_) in said.items() if not reference] == [
        "sft",
        "simpo",
        "orpo",
        "cpo",
    ]
    assert [name for name, (_, couples, _) in said.items() if couples] == [
        "bco_pair",
        "aot",
        "aot_unpaired",
        "kto",
    ]
    assert [name for name, (*_, labelled) in said.items() if labelled] == [
        "bco_pair",
        "aot_unpaired",
        "kto",
    ]
    mismatched = [name for name in LOSSES if choose(name, 0.1, {}).needs_mismatched]
    assert mismatched == ["kto"] and choose("sigmoid,kto", 0.1, {}).needs_mismatched
    assert not choose("kto", 0.1, {"ld_alpha": 0.5}).takes_labelled


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_without_a_reference_does_not_look_at_it(name):
    p = random_pairs(8)
    other = p._replace(ref_chosen=p.ref_chosen - 3, ref_rejected=p.ref_rejected + 5)
    loss = choose(name, 0.1, {})
    assert torch.equal(loss(p), loss(other)) is not loss.needs_reference


def random_pairs(n, seed=0):
    random = torch.Generator().manual_seed(seed)
    values = -20 * torch.rand(4, n, dtype=torch.float64, generator=random)
    return Pairs(*values, *torch.randint(1, 9, (2, n), generator=random))


@pytest.mark.parametrize(
    ("kind", "coef", "slope"),
    # f'(t) of f(t) = t log t; -log t; t log t - (1 + t) log((1 + t) / 2); and TRL's (t^(c - 1) - 1)
    # / (c - 1)
    [
        ("reverse_kl", 0.5, lambda t: math.log(t)),
        ("forward_kl", 0.5, lambda t: 1 - 1 / t),
        ("js_divergence", 0.5, lambda t: math.log(2 * t / (1 + t))),
        ("alpha_divergence", 0.3, lambda t: (t**-0.7 - 1) / -0.7),
        ("alpha_divergence", 1.0, lambda t: math.log(t)),
    ],
)
def test_divergences_by_hand(kind, coef, slope):
    p = pairs((-10, -9, -12, -8.5))
    found = with_divergence(p, kind, coef)
    h = 0.4 * (slope(math.e**2) - slope(math.e**-0.5))
    args = {"f_divergence_type": kind}
    if kind.startswith("alpha"):
        args["f_alpha_divergence_coef"] = coef
    assert (found.chosen - found.ref_chosen).item() == pytest.approx(slope(math.e**2), rel=1e-13)
    assert choose("sigmoid", 0.4, args)(p).item() == pytest.approx(
        math.log1p(math.exp(-h)), rel=1e-13
    )
    assert choose("sigmoid:2,sft:0.5", 0.4, args)(p).item() == pytest.approx(
        2 * math.log1p(math.exp(-h)) + 0.5 * 2.5
    )


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_of_far_ratios_are_no_nan(kind):
    # where pi is e^-300 and e^-200 of pi_ref both exponentials are past fp32
    p = Pairs(*torch.tensor([[-310.0, -215, -10, -15]]).T, torch.tensor([4]), torch.tensor([5]))
    leaf = p.chosen.requires_grad_()
    loss = choose("sigmoid", 0.1, {"f_divergence_type": kind})(p._replace(chosen=leaf))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(leaf.grad).all()


COUPLED = {
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {},
    "bco_pair": {},
    "kto": {"undesirable_weight": 0.5},
    "sigmoid:0.5,bco_pair:2,aot:1": {},
}


def toy_step(n=13):
    """A step of n pairs whose scores are a linear model's of 5 weights, (2n,) in turn, and what
    goes with them.
    """
    random = torch.Generator().manual_seed(5)
    inputs = torch.randn(2 * n, 5, dtype=torch.float64, generator=random)
    ref = inputs @ torch.randn(5, dtype=torch.float64, generator=random)
    mismatched = torch.randn(2 * n, dtype=torch.float64, generator=random) + 0.5
    return inputs, ref, torch.randint(1, 9, (2 * n,), generator=random), mismatched


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        *((name, False) for name in COUPLED),
        ("aot_unpaired", True),
        ("bco_pair", True),
        ("kto", True),
    ],
)
def test_two_passes_give_the_gradient_of_the_whole_step(name, labels):
    loss = choose(name, 0.3, COUPLED[name])
    inputs, ref, lengths, mismatched = toy_step()
    theta = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
    desired = torch.arange(26) % 3 == 0

    def examples(scores):
        if labels:
            return Labelled(scores, ref, lengths, desired)
        return Pairs.of(scores, ref, lengths)

    # all at once, with the statistics from plain formulas
    whole = examples(inputs @ theta)
    rewards = 0.3 * (inputs @ theta - ref).detach()
    baselines = {"bco_pair": float(rewards.mean()), "kto": float(mismatched.mean())}
    losses = loss(whole, baselines=baselines)
    (expected,) = torch.autograd.grad(losses.sum() / len(losses), theta)

    # scores without gradient, then batch by batch in other batches, in another order
    with torch.no_grad():
        found, gradient = loss.over_step(examples(inputs @ theta), RunningMean(), mismatched)
    assert torch.allclose(found, losses.detach(), rtol=1e-13) and not found.requires_grad
    total = torch.zeros(5, dtype=torch.float64)
    for batch in torch.arange(26).view(13, 2)[torch.randperm(13)].split((1, 0, 4, 8)):
        at = batch.flatten()
        (part,) = torch.autograd.grad((inputs[at] @ theta * gradient[at]).sum() / len(found), theta)
        total += part
    assert torch.allclose(total, expected, rtol=1e-12)


@pytest.mark.parametrize("name", COUPLED)
def test_a_step_does_not_depend_on_its_order(name):
    p = random_pairs(17)
    order = torch.randperm(17)
    loss, mismatched = choose(name, 0.3, COUPLED[name]), torch.rand(34, dtype=torch.float64)
    losses, gradient = loss.over_step(p, RunningMean(), mismatched)
    moved, other = loss.over_step(Pairs(*(x[order] for x in p)), RunningMean(), mismatched)
    assert torch.allclose(moved, losses[order], rtol=1e-13)
    assert torch.allclose(other.view(-1, 2), gradient.view(-1, 2)[order], rtol=1e-12)


@pytest.mark.parametrize("name", COUPLED)
def test_batches_alone_are_another_loss(name):
    p, mismatched = random_pairs(16), torch.rand(32, dtype=torch.float64)
    loss = choose(name, 0.3, COUPLED[name])
    halves = [
        loss.over_step(Pairs(*(x[at] for x in p)), RunningMean(), mismatched[at])[0]
        for at in (slice(0, 8), slice(8, 16))
    ]
    assert loss.couples
    assert not torch.allclose(
        torch.cat(halves), loss.over_step(p, RunningMean(), mismatched)[0], rtol=1e-3
    )


def test_uncoupled_losses_take_two_passes_too():
    p = random_pairs(6)
    loss = choose("orpo", 0.3, {})
    losses, gradient = loss.over_step(p, RunningMean(), weights=torch.arange(6))
    leaf = p.chosen.clone().requires_grad_()
    expected = loss(p._replace(chosen=leaf), torch.arange(6))
    assert torch.equal(losses, expected.detach())
    assert torch.allclose(gradient[0::2], torch.autograd.grad(expected.sum(), leaf)[0])


def test_the_running_mean_is_that_of_all_steps():
    first, second = random_pairs(5, 1), random_pairs(8, 2)
    running, loss = RunningMean(), choose("bco_pair", 0.3, {})
    loss.over_step(first, running)
    resumed = RunningMean()
    resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    found, _ = loss.over_step(second, resumed)
    everything = torch.cat([x for p in (first, second) for x in p.rewards(0.3)])
    assert resumed.count == 26 and resumed.mean == pytest.approx(
        float(everything.mean()), rel=1e-13
    )
    assert torch.allclose(
        found, loss(second, baselines={"bco_pair": float(everything.mean())}), rtol=1e-13
    )
    before = resumed.state_dict()
    held_out, _ = loss.over_step(first, resumed, update=False)
    assert resumed.state_dict() == before
    assert torch.equal(held_out, loss(first, baselines={"bco_pair": resumed.mean}))
    resumed.update(torch.zeros(0))
    assert resumed.state_dict() == before


def test_ktos_divergence_is_at_least_0_and_has_to_be_known():
    p, loss = random_pairs(4), choose("kto", 0.3, {})
    assert torch.equal(loss.over_step(p, RunningMean(), torch.tensor([-3.0, 1.0]))[0], loss(p))
    assert torch.equal(loss.over_step(p, RunningMean(), torch.tensor([]))[0], loss(p))
    assert torch.equal(
        loss.over_step(p, RunningMean(), torch.tensor([5.0, -1]))[0],
        loss(p, baselines={"kto": 2.0}),
    )
    with pytest.raises(ValueError, match="mismatched"):
        loss.over_step(p, RunningMean())


def test_a_pair_is_two_labelled_responses():
    p = random_pairs(7)
    for name, together in (
        ("kto", torch.mean),
        ("aot_unpaired", torch.mean),
        ("bco_pair", torch.sum),
    ):
        loss = choose(name, 0.3, {})
        both = p.split()
        assert both.desired.tolist() == [True, False] * 7 and torch.equal(
            both.lengths[1::2], p.rejected_len
        )
        assert torch.allclose(loss(p), together(loss(both).view(7, 2), 1), rtol=1e-13)


def test_weights_multiply_the_pair():
    p = random_pairs(3)
    loss = choose("ipo", 0.3, {"use_weighting": True})
    assert torch.equal(loss(p, torch.tensor([1.0, 0.5, 0])), loss(p) * torch.tensor([1.0, 0.5, 0]))


DPO = choose("sigmoid", 0.5, {})
# log pi -12 and -20, under the reference -15 and -18: log-ratios of 3 and -2; 4 and 5 tokens
PAIR = Pairs(
    *torch.tensor([[-12.0, -20, -15, -18]]).double().T, torch.tensor([4]), torch.tensor([5])
)
SUMMED = (0.5 * 3, 0.5 * -2)
REWARDS_BY_HAND = dict.fromkeys(LOSSES, SUMMED) | {
    "ipo": (0.5 * 3 / 4, 0.5 * -2 / 5),
    "sigmoid_norm": (0.5 * 3 / 4, 0.5 * -2 / 5),
    "simpo": (0.5 * -12 / 4, 0.5 * -20 / 5),
    "orpo": (0.5 * -12 / 4, 0.5 * -20 / 5),
    "cpo": (0.5 * -12, 0.5 * -20),
    "sft": (-12 / 4, -20 / 5),
    "rdpo": (0.5 * 3 + 0.01 * 4, 0.5 * -2 + 0.01 * 5),
}


@pytest.mark.parametrize("name", LOSSES)
def test_rewards_and_what_is_shown_of_them_by_hand(name):
    loss, (chosen, rejected) = choose(name, 0.5, {}), REWARDS_BY_HAND[name]
    assert [float(x) for x in loss.rewards(PAIR)] == pytest.approx([chosen, rejected], rel=1e-15)
    found = means(preference_sums(PAIR, torch.zeros(1), loss.rewards(PAIR)))
    assert found["rewards/chosen"] == pytest.approx(chosen, rel=1e-15)
    assert found["rewards/rejected"] == pytest.approx(rejected, rel=1e-15)
    assert found["rewards/margins"] == pytest.approx(chosen - rejected, rel=1e-14)
    assert found["rewards/accuracies"] == (chosen > rejected)
    if loss.takes_labelled:
        both = loss.rewards(PAIR.split())
        assert both.tolist() == pytest.approx([chosen, rejected], rel=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_a_reward_is_what_the_loss_looks_at(name):
    """Pairs that differ, but not in their rewards, have the same loss."""
    row, p = LOSSES[name], random_pairs(6)
    args = {"nll_weight": 0.0} if "nll_weight" in row.parameters else {}  # that is no reward's
    loss = choose(name, 0.5, args)
    assert row.reward.of_ratio is row.needs_reference
    if not row.reward.of_ratio:
        other = p._replace(ref_chosen=3 * p.ref_chosen, ref_rejected=p.ref_rejected - 1)
        assert torch.equal(loss(other), loss(p)), "the reference does not count"
    else:
        other = Pairs(*(x + 2.5 for x in p[:4]), *p[4:])
        assert torch.allclose(loss(other), loss(p), rtol=1e-11), "ratios alone count"
    longer = p._replace(chosen_len=2 * p.chosen_len, rejected_len=2 * p.rejected_len)
    doubled = Pairs(*(2 * x for x in p))
    if row.reward.per_token:
        assert torch.allclose(loss(doubled), loss(p), rtol=1e-12), "means a token stand still"
        assert not torch.allclose(loss(longer), loss(p))
    elif not row.reward.paid_a_token:
        assert torch.equal(loss(longer), loss(p)), "lengths do not count"
    else:
        assert not torch.allclose(loss(longer), loss(p))


def test_rewards_of_sums_divergences_and_damping():
    simpo = choose("simpo", 0.5, {})
    for spec in ("simpo:1.0,sigmoid:2.0", "sft:2.0,simpo:0.5"):  # sft compares nothing
        loss = choose(spec, 0.5, {})
        assert [*map(float, loss.rewards(PAIR))] == [*map(float, simpo.rewards(PAIR))]
        assert loss.formula_of_rewards == "beta x log-prob, mean a token: that of simpo"
    forward = choose("sigmoid", 0.5, {"f_divergence_type": "forward_kl"})
    expected = [0.5 * (1 - math.exp(-3)), 0.5 * (1 - math.exp(2))]
    assert [*map(float, forward.rewards(PAIR))] == pytest.approx(expected, rel=1e-14)
    assert "forward_kl" in forward.formula_of_rewards
    assert "0.5 (LD-DPO)" in choose("sigmoid", 0.1, {"ld_alpha": 0.5}).formula_of_rewards
    assert DPO.formula_of_rewards == "beta x log-ratio to the reference, summed"
    length = choose("rdpo", 0.5, {"alpha": 0.2})
    assert length.formula_of_rewards.endswith("+ 0.2 a token of length")
    expected = [0.5 * 3 + 0.2 * 4, 0.5 * -2 + 0.2 * 5]
    assert [*map(float, length.rewards(PAIR))] == pytest.approx(expected, rel=1e-14)


def test_measures_of_labelled_responses_by_hand():
    examples = Labelled(
        logps=torch.tensor([-10.0, -9, -8, -7]).double(),
        ref_logps=torch.tensor([-12.0, -8, -8, -6]).double(),
        lengths=torch.tensor([4, 5, 2, 7]),
        desired=torch.tensor([True, True, True, False]),
    )
    # rewards at beta 0.5: 1, -0.5, 0 for the desired, -0.5 for the other: right, wrong, a tie,
    # right
    sums = preference_sums(examples, torch.tensor([1.0, 2, 3, 6]), DPO.rewards(examples))
    found = means(sums)
    assert sums[0] == 4 and len(sums) == 1 + len(PAIR_SUMS)
    assert found["loss"] == 3 and found["rewards/accuracies"] == 2.5 / 4
    assert found["rewards/chosen"] == pytest.approx(0.5 / 3) and found["rewards/rejected"] == -0.5
    assert found["rewards/margins"] == pytest.approx(0.5 / 3 + 0.5)
    assert found["logps/chosen"] == -9 and found["logps/chosen_per_token"] == pytest.approx(
        -27 / 11
    )
    assert found["logps/rejected_per_token"] == -1 and found["chosen_fell"] == pytest.approx(1 / 3)
    empty = Labelled(*(x[:0] for x in examples))
    none = preference_sums(empty, torch.zeros(0), DPO.rewards(empty))
    assert not none.any() and len(none) == len(sums)
    first_three = Labelled(*(x[:3] for x in examples))
    desired_only = means(preference_sums(first_three, torch.ones(3), DPO.rewards(first_three)))
    assert math.isnan(desired_only["rewards/rejected"]) and desired_only["loss"] == 1


def test_measures_by_hand():
    p = pairs((-10, -9, -12, -8), (-10, -9, -10, -9), (-11, -5, -10, -9))
    # rewards at beta 0.5: (1, -0.5), (0, 0), (-0.5, 2): margins 1.5, 0, -2.5; a tie counts one half
    sums = preference_sums(p, torch.tensor([1.0, 2.0, 6.0]), DPO.rewards(p))
    found = means(sums)
    assert sums[0] == 3 and len(sums) == 1 + len(PAIR_SUMS)
    assert found["loss"] == 3.0
    assert found["rewards/chosen"] == pytest.approx(0.5 / 3)
    assert found["rewards/rejected"] == pytest.approx(1.5 / 3)
    assert found["rewards/margins"] == pytest.approx(-1 / 3)
    assert found["rewards/accuracies"] == 0.5
    assert found["logps/chosen"] == pytest.approx(-31 / 3)
    assert found["logps/chosen_per_token"] == pytest.approx(-31 / 12)
    assert found["logps/rejected_per_token"] == pytest.approx(-23 / 15)
    assert found["chosen_fell"] == pytest.approx(1 / 3)


def test_measures_add_up_over_batches():
    p = pairs((-10, -9, -12, -8), (-10, -9, -10, -9), (-11, -5, -10, -9))
    losses = torch.tensor([1.0, 2.0, 6.0])

    def part(which):
        these = Pairs(*(x[which] for x in p))
        return preference_sums(these, losses[which], DPO.rewards(these))

    none = part(slice(0, 0))
    assert none.tolist() == [0] * (1 + len(PAIR_SUMS))
    whole = preference_sums(p, losses, DPO.rewards(p))
    assert torch.allclose(part(slice(0, 1)) + part(slice(1, 3)) + none, whole, rtol=1e-15)


def test_the_table_of_metrics_names_what_is_measured():
    measured = means(torch.ones(1 + len(PAIR_SUMS)))
    assert {metric.name for metric in METRICS} == set(measured)
    # the closing table's rows, in its order
    assert [(metric.title, metric.name) for metric in METRICS if metric.in_table] == [
        ("loss", "loss"),
        ("reward accuracy", "rewards/accuracies"),
        ("reward margin", "rewards/margins"),
        ("log-prob of chosen", "logps/chosen"),
        ("log-prob of rejected", "logps/rejected"),
    ]
    assert LABELS["logps/chosen_per_token"] == "log-prob of chosen, nats a token"
    assert LABELS["loss"] == "loss"


def test_nothing_measured_is_nan():
    assert all(math.isnan(v) for v in means(torch.zeros(1 + len(PAIR_SUMS))).values())


def test_ties_count_one_half():
    assert wins(torch.tensor([2.0, -1.0, 0.0])).tolist() == [1, 0, 0.5]


def test_wilson_against_a_published_value():
    # 81 of 263: Newcombe 1998 (Statistics in Medicine 17, table I) gives 0.2553 to 0.3662
    low, high = wilson(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
