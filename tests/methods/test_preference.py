"""Coupled losses: what the second pass over a step gets of the first."""

import torch

from train.losses.preference import Labelled
from train.methods import preference


class Batch:
    group_rows = (7, 3)


def test_examples_and_losses_of_a_batch_are_on_one_device():
    """The first pass ends on the CPU; what is shown and what goes backward meet where the scores
    are: here on "meta", as on a GPU.
    """
    examples = Labelled(*(torch.arange(3.0).double() for _ in range(3)), torch.tensor([True] * 3))
    whole = preference._WholeStep({3: 0, 7: 1, 9: 2}, examples, torch.ones(3), torch.ones(3))
    scores = torch.zeros(2, dtype=torch.float64, device="meta", requires_grad=True)
    scored = whole.of_batch(Batch, scores)
    losses = preference._WithGradient.apply(scored.scores, scored.step_losses, scored.step_gradient)
    assert {x.device.type for x in (*scored.examples, losses)} == {"meta"}


def test_the_gradient_of_a_known_loss_is_the_one_given():
    scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    losses, gradient = torch.tensor([5.0, 6.0]), torch.tensor([1.0, -2.0, 3.0, -4.0])
    found = preference._WithGradient.apply(scores, losses, gradient)
    assert found.tolist() == [5, 6]
    (found * torch.tensor([1.0, 10.0])).sum().backward()
    assert scores.grad.tolist() == [1, -2, 30, -40]
