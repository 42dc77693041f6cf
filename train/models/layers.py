"""Layers in the place of a model's own, faster on a CPU: the products of train/models/matmul.py,
gradients in few passes over memory.
"""

import functools

import torch
from torch import nn

from train.models.matmul import grad_buffer, matmul_transposed, rounded, weight_gradient


class Linear(nn.Linear):
    """nn.Linear with products through oneDNN, and gradients of the weight that need no temporary
    copy.
    """

    def forward(self, x, up=None):
        """With `up`, shaped like x, the product of silu(x) * up, which is not kept for the backward
        pass.
        """
        if x.device.type != "cpu":
            return super().forward(x if up is None else nn.functional.silu(x) * up)
        product = (
            torch.get_autocast_dtype("cpu")
            if torch.is_autocast_enabled("cpu")
            else self.weight.dtype
        )
        flat, second = (
            each.reshape(-1, x.shape[-1]) for each in (x, rounded(x, product) if up is None else up)
        )
        rows = (_Product if up is None else _Gated).apply(
            flat, second, self.weight, self.bias, product
        )
        return rows.view(*x.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exact, x, weight, bias, product):
        ctx.weight, ctx.dtype, w = weight, exact.dtype, rounded(weight, product)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, w)
        return matmul_transposed(x, w, None if bias is None else bias.to(product))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        grad_x = matmul_transposed(grad, w.t()).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, *_gradients(ctx, grad, x), None


def _gradients(ctx, grad, x):
    """Of the weight and the bias, the third and fourth inputs; None for what is not wanted or is
    gathered already.
    """
    _, _, wants_weight, wants_bias, _ = ctx.needs_input_grad
    both = (
        weight_gradient(ctx.weight, grad, x) if wants_weight else None,
        grad.sum(0) if wants_bias else None,
    )
    return [None if each is None else each.to(ctx.weight.dtype) for each in both]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight, bias, product):
        ctx.weight, w = weight, rounded(weight, product)
        ctx.save_for_backward(gate, up, w)
        gated = nn.functional.silu(gate).mul_(up).to(product)
        return matmul_transposed(gated, w, None if bias is None else bias.to(product))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up, w = ctx.saved_tensors
        opened, grad_x = nn.functional.silu(gate), matmul_transposed(grad, w.t()).to(up.dtype)
        by_weight = _gradients(
            ctx, grad, (opened * up).to(grad.dtype) if ctx.needs_input_grad[2] else None
        )
        return (
            torch.ops.aten.silu_backward(grad_x * up, gate),
            opened.mul_(grad_x),
            *by_weight,
            None,
        )


class Embedding(nn.Embedding):
    """nn.Embedding whose gradient, where there is one already, touches the rows it concerns only."""

    def forward(self, ids):
        if ids.device.type != "cpu":
            return super().forward(ids)
        return _Lookup.apply(ids, self.weight, self.padding_idx)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, padding):
        ctx.weight, ctx.padding = weight, padding
        ctx.save_for_backward(ids)
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None, None
        ids, grad = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        if (
            ctx.padding is not None
        ):  # as torch has it: the padding token's vector is not trained by its use
            grad = grad.masked_fill((ids == ctx.padding)[:, None], 0)
        into, first = grad_buffer(ctx.weight)
        total = torch.zeros_like(ctx.weight) if into is None else into.zero_() if first else into
        total.index_add_(0, ids, grad.to(total.dtype))
        return None, total if into is None else None, None


class RMSNorm:
    """Goes before the norm of a model (RMS_NORMS): the same in fp32, with a gradient in half as
    many passes.

    Zhang and Sennrich 2019, arXiv 1910.07467, equation 4: x / sqrt(mean(x^2) + eps) * weight.
    """

    def forward(self, x):
        if x.device.type != "cpu" or not x.dtype == self.weight.dtype == torch.float32:
            return super().forward(x)
        return _Normed.apply(x, self.weight, self.variance_epsilon)


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, scale, weight = ctx.saved_tensors
        plain = x * scale  # y = plain * weight
        by_weight = grad * plain
        along = (by_weight @ weight).div_(x.shape[-1])[..., None]  # what changes the norm of x only
        grad_x = (grad * weight).addcmul_(plain, along, value=-1).mul_(scale)
        return grad_x, by_weight.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


class GatedMLP:
    """Goes before the MLP of a model (GATED_MLPS): the same, keeping two wide tensors less for the
    backward pass.

    Shazeer 2020, arXiv 2002.05202, equation 6: SwiGLU.
    """

    def forward(self, x):
        gate, up, plain = (
            self.gate_proj(x),
            self.up_proj(x),
            type(self.down_proj) is not Linear,
        )  # adapters, say
        return self.down_proj(self.act_fn(gate) * up) if plain else self.down_proj(gate, up)


# By the names that transformers has for one and the same code.
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
RMS_NORMS, GATED_MLPS = ({f"{family}{kind}" for family in FAMILIES} for kind in ("RMSNorm", "MLP"))
FASTER = {nn.Linear: Linear, nn.Embedding: Embedding}


def swap(model):
    """Make each layer of `model` that has a faster twin here that twin. Weights stay where they
    are.
    """
    for module in model.modules():
        if (twin := _twin(type(module))) and not _special(module):
            module.__class__ = twin


def swap_back(model):
    """Give `model` its own layers again."""
    for module in model.modules():
        own = type(module).__bases__[-1]
        if _twin(own) is type(module):
            module.__class__ = own


@functools.cache
def _twin(kind):
    if kind in FASTER or not kind.__module__.startswith("transformers."):
        return FASTER.get(kind)
    ours = (
        RMSNorm if kind.__name__ in RMS_NORMS else GatedMLP if kind.__name__ in GATED_MLPS else None
    )
    return ours and type(ours.__name__, (ours, kind), {})


def _special(module):
    if isinstance(module, nn.Embedding):
        return module.max_norm or module.scale_grad_by_freq or module.sparse
    # an activation of transformers' or torch's, by its name
    return hasattr(module, "gate_proj") and type(module.act_fn).__name__ not in (
        "SiLU",
        "SiLUActivation",
    )
