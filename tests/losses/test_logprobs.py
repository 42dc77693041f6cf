"""Token log-probabilities reduced to responses: sums, LD-DPO's damping, WPO's weights."""

import math

import torch

from train.losses.logprobs import damped, sum_per_response, wpo_weights


def test_damped_by_hand():
    # pairs of 2 and 3 tokens, of 1 and 1, of 4 and 2: what is past 2, 1, 2 tokens counts half
    lengths = torch.tensor([2, 3, 1, 1, 4, 2])
    values = -torch.arange(1.0, 14.0)
    found = damped(values, lengths, 0.5)
    assert found.tolist() == [-1, -2, -3, -4, -2.5, -6, -7, -8, -9, -5, -5.5, -12, -13]
    assert sum_per_response(found, lengths).tolist() == [-3, -9.5, -6, -7, -27.5, -25]
    assert torch.equal(damped(values, lengths, 1.0), values)
    assert damped(values[:0], lengths[:0], 0.5).shape == (0,)


def test_weights_by_hand():
    logps = torch.tensor([0.5, 0.25, 0.1]).log().requires_grad_()
    squares = torch.tensor([0.5, 0.5, 0.2]).log()
    # token ratios 1, 1/2 and 1/2: geometric means a response
    found = wpo_weights(logps, squares, torch.tensor([2, 1]))
    expected = torch.tensor([0.5**0.5, 0.5], dtype=torch.float64)
    assert torch.allclose(found, expected) and not found.requires_grad
    assert wpo_weights(logps[:0], squares[:0], torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_score_by_hand():
    values = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0], requires_grad=True)
    total = sum_per_response(values, torch.tensor([3, 2]))
    assert total.tolist() == [-7.0, -24.0]
    total[1].backward()
    assert values.grad.tolist() == [0, 0, 0, 1, 1]


def test_score_of_nothing_stays_in_the_graph():
    values = torch.zeros(3, requires_grad=True)
    total = sum_per_response(values[:0], torch.zeros(0, dtype=torch.int64))
    assert total.shape == (0,)
    total.sum().backward()
    assert values.grad.tolist() == [0, 0, 0]


def test_score_of_a_long_answer_loses_no_digit():
    """Added up one after the other in fp32, these 800 values would end 1e-3 nats away."""
    values = -6.85 * torch.rand(800, generator=torch.Generator().manual_seed(0))
    exact = math.fsum(values.tolist())
    in_turn = values.cumsum(0)[-1]  # fp32
    assert abs(float(in_turn) - exact) > 1e-5
    (total,) = sum_per_response(values, torch.tensor([800])).tolist()
    assert abs(total - exact) < 1e-11
