"""The chunked head against log_softmax over all logits, and the memory that it works in."""

import math

import pytest
import torch

from train.models import lm_head, matmul
from train.models.lm_head import token_logps

VOCABULARY = 37  # of `inputs`; in fp64 a token's logits are 37 * 8 bytes


def plain(hidden, weight, target, bias=None):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return torch.log_softmax(logits, dim=-1).gather(1, target[:, None]).squeeze(1)


def inputs(tokens=11, vocabulary=VOCABULARY, width=8, dtype=torch.float64):
    """hidden (T, H), weight (V, H), target (T,), bias (V,)"""
    random = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype, generator=random).requires_grad_()

    hidden = leaf(tokens, width)
    weight = leaf(vocabulary, width)
    target = torch.randint(vocabulary, (tokens,), generator=random)
    return hidden, weight, target, leaf(vocabulary)


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_gradient_in_any_chunks(chunk, with_bias):
    hidden, weight, target, bias = inputs()
    bias = bias if with_bias else None
    weights = torch.randn(11, dtype=torch.float64)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    expected = plain(hidden, weight, target, bias)
    logps = token_logps(hidden, weight, target, bias, logits_bytes=chunk * VOCABULARY * 8)
    assert torch.allclose(logps, expected, rtol=1e-13)
    for ours, theirs in zip(
        torch.autograd.grad((logps * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def test_gradcheck():
    hidden, weight, target, bias = inputs(tokens=5, vocabulary=7, width=3)
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logps(h, w, target, b, logits_bytes=2 * 7 * 8), (hidden, weight, bias)
    )


def test_second_backward_is_the_same():
    # the first overwrites the kept logits; the second must compute them again
    hidden, weight, target, _ = inputs()
    loss = token_logps(hidden, weight, target).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.allclose(a, b, rtol=1e-13) for a, b in zip(first, second, strict=True))


def test_batches_that_wait_for_each_other_keep_their_logits(monkeypatch):
    monkeypatch.setattr(lm_head, "SLICE", 10)  # of a vocabulary of 37
    hidden, weight, target, bias = inputs()
    other = (hidden * 2).detach().requires_grad_()
    both = [token_logps(h, weight, target, bias).sum() for h in (hidden, other)]
    for loss, h in zip(both, (hidden, other), strict=True):
        ours = torch.autograd.grad(loss, (h, weight, bias))
        expected = torch.autograd.grad(plain(h, weight, target, bias).sum(), (h, weight, bias))
        assert all(
            torch.allclose(a, b, rtol=1e-12, atol=1e-13)
            for a, b in zip(ours, expected, strict=True)
        )


def test_scratch_is_used_again_when_nobody_holds_it():
    like = torch.zeros(5, 3)
    first = matmul.scratch(like, 7, torch.float32)
    second, wide = (matmul.scratch(like, 7, dtype) for dtype in (torch.float32, torch.float64))
    first.fill_(1)
    second.fill_(2)
    wide.fill_(3)
    assert (first == 1).all() and (second == 2).all() and first.shape == (5, 7)
    place = first.data_ptr()
    del first
    assert matmul.scratch(like[:2], 4, torch.float32).data_ptr() == place
    assert matmul.scratch(like[:0], 4, torch.float32).shape == (0, 4)
    matmul._SCRATCH.clear()
    with torch.inference_mode():
        matmul.scratch(like, 90, torch.float32).fill_(1)
    matmul.scratch(like, 90, torch.float32).fill_(1)  # what inference mode made is not for others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_logits_share_one_memory(dtype, monkeypatch):
    """Forward and backward, recomputed chunks and the one that was kept: each goes before the next
    is made.
    """
    hidden, weight, target, _ = inputs(tokens=12, dtype=torch.float32)  # three chunks of 4
    matmul._SCRATCH.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logps = token_logps(hidden, weight, target, logits_bytes=4 * VOCABULARY * 4)
    memory, _ = matmul._SCRATCH[torch.float32]
    made = []  # dtypes
    new_empty = torch.Tensor.new_empty

    def counted(*args, **options):
        made.append(options["dtype"])
        return new_empty(*args, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    logps.sum().backward()
    assert matmul._SCRATCH[torch.float32][0] is memory
    assert made == ([] if dtype == torch.float32 else [torch.bfloat16])


def test_the_same_bits_with_and_without_a_gradient():
    # a reference is scored without; against a policy of the same weights its margins are 0 to the
    # bit
    hidden, weight, target, _ = inputs(tokens=300, vocabulary=9000, width=64, dtype=torch.float32)
    with torch.no_grad():
        without_graph = token_logps(hidden, weight, target)
    assert torch.equal(without_graph, token_logps(hidden, weight, target))


@pytest.mark.parametrize("cached_rows", [1, 3, 100])
def test_a_large_vocabulary_s_log_probabilities_are_not_biased(cached_rows, monkeypatch):
    """A likely token among 50,000 small ones: torch's own sum on a CPU loses 1e-5 of them."""
    monkeypatch.setattr(lm_head, "CACHED_BYTES", cached_rows * 50_000 * 4)
    hidden, weight, _, _ = inputs(tokens=40, vocabulary=50_000, width=16, dtype=torch.float32)
    hidden, weight = hidden.detach() / 2, weight.detach()
    target = torch.arange(40)
    weight[target] += hidden / hidden.square().mean(1, keepdim=True)  # 16 is added to its logit
    true = plain(hidden.double(), weight.double(), target)  # -0.3 nats on average
    found = token_logps(hidden, weight, target)
    assert (found - true).mean().abs() < 3e-7
    assert torch.equal(found, token_logps(hidden, weight, target, logits_bytes=7 * 50_000 * 4))


def test_huge_logits_stay_finite():
    hidden = torch.tensor([[300.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    logps = token_logps(hidden, weight, torch.tensor([1]))
    assert logps.item() == -600.0  # log softmax of (300, -300) at 1: -600 - log(1 + e^-600)
    logps.sum().backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_bf16_is_summed_in_fp32():
    hidden, weight, target, _ = inputs(tokens=50, vocabulary=5000, width=64, dtype=torch.float32)
    exact = plain(hidden.double(), weight.double(), target)
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logps(hidden, weight, target)
    assert logps.dtype == torch.float32
    rounded = plain(hidden.bfloat16().double(), weight.bfloat16().double(), target)
    # only the logits themselves are rounded: to 8 bits, at a size of up to 2^5
    assert (logps - rounded).abs().max() < 2.0**5 * 2.0**-8
    assert (logps - exact).abs().max() < 0.5


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_log_sum_of_squares_in_any_chunks(chunk, with_bias):
    hidden, weight, target, bias = inputs()
    bias = bias if with_bias else None
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    p = torch.softmax(torch.nn.functional.linear(hidden, weight, bias), -1)
    logits_bytes = chunk * VOCABULARY * 8
    logps, squares = token_logps(hidden, weight, target, bias, logits_bytes, log_p2=True)
    assert torch.allclose(squares, (p**2).sum(-1).log(), rtol=1e-12) and not squares.requires_grad
    assert torch.equal(logps, token_logps(hidden, weight, target, bias, logits_bytes))
    # the gradient is the same, twice: the first backward pass overwrites what was kept
    expected = torch.autograd.grad(plain(hidden, weight, target, bias).square().sum(), leaves)
    first = torch.autograd.grad(logps.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(logps.square().sum(), leaves)
    for ours, again, theirs in zip(first, second, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13)
        assert torch.allclose(again, theirs, rtol=1e-12, atol=1e-13)


def test_log_sum_of_squares_of_sure_and_of_flat_tokens():
    # fp32: one certain token of 49,152, whose other squares underflow, and 49,152 equal ones
    hidden = torch.tensor([[200.0], [0.0]])
    weight = torch.zeros(49152, 1)
    weight[7] = 1
    with torch.no_grad():
        logps, squares = token_logps(hidden, weight, torch.tensor([7, 0]), log_p2=True)
    # log(49152 p^2): the second token's own p, whose fp32 rounding counts twice, and 3 units in the
    # last place of 10.8
    expected = math.log(49152) + 2 * logps[1].item()
    assert squares[0] == 0 and squares[1].item() == pytest.approx(expected, abs=3 * 2**-20)
    assert logps[0] == 0 and logps[1].item() == pytest.approx(-math.log(49152), abs=2 * 2**-20)


def test_log_sum_of_squares_of_nothing():
    hidden, weight, *_ = inputs()
    logps, squares = token_logps(hidden[:0], weight, torch.zeros(0, dtype=torch.int64), log_p2=True)
    assert logps.shape == squares.shape == (0,)
    logps.sum().backward()
    assert not hidden.grad.any()


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_a_temperature_divides_logits(temperature, chunk):
    """Values, gradients and entropies are those of the divided logits, in any chunks."""
    torch.manual_seed(0)
    hidden = torch.randn(11, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, 16, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(VOCABULARY, dtype=torch.float64, requires_grad=True)
    target = torch.randint(VOCABULARY, (11,))
    out = torch.randn(11, dtype=torch.float64)
    logps, entropy = token_logps(
        hidden,
        weight,
        target,
        bias,
        logits_bytes=chunk * VOCABULARY * 8,
        temperature=temperature,
        entropy=True,
    )
    found = torch.autograd.grad((logps * out).sum(), (hidden, weight, bias))
    plain = torch.log_softmax((hidden @ weight.t() + bias) / temperature, 1)
    true = plain.gather(1, target[:, None]).squeeze(1)
    wanted = torch.autograd.grad((true * out).sum(), (hidden, weight, bias))
    assert torch.allclose(logps, true, rtol=1e-12, atol=1e-12)
    assert torch.allclose(entropy, -(plain.exp() * plain).sum(1), rtol=1e-12, atol=1e-12)
    assert not entropy.requires_grad
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_a_token_that_cannot_come_has_no_part_in_the_entropy():
    """A bias of -inf keeps it out."""
    hidden, weight, target = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    bias = torch.zeros(11)
    bias[7:] = -torch.inf
    _, found = token_logps(hidden, weight, target, bias=bias, entropy=True)
    _, expected = token_logps(hidden, weight[:7], target, entropy=True)
    assert torch.allclose(found, expected, rtol=1e-5)


def test_log_p2_and_entropy_are_not_made_together():
    with pytest.raises(ValueError, match="in one call"):
        token_logps(*torch.zeros(2, 3, 4), torch.zeros(3).long(), log_p2=True, entropy=True)


def test_a_gpu_s_memory_bounds_a_chunk(monkeypatch):
    def has(gigabytes):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, gigabytes << 30))
        lm_head.default_logits_bytes.cache_clear()
        return lm_head.default_logits_bytes(torch.device("cuda", 0))

    assert has(80) == 2 << 30 and has(16) == lm_head.LOGITS_BYTES == 1 << 29
    lm_head.default_logits_bytes.cache_clear()
    assert lm_head.default_logits_bytes(torch.device("cpu")) == 1 << 29
