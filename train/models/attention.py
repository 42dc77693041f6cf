"""Attention over packed rows, registered with transformers under the name "zeropref": no model is forked.

Each response is one segment of queries with the keys of its prompt in front (train/data/packing.py); causal attention
aligned to the bottom right is its mask. On CUDA in half precision this is one call of torch's variable-length
flash kernel; elsewhere scaled_dot_product_attention runs segment by segment.

Legend: L tokens, K gathered keys, H heads, G key heads, D head size; a leading 1 is transformers' batch dimension.
"""

import inspect

import torch
import torch.nn.functional as F
import transformers

NAME = "zeropref"


class Segments:
    """What attention needs to know of one packed row, made once a row and handed to every layer."""

    def __init__(self, row):
        self.row = row
        self.max_q = max(size for prompt, *responses in row.shape for size in _query_sizes(prompt, responses))
        self.max_k = max(prompt + size for prompt, *responses in row.shape for size in responses)
        self.query_sizes = [size for prompt, *rest in row.shape for size in _query_sizes(prompt, rest)]
        self.key_sizes = [size for shape in row.shape for size in shape]  # the prompt's and the responses', in turn
        self._masks = {}

    def mask(self, queries, keys, window, device):
        """The (queries, keys) boolean mask of a segment, aligned bottom right; None where `is_causal` says it all."""
        if queries == keys and not 0 < window < keys:
            return None
        key = (queries, keys, window)
        if key not in self._masks:
            at = torch.arange(keys - queries, keys, device=device)[:, None]  # (queries, 1) positions of the queries
            to = torch.arange(keys, device=device)[None]
            seen = to <= at
            self._masks[key] = seen & (to > at - window) if window > 0 else seen
        return self._masks[key]


def _query_sizes(prompt, responses):
    """The first response's queries come with the prompt's; an empty prompt has none."""
    return [prompt + responses[0], *responses[1:]]


def packed_attention(module, query, key, value, attention_mask, segments=None, scaling=None, sliding_window=None, **other):
    """transformers' attention interface: query (1, H, L, D), key and value (1, G, L, D) -> (1, L, H, D), None."""
    if segments is None:
        raise RuntimeError(f"{NAME!r} attention works on packed rows only: call the model through train.models.backbone")
    for name in ("softcap", "s_aux", "position_bias"):
        if other.get(name) is not None:
            raise ValueError(f"packed attention does not implement {name}; use --layout padded")
    dtype = value.dtype  # under autocast rotary embeddings leave query and key in fp32, value comes in bf16
    query, key = query.to(dtype), key.to(dtype)
    window = sliding_window or 0
    if query.is_cuda and dtype in (torch.bfloat16, torch.float16):
        out = _flash(query[0], key[0], value[0], segments.row, segments.max_q, segments.max_k, scaling, window)
    else:
        out = _by_segment(query, key, value, segments, scaling, window)
    return out, None


def _by_segment(query, key, value, segments, scaling, window):
    """Segment by segment: (1, H, L, D), (1, G, L, D) x 2 -> (1, L, H, D)."""
    grouped = query.shape[1] != key.shape[1]
    keys, values = iter(key.split(segments.key_sizes, dim=2)), iter(value.split(segments.key_sizes, dim=2))
    queries = iter(query.split(segments.query_sizes, dim=2))
    out = []
    for prompt, *responses in segments.row.shape:
        prompt_key, prompt_value = next(keys), next(values)
        for _ in responses:
            q = next(queries)  # (1, H, n, D)
            k = torch.cat([prompt_key, next(keys)], dim=2)  # (1, G, m, D)
            v = torch.cat([prompt_value, next(values)], dim=2)
            mask = segments.mask(q.shape[2], k.shape[2], window, q.device)
            out.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
                )
            )
    return torch.cat(out, dim=2).transpose(1, 2)


class GatherKeys(torch.autograd.Function):
    """x[kv_index] along dimension 0, with a backward that adds in a fixed order instead of with atomics.

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


def _flash(query, key, value, row, max_q, max_k, scaling, window):
    """One call of torch's varlen kernel: (H, L, D), (G, L, D) x 2 -> (1, L, H, D). CUDA, fp16 or bf16."""
    from torch.nn.attention.varlen import varlen_attn

    query = query.transpose(0, 1).contiguous()  # (L, H, D)
    key, value = (x.transpose(0, 1) for x in (key, value))  # (L, G, D)
    known = inspect.signature(varlen_attn).parameters  # torch 2.10 to 2.13 spell the mask and grouped heads differently
    options = {"scale": scaling} if scaling is not None else {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    key, value = (GatherKeys.apply(x, row.kv_index, row.kv_users) for x in (key, value))  # (K, G, D)
    if "window_size" in known:
        options["window_size"] = (window - 1 if window > 0 else -1, 0)
    elif window > 0:
        raise ValueError("sliding windows need torch 2.11 or newer on CUDA; use --layout padded")
    else:
        options["is_causal"] = True
    out = varlen_attn(query, key, value, row.cu_q, row.cu_k, max_q, max_k, **options)
    return out[None]


def register():
    """Make "zeropref" known to transformers; without an entry in its mask registry no mask is built."""
    transformers.AttentionInterface.register(NAME, packed_attention)
