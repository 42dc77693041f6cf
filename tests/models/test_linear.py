"""Our layers against torch's own, in fp64 and in fp32, under autocast, over several rows, and what is left alone."""

import copy

import pytest
import torch
from torch import nn

from train.losses import products
from train.losses.logprobs import token_logps
from train.models import linear


def tied(bias=True, dtype=torch.float32):
    """An embedding with a padding token, two layers, and the embedding's weight once more as the head."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 24, padding_idx=2), nn.Linear(24, 40, bias), nn.Linear(40, 24, bias))
    return model.to(dtype)


def run(model, ids, target, weights):
    hidden = model(ids)[0]
    logps = token_logps(hidden, model[0].weight, target, None, budget=70 * 50 * 4)  # two chunks and more
    (logps * weights).sum().backward()
    return logps.detach()


def rows(count, tokens):
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (count, 1, tokens), generator=random)
    ids[:, 0, ::7] = 2  # padding's id occurs
    return ids, torch.randint(50, (count, tokens), generator=random), torch.randn(count, tokens, generator=random)


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("tokens", [1, products.ROWS - 1, products.ROWS, 150])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_add_up_within_fp32_rounding_of_fp64(tokens, bias, gathers):
    true = tied(bias, torch.float64)
    ours = tied(bias)
    linear.swap(ours)
    assert [type(layer) for layer in ours] == [linear.Embedding, linear.Linear, linear.Linear]
    if gathers:
        products.gather_in_place(ours)
    for ids, target, weights in zip(*rows(3, tokens), strict=True):
        logps, expected = run(ours, ids, target, weights), run(true, ids, target, weights.double())
        assert (logps - expected).abs().max() < 1e-5
    for mine, theirs in zip(ours.parameters(), true.parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 3e-6 * theirs.grad.abs().max()


def test_fp64_is_exact_and_autocast_is_torchs():
    plain, ours = tied(dtype=torch.float64), tied(dtype=torch.float64)
    linear.swap(ours)
    (ids, *_), (target, *_), (weights, *_) = rows(1, 100)
    assert torch.equal(run(ours, ids, target, weights), run(plain, ids, target, weights))
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-13, atol=1e-15)
    plain, ours = tied(), tied()
    linear.swap(ours)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(ids), plain(ids)) and ours(ids).dtype == torch.bfloat16
        run(ours, ids, target, weights), run(plain, ids, target, weights)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 0.01 * theirs.grad.abs().max()


def test_the_fast_product_and_the_place_of_gradients_are_really_taken(monkeypatch):
    taken = []
    if torch.backends.mkldnn.is_available():
        fast = torch.ops.mkldnn._linear_pointwise
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: taken.append(1) or fast(*a))
    ours = tied()
    linear.swap(ours)
    products.gather_in_place(ours)
    ids, target, weights = rows(2, 150)
    run(ours, ids[0], target[0], weights[0])
    assert not torch.backends.mkldnn.is_available() or len(taken) >= 6
    before = [p.grad for p in ours.parameters()]
    kept = [grad.clone() for grad in before]
    run(ours, ids[1], target[1], weights[1])
    for p, grad, old in zip(ours.parameters(), before, kept, strict=True):
        assert p.grad is grad and not torch.equal(grad, old)


def test_swap_leaves_other_layers_and_shared_weights_alone():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(
        nn.Embedding(7, 8), Special(8, 8), nn.Linear(8, 7, bias=False), nn.Embedding(7, 8, max_norm=1)
    )
    model[2].weight = model[0].weight
    linear.swap(model)
    assert type(model[1]) is Special and type(model[2]) is linear.Linear and type(model[3]) is nn.Embedding
    assert model[2].weight is model[0].weight
    linear.swap_back(model)
    assert type(model[2]) is nn.Linear and type(model[0]) is nn.Embedding


def test_expanded_gradients_and_the_same_result_twice():
    ours = nn.Sequential(nn.Linear(96, 160))
    linear.swap(ours)
    x = torch.randn(1, 300, 96)
    found = [torch.autograd.grad(copy.deepcopy(ours)(x.requires_grad_()).sum(), x)[0] for _ in range(2)]
    assert torch.equal(*found)
    assert torch.allclose(found[0], ours[0].weight.sum(0).expand_as(x), atol=1e-5)
