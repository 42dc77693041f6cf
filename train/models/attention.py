"""Attention over packed rows, registered with transformers under the name "zeropref": no model is
forked.

Each response is one segment of queries with the keys of its prompt in front
(train/data/packing.py); causal attention aligned to the bottom right is its mask. On CUDA in half
precision this is one call of torch's variable-length flash kernel; elsewhere torch's attention runs
segment by segment.

Legend: L tokens, K gathered keys, H heads, G key heads, D head size; a leading 1 is transformers'
batch dimension.
"""

import inspect
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers

NAME = "zeropref"
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Segments:
    """What attention needs to know of one packed row, made once a row and handed to every layer."""

    def __init__(self, row):
        self.row = row
        self.parts = []  # S segments
        start = 0
        for prompt, *responses in row.shape:
            first = start + prompt
            for j, size in enumerate(responses):
                self.parts.append(
                    Part(start if j == 0 else first, first + size, start, start + prompt, first)
                )
                first += size
            start = first
        self.max_q = max(part.end - part.queries for part in self.parts)
        self.max_k = max(part.size for part in self.parts)
        self._masks = {}

    def mask(self, queries, keys, window, like):
        """The (queries, keys) additive mask of a segment, aligned bottom right; None where
        `is_causal` says it all.
        """
        if queries == keys and not 0 < window < keys:
            return None
        key = (queries, keys, window, like.dtype)
        if key not in self._masks:
            to = torch.arange(keys, device=like.device)[None]
            at = to[0, keys - queries :, None]  # (queries, 1) positions of the queries
            hidden = to > at if window <= 0 else (to > at) | (to <= at - window)
            mask = torch.zeros(queries, keys, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill_(hidden, -math.inf)
        return self._masks[key]


class Part(NamedTuple):
    """One segment: the response [response, end) of the prompt [prompt, prompt_end), whose queries
    start at `queries`.

    The first response of a group runs its prompt's queries too, and its keys lie side by side with
    the prompt's.
    """

    queries: int
    end: int
    prompt: int
    prompt_end: int
    response: int

    @property
    def size(self):
        """Keys of this segment."""
        return self.prompt_end - self.prompt + self.end - self.response

    def keys(self, x):
        """The segment's keys or values out of x (1, G, L, D): (1, G, size, D), a view where they
        lie side by side.
        """
        if self.prompt_end == self.response:
            return x[:, :, self.prompt : self.end]
        return torch.cat(
            [x[:, :, self.prompt : self.prompt_end], x[:, :, self.response : self.end]], dim=2
        )

    def add_to(self, total, grad):
        """Add the gradient of `keys`, (1, G, size, D), to that of x. The first response comes
        first, and overwrites.
        """
        if self.prompt_end == self.response:
            total[:, :, self.prompt : self.end] = grad
        else:
            split = self.prompt_end - self.prompt
            total[:, :, self.prompt : self.prompt_end] += grad[:, :, :split]
            total[:, :, self.response : self.end] = grad[:, :, split:]


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    segments=None,
    scaling=None,
    sliding_window=None,
    **other,
):
    """transformers' attention interface: query (1, H, L, D), key and value (1, G, L, D) -> (1, L,
    H, D), None.
    """
    if segments is None:
        raise RuntimeError(
            f"{NAME!r} attention works on packed rows only: call the model through train.models.backbone"
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if other.get(name) is not None:
            raise ValueError(f"packed attention does not implement {name}; use --layout padded")
    # under autocast rotary embeddings leave query and key in fp32, value comes in bf16
    dtype = value.dtype
    if (
        not query.is_cuda
    ):  # torch's backward kernel for bf16 takes twice as long as that for fp32, and rounds more
        dtype = torch.promote_types(dtype, torch.float32)
    query, key, value, given = query.to(dtype), key.to(dtype), value.to(dtype), value.dtype
    window = sliding_window or 0
    alike = query.shape[-1] == value.shape[-1]
    if query.is_cuda and alike and dtype in (torch.bfloat16, torch.float16):
        out = _flash(query[0], key[0], value[0], segments, scaling, window)
    elif not query.is_cuda and alike:
        out = CpuAttention.apply(query, key, value, segments, scaling, window)
    else:
        out = _by_segment(query, key, value, segments, scaling, window)
    return out.to(given), None


def _by_segment(query, key, value, segments, scaling, window):
    """The plain form: (1, H, L, D), (1, G, L, D) x 2 -> (1, L, H, D)."""
    out = []
    for part in segments.parts:
        q, k, v = query[:, :, part.queries : part.end], part.keys(key), part.keys(value)
        mask = segments.mask(q.shape[2], k.shape[2], window, q)
        out.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(out, dim=2).transpose(1, 2)


class CpuAttention(torch.autograd.Function):
    """`_by_segment` on torch's CPU flash kernels, with one node of the graph a layer instead of one
    a segment.

    Gradients of a shared prompt's keys add up in place, in the order of the responses.
    """

    @staticmethod
    def forward(ctx, query, key, value, segments, scaling, window):
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])  # (1, L, H, D)
        by_head, norms = out.transpose(1, 2), []
        for part in segments.parts:
            q, k, v = query[:, :, part.queries : part.end], part.keys(key), part.keys(value)
            mask = segments.mask(q.shape[2], k.shape[2], window, q)
            by_head[:, :, part.queries : part.end], norm = _FORWARD(
                q, k, v, 0.0, mask is None, attn_mask=mask, scale=scaling
            )
            norms.append(norm)  # (1, H, queries) logarithms of the softmax's denominators
        ctx.save_for_backward(query, key, value, out, *norms)
        ctx.how = segments, scaling, window
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, out, *norms = ctx.saved_tensors
        segments, scaling, window = ctx.how
        out, grad = out.transpose(1, 2), grad.transpose(1, 2)
        grads = [torch.empty_like(x) for x in (query, key, value)]
        for part, norm in zip(segments.parts, norms, strict=True):
            at = slice(part.queries, part.end)
            q, k, v = query[:, :, at], part.keys(key), part.keys(value)
            mask = segments.mask(q.shape[2], k.shape[2], window, q)
            grads[0][:, :, at], grad_key, grad_value = _BACKWARD(
                grad[:, :, at],
                q,
                k,
                v,
                out[:, :, at],
                norm,
                0.0,
                mask is None,
                attn_mask=mask,
                scale=scaling,
            )
            part.add_to(grads[1], grad_key)
            part.add_to(grads[2], grad_value)
        return *grads, None, None, None


class GatherKeys(torch.autograd.Function):
    """x[kv_index] along dimension 0, with a backward that adds in a fixed order instead of with
    atomics.

    x (L, ...), kv_index (K,), kv_users (L, k) with K for "no further user" -> (K, ...).
    """

    @staticmethod
    def forward(ctx, x, kv_index, kv_users):
        ctx.save_for_backward(kv_users)
        return x.index_select(0, kv_index)

    @staticmethod
    def backward(ctx, grad):
        (users,) = ctx.saved_tensors
        padded = torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])
        total = padded.index_select(0, users[:, 0])
        for j in range(1, users.shape[1]):
            total += padded.index_select(0, users[:, j])
        return total, None, None


def _flash(query, key, value, segments, scaling, window):
    """One call of torch's varlen kernel: (H, L, D), (G, L, D) x 2 -> (1, L, H, D). CUDA, fp16 or
    bf16.
    """
    from torch.nn.attention.varlen import varlen_attn

    row = segments.row
    query = query.transpose(0, 1).contiguous()  # (L, H, D)
    key, value = (x.transpose(0, 1) for x in (key, value))  # (L, G, D)
    options = {"window_size": (window - 1 if window > 0 else -1, 0)} | (
        {} if scaling is None else {"scale": scaling}
    )
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:  # torch 2.11
        key, value = (
            x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value)
        )
    key, value = (
        GatherKeys.apply(x, row.kv_index, row.kv_users) for x in (key, value)
    )  # (K, G, D)
    return varlen_attn(
        query, key, value, row.cu_q, row.cu_k, segments.max_q, segments.max_k, **options
    )[None]


def register():
    """Make "zeropref" known to transformers; without an entry in its mask registry no mask is
    built.
    """
    transformers.AttentionInterface.register(NAME, packed_attention)
