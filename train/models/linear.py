"""Linear and embedding layers on the products of train/losses/products.py, in the place of a model's own, on a CPU."""

import torch
from torch import nn

from train.losses.products import times_transposed, weight_gradient


class Linear(nn.Linear):
    """nn.Linear with products through oneDNN, and gradients of the weight that need no temporary copy."""

    def forward(self, x):
        if x.device.type != "cpu":
            return super().forward(x)
        product = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.weight.dtype
        rows = _Product.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias, product)
        return rows.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, product):
        ctx.weight, ctx.dtype = weight, x.dtype
        x, w = x.to(product), weight.to(product)
        ctx.save_for_backward(x, w)
        return times_transposed(x, w, None if bias is None else bias.to(product))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_w = weight_gradient(ctx.weight, grad, x) if wants_weight else None
        return (
            times_transposed(grad, w.t()).to(ctx.dtype) if wants_x else None,
            None if grad_w is None else grad_w.to(ctx.weight.dtype),
            grad.sum(0).to(ctx.weight.dtype) if wants_bias else None,
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
        if ctx.padding is not None:  # as torch has it: the padding token's vector is not trained by its use
            grad = grad.masked_fill((ids == ctx.padding)[:, None], 0)
        into = ctx.weight.grad if getattr(ctx.weight, "gathers", False) else None
        total = torch.zeros_like(ctx.weight) if into is None else into
        total.index_add_(0, ids, grad.to(total.dtype))
        return None, total if into is None else None, None


FASTER = {nn.Linear: Linear, nn.Embedding: Embedding}


def swap(model, kinds=FASTER):
    """Make each layer of `model` whose class is a key of `kinds` one of its value. Weights stay where they are."""
    for module in model.modules():
        if (new := kinds.get(type(module))) and not _special(module):
            module.__class__ = new


def swap_back(model):
    """Give `model` its own layers again."""
    swap(model, {new: old for old, new in FASTER.items()})


def _special(module):
    return isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse)
