"""Our layers against torch's own, in fp64 and in fp32, under autocast, over several batches a step,
and what is left alone.
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
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
    """Forward and backward of one batch: ids (1, T), target and weights (T,). Two chunks of logits
    and more from 71 tokens on.
    """
    hidden = model(ids)[0]  # (T, H)
    logps = token_logps(hidden, model[0].weight, target, logits_bytes=70 * 50 * 4)
    (logps * weights).sum().backward()
    return logps.detach()


def batches(count, tokens):
    """ids (count, 1, T), target and weights (count, T)"""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (count, 1, tokens), generator=random)
    ids[:, 0, ::7] = 2  # padding's id occurs
    return (
        ids,
        torch.randint(50, (count, tokens), generator=random),
        torch.randn(count, tokens, generator=random),
    )


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("tokens", [1, matmul.MIN_TOKENS - 1, matmul.MIN_TOKENS, 150])
@pytest.mark.parametrize("bias", [False, True])
def test_batches_add_up_within_fp32_rounding_of_fp64(tokens, bias, in_place):
    true = tied(bias, torch.float64)
    ours = tied(bias)
    layers.swap(ours)
    assert [type(layer) for layer in ours] == [layers.Embedding, layers.Linear, layers.Linear]
    if in_place:
        matmul.accumulate_in_place(ours)
    for ids, target, weights in zip(*batches(3, tokens), strict=True):
        logps = run(ours, ids, target, weights)
        expected = run(true, ids, target, weights.double())
        assert (logps - expected).abs().max() < 1e-5
    for mine, theirs in zip(ours.parameters(), true.parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 3e-6 * theirs.grad.abs().max()


def test_fp64_is_exact_and_autocast_is_torchs():
    plain = tied(dtype=torch.float64)
    ours = tied(dtype=torch.float64)
    layers.swap(ours)
    ids, target, weights = (each[0] for each in batches(1, 100))
    assert torch.equal(run(ours, ids, target, weights), run(plain, ids, target, weights))
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-13, atol=1e-15)
    plain = tied()
    ours = tied()
    layers.swap(ours)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(ids), plain(ids)) and ours(ids).dtype == torch.bfloat16
        run(ours, ids, target, weights)
        run(plain, ids, target, weights)
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
    ids, target, weights = batches(2, 150)
    run(ours, ids[0], target[0], weights[0])
    assert not torch.backends.mkldnn.is_available() or len(taken) >= 6
    before = [p.grad for p in ours.parameters()]
    copies = [grad.clone() for grad in before]
    run(ours, ids[1], target[1], weights[1])
    for p, grad, old in zip(ours.parameters(), before, copies, strict=True):
        assert p.grad is grad and not torch.equal(grad, old)


@pytest.mark.parametrize("head", [True, False])  # without it the embedding's is the first gradient
@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
def test_each_step_starts_its_gradient_anew_in_the_same_memory(product, head, monkeypatch):
    """Two batches a step; what stood there before counts for nothing, NaN included."""
    ours = tied()
    layers.swap(ours)
    alone = copy.deepcopy(ours)
    matmul.accumulate_in_place(ours)
    monkeypatch.setattr(matmul, "SLICE", 7)  # of the weights' 24 to 50 rows
    monkeypatch.setattr(matmul, "CACHED_ROWS", 7)

    def step(model, step_batches):
        for p in model.parameters():
            p.grad = None
        for ids, target, weights in step_batches:
            with torch.autocast("cpu", product, enabled=product != torch.float32):
                if head:
                    run(model, ids, target, weights)
                else:
                    (model(ids)[0] * weights[:, None]).sum().backward()

    four = list(zip(*batches(4, 100), strict=True))
    step(ours, four[:2])
    for p in ours.parameters():
        p.grad_memory.fill_(torch.nan)
    step(ours, four[2:])
    step(alone, four[2:])
    for mine, theirs in zip(ours.parameters(), alone.parameters(), strict=True):
        # biases' gradients are autograd's own
        assert mine.grad is mine.grad_memory or mine.ndim == 1
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
    assert [type(layer) for layer in model[1:]] == [Special, layers.Linear, nn.Embedding]
    assert model[2].weight is model[0].weight
    layers.swap_back(model)
    assert type(model[2]) is nn.Linear and type(model[0]) is nn.Embedding


def test_expanded_gradients_and_the_same_result_twice():
    ours = nn.Sequential(nn.Linear(96, 160))
    layers.swap(ours)
    x = torch.randn(1, 300, 96)
    first, second = (
        torch.autograd.grad(copy.deepcopy(ours)(x.requires_grad_()).sum(), x)[0] for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.allclose(first, ours[0].weight.sum(0).expand_as(x), atol=1e-5)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 70, 24), (1, 5, 3, 24), (1, 1, 24)])
def test_norms_are_the_models_own(shape, products):
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
    x = 0.1 * torch.randn(shape)
    grad = torch.randn(shape)
    x[..., 0, :] = 0  # then eps decides
    true_x = x.double().requires_grad_()
    true_w = theirs.weight.detach().double().requires_grad_()
    true = true_x / (true_x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * true_w
    true.backward(grad.double())
    mine = x.clone().requires_grad_()
    with torch.autocast("cpu", products, enabled=products != torch.float32):
        found = ours(mine)
        with torch.no_grad():  # the same bits with and without a gradient: policy and reference
            assert torch.equal(ours(x), found)
    found.backward(grad)
    assert torch.allclose(found.double(), true, rtol=1e-6, atol=1e-7)
    assert torch.allclose(found, theirs(x), rtol=1e-6, atol=1e-7)
    assert torch.allclose(mine.grad.double(), true_x.grad, rtol=1e-5, atol=1e-5)
    assert torch.allclose(ours.weight.grad.double(), true_w.grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours(x.bfloat16()), theirs(x.bfloat16()))
    layers.swap_back(ours)
    assert type(ours) is LlamaRMSNorm and torch.equal(ours(x), theirs(x))


def rms_error(found, true):
    """Root mean square of the error, relative to that of the true values, in fp64."""
    error = found.double() - true
    return float((error.square().mean() / true.square().mean()).sqrt())


@pytest.mark.parametrize("width", [64, 576, 4096])
def test_a_norm_is_rounded_once(width, monkeypatch):
    """2,048 tokens, the last piece of rows not full."""
    monkeypatch.setattr(layers, "CACHED_NUMBERS", 100 * width)
    torch.manual_seed(0)
    norm = LlamaRMSNorm(width, eps=1e-5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    layers.swap(norm)
    x = torch.randn(2, 1024, width)
    wide = x.double()
    scale = (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    true = wide * scale * norm.weight.detach().double()
    with torch.no_grad():
        found = norm(x)
    # where the last digit of fp64 decides on which side a number is rounded
    assert (found != true.float()).double().mean() < 1e-6
    turned = x.transpose(0, 1)  # rows that do not lie one behind the other
    with torch.no_grad():
        assert torch.equal(norm(turned), found.transpose(0, 1))


@pytest.mark.parametrize("width", [64, 576])
def test_a_norm_s_gradient_is_more_exact_than_the_models_own(width):
    torch.manual_seed(0)
    theirs = LlamaRMSNorm(width, eps=1e-5)
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 1.5)
    ours = copy.deepcopy(theirs)
    layers.swap(ours)
    x, grad = torch.randn(2, 2048, width)
    weight = theirs.weight.detach().double()
    true = x.double().requires_grad_()
    normed = true * (true.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    (normed * weight).backward(grad.double())
    errors = []
    for norm in (ours, theirs):
        mine = x.clone().requires_grad_()
        norm(mine).backward(grad)
        errors.append(rms_error(mine.grad, true.grad))
    assert errors[0] < 0.95 * errors[1]


def test_a_lookup_s_gradient_is_as_exact_as_torchs():
    """Eight batches in place in which three tokens in four are one and the same token."""
    theirs = nn.Embedding(50, 24)
    ours = nn.Sequential(copy.deepcopy(theirs))
    layers.swap(ours)
    matmul.accumulate_in_place(ours)
    ids, _, _ = batches(8, 1000)
    ids = torch.where(torch.arange(1000) % 4 > 0, 7, ids)
    grads = torch.randn(8, 1, 1000, 24, generator=torch.Generator().manual_seed(2))
    true = torch.zeros(50, 24, dtype=torch.float64)
    for batch_ids, grad in zip(ids, grads, strict=True):
        true.index_add_(0, batch_ids[0], grad[0].double())
        for embedding in (ours, theirs):
            embedding(batch_ids).backward(grad)
    assert ours[0].weight.grad is ours[0].weight.grad_memory
    # the same sums in the same order
    assert rms_error(ours[0].weight.grad, true) <= rms_error(theirs.weight.grad, true)


def test_a_sum_over_the_vocabulary_is_as_exact_as_torchs_own():
    """Where it runs on oneDNN, whose products in one piece are 1.6 times farther from fp64."""
    torch.manual_seed(0)
    x = torch.randn(400, 4100)  # the last slice is not full
    weight = torch.randn(4100, 48)
    true = x.double() @ weight.double()
    found = matmul.matmul_over_vocabulary(x, weight)
    assert rms_error(found, true) < 1.1 * rms_error(x @ weight, true)
    half = x.bfloat16(), weight.bfloat16()  # in one piece: rounded once
    assert torch.equal(matmul.matmul_over_vocabulary(*half), half[0] @ half[1])


class Made(TorchDispatchMode):
    """Keeps the tensors that operations give, so that none takes another's memory."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.tensors.append(result)
        return result


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_with_a_vocabulary_takes_no_memory_beside_the_result(bias):
    """Logits of --layout padded: in slices of the sum they would be made again and
    again, and the weight copied, pieces that the system clears each time.
    """
    torch.manual_seed(0)
    layer = nn.Linear(40, 5 * matmul.SLICE, bias=bias).requires_grad_(False)
    x = torch.randn(matmul.MIN_TOKENS, 40)
    true = copy.deepcopy(layer).double()(x.double())
    layers.swap(layer)
    with Made() as made:
        found = layer(x)
    assert rms_error(found, true) < 2e-7
    given = {t.untyped_storage().data_ptr() for t in (x, found, *layer.parameters())}
    storages = [t.untyped_storage() for t in made.tensors]
    others = [s.nbytes() for s in storages if s.data_ptr() not in given]
    assert max(others, default=0) < found.nbytes / 8


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("width", [16, 64, 100, 576, 1536])
def test_a_model_s_products_are_as_exact_as_torchs_own(width):
    """As transformers' layers compute them, on MKL. oneDNN's in one piece are no nearer to fp64 where
    the model is narrow, and 1.5 and 2 times as far at 576 and 1,536.
    """
    torch.manual_seed(0)
    x = torch.randn(150, width)
    layer = nn.Linear(width, 80)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    with torch.no_grad():
        wide = copy.deepcopy(layer).double()
        true = wide(x.double())
        theirs = rms_error(layer(x), true)
    in_one_piece = rms_error(matmul.matmul_transposed(x, weight, bias), true)
    layers.swap(layer)
    logits = torch.full((150, 80), torch.nan)
    matmul.matmul_transposed_into(logits, x, weight)
    for found in (layer(x).detach(), logits + bias):
        error = rms_error(found, true)
        assert error < 1.1 * theirs
        assert width == 16 or error < 0.75 * in_one_piece  # 16 terms are not cut


@pytest.mark.parametrize("tokens", [64, 200, 960, 1100])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_weight_s_gradient_is_as_exact_as_torchs_own(tokens, in_place, monkeypatch):
    """Where it runs on oneDNN, whose sum over 960 tokens in one piece is 1.6 times farther from fp64."""
    monkeypatch.setattr(matmul, "CACHED_ROWS", 50)  # of 80: the last slice is not full
    torch.manual_seed(0)
    x = torch.randn(tokens, 72)
    grad = torch.randn(tokens, 80)
    layer = nn.Linear(72, 80, bias=False)
    if in_place:
        matmul.accumulate_in_place(layer)
        layer.weight.grad_memory.fill_(torch.nan)
    found = matmul.weight_gradient(layer.weight, grad, x)
    found = layer.weight.grad if in_place else found
    true = grad.double().t() @ x.double()
    bound = 1.1 * rms_error(grad.t() @ x, true)
    assert rms_error(found, true) < bound
    if in_place:  # a second batch is added
        assert matmul.weight_gradient(layer.weight, grad, x) is None
        assert rms_error(layer.weight.grad, 2 * true) < bound


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


def llama_mlp(**options):
    """H 16, M 40"""
    heads = dict(num_attention_heads=2, num_key_value_heads=2)
    return LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=40, **heads, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_mlps_are_the_models_own_and_keep_less(dtype):
    """The same bits, values and gradients."""
    torch.manual_seed(0)
    theirs = llama_mlp(mlp_bias=True).to(dtype)
    ours = copy.deepcopy(theirs)
    x = torch.randn(1, 9, 16, dtype=dtype)
    grad = torch.randn(1, 9, 16, dtype=dtype)
    layers.swap(ours)  # fewer tokens than matmul.MIN_TOKENS: torch's own products, bit for bit
    assert type(ours.down_proj) is layers.GatedDownProjection
    results = []
    wide_tensors = []  # saved for the backward pass
    for mlp in (ours, theirs):
        saved = []
        mine = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            out = mlp(mine)
        out.backward(grad)
        results.append([out, mine.grad, *(p.grad for p in mlp.parameters())])
        places = {t.untyped_storage().data_ptr() for t in saved if t.shape[-2:] == (9, 40)}
        wide_tensors.append(len(places))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # gate and up; transformers' own keeps silu(gate) and the product too
    assert wide_tensors == [2, 4]
    layers.swap(theirs)
    assert isinstance(theirs, layers.GatedMLP) and type(theirs.gate_proj) is layers.Linear
    layers.swap_back(theirs)
    assert type(theirs) is LlamaMLP
    assert type(theirs.gate_proj) is type(theirs.down_proj) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_down_projection_is_the_linear_layer_of_the_product(dtype):
    """In fp32 and under autocast, values and gradients, with as many tokens as oneDNN takes."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(40, 16))
    layers.swap(plain)
    gated = copy.deepcopy(plain[0])
    gated.__class__ = layers.GatedDownProjection
    gate, up = torch.randn(2, 1, 100, 40)
    grad = torch.randn(1, 100, 16)
    results = []
    for down_proj in (plain[0], gated):
        inputs = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            if down_proj is gated:
                out = gated(*inputs)
            else:
                out = down_proj(nn.functional.silu(inputs[0]) * inputs[1])
        assert out.dtype == dtype and out.shape == (1, 100, 16)
        out.backward(grad.to(dtype))
        results.append([out, *(t.grad for t in (*inputs, *down_proj.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_wrapped_down_projection_gets_the_product():
    """As adapters wrap it."""

    class Wrapped(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x):
            return self.base_layer(x)

    torch.manual_seed(0)
    theirs = llama_mlp()
    ours = copy.deepcopy(theirs)
    x = torch.randn(1, 9, 16)
    ours.down_proj = Wrapped(ours.down_proj)
    layers.swap(ours)
    assert isinstance(ours, layers.GatedMLP) and type(ours.down_proj.base_layer) is layers.Linear
    assert torch.equal(ours(x), theirs(x))


def test_an_older_graph_whose_rounded_weight_is_gone_fails_loudly():
    layer = nn.Sequential(nn.Linear(24, 8))
    x = torch.randn(1, 70, 24, requires_grad=True)
    layers.swap(layer)
    with torch.autocast("cpu", torch.bfloat16):
        old = layer(x)
        with torch.no_grad():
            layer[0].weight.mul_(2)
        layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        old.float().sum().backward()


def test_a_weight_rounded_in_inference_mode_is_rounded_again():
    layer = nn.Sequential(nn.Linear(24, 8))
    x = torch.randn(1, 70, 24)
    layers.swap(layer)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            layer(x)
        with torch.no_grad():
            layer[0].weight.mul_(2)
        assert torch.equal(layer(x), nn.functional.linear(x, layer[0].weight, layer[0].bias))


def test_another_activation_stays():
    mlp = llama_mlp(hidden_act="gelu")
    layers.swap(mlp)
    assert type(mlp) is LlamaMLP and type(mlp.down_proj) is layers.Linear


def test_an_input_is_rounded_once_for_all_that_read_it():
    torch.manual_seed(0)
    readers = nn.ModuleList(nn.Linear(24, 8) for _ in range(3))
    layers.swap(readers)
    x = torch.randn(1, 70, 24, requires_grad=True)
    saved = []
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            first = [reader(x) for reader in readers]
        assert len({t.untyped_storage().data_ptr() for t in saved if t.shape == (70, 24)}) == 1
        with torch.no_grad():
            x.neg_()
        second = [reader(x) for reader in readers]
        for before, after, reader in zip(first, second, readers, strict=True):
            # what has changed is seen
            assert torch.equal(after, nn.functional.linear(x, reader.weight, reader.bias))
            assert not torch.equal(after, before)
    expected = nn.functional.linear(x, readers[0].weight, readers[0].bias)
    assert torch.allclose(readers[0](x), expected, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_a_weight_is_rounded_once_a_step(fused):
    """Body and head; AdamW's step, a copy into the weight and a moved reference count as changes."""
    ours = tied(bias=False)
    layers.swap(ours)
    matmul.accumulate_in_place(ours)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, fused=fused)
    ids, target, weights = (each[0] for each in batches(1, 100))
    weights_of = (ours[1].weight, ours[0].weight)
    weight = ours[1].weight
    copies = []  # of `weight` in bf16, one a step

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            run(ours, ids, target, weights)
            kept = [p.rounded_copy.value for p in weights_of]
            run(ours, ids, target, weights)
        for p, old in zip(weights_of, kept, strict=True):
            assert p.rounded_copy.value is old
            assert torch.equal(p.bfloat16(), old)
        copies.append(kept[0].clone())

    step()
    optimizer.step()
    # as TrainedModel.step does: the fused one forgets it
    torch.autograd.graph.increment_version(list(ours.parameters()))
    step()
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    step()
    with torch.no_grad():
        weight.lerp_(torch.zeros_like(weight), 0.5)
    step()
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(copies))


def test_a_layer_that_stands_still_keeps_no_input():
    frozen = nn.Linear(24, 8).requires_grad_(False)
    layers.swap(frozen)
    x = torch.randn(1, 70, 24, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = frozen(x)
    out.sum().backward()
    assert [t.shape for t in saved] == [(8, 24)]
    assert torch.allclose(x.grad, frozen.weight.sum(0).expand_as(x), atol=1e-6)
    assert frozen(x[:, :0]).shape == (1, 0, 8)
