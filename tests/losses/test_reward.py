"""Losses of reward models against numbers derived by hand, in fp64, and their gradients."""

import math

import pytest
import torch

from train.losses import reward
from train.losses.reward import ScoredAnswers, ScoredPairs

CHOSEN = [1.2, -0.3, 0.8]
REJECTED = [0.4, 0.5, 0.8]
MARGIN = [0.5, 0.0, 1.0]


def pairs(margin=(0.0, 0.0, 0.0)):
    """Three pairs: right by 0.8, wrong by 0.8, and a tie."""
    chosen, rejected = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (CHOSEN, REJECTED)
    )
    return ScoredPairs(chosen, rejected, torch.tensor(margin, dtype=torch.float64))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_bradley_terry():
    """-log sigmoid(h) = log(1 + exp(-h)), and its derivative by h is -sigmoid(-h): chosen's gradient,
    and the opposite of rejected's.
    """
    examples = pairs()
    losses = reward.bradley_terry(examples)
    differences = [0.8, -0.8, 0.0]
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-h)) for h in differences])
    assert losses[2].item() == pytest.approx(math.log(2), abs=1e-15)
    assert losses.mean().item() == pytest.approx(0.7451161708185002, abs=1e-14)  # OpenRLHF's too
    losses.sum().backward()
    slopes = [-sigmoid(-h) for h in differences]
    assert examples.chosen.grad.tolist() == pytest.approx(slopes, abs=1e-15)
    assert examples.rejected.grad.tolist() == pytest.approx([-s for s in slopes], abs=1e-15)


def test_margin():
    """Chosen has to be better by the margin: h is 0.3, -0.8 and -1."""
    losses = reward.bradley_terry(pairs(MARGIN))
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-h)) for h in (0.3, -0.8, -1)])
    assert losses.mean().item() == pytest.approx(1.012905865978176, abs=1e-14)  # OpenRLHF's too


def test_label_smoothing():
    """-(1 - e) log sigmoid(h) - e log sigmoid(-h) = log(1 + exp(-h)) + e h, since log sigmoid(-h) is
    log sigmoid(h) - h. The gradient is e - sigmoid(-h): 0 where sigmoid(-h) is the share of flips.
    """
    examples = pairs()
    losses = reward.bradley_terry(examples, label_smoothing=0.1)
    expected = [math.log1p(math.exp(-h)) + 0.1 * h for h in (0.8, -0.8, 0.0)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-15)
    losses.sum().backward()
    expected = [0.1 - sigmoid(-h) for h in (0.8, -0.8, 0.0)]
    assert examples.chosen.grad.tolist() == pytest.approx(expected, abs=1e-15)
    best = torch.tensor([math.log(9)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(best)
    reward.bradley_terry(ScoredPairs(best, zero, zero), label_smoothing=0.1).backward()
    assert abs(best.grad.item()) < 1e-15


def test_centering():
    """The sums of the scores are 1.6, 0.2 and 1.6: 0.01 times the mean of their squares is 0.0172.
    Both gradients move by 2 * 0.01 * sum.
    """
    plain, centred = pairs(), pairs()
    reward.bradley_terry(plain).sum().backward()
    losses = reward.bradley_terry(centred, centering=0.01)
    assert losses.mean().item() == pytest.approx(0.7451161708185002 + 0.0172, abs=1e-14)
    assert losses.mean().item() == pytest.approx(0.7623161708185002, abs=1e-14)  # as TRL has it
    losses.sum().backward()
    for one, other in ((plain.chosen, centred.chosen), (plain.rejected, centred.rejected)):
        assert (other.grad - one.grad).tolist() == pytest.approx([0.032, 0.004, 0.032], abs=1e-15)


def test_logistic():
    """-log of the probability that the target has: sigmoid(1.2), 1 - sigmoid(-0.3), and half each.
    The gradient is sigmoid(r) - t.
    """
    scores = torch.tensor(CHOSEN, dtype=torch.float64, requires_grad=True)
    losses = reward.logistic(ScoredAnswers(scores, torch.tensor([1.0, 0.0, 0.5]).double()))
    p = [sigmoid(r) for r in CHOSEN]
    third = -0.5 * math.log(p[2]) - 0.5 * math.log(1 - p[2])
    assert losses.tolist() == pytest.approx([-math.log(p[0]), -math.log(1 - p[1]), third])
    losses.sum().backward()
    assert scores.grad.tolist() == pytest.approx([p[0] - 1, p[1], p[2] - 0.5], abs=1e-15)


def test_squared():
    scores = torch.tensor(CHOSEN, dtype=torch.float64, requires_grad=True)
    losses = reward.squared(
        ScoredAnswers(scores, torch.tensor([1.0, 0.5, 0.8], dtype=torch.float64))
    )
    assert losses.tolist() == pytest.approx([0.04, 0.64, 0.0], abs=1e-15)
    losses.sum().backward()
    assert scores.grad.tolist() == pytest.approx([0.4, -1.6, 0.0], abs=1e-15)


def test_far_scores_stay_finite():
    """At a difference of -1,000 the loss is 1,000 and its gradient -1: no exponential overflows."""
    chosen = torch.tensor([-500.0, 500.0], requires_grad=True)
    zeros = torch.zeros(2)
    losses = reward.bradley_terry(ScoredPairs(chosen, -chosen.detach(), zeros))
    assert losses.tolist() == [1000.0, 0.0]
    losses.sum().backward()
    assert chosen.grad.tolist() == [-1.0, 0.0]


def test_parameters_are_the_signature():
    assert reward.LOSSES["bradley_terry"].parameters == {"label_smoothing": 0.0, "centering": 0.0}
    assert reward.LOSSES["squared"].parameters == {}
    loss = reward.choose("bradley_terry", {"label_smoothing": 0.1, "centering": 1})
    expected = reward.bradley_terry(pairs(), label_smoothing=0.1, centering=1)
    assert torch.equal(loss(pairs()), expected)
    assert loss.row.takes_pairs and not reward.choose("logistic", {}).row.takes_pairs


@pytest.mark.parametrize(
    "name, args, words",
    [
        ("bradley", {}, "none of: bradley_terry, logistic, squared"),
        (
            "bradley_terry",
            {"beta": 1.0},
            "takes no beta; its parameters are: label_smoothing, cent",
        ),
        ("squared", {"centering": 1.0}, "takes no centering; its parameters are: none"),
        ("bradley_terry", {"centering": "x"}, "centering is a float, not 'x'"),
        ("bradley_terry", {"centering": True}, "centering is a float, not True"),
        ("bradley_terry", {"label_smoothing": 0.5}, r"lies in \[0, 0.5\), not at 0.5"),
        ("bradley_terry", {"label_smoothing": math.nan}, "not at nan"),
        ("bradley_terry", {"centering": -1.0}, "at least 0, not -1.0"),
    ],
)
def test_refusals(name, args, words):
    with pytest.raises(ValueError, match=words):
        reward.choose(name, args)
