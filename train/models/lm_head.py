"""Token log-probabilities from hidden states and the head's weight, without the (tokens x
vocabulary) tensor.
"""

import math

import torch

from train.models.matmul import SLICE, matmul_transposed, rounded, scratch, weight_gradient

LOGITS_BYTES = 1 << 29  # at SmolLM's 49,152 tokens of vocabulary and fp32: 2,730 tokens


def token_logps(hidden, weight, target, bias=None, budget=LOGITS_BYTES, log_p2=False):
    """log softmax(hidden @ weight.T + bias)[target]: (T, H), (V, H), (T,) -> (T,) nats in fp32 or
    wider.

    Exact, with exact gradients for hidden, weight and bias. `budget`: bytes of a chunk's logits; on
    CUDA two such are alive for a moment. Under autocast the products run in the autocast type, like
    any linear layer's. With `log_p2` a second (T,) comes out: log sum_v p_v^2 of each token's
    distribution, without gradient.
    """
    device = hidden.device.type
    product = (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    )
    with torch.autocast(device, enabled=False):
        logps, squares = _TokenLogps.apply(hidden, weight, target, bias, product, budget, log_p2)
    return (logps, squares) if log_p2 else logps


def _log_softmax(hidden, weight, bias):
    """(t, H), (V, H) -> (t, V) nats in fp32 or wider, on a CPU in `scratch` memory."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.device.type == "cpu":
        logits = scratch(hidden, weight.shape[0], wide)
        for into, rows in zip(logits.split(SLICE, dim=1), weight.split(SLICE), strict=True):
            into.copy_(matmul_transposed(hidden, rows))
    else:  # half-precision products, never rounded to half
        logits = torch.mm(
            hidden, weight.t(), **({} if hidden.dtype == wide else {"out_dtype": wide})
        )
    logits = logits if bias is None else logits.add_(bias)
    # in place where that is known to be right: on a CPU each row is read twice and only then
    # written
    return torch.log_softmax(
        logits, dim=1, **({"out": logits} if logits.device.type == "cpu" else {})
    )


def _norm(rows):
    """(t, V) -> (t,) 2-norms, in parts: on CPU torch adds up a whole row one by one, which costs
    fp32 two digits.
    """
    norm = torch.linalg.vector_norm
    return norm(norm(rows.unflatten(1, (-1, math.gcd(rows.shape[1], 64))), dim=2), dim=1)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, bias, product, budget, log_p2):
        wide = torch.promote_types(product, torch.float32)
        h, w = hidden.to(product), rounded(weight, product)
        size = max(1, int(budget // (weight.shape[0] * wide.itemsize)))
        ctx.spans = [(t, min(t + size, h.shape[0])) for t in range(0, h.shape[0], size)]
        ctx.weight = weight
        logps, ctx.kept = hidden.new_empty(h.shape[0], dtype=wide), {}
        squares = torch.empty_like(logps) if log_p2 else None
        for start, end in ctx.spans:
            every = None  # one chunk at a time
            every = _log_softmax(h[start:end], w, bias)  # (t, V)
            logps[start:end] = every.gather(1, target[start:end, None]).squeeze(1)
            if (
                log_p2
            ):  # the backward pass wants p as well: what is kept is p then, not its logarithm
                squares[start:end] = 2 * _norm(every.exp_()).log()
        if ctx.spans and any(ctx.needs_input_grad):
            ctx.kept[ctx.spans[-1]] = every  # alive anyway: the backward pass starts with it
        ctx.save_for_backward(h, w, target, bias)
        ctx.dtypes = wide, hidden.dtype, weight.dtype
        ctx.kept_p = log_p2
        if log_p2:
            ctx.mark_non_differentiable(squares)
        return logps, squares

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        h, w, target, bias = ctx.saved_tensors
        wide, hidden_type, weight_type = ctx.dtypes
        _, wants_weight, _, wants_bias, *_ = ctx.needs_input_grad
        grad_h = torch.zeros_like(h)
        grad_w = torch.zeros_like(w, dtype=wide) if wants_weight and len(ctx.spans) != 1 else None
        grad_b = torch.zeros_like(bias, dtype=wide) if wants_bias else None
        for start, end in reversed(ctx.spans):
            p = ctx.kept.pop((start, end), None)
            is_p = p is not None and ctx.kept_p
            p = _log_softmax(h[start:end], w, bias) if p is None else p  # (t, V), overwritten
            # d logp / d logits = onehot(target) - softmax
            (p if is_p else p.exp_()).mul_(-grad[start:end, None])
            p.scatter_add_(1, target[start:end, None], grad[start:end, None].to(wide))
            if wants_bias:
                grad_b += p.sum(0)
            p = p if p.dtype == h.dtype else scratch(p, p.shape[1], h.dtype).copy_(p)
            grad_h[start:end] = matmul_transposed(p, w.t())
            if wants_weight:
                part = weight_gradient(ctx.weight, p, h[start:end])  # (V, H)
                grad_w = (
                    part if grad_w is None or part is None else grad_w.add_(part)
                )  # None once it is elsewhere
        grad_w = None if grad_w is None else grad_w.to(weight_type)
        grad_b = grad_b.to(bias.dtype) if wants_bias else None
        return grad_h.to(hidden_type), grad_w, None, grad_b, None, None, None
