"""Attention on a CPU, in calls of some queries with the keys up to their last, against a segment at once."""

import pytest
import torch

from train.data.packing import Group, pack
from train.models import attention

LAST = attention.CALL_QUERIES
# Prompt and responses: fewer queries than a call takes, exactly as many, one more, several calls.
SIZES = [(10, LAST - 10, LAST), (LAST, LAST + 1, 2 * LAST + 30, 1), (1, 200, 3), (150, 70, 90)]


def segments_of(sizes):
    """Of one packed batch; which tokens it holds plays no part."""
    ids = [[range(n) for n in group] for group in sizes]
    return attention.Segments(pack([Group(prompt, responses) for prompt, *responses in ids]))


def attend(function, segments, window, dtype, inputs, grad):
    """What `function` gives and its gradients, in fp64."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    out = function(*leaves, segments, None, window)
    out.backward(grad.to(dtype))
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]


@pytest.mark.parametrize("window", [0, 1, 20, LAST, LAST + 1, 100, 1000])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 4e-6)])
def test_calls_equal_a_segment_at_once(window, dtype, bound):
    """Values and gradients, with four heads on two; within the rounding of the type."""
    segments = segments_of(SIZES)
    length = sum(map(sum, SIZES))
    torch.manual_seed(0)
    query, grad = torch.randn(2, 1, 4, length, 16, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, length, 16, dtype=torch.float64)
    inputs = (query, key, value)
    grad = grad.transpose(1, 2)
    expected = attend(attention._by_segment, segments, window, torch.float64, inputs, grad)
    found = attend(attention.CpuAttention.apply, segments, window, dtype, inputs, grad)
    for mine, true in zip(found, expected, strict=True):
        assert (mine - true).abs().max() <= bound * true.abs().max().clamp(min=1)


def test_what_a_call_holds():
    """By hand: a prompt of 10 with responses of 60 and of LAST + 2 tokens; the first response's queries
    include the prompt's.
    """
    segments = segments_of([(10, 60, LAST + 2)])
    first, second = segments
    calls = [list(segments.calls(segment, 0, torch.zeros(1))) for segment in (first, second)]
    assert [call[:3] for call in calls[0]] == [(0, LAST, LAST), (LAST, 70, 70)]
    assert [call[:3] for call in calls[1]] == [(0, LAST, 10 + LAST), (LAST, LAST + 2, 12 + LAST)]
    assert calls[0][0].mask is None  # as many keys as queries: causal says it all
    (earlier, last) = calls[1][1].mask == 0  # (2, k) which keys are seen
    assert earlier.tolist() == [True] * (11 + LAST) + [False] and last.all()
    assert len(segments._call_masks) == 3  # of 70 - LAST, LAST and 2 queries


def test_tokens_behind_a_call_change_nothing_before_it():
    """The bits of a token are those that its segment gives without what follows."""
    torch.manual_seed(0)
    longer, shorter = segments_of([(10, 200)]), segments_of([(10, 2 * LAST - 10)])
    query = torch.randn(1, 4, 210, 16)
    key, value = torch.randn(2, 1, 2, 210, 16)
    whole = attention.CpuAttention.apply(query, key, value, longer, None, 0)
    part = [x[:, :, : 2 * LAST] for x in (query, key, value)]
    cut = attention.CpuAttention.apply(*part, shorter, None, 0)
    assert torch.equal(whole[:, : 2 * LAST], cut)
