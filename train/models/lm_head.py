"""Token log-probabilities from hidden states and the head's weight, without the (tokens x
vocabulary) tensor of a whole batch.

The head is worked off in chunks of tokens sized by a byte budget. The last chunk is kept for the
backward pass, which overwrites it with its gradient; the others are computed a second time.

The softmax, its logarithm and what is summed over chunks are fp32 (fp64 for fp64 weights). Matrix
products have the type of their factors: of half precision, the logits come out in fp32 on CUDA and
rounded to half on a CPU, and their gradient is rounded to half before it goes on, on both.

Legend: T scored tokens, C tokens of a chunk, V vocabulary, H hidden size. Log-probabilities are in
nats.
"""

import functools
import math
from typing import NamedTuple

import torch

from train.models.matmul import (
    SLICE,
    matmul_over_vocabulary,
    matmul_transposed_into,
    product_dtype,
    rounded,
    scratch,
    weight_gradient,
)

# At SmolLM's vocabulary of 49,152 and fp32: 2,730 tokens a chunk.
LOGITS_BYTES = 1 << 29
# Of a GPU's memory, for a chunk: 2 GB of 80, which are 10,900 such tokens. Of a batch that is one
# chunk no logits are computed twice.
CHUNK_SHARE = 1 / 40
# Of logits that are normalised at a time on a CPU: they stay in its cache between the passes.
CACHED_BYTES = 1 << 22


def chunk_bytes(memory: int) -> int:
    """Bytes of a chunk's logits on a GPU of so many bytes, where nobody says how many."""
    return max(LOGITS_BYTES, int(memory * CHUNK_SHARE))


@functools.cache
def default_logits_bytes(device: torch.device) -> int:
    """Bytes of a chunk's logits on `device`, where nobody says how many."""
    if device.type != "cuda":
        return LOGITS_BYTES
    return chunk_bytes(torch.cuda.mem_get_info(device)[1])


def token_logps(
    hidden,
    weight,
    target,
    bias=None,
    logits_bytes=None,
    log_p2=False,
    *,
    temperature=1.0,
    entropy=False,
):
    """log softmax((hidden @ weight.T + bias) / temperature)[target]: (T, H), (V, H), (T,), (V,) ->
    (T,) nats in fp32 or wider.

    Exact, with exact gradients for hidden, weight and bias. `logits_bytes`: bytes of a chunk's
    logits, by default default_logits_bytes; on CUDA two such are alive for a moment. Under autocast
    the products run in the autocast type, like any linear layer's.

    With `log_p2` a second (T,) comes out, log sum_v p_v^2 of each token's distribution; with `entropy`
    -sum_v p_v log p_v, in nats. Both are without gradient; ValueError for both at once.
    """
    if log_p2 and entropy:
        raise ValueError("log_p2 and entropy are not made in one call")
    second = "log_p2" if log_p2 else "entropy" if entropy else None
    logits_bytes = logits_bytes or default_logits_bytes(hidden.device)
    options = _Options(product_dtype(hidden, weight), logits_bytes, second, temperature)
    with torch.autocast(hidden.device.type, enabled=False):  # the function below casts by itself
        logps, others = _TokenLogps.apply(hidden, weight, target, bias, options)
    return (logps, others) if second else logps


class _Options(NamedTuple):
    dtype: torch.dtype  # of the matrix products
    logits_bytes: int
    second: str | None  # what comes out beside: "log_p2" or "entropy"
    temperature: float  # logits are divided by it


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, bias, options):
        """(T, H), (V, H), (T,), (V,) -> (T,), (T,) or None"""
        wide = torch.promote_types(options.dtype, torch.float32)
        h = hidden.to(options.dtype)
        w = rounded(weight, options.dtype)
        num_tokens = h.shape[0]
        size = max(1, int(options.logits_bytes // (weight.shape[0] * wide.itemsize)))
        ctx.chunks = [(t, min(t + size, num_tokens)) for t in range(0, num_tokens, size)]
        logps = hidden.new_empty(num_tokens, dtype=wide)
        others = torch.empty_like(logps) if options.second else None
        for start, end in ctx.chunks:
            # One chunk at a time: its memory is let go before the next is made, and `scratch` hands
            # out the same again.
            log_p = None
            log_p = _log_softmax(h[start:end], w, bias, options.temperature)  # (C, V)
            logps[start:end] = log_p.gather(1, target[start:end, None]).squeeze(1)
            if options.second == "log_p2":
                # in place: from here on `log_p` holds p, which the backward pass wants as well
                others[start:end] = 2 * _norm(log_p.exp_()).log()
            elif options.second == "entropy":
                others[start:end] = _entropy(log_p)
        ctx.last_chunk = None
        if ctx.chunks and any(ctx.needs_input_grad):
            ctx.last_chunk = log_p  # alive anyway: the backward pass starts with it
        ctx.last_chunk_is_p = options.second == "log_p2"
        ctx.temperature = options.temperature
        ctx.save_for_backward(h, w, target, bias)
        ctx.weight = weight
        ctx.dtypes = (wide, hidden.dtype, weight.dtype)
        if options.second:
            ctx.mark_non_differentiable(others)
        return logps, others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        """(T,) -> (T, H), (V, H), (V,)"""
        h, w, target, bias = ctx.saved_tensors
        wide, hidden_dtype, weight_dtype = ctx.dtypes
        _, wants_weight, _, wants_bias, _ = ctx.needs_input_grad
        if ctx.temperature != 1:
            grad = grad / ctx.temperature  # of logits that are not divided yet
        grad_h = torch.zeros_like(h)
        grad_w = None
        if wants_weight and len(ctx.chunks) != 1:  # of one chunk the product itself is the gradient
            grad_w = torch.zeros_like(w, dtype=wide)
        grad_b = torch.zeros_like(bias, dtype=wide) if wants_bias else None
        for start, end in reversed(ctx.chunks):
            chunk = slice(start, end)
            grad_logits = None  # one chunk at a time: see above
            grad_logits = _probabilities(ctx, h[chunk], w, bias)  # (C, V)
            # in place: (d logp / d logits = onehot(target) - softmax(logits)) * d loss / d logp
            grad_logits.mul_(-grad[chunk, None])
            grad_logits.scatter_add_(1, target[chunk, None], grad[chunk, None].to(wide))
            if wants_bias:
                grad_b += grad_logits.sum(0)
            if grad_logits.dtype != h.dtype:
                grad_logits = scratch(grad_logits, w.shape[0], h.dtype).copy_(grad_logits)
            grad_h[chunk] = matmul_over_vocabulary(grad_logits, w)
            if wants_weight:
                part = weight_gradient(ctx.weight, grad_logits, h[chunk])  # (V, H)
                if grad_w is None or part is None:
                    grad_w = part  # None where weight.grad has it already
                else:
                    grad_w.add_(part)
        grad_w = None if grad_w is None else grad_w.to(weight_dtype)
        grad_b = grad_b.to(bias.dtype) if wants_bias else None
        return grad_h.to(hidden_dtype), grad_w, None, grad_b, None


def _probabilities(ctx, hidden, weight, bias):
    """(C, H), (V, H), (V,) -> (C, V), to be overwritten: what the forward pass has kept of the last
    chunk, once; computed again for the other chunks, and for all in a second backward pass.
    """
    kept = ctx.last_chunk
    ctx.last_chunk = None
    if kept is None:
        return _log_softmax(hidden, weight, bias, ctx.temperature).exp_()
    return kept if ctx.last_chunk_is_p else kept.exp_()


def _log_softmax(hidden, weight, bias, temperature):
    """(C, H), (V, H), (V,) -> (C, V) nats in fp32 or wider, on a CPU in `scratch` memory."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    on_cpu = hidden.device.type == "cpu"
    if on_cpu:
        logits = scratch(hidden, weight.shape[0], wide)
        for part, part_weight in zip(logits.split(SLICE, dim=1), weight.split(SLICE), strict=True):
            matmul_transposed_into(part, hidden, part_weight)
    elif hidden.dtype == wide:
        logits = torch.mm(hidden, weight.t())
    else:
        # half-precision products, summed in fp32 and never rounded to half
        logits = torch.mm(hidden, weight.t(), out_dtype=wide)
    if bias is not None:
        logits.add_(bias)
    if temperature != 1:
        logits.div_(temperature)
    if not on_cpu:
        return torch.log_softmax(logits, dim=1)
    if hidden.dtype != wide:
        # _normalise would gain nothing: the logits were rounded to half. In place: each row is read
        # twice and only then written.
        return torch.log_softmax(logits, dim=1, out=logits)
    return _normalise(logits)


def _normalise(logits):
    """Log softmax of each row of logits, (C, V), in place.

    On a CPU torch's own adds up a row's exponentials in as many running sums as a vector register has
    places. A vocabulary's many small terms are then rounded away beside a large one: at 49,152 a
    log-probability comes out 3e-6 to 8e-6 nats too high, which an answer's sum keeps, against 1e-8
    here. It takes 57 microseconds a token there instead of 24; the product before it takes 280.
    """
    rows = max(1, CACHED_BYTES // (logits.shape[1] * logits.itemsize))
    for part in logits.split(rows):
        part.sub_(part.amax(1, keepdim=True))  # the likeliest at 0
        # torch's sum, other than its log softmax, adds up parts of parts: small terms are not lost
        part.sub_(part.exp().sum(1, keepdim=True).log_())
    return logits


def _entropy(log_p):
    """-sum_v p_v log p_v: (C, V) -> (C,) nats, by slices, which need no second (C, V)."""
    total = log_p.new_zeros(log_p.shape[0])
    for part in log_p.split(SLICE, dim=1):
        # what cannot come, at -inf, adds 0 and not 0 * -inf
        total -= torch.linalg.vecdot(part.exp(), part.clamp(min=torch.finfo(part.dtype).min))
    return total


def _norm(rows):
    """2-norms of rows: (C, V) -> (C,). In up to 64 parts, because on CPU torch adds up a whole row
    one by one, which costs fp32 two digits.
    """
    parts = rows.unflatten(1, (-1, math.gcd(rows.shape[1], 64)))  # (C, V / parts, parts)
    return torch.linalg.vector_norm(torch.linalg.vector_norm(parts, dim=2), dim=1)
