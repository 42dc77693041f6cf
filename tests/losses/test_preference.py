"""Losses and measures with numbers derived by hand."""

import math

import pytest
import torch

from train.losses.measures import PAIR_SUMS, means, of_pairs, wilson, wins
from train.losses.preference import LOSSES, Pairs, choose


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
    assert found.item() == pytest.approx(0.8 * math.log1p(math.exp(-0.3)) + 0.2 * math.log1p(math.exp(0.3)), rel=1e-14)


def test_far_margins_are_linear_not_infinite():
    found = choose("sigmoid", 1.0, {})(pairs((-10, -9, -10, -2009), (-10, -2009, -10, -9)))
    assert found.tolist() == [2000.0, 0.0]


def test_unknown_loss_names_the_choices():
    with pytest.raises(ValueError, match="'sigmiod' is none of: sigmoid"):
        choose("sigmiod", 0.1, {})


def test_foreign_parameters_are_refused_with_the_list():
    with pytest.raises(ValueError, match="takes no tau; its parameters are: label_smoothing"):
        choose("sigmoid", 0.1, {"tau": 1})


def test_parameters_out_of_range_are_refused_at_once():
    with pytest.raises(ValueError, match=r"label_smoothing lies in \[0, 0.5\)"):
        choose("sigmoid", 0.1, {"label_smoothing": 0.5})


def test_every_loss_cites_its_paper():
    for name, loss in LOSSES.items():
        assert "arXiv" in loss.__doc__ and "equation" in loss.__doc__, name


def test_measures_by_hand():
    p = pairs((-10, -9, -12, -8), (-10, -9, -10, -9), (-11, -5, -10, -9))
    # rewards at beta 0.5: (1, -0.5), (0, 0), (-0.5, 2): margins 1.5, 0, -2.5; a tie counts one half
    sums = of_pairs(p, torch.tensor([1.0, 2.0, 6.0]), 0.5)
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


def test_measures_add_up_over_rows():
    p = pairs((-10, -9, -12, -8), (-10, -9, -10, -9), (-11, -5, -10, -9))
    losses = torch.tensor([1.0, 2.0, 6.0])
    part = lambda which: of_pairs(Pairs(*(x[which] for x in p)), losses[which], 0.5)
    none = part(slice(0, 0))
    assert none.tolist() == [0] * (1 + len(PAIR_SUMS))
    assert torch.allclose(part(slice(0, 1)) + part(slice(1, 3)) + none, of_pairs(p, losses, 0.5), rtol=1e-15)


def test_nothing_measured_is_nan():
    assert all(math.isnan(v) for v in means(torch.zeros(1 + len(PAIR_SUMS))).values())


def test_ties_count_one_half():
    assert wins(torch.tensor([2.0, -1.0, 0.0])).tolist() == [1, 0, 0.5]


def test_wilson_against_a_published_value():
    # 81 of 263: Newcombe 1998 (Statistics in Medicine 17, table I) gives 0.2553 to 0.3662
    low, high = wilson(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
