"""Attention over packed batches, registered with transformers under the name "zeropref": no model
is forked.

Each response is one segment of queries with the keys of its prompt in front
(train/data/packing.py); causal attention aligned to the bottom right is its mask. On CUDA in half
precision this is one call of torch's variable-length flash kernel, and for what that does not take
one call of torch's attention over padded segments; on a CPU torch's attention runs segment by
segment.

Legend: L tokens, K gathered keys, S segments, H heads, G key heads (and value heads), D head size, q
queries and k keys of one segment, or of the longest; a leading 1 is transformers' batch dimension.
"""

import contextlib
import functools
import inspect
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from train.models.buckets import StaticSegments

NAME = "zeropref"

# Queries of one call of the CPU's kernel. Told that attention is causal it takes as long as for all
# keys of all queries; in calls of 64 queries with the keys up to their last, a segment of 340 tokens
# takes two thirds of that, forward and backward, in the order of smaller sums.
CALL_QUERIES = 64

# The kernel behind scaled_dot_product_attention on a CPU, called directly for the logarithms that
# its backward pass needs.
_FLASH_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Segments:
    """What attention needs to know of one packed batch, made once a batch and handed to every
    layer. Iterating gives a Segment for each response.

    deterministic: on CUDA, gradients are the same bits each time.
    """

    def __init__(self, batch, deterministic=False):
        self.batch = batch
        self.deterministic = deterministic
        self.has_flash = has_flash(batch.input_ids.device)
        self._segments = []
        prompt_start = 0
        for prompt_length, *response_lengths in batch.shape:
            prompt_end = prompt_start + prompt_length
            response_start = prompt_end
            for j, length in enumerate(response_lengths):
                end = response_start + length
                self._segments.append(
                    Segment(
                        query_start=prompt_start if j == 0 else response_start,
                        end=end,
                        prompt_start=prompt_start,
                        prompt_end=prompt_end,
                        response_start=response_start,
                    )
                )
                response_start = end
            prompt_start = response_start
        self.max_queries = max(segment.num_queries for segment in self)
        self.max_keys = max(segment.num_keys for segment in self)
        self._masks = {}
        self._padded_masks = {}
        self._call_masks = {}

    def __iter__(self):
        return iter(self._segments)

    def mask(self, query, key, window):
        """The additive (q, k) mask of a segment, aligned to the bottom right, for query (1, H, q,
        D) and key (1, G, k, D). None where `is_causal` says it all.

        Kept for the other layers: many have the same shape.
        """
        num_queries = query.shape[2]
        num_keys = key.shape[2]
        has_window = 0 < window < num_keys
        if num_queries == num_keys and not has_window:
            return None
        which = (num_queries, num_keys, window, query.dtype)
        if which not in self._masks:
            self._masks[which] = _mask(num_queries, num_keys, window, query)
        return self._masks[which]

    @functools.cached_property
    def padding(self):
        """How segments are padded to the longest: a Padding. Made on the batch's device, which is not
        asked for anything.
        """
        cu_q, cu_k = self.batch.cu_q.long(), self.batch.cu_k.long()  # (S + 1,)
        device = cu_q.device
        num_queries, num_keys = cu_q.diff()[:, None], cu_k.diff()[:, None]  # (S, 1)
        query = torch.arange(self.max_queries, device=device).minimum(num_queries - 1)  # (S, q)
        # kernels like rows of 16
        key = torch.arange(-(-self.max_keys // 16) * 16, device=device)  # (k,)
        token = torch.arange(len(self.batch.input_ids), device=device)  # (L,)
        segment = torch.searchsorted(cu_q[1:], token, right=True)  # (L,)
        return Padding(
            queries=cu_q[:-1, None] + query,
            keys=cu_k[:-1, None] + key.minimum(num_keys - 1),
            outputs=segment * self.max_queries + token - cu_q[segment],
            query_places=query + num_keys - num_queries,
            is_key=key < num_keys,
        )

    def padded_mask(self, window, dtype):
        """The additive (S, 1, q, k) mask of padded segments. Kept for the other layers."""
        if (window, dtype) not in self._padded_masks:
            padding = self.padding
            key = torch.arange(padding.keys.shape[1], device=padding.keys.device)  # (k,)
            query = padding.query_places[:, :, None]  # (S, q, 1)
            seen = padding.is_key[:, None] & (key <= query)  # (S, q, k)
            if window > 0:
                seen = seen & (key > query - window)
            mask = torch.zeros(seen.shape, dtype=dtype, device=key.device)
            self._padded_masks[window, dtype] = mask.masked_fill_(~seen, -math.inf)[:, None]
        return self._padded_masks[window, dtype]

    def calls(self, segment, window, like):
        """A segment's attention in calls of up to CALL_QUERIES queries: a Call each, in their order.

        A mask depends on how far a key is from a query alone, so those of all calls with the same
        number of queries are the right end of one, of the type and on the device of `like`.
        """
        prompt_length = segment.num_keys - segment.num_queries
        for start in range(0, segment.num_queries, CALL_QUERIES):
            end = min(start + CALL_QUERIES, segment.num_queries)
            num_queries = end - start
            num_keys = prompt_length + end
            mask = None
            if num_queries < num_keys or 0 < window < num_keys:
                which = (num_queries, window, like.dtype)
                if which not in self._call_masks:
                    self._call_masks[which] = _mask(num_queries, self.max_keys, window, like)
                mask = self._call_masks[which][:, self.max_keys - num_keys :]  # (q, k)
            yield Call(start, end, num_keys, mask)


class Padding(NamedTuple):
    """Segments side by side, each as long as the longest: its last query and its last key again where
    it is shorter. No gradient comes to these, for nobody reads such a query or sees such a key.
    """

    queries: torch.Tensor  # (S, q) into the L tokens
    keys: torch.Tensor  # (S, k) into the K gathered keys
    outputs: torch.Tensor  # (L,) into the S * q padded queries: where each token's is
    query_places: torch.Tensor  # (S, q): the place of a query among its segment's keys
    is_key: torch.Tensor  # (S, k) bool


def _mask(num_queries, num_keys, window, like):
    """What is added to scores, (q, k), of the type and on the device of `like`: -inf for a key behind
    its query or outside the `window` of keys that end there. The last query is the last key's.
    """
    key_place = torch.arange(num_keys, device=like.device)[None]  # (1, k)
    query_place = key_place[0, num_keys - num_queries :, None]  # (q, 1)
    hidden = key_place > query_place  # (q, k)
    if window > 0:
        hidden = hidden | (key_place <= query_place - window)
    mask = torch.zeros(num_queries, num_keys, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, -math.inf)


class Call(NamedTuple):
    """Some of a segment's queries, for one call of the CPU's kernel."""

    start: int  # queries [start, end) of the segment's own
    end: int
    num_keys: int  # the segment's first keys, up to that of the last of these queries
    mask: torch.Tensor | None  # (q, k); None where `is_causal` says it all


class Segment(NamedTuple):
    """One response and its prompt, as places in the batch's L tokens.

    The first response of a group runs its prompt's queries too, and its keys lie side by side with
    the prompt's.
    """

    query_start: int  # queries are [query_start, end)
    end: int  # of the response
    prompt_start: int  # the prompt is [prompt_start, prompt_end)
    prompt_end: int
    response_start: int  # the response is [response_start, end)

    @property
    def queries(self):
        """Where the segment's queries stand in the batch."""
        return slice(self.query_start, self.end)

    @property
    def num_queries(self):
        return self.end - self.query_start

    @property
    def num_keys(self):
        return self.prompt_end - self.prompt_start + self.end - self.response_start

    def keys(self, x):
        """The segment's keys or values out of x (1, G, L, D): (1, G, k, D), a view where they lie
        side by side.
        """
        if self.prompt_end == self.response_start:
            return x[:, :, self.prompt_start : self.end]
        prompt = x[:, :, self.prompt_start : self.prompt_end]
        response = x[:, :, self.response_start : self.end]
        return torch.cat([prompt, response], dim=2)

    def add_keys_gradient(self, total, grad):
        """Add the gradient of `keys`, (1, G, k, D), to that of x, (1, G, L, D). The first response
        comes first, and overwrites.
        """
        if self.prompt_end == self.response_start:
            total[:, :, self.prompt_start : self.end] = grad
        else:
            prompt_length = self.prompt_end - self.prompt_start
            total[:, :, self.prompt_start : self.prompt_end] += grad[:, :, :prompt_length]
            total[:, :, self.response_start : self.end] = grad[:, :, prompt_length:]


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
            f"{NAME!r} attention works on packed batches only: "
            "call the model through train.models.backbone"
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if other.get(name) is not None:
            raise ValueError(f"packed attention does not implement {name}; use --layout padded")
    # under autocast rotary embeddings leave query and key in fp32, value comes in bf16
    out_dtype = value.dtype
    dtype = out_dtype
    if not query.is_cuda:
        # torch's backward kernel for bf16 takes twice as long as that for fp32, and rounds more
        dtype = torch.promote_types(dtype, torch.float32)
    query = query.to(dtype)
    key = key.to(dtype)
    value = value.to(dtype)
    window = sliding_window or 0
    same_head_size = query.shape[-1] == value.shape[-1]
    if isinstance(segments, StaticSegments) and not segments.has_flash:
        out = _in_one_call(query, key, value, segments, scaling, window)
    elif not query.is_cuda and same_head_size:
        out = CpuAttention.apply(query, key, value, segments, scaling, window)
    elif not query.is_cuda:
        out = _by_segment(query, key, value, segments, scaling, window)
    elif segments.has_flash and same_head_size and flash_takes(query.shape[-1], dtype):
        out = _flash(query[0], key[0], value[0], segments, scaling, window)
    else:
        out = _padded(query[0], key[0], value[0], segments, scaling, window)
    return out.to(out_dtype), None


def has_flash(device: torch.device) -> bool:
    """Whether the device is a GPU that flash kernels are built for: sm80, an A100, and later ones."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_takes(head_size: int, dtype: torch.dtype) -> bool:
    """Whether flash kernels have heads of this size in this dtype."""
    return dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0 and head_size <= 256


def without_flash(config, dtype: torch.dtype, device: torch.device) -> str:
    """Why a model's attention on this GPU goes without the flash kernel, in words; "" where it has it,
    and on a CPU.

    config: the model's. dtype: that it computes in.
    """
    if device.type != "cuda":
        return ""
    if not has_flash(device):
        return f"{torch.cuda.get_device_name(device)} is older than sm80"
    config = config.get_text_config()
    head_size = getattr(config, "head_dim", None)
    head_size = head_size or config.hidden_size // config.num_attention_heads
    if dtype not in (torch.bfloat16, torch.float16):
        return "it has no fp32"
    if not flash_takes(head_size, dtype):
        return f"it has no heads of {head_size}: multiples of 8 up to 256"
    return ""


def _by_segment(query, key, value, segments, scaling, window):
    """The plain form: (1, H, L, D), (1, G, L, D) x 2 -> (1, L, H, D)."""
    out = []
    for segment in segments:
        q = query[:, :, segment.queries]  # (1, H, q, D)
        k = segment.keys(key)  # (1, G, k, D)
        v = segment.keys(value)  # (1, G, k, D)
        mask = segments.mask(q, k, window)
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # (1, H, q, D)
        out.append(attended)
    return torch.cat(out, dim=2).transpose(1, 2)


def _in_one_call(query, key, value, segments, scaling, window):
    """torch's attention over the whole of a static row, without a segment on the host: (1, H, L, D),
    (1, G, L, D) x 2 -> (1, L, H, D). Most of its work is on pairs that the mask then hides.
    """
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=segments.visible(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # (1, H, L, D)
    return out.transpose(1, 2)


class CpuAttention(torch.autograd.Function):
    """`_by_segment` on torch's CPU flash kernels, with one node of the graph a layer instead of one
    a segment.

    Gradients of a shared prompt's keys add up in place, in the order of the responses.
    """

    @staticmethod
    def forward(ctx, query, key, value, segments, scaling, window):
        """(1, H, L, D), (1, G, L, D) x 2 -> (1, L, H, D)"""
        _, num_heads, length, head_size = query.shape
        out = query.new_empty(1, length, num_heads, head_size)
        out_by_head = out.transpose(1, 2)  # (1, H, L, D), a view
        log_sums = []  # (1, H, q) of each call: logarithms of the softmax's denominators
        for segment in segments:
            keys = segment.keys(key)  # (1, G, k, D)
            values = segment.keys(value)  # (1, G, k, D)
            for call in segments.calls(segment, window, query):
                queries = slice(segment.query_start + call.start, segment.query_start + call.end)
                out_by_head[:, :, queries], log_sum = _FLASH_CPU(
                    query[:, :, queries],  # (1, H, q, D)
                    keys[:, :, : call.num_keys],
                    values[:, :, : call.num_keys],
                    0.0,  # no dropout
                    call.mask is None,
                    attn_mask=call.mask,
                    scale=scaling,
                )
                log_sums.append(log_sum)
        ctx.save_for_backward(query, key, value, out, *log_sums)
        ctx.segments = segments
        ctx.scaling = scaling
        ctx.window = window
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """(1, L, H, D) -> (1, H, L, D), (1, G, L, D) x 2"""
        query, key, value, out, *log_sums = ctx.saved_tensors
        out = out.transpose(1, 2)  # (1, H, L, D)
        grad = grad.transpose(1, 2)  # (1, H, L, D)
        # not cleared: each token is a query once, and the first of its keys' gradients overwrites
        grad_query = torch.empty_like(query)
        grad_key = torch.empty_like(key)
        grad_value = torch.empty_like(value)
        log_sums = iter(log_sums)
        for segment in ctx.segments:
            keys = segment.keys(key)  # (1, G, k, D)
            values = segment.keys(value)  # (1, G, k, D)
            calls = list(ctx.segments.calls(segment, ctx.window, query))
            log_sums_of_calls = itertools.islice(log_sums, len(calls))
            grad_keys = grad_values = None
            # from the last call on, which reads all keys: the others add to what it gives
            for call, log_sum in reversed(list(zip(calls, log_sums_of_calls, strict=True))):
                queries = slice(segment.query_start + call.start, segment.query_start + call.end)
                grad_query[:, :, queries], grad_k, grad_v = _FLASH_CPU_BACKWARD(
                    grad[:, :, queries],
                    query[:, :, queries],
                    keys[:, :, : call.num_keys],
                    values[:, :, : call.num_keys],
                    out[:, :, queries],
                    log_sum,
                    0.0,
                    call.mask is None,
                    attn_mask=call.mask,
                    scale=ctx.scaling,
                )
                if grad_keys is None:
                    grad_keys = grad_k
                    grad_values = grad_v
                else:
                    grad_keys[:, :, : call.num_keys] += grad_k
                    grad_values[:, :, : call.num_keys] += grad_v
            segment.add_keys_gradient(grad_key, grad_keys)
            segment.add_keys_gradient(grad_value, grad_values)
        return grad_query, grad_key, grad_value, None, None, None


class GatherKeys(torch.autograd.Function):
    """x[kv_index] along dimension 0, with a backward that adds in a fixed order instead of with
    atomics.

    x (L, ...), kv_index (K,), kv_users (L, u) with K for "no further user" -> (K, ...).
    """

    @staticmethod
    def forward(ctx, x, kv_index, kv_users):
        ctx.save_for_backward(kv_users)
        return x.index_select(0, kv_index)

    @staticmethod
    def backward(ctx, grad):
        (kv_users,) = ctx.saved_tensors
        # row K, zero, for "no further user"
        padded = torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])  # (K + 1, ...)
        total = padded.index_select(0, kv_users[:, 0])  # (L, ...)
        for j in range(1, kv_users.shape[1]):
            total += padded.index_select(0, kv_users[:, j])
        return total, None, None


def _flash(query, key, value, segments, scaling, window):
    """One call of torch's varlen kernel: (H, L, D), (G, L, D) x 2 -> (1, L, H, D). CUDA, fp16 or
    bf16.
    """
    # Here and not above: it takes a second to import, and a CPU has no such kernel.
    from torch.nn.attention.varlen import varlen_attn

    batch = segments.batch
    query = query.transpose(0, 1).contiguous()  # (L, H, D)
    key = key.transpose(0, 1)  # (L, G, D)
    value = value.transpose(0, 1)  # (L, G, D)
    # (left, right) keys besides a query's own; -1 for no bound
    options = {"window_size": (window - 1 if window > 0 else -1, 0)}
    if scaling is not None:
        options["scale"] = scaling
    if _varlen_takes_gqa():
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:  # torch 2.11 has no grouped heads
        queries_per_key = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(queries_per_key, dim=1)  # (L, H, D)
        value = value.repeat_interleave(queries_per_key, dim=1)  # (L, H, D)
    key = GatherKeys.apply(key, batch.kv_index, batch.kv_users)  # (K, G or H, D)
    value = GatherKeys.apply(value, batch.kv_index, batch.kv_users)  # (K, G or H, D)
    lengths = (batch.cu_q, batch.cu_k, segments.max_queries, segments.max_keys)
    if segments.deterministic:
        out = DeterministicFlash.apply(query, key, value, *lengths, options)  # (L, H, D)
    else:
        out = varlen_attn(query, key, value, *lengths, **options)  # (L, H, D)
    return out[None]


@functools.cache
def _varlen_takes_gqa() -> bool:
    """Whether torch's varlen_attn knows grouped heads: asked once, it takes longer than a launch."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


class DeterministicFlash(torch.autograd.Function):
    """torch's varlen_attn with a backward that adds up in a fixed order.

    By itself the kernel adds a query's gradients over blocks of keys, of 128 or so, with atomics: of
    longer segments the last digits differ from run to run. torch's flag makes it add them in order,
    and is on for this one kernel alone: elsewhere it would refuse or slow down what is in order.
    """

    @staticmethod
    def forward(ctx, query, key, value, cu_q, cu_k, max_q, max_k, options):
        """(L, H, D), (K, G, D) x 2 -> (L, H, D)"""
        # varlen_attn does not hand over what its backward needs
        kernel_options = options | {
            "window_size": list(options["window_size"]),
            "is_causal": options["window_size"] == (-1, 0),
        }
        out, log_sum, rng = torch.ops.torch_attn._varlen_attn(
            query, key, value, cu_q, cu_k, max_q, max_k, **kernel_options
        )
        ctx.save_for_backward(query, key, value, out, log_sum, cu_q, cu_k, rng)
        ctx.numbers = (max_q, max_k, options.get("scale"), kernel_options["window_size"])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """(L, H, D) -> (L, H, D), (K, G, D) x 2"""
        grads = varlen_backward_in_order(grad, *ctx.saved_tensors, *ctx.numbers)
        return *grads, None, None, None, None, None


# an operation of its own, so that the flag around it is no business of a compiler's
@torch.library.custom_op("zeropref::varlen_backward_in_order", mutates_args=())
def varlen_backward_in_order(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    rng: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    window: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward of torch's varlen_attn, (L, H, D) -> (L, H, D), (K, G, D) x 2, which adds up in a
    fixed order.
    """
    with _deterministic_kernels():
        return torch.ops.torch_attn._varlen_attn_backward(
            grad,
            query,
            key,
            value,
            out,
            log_sum,
            cu_q,
            cu_k,
            max_q,
            max_k,
            is_causal=window == [-1, 0],
            rng_state=rng,
            scale=scale,
            window_size=window,
        )


@varlen_backward_in_order.register_fake
def _(grad, query, key, value, *others):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextlib.contextmanager
def _deterministic_kernels():
    """Inside, torch's kernels add up in a fixed order where they have a choice."""
    before = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned_only)


def _padded(query, key, value, segments, scaling, window):
    """One call of torch's attention over segments padded to the longest: (H, L, D), (G, L, D) x 2 ->
    (1, L, H, D).

    On CUDA, for what the flash kernel does not take: fp32, other head sizes, GPUs before sm80. Exact:
    padding is masked away. By segment it would be 40 launches a segment and layer.
    """
    batch, padding = segments.batch, segments.padding

    def side_by_side(x, index):  # (N, heads, D), (S, n) -> (S, heads, n, D)
        x = x.index_select(0, index.flatten()).unflatten(0, index.shape)
        return x.transpose(1, 2)

    def keys(x):  # (G, L, D) -> (S, H, k, D)
        x = GatherKeys.apply(x.transpose(0, 1), batch.kv_index, batch.kv_users)  # (K, G, D)
        x = side_by_side(x, padding.keys)
        # the memory-efficient kernel has no grouped heads, and without it scores are kept
        return x.repeat_interleave(query.shape[0] // x.shape[1], dim=1)

    # of torch's kernels one adds up in a fixed order, and keeps the (S, H, q, k) scores for it
    with sdpa_kernel(SDPBackend.MATH) if segments.deterministic else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            side_by_side(query.transpose(0, 1), padding.queries),
            keys(key),
            keys(value),
            attn_mask=segments.padded_mask(window, query.dtype),
            scale=scaling,
        )  # (S, H, q, D)
    out = out.transpose(1, 2).flatten(0, 1)  # (S * q, H, D)
    return out.index_select(0, padding.outputs)[None]


def register():
    """Make "zeropref" known to transformers; without an entry in its mask registry no mask is
    built.
    """
    transformers.AttentionInterface.register(NAME, packed_attention)
