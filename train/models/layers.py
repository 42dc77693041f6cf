"""Layers that take the place of a model's own and are faster on a CPU, and in fp32 what they give is
nearer to fp64: products through train/models/matmul.py, norms rounded once, gradients in fewer passes
over memory. Elsewhere, and where they are compiled (train/models/compiled.py), they do what the
model's own do.

`swap` changes the class of a model's modules, not the modules: weights, names and hooks stay.

Legend: ... any leading dimensions, T their product (tokens), I a layer's inputs, O its outputs, V
vocabulary, H hidden size, M a gated MLP's intermediate size.
"""

import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

from train.models.matmul import (
    exact_matmul_transposed,
    grad_buffer,
    matmul_transposed,
    product_dtype,
    rounded,
    weight_gradient,
)

# Numbers that a norm has in fp64 at a time: they stay in the cache.
CACHED_NUMBERS = 1 << 17


class Linear(nn.Linear):
    """nn.Linear with products through oneDNN, and gradients of the weight that need no temporary
    copy.
    """

    def forward(self, x):
        """(..., I) -> (..., O)"""
        if _is_left_to_torch(x):
            return super().forward(x)
        dtype = product_dtype(x, self.weight)
        # Rounded out here, where x itself is at hand: all layers that read x then share one copy.
        out = _Product.apply(_flat(x), _flat(rounded(x, dtype)), self.weight, self.bias, dtype)
        return out.view(*x.shape[:-1], self.out_features)


class GatedDownProjection(nn.Linear):
    """The down projection of a gated MLP, the product of silu(gate) * up with its weight. Neither
    silu(gate) nor that product is kept for the backward pass.

    It is a module with two inputs and no function of the MLP's, because under ZeRO-3 a weight may
    be read inside its own module's forward only.
    """

    def forward(self, gate, up):
        """(..., M), (..., M) -> (..., H)"""
        if _is_left_to_torch(gate):
            return super().forward(F.silu(gate) * up)
        dtype = product_dtype(gate, self.weight)
        out = _GatedProduct.apply(_flat(gate), _flat(up), self.weight, self.bias, dtype)
        return out.view(*gate.shape[:-1], self.out_features)


def _is_left_to_torch(x):
    """Whether a layer does what the model's own does: elsewhere than on a CPU, and in compiled code,
    whose products and passes over memory are the compiler's.
    """
    return x.device.type != "cpu" or torch.compiler.is_compiling()


def _flat(x):
    """(..., I) -> (T, I)"""
    return x.reshape(-1, x.shape[-1])


class _Product(torch.autograd.Function):
    """x @ weight.T + bias, computed in `dtype`."""

    @staticmethod
    def forward(ctx, x, rounded_x, weight, bias, dtype):
        """`x` and `rounded_x`, its copy in `dtype`: (T, I). The gradient goes to `x`, and only the
        copy is read.
        """
        ctx.weight = weight
        ctx.x_dtype = x.dtype
        rounded_weight = rounded(weight, dtype)
        wants_weight = ctx.needs_input_grad[2]
        # a frozen weight, beside adapters, needs no input for its gradient
        ctx.save_for_backward(rounded_x if wants_weight else None, rounded_weight)
        bias = None if bias is None else bias.to(dtype)
        return exact_matmul_transposed(rounded_x, rounded_weight, bias)  # (T, O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = matmul_transposed(grad, weight.t()).to(ctx.x_dtype)  # (T, I)
        grad_weight, grad_bias = _parameter_gradients(ctx, grad, x)
        return grad_x, None, grad_weight, grad_bias, None


class _GatedProduct(torch.autograd.Function):
    """(silu(gate) * up) @ weight.T + bias, computed in `dtype`.

    Shazeer 2020, arXiv 2002.05202, equation 6: what FFN_SwiGLU multiplies with W_2.
    """

    @staticmethod
    def forward(ctx, gate, up, weight, bias, dtype):
        ctx.weight = weight
        rounded_weight = rounded(weight, dtype)
        ctx.save_for_backward(gate, up, rounded_weight)
        gated = F.silu(gate).mul_(up).to(dtype)  # (T, M)
        bias = None if bias is None else bias.to(dtype)
        return exact_matmul_transposed(gated, rounded_weight, bias)  # (T, H)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        # computed a second time, like `gated` below, instead of waiting in memory for this pass
        activated = F.silu(gate)  # (T, M)
        grad_gated = matmul_transposed(grad, weight.t()).to(up.dtype)  # (T, M)
        wants_weight = ctx.needs_input_grad[2]
        gated = (activated * up).to(grad.dtype) if wants_weight else None
        grad_weight, grad_bias = _parameter_gradients(ctx, grad, gated)
        del gated  # before another (T, M) is made
        grad_gate = torch.ops.aten.silu_backward(grad_gated * up, gate)
        grad_up = activated.mul_(grad_gated)
        return grad_gate, grad_up, grad_weight, grad_bias, None


def _parameter_gradients(ctx, grad, x):
    """Gradients of weight and bias, which are inputs 2 and 3 of both functions above: (T, O), (T,
    I) -> (O, I), (O,). None for what is not wanted, and for a weight whose gradient is in its
    `.grad` already.
    """
    _, _, wants_weight, wants_bias, _ = ctx.needs_input_grad
    grad_weight = weight_gradient(ctx.weight, grad, x) if wants_weight else None
    grad_bias = grad.sum(0) if wants_bias else None
    dtype = ctx.weight.dtype
    return [None if each is None else each.to(dtype) for each in (grad_weight, grad_bias)]


class Embedding(nn.Embedding):
    """nn.Embedding whose gradient, where the weight has one already (from a tied head, or an
    earlier batch), only touches the rows that were looked up.
    """

    def forward(self, ids):
        """(...) -> (..., H)"""
        if _is_left_to_torch(ids):
            return super().forward(ids)
        return _Lookup.apply(ids, self.weight, self.padding_idx)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, padding_idx):
        ctx.weight = weight
        ctx.padding_idx = padding_idx
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None, None
        ids = ids.reshape(-1)  # (T,)
        grad = _flat(grad)  # (T, H)
        if ctx.padding_idx is not None:
            # as in torch: the padding token's vector is not trained by its use
            grad = grad.masked_fill((ids == ctx.padding_idx)[:, None], 0)
        buffer, is_first = grad_buffer(ctx.weight)
        if buffer is None:
            grad_weight = torch.zeros_like(ctx.weight)  # (V, H)
            grad_weight.index_add_(0, ids, grad.to(grad_weight.dtype))
            return None, grad_weight, None
        if is_first:
            buffer.zero_()
        # A frequent token's gradients among themselves first, as torch's own lookup adds them up:
        # each of them added to what earlier batches and the head have left would be rounded to
        # that sum's digits.
        rows, place = ids.unique(return_inverse=True)  # (R,), (T,)
        sums = buffer.new_zeros(len(rows), grad.shape[1])  # (R, H)
        sums.index_add_(0, place, grad.to(buffer.dtype))
        buffer.index_add_(0, rows, sums)
        return None, None, None


class RMSNorm:
    """A base class in front of a model's own norm (RMS_NORMS), for x and weight in fp32: computed in
    fp64 and rounded once, under autocast in fp32; its gradient in half as many passes, in fp32.

    Zhang and Sennrich 2019, arXiv 1910.07467, equation 4: x / sqrt(mean(x^2) + eps) * weight.
    """

    def forward(self, x):
        """(..., H) -> (..., H)"""
        is_fp32 = x.dtype == self.weight.dtype == torch.float32
        if _is_left_to_torch(x) or not is_fp32:
            return super().forward(x)
        # what is rounded to half right afterwards need not be more exact than fp32
        exact = product_dtype(x, self.weight) == torch.float32
        return _Normed.apply(x, self.weight, self.variance_epsilon, exact)


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, exact):
        """(..., H), (H,) -> (..., H). exact: in fp64, and rounded once."""
        if not exact:
            # In parts of up to 16: on a CPU torch adds up a whole row one by one, which costs fp32 a
            # digit in wide models. From the parts on in fp64: a root in fp32 that is squared again
            # doubles the scale's error.
            parts = x.unflatten(-1, (-1, math.gcd(x.shape[-1], 16)))  # (..., H / part, part)
            norms = torch.linalg.vector_norm(parts, dim=-1)  # (..., H / part)
            norm = torch.linalg.vector_norm(norms, dim=-1, keepdim=True, dtype=torch.float64)
            scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().float()  # (..., 1)
            ctx.save_for_backward(x, scale, weight)
            return (x * scale).mul_(weight)
        # In fp64, some rows at a time, and rounded once: a rounded scale is off for all of a row in the
        # same way, and with it all that is computed from the row.
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        scale = x.new_empty(*x.shape[:-1], 1)
        rows = max(1, CACHED_NUMBERS // x.shape[-1])
        pieces = zip(*(_flat(each).split(rows) for each in (x, out, scale)), strict=True)
        for part, part_out, part_scale in pieces:
            part = part.double()
            norm = torch.linalg.vector_norm(part, dim=-1, keepdim=True)
            exact_scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            part_out.copy_(part.mul_(exact_scale).mul_(weight))
            part_scale.copy_(exact_scale)
        ctx.save_for_backward(x, scale, weight)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # With n = x * s and s = 1 / sqrt(mean(x^2) + eps), the output is n * weight and, through s,
        #     d loss / d x = s * (grad * weight - n * mean(grad * weight * n))
        x, scale, weight = ctx.saved_tensors
        normed = x * scale  # (..., H)
        grad_by_normed = grad * normed
        mean = (grad_by_normed @ weight).div_(x.shape[-1])[..., None]  # (..., 1)
        grad_x = (grad * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        grad_weight = grad_by_normed.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None


class GatedMLP:
    """A base class in front of a model's own gated MLP (GATED_MLPS): the same, keeping two (T, M)
    tensors less for the backward pass.

    Shazeer 2020, arXiv 2002.05202, equation 6: SwiGLU.
    """

    def forward(self, x):
        """(..., H) -> (..., H)"""
        gate = self.gate_proj(x)  # (..., M)
        up = self.up_proj(x)  # (..., M)
        if type(self.down_proj) is GatedDownProjection:
            return self.down_proj(gate, up)
        # adapters wrap the down projection in a module of theirs, which takes one input
        return self.down_proj(self.act_fn(gate) * up)


# Classes of transformers, by the names that it gives to one and the same code in each family.
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
RMS_NORMS = {f"{family}RMSNorm" for family in FAMILIES}
GATED_MLPS = {f"{family}MLP" for family in FAMILIES}
# The activation of a gated MLP, a module of transformers' or torch's, by its name.
SILU = ("SiLU", "SiLUActivation")
TWINS = {nn.Linear: Linear, nn.Embedding: Embedding}


def swap(model):
    """Make each layer of `model` that has a faster twin here that twin. Weights stay where they
    are.

    Adapters go in before: they wrap a layer as they find it, and a GatedDownProjection takes two
    inputs.
    """
    for module in model.modules():
        twin = _twin(type(module))
        if twin is None or _must_stay(module):
            continue
        module.__class__ = twin
        if isinstance(module, GatedMLP) and type(module.down_proj) is nn.Linear:
            # `modules` comes to a parent first, so this is not a Linear of ours yet
            module.down_proj.__class__ = GatedDownProjection


def swap_back(model):
    """Give `model` its own layers again."""
    for module in model.modules():
        own = type(module).__bases__[-1]
        if type(module) is GatedDownProjection or _twin(own) is type(module):
            module.__class__ = own


@functools.cache
def _twin(kind):
    """The faster class for modules of exactly the class `kind`; None where there is none."""
    if kind in TWINS:
        return TWINS[kind]
    if not kind.__module__.startswith("transformers."):
        return None
    for base, names in ((RMSNorm, RMS_NORMS), (GatedMLP, GATED_MLPS)):
        if kind.__name__ in names:
            return type(base.__name__, (base, kind), {})
    return None


def _must_stay(module):
    """Whether a module's settings ask for something that its twin does not do."""
    if isinstance(module, nn.Embedding):
        return module.max_norm or module.scale_grad_by_freq or module.sparse
    if hasattr(module, "gate_proj"):
        return type(module.act_fn).__name__ not in SILU
    return False
