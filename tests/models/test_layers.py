"""Our layers against torch's own, in fp64 and in fp32, under autocast, over several rows, and what
is left alone.
"""

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from train.models import layers, matmul
from train.models.lm_head import token_logps


def tied(bias=True, dtype=torch.float32):
    """An embedding with a padding token, two layers, and the embedding's weight once more as the
    head.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(50, 24, padding_idx=2), nn.Linear(24, 40, bias), nn.Linear(40, 24, bias)
    )
    return model.to(dtype)


def run(model, ids, target, weights):
    hidden = model(ids)[0]
    logps = token_logps(
        hidden, model[0].weight, target, None, budget=70 * 50 * 4
    )  # two chunks and more
    (logps * weights).sum().backward()
    return logps.detach()


def rows(count, tokens):
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (count, 1, tokens), generator=random)
    ids[:, 0, ::7] = 2  # padding's id occurs
    return (
        ids,
        torch.randint(50, (count, tokens), generator=random),
        torch.randn(count, tokens, generator=random),
    )


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("tokens", [1, matmul.ROWS - 1, matmul.ROWS, 150])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_add_up_within_fp32_rounding_of_fp64(tokens, bias, gathers):
    true = tied(bias, torch.float64)
    ours = tied(bias)
    layers.swap(ours)
    assert [type(layer) for layer in ours] == [layers.Embedding, layers.Linear, layers.Linear]
    if gathers:
        matmul.accumulate_in_place(ours)
    for ids, target, weights in zip(*rows(3, tokens), strict=True):
        logps, expected = run(ours, ids, target, weights), run(true, ids, target, weights.double())
        assert (logps - expected).abs().max() < 1e-5
    for mine, theirs in zip(ours.parameters(), true.parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 3e-6 * theirs.grad.abs().max()


def test_fp64_is_exact_and_autocast_is_torchs():
    plain, ours = tied(dtype=torch.float64), tied(dtype=torch.float64)
    layers.swap(ours)
    (ids, *_), (target, *_), (weights, *_) = rows(1, 100)
    assert torch.equal(run(ours, ids, target, weights), run(plain, ids, target, weights))
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-13, atol=1e-15)
    plain, ours = tied(), tied()
    layers.swap(ours)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(ids), plain(ids)) and ours(ids).dtype == torch.bfloat16
        run(ours, ids, target, weights), run(plain, ids, target, weights)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 0.01 * theirs.grad.abs().max()


def test_the_fast_product_and_the_place_of_gradients_are_really_taken(monkeypatch):
    taken = []
    if torch.backends.mkldnn.is_available():
        fast = torch.ops.mkldnn._linear_pointwise
        monkeypatch.setattr(
            torch.ops.mkldnn, "_linear_pointwise", lambda *a: taken.append(1) or fast(*a)
        )
    ours = tied()
    layers.swap(ours)
    matmul.accumulate_in_place(ours)
    ids, target, weights = rows(2, 150)
    run(ours, ids[0], target[0], weights[0])
    assert not torch.backends.mkldnn.is_available() or len(taken) >= 6
    before = [p.grad for p in ours.parameters()]
    kept = [grad.clone() for grad in before]
    run(ours, ids[1], target[1], weights[1])
    for p, grad, old in zip(ours.parameters(), before, kept, strict=True):
        assert p.grad is grad and not torch.equal(grad, old)


@pytest.mark.parametrize("head", [True, False])  # without it the embedding's is the first gradient
@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
def test_each_step_starts_its_gradient_anew_in_the_same_memory(product, head, monkeypatch):
    """Two rows a step; what stood there before counts for nothing, NaN included."""
    ours = tied()
    layers.swap(ours)
    alone = copy.deepcopy(ours)
    matmul.accumulate_in_place(ours)
    monkeypatch.setattr(matmul, "SLICE", 7)  # of the weights' 24 to 50 rows

    def step(model, parts):
        for p in model.parameters():
            p.grad = None
        for ids, target, weights in parts:
            with torch.autocast("cpu", product, enabled=product != torch.float32):
                run(model, ids, target, weights) if head else (
                    model(ids)[0] * weights[:, None]
                ).sum().backward()

    parts = list(zip(*rows(4, 100), strict=True))
    step(ours, parts[:2])
    for p in ours.parameters():
        p.gathers.fill_(torch.nan)
    step(ours, parts[2:])
    step(alone, parts[2:])
    for mine, theirs in zip(ours.parameters(), alone.parameters(), strict=True):
        assert mine.grad is mine.gathers or mine.ndim == 1  # biases' gradients are autograd's own
        bound = {torch.float32: 2e-6, torch.bfloat16: 0.01}[product] * theirs.grad.abs().max()
        assert (mine.grad - theirs.grad).abs().max() <= bound


def test_swap_leaves_other_layers_and_shared_weights_alone():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(
        nn.Embedding(7, 8),
        Special(8, 8),
        nn.Linear(8, 7, bias=False),
        nn.Embedding(7, 8, max_norm=1),
    )
    model[2].weight = model[0].weight
    layers.swap(model)
    assert (
        type(model[1]) is Special
        and type(model[2]) is layers.Linear
        and type(model[3]) is nn.Embedding
    )
    assert model[2].weight is model[0].weight
    layers.swap_back(model)
    assert type(model[2]) is nn.Linear and type(model[0]) is nn.Embedding


def test_expanded_gradients_and_the_same_result_twice():
    ours = nn.Sequential(nn.Linear(96, 160))
    layers.swap(ours)
    x = torch.randn(1, 300, 96)
    found = [
        torch.autograd.grad(copy.deepcopy(ours)(x.requires_grad_()).sum(), x)[0] for _ in range(2)
    ]
    assert torch.equal(*found)
    assert torch.allclose(found[0], ours[0].weight.sum(0).expand_as(x), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 70, 24), (1, 5, 3, 24), (1, 1, 24)])
def test_norms_are_the_models_own(shape):
    """Values and gradients within fp32 rounding of fp64's own formula; fp64 itself stays with the
    model's code.
    """
    torch.manual_seed(0)
    ours = LlamaRMSNorm(24, eps=1e-3)
    with torch.no_grad():
        ours.weight.uniform_(-2, 2)
    theirs = copy.deepcopy(ours)
    layers.swap(ours)
    assert isinstance(ours, layers.RMSNorm) and isinstance(ours, LlamaRMSNorm)
    x, grad = 0.1 * torch.randn(shape), torch.randn(shape)
    x[..., 0, :] = 0  # then eps decides
    true_x, true_w = x.double().requires_grad_(), theirs.weight.detach().double().requires_grad_()
    true = true_x / (true_x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * true_w
    true.backward(grad.double())
    mine = x.clone().requires_grad_()
    found = ours(mine)
    found.backward(grad)
    assert torch.allclose(found.double(), true, rtol=1e-6, atol=1e-7)
    assert torch.allclose(found, theirs(x), rtol=1e-6, atol=1e-7)
    assert torch.allclose(mine.grad.double(), true_x.grad, rtol=1e-5, atol=1e-5)
    assert torch.allclose(ours.weight.grad.double(), true_w.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # the same bits with and without a gradient: policy and reference
        assert torch.equal(ours(x), found)
    assert torch.equal(ours(x.bfloat16()), theirs(x.bfloat16()))
    layers.swap_back(ours)
    assert type(ours) is LlamaRMSNorm and torch.equal(ours(x), theirs(x))


def test_a_norm_that_stands_still_gives_no_gradient_of_its_weight():
    norm = LlamaRMSNorm(24).requires_grad_(False)
    layers.swap(norm)
    x = torch.randn(1, 9, 24, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None and x.grad.abs().sum() > 0


def test_other_norms_stay():
    """Gemma's weight counts from 1."""
    model = nn.Sequential(
        GemmaRMSNorm(8), nn.LayerNorm(8), Qwen3RMSNorm(8), MistralRMSNorm(8), Qwen2RMSNorm(8)
    )
    kinds = [type(layer) for layer in model]
    layers.swap(model)
    assert [type(layer) for layer in model[:2]] == kinds[:2]
    assert all(isinstance(layer, layers.RMSNorm) for layer in model[2:])
    layers.swap_back(model)
    assert [type(layer) for layer in model] == kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_mlps_are_the_models_own_and_keep_less(dtype):
    """The same bits, values and gradients."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=40,
        num_attention_heads=2,
        num_key_value_heads=2,
        mlp_bias=True,
    )
    theirs = LlamaMLP(config).to(dtype)
    ours, x, grad = (
        copy.deepcopy(theirs),
        torch.randn(1, 9, 16, dtype=dtype),
        torch.randn(1, 9, 16, dtype=dtype),
    )
    layers.swap(ours)  # fewer rows than products.ROWS: torch's own products, bit for bit
    found, sizes = [], []
    for mlp in (ours, theirs):
        saved, mine = [], x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: s.append(t) or t, lambda t: t
        ):
            out = mlp(mine)
        out.backward(grad)
        found.append([out, mine.grad, *(p.grad for p in mlp.parameters())])
        sizes.append(
            len({t.untyped_storage().data_ptr() for t in saved if t.shape[-2:] == (9, 40)})
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert sizes == [2, 4]  # gate and up; transformers' own keeps silu(gate) and the product too
    layers.swap(theirs)
    assert isinstance(theirs, layers.GatedMLP) and type(theirs.gate_proj) is layers.Linear
    layers.swap_back(theirs)
    assert type(theirs) is LlamaMLP and type(theirs.gate_proj) is nn.Linear


def test_a_wrapped_down_projection_gets_the_product():
    """As adapters wrap it."""

    class Wrapped(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x):
            return self.base_layer(x)

    torch.manual_seed(0)
    theirs = LlamaMLP(
        LlamaConfig(
            hidden_size=16, intermediate_size=40, num_attention_heads=2, num_key_value_heads=2
        )
    )
    ours, x = copy.deepcopy(theirs), torch.randn(1, 9, 16)
    ours.down_proj = Wrapped(ours.down_proj)
    layers.swap(ours)
    assert isinstance(ours, layers.GatedMLP) and type(ours.down_proj.base_layer) is layers.Linear
    assert torch.equal(ours(x), theirs(x))


def test_an_older_graph_whose_rounded_weight_is_gone_fails_loudly():
    layer, x = nn.Sequential(nn.Linear(24, 8)), torch.randn(1, 70, 24, requires_grad=True)
    layers.swap(layer)
    with torch.autocast("cpu", torch.bfloat16):
        old = layer(x)
        with torch.no_grad():
            layer[0].weight.mul_(2)
        layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        old.float().sum().backward()


def test_a_weight_rounded_in_inference_mode_is_rounded_again():
    layer, x = nn.Sequential(nn.Linear(24, 8)), torch.randn(1, 70, 24)
    layers.swap(layer)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            layer(x)
        with torch.no_grad():
            layer[0].weight.mul_(2)
        assert torch.equal(layer(x), nn.functional.linear(x, layer[0].weight, layer[0].bias))


def test_another_activation_stays():
    mlp = LlamaMLP(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=40,
            num_attention_heads=2,
            num_key_value_heads=2,
            hidden_act="gelu",
        )
    )
    layers.swap(mlp)
    assert type(mlp) is LlamaMLP and type(mlp.down_proj) is layers.Linear


def test_an_input_is_rounded_once_for_all_that_read_it():
    torch.manual_seed(0)
    readers = nn.ModuleList(nn.Linear(24, 8) for _ in range(3))
    layers.swap(readers)
    x = torch.randn(1, 70, 24, requires_grad=True)
    saved, apply = [], lambda: [reader(x) for reader in readers]
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            first = apply()
        assert len({t.untyped_storage().data_ptr() for t in saved if t.shape == (70, 24)}) == 1
        with torch.no_grad():
            x.neg_()
        for before, after, reader in zip(first, apply(), readers, strict=True):
            assert torch.equal(
                after, nn.functional.linear(x, reader.weight, reader.bias)
            )  # what has changed is seen
            assert not torch.equal(after, before)
    assert torch.allclose(
        readers[0](x), nn.functional.linear(x, readers[0].weight, readers[0].bias), atol=1e-6
    )


@pytest.mark.parametrize("fused", [True, False])
def test_a_weight_is_rounded_once_a_step(fused):
    """Body and head; AdamW's step, a copy into the weight and a moved reference count as changes."""
    ours = tied(bias=False)
    layers.swap(ours)
    matmul.accumulate_in_place(ours)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, fused=fused)
    (ids, *_), (target, *_), (weights, *_) = rows(1, 100)
    weight, seen = ours[1].weight, []

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            run(ours, ids, target, weights)
            kept = [p.rounded[1] for p in (weight, ours[0].weight)]
            run(ours, ids, target, weights)
        assert all(
            p.rounded[1] is old for p, old in zip((weight, ours[0].weight), kept, strict=True)
        )
        assert all(torch.equal(p.bfloat16(), p.rounded[1]) for p in (weight, ours[0].weight))
        seen.append(kept[0].clone())

    step()
    optimizer.step()
    torch.autograd.graph.increment_version(
        list(ours.parameters())
    )  # as Policy.step does: the fused one forgets it
    step()
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    step()
    with torch.no_grad():
        weight.lerp_(torch.zeros_like(weight), 0.5)
    step()
    assert not any(torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))


def test_a_layer_that_stands_still_keeps_no_input():
    frozen = nn.Linear(24, 8).requires_grad_(False)
    layers.swap(frozen)
    x, saved = torch.randn(1, 70, 24, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = frozen(x)
    out.sum().backward()
    assert [t.shape for t in saved] == [(8, 24)]
    assert torch.allclose(x.grad, frozen.weight.sum(0).expand_as(x), atol=1e-6)
    assert frozen(x[:, :0]).shape == (1, 0, 8)
