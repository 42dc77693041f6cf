"""Attention over padded segments, which CUDA computes where its flash kernel does not apply, against
one segment at a time in fp64; and when it applies.
"""

import pytest
import torch
import transformers

from train.data.packing import Group, pack
from train.engine.ds_config import resolve_precision
from train.models import attention

# prompt and responses; the third is plain text, the fourth has three responses
SIZES = [(5, 4, 9), (1, 30, 2), (0, 7), (6, 2, 5, 3), (3, 1, 1)]
HEADS, KEY_HEADS, SIZE = 6, 2, 20


def batch():
    """A packed batch of those sizes."""
    groups = [Group((1,) * p, tuple((1,) * n for n in sizes)) for p, *sizes in SIZES]
    return pack(groups)


def inputs(dtype=torch.float64):
    """query (1, H, L, D), key and value (1, G, L, D), and a gradient (1, L, H, D)"""
    random = torch.Generator().manual_seed(0)
    length = sum(map(sum, SIZES))

    def made(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    query, grad = made(1, HEADS, length, SIZE), made(1, length, HEADS, SIZE)
    key, value = made(1, KEY_HEADS, length, SIZE), made(1, KEY_HEADS, length, SIZE)
    return [x.requires_grad_() for x in (query, key, value)], grad


def value_and_gradients(compute, grad, leaves):
    """What `compute` gives for query, key and value, and their gradients."""
    out = compute(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("window", [0, 1, 4, 16])
def test_padded_segments_are_one_segment_at_a_time(window, deterministic):
    leaves, grad = inputs()
    segments = attention.Segments(batch(), deterministic)

    def plain(query, key, value):
        return attention._by_segment(query, key, value, segments, 0.3, window)

    def padded(query, key, value):
        return attention._padded(query[0], key[0], value[0], segments, 0.3, window)

    expected = value_and_gradients(plain, grad, leaves)
    found = value_and_gradients(padded, grad, leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_padding_adds_nothing_to_a_gradient():
    """In fp32 the value and each gradient are fp64's but for rounding."""
    exact_leaves, exact_grad = inputs()
    leaves, grad = inputs(torch.float32)
    segments = attention.Segments(batch())

    def padded(query, key, value):
        return attention._padded(query[0], key[0], value[0], segments, None, 0)

    exact = value_and_gradients(padded, exact_grad, exact_leaves)
    for ours, theirs in zip(value_and_gradients(padded, grad, leaves), exact, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize(
    "head_size, dtype, takes",
    [
        (64, torch.bfloat16, True),
        (256, torch.float16, True),
        (264, torch.bfloat16, False),
        (20, torch.bfloat16, False),
        (64, torch.float32, False),
    ],
)
def test_heads_that_flash_kernels_have(head_size, dtype, takes):
    assert attention.flash_takes(head_size, dtype) is takes


@pytest.mark.parametrize(
    "gpu, capability, flash, precision",
    [
        ("V100", (7, 0), False, "fp32"),
        ("T4", (7, 5), False, "fp32"),
        ("A100", (8, 0), True, "bf16"),
        ("H100", (9, 0), True, "bf16"),
    ],
)
def test_what_a_gpu_is_given(monkeypatch, gpu, capability, flash, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    device = torch.device("cuda", 0)
    assert attention.has_flash(device) is flash
    assert resolve_precision("auto", device) == precision
    assert resolve_precision("bf16", device) == "bf16"  # asked for is asked for


@pytest.mark.parametrize(
    "capability, dtype, heads, why",
    [
        ((8, 0), torch.bfloat16, {}, ""),
        ((7, 5), torch.bfloat16, {}, "a T4 is older than sm80"),
        ((8, 0), torch.float32, {}, "it has no fp32"),
        (
            (9, 0),
            torch.bfloat16,
            {"head_dim": 20},
            "it has no heads of 20: multiples of 8 up to 256",
        ),
        (
            (9, 0),
            torch.bfloat16,
            {"head_dim": None, "hidden_size": 1200, "num_attention_heads": 4},
            "it has no heads of 300: multiples of 8 up to 256",
        ),
    ],
)
def test_why_attention_goes_without_flash(monkeypatch, capability, dtype, heads, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a T4")
    config = transformers.LlamaConfig(**heads)
    assert attention.without_flash(config, dtype, torch.device("cuda", 0)) == why
    assert attention.without_flash(config, dtype, torch.device("cpu")) == ""


def test_a_cpu_is_asked_for_no_gpu():
    assert not attention.has_flash(torch.device("cpu"))
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"


def test_the_flash_backward_runs_under_the_flag():
    """The kernel itself is on CUDA only: a stand-in on the CPU says what it was called with."""
    from torch.nn.attention import varlen

    seen = []

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def stand_in(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, rng, scale, window):
        flag = torch.are_deterministic_algorithms_enabled()
        seen.append((flag, max_q, max_k, causal, scale, window))
        return q + 1, k + 2, v + 3

    x = torch.zeros(4, 2, 8)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    tensors = (x, x, x, x, x, x, cu, cu, x)
    grads = attention.varlen_backward_in_order(*tensors, 4, 3, 0.5, [3, 0])
    attention.varlen_backward_in_order(*tensors, 4, 3, None, [-1, 0])
    assert seen == [(True, 4, 3, False, 0.5, [3, 0]), (True, 4, 3, True, None, [-1, 0])]
    assert [float(grad.mean()) for grad in grads] == [1, 2, 3]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("before", [False, True])
def test_the_flag_for_kernels_is_put_back(before):
    torch.use_deterministic_algorithms(before, warn_only=True)
    try:
        with attention._deterministic_kernels():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled() is before
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
