"""Matrix products with a weight through the faster of torch's two CPU libraries, and memory that
serves again: rounded copies of weights, logits, gradients.

On AMD processors MKL's fp32 products reach 45 to 95 % of oneDNN's speed at the shapes of a language
model. Both are fp32 throughout and differ in the order of their sums only: oneDNN's, of more terms one
after the other, are as exact as MKL's in slices (SUM_SLICE).

Legend: T tokens, I a layer's inputs, O its outputs (or the vocabulary), so a weight is (O, I), as
in nn.Linear.
"""

import contextlib
import weakref
from typing import NamedTuple

import torch

# Batches of fewer tokens than this are left to torch's own library. Where tokens are drawn one by one
# any number of sequences is worth it (`in_one_piece`).
MIN_TOKENS = 64
MIN_DRAWN = 2

# A weight's rows that are worked on at a time: no temporary is then too large for the allocator to
# keep (see `scratch`).
SLICE = 4096

# Terms of a sum that one product of oneDNN adds up, one after the other: as many as MKL puts in a
# block, to judge by its errors. Shorter sums are cut in four, of 16 terms at least: that takes two
# fifths off their error.
SUM_SLICE = 192
SUM_SLICES = 4
LEAST_SUM_SLICE = 16

# Rows of a weight that one product of oneDNN works on where its result is copied: it is in the cache
# then. A gradient of 4,096 takes 1.4 times as long.
CACHED_ROWS = 1024

# Whether products are inside `in_one_piece`.
_IN_ONE_PIECE = False

# dtype -> (1-D memory, weak reference to the tensor that was last handed out of it)
_SCRATCH = {}


class RoundedCopy(NamedTuple):
    """What `rounded` keeps with a tensor, as its attribute `rounded_copy`."""

    version: int  # of the tensor when it was copied; autograd counts each change in place
    value: torch.Tensor  # the same shape in another dtype


@contextlib.contextmanager
def in_one_piece():
    """Inside, `exact_matmul_transposed` is `matmul_transposed`: for tokens that are drawn, whose noise
    makes nothing of a last digit. Slices of each weight, copied for each token, take 1.7 times as long
    for 64 sequences.
    """
    global _IN_ONE_PIECE
    before, _IN_ONE_PIECE = _IN_ONE_PIECE, True
    try:
        yield
    finally:
        _IN_ONE_PIECE = before


def product_dtype(x, weight):
    """The dtype in which x @ weight.T is computed: autocast's where that is on, else the
    weight's.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def matmul_transposed(x, weight, bias=None):
    """x @ weight.T + bias: (T, I), (O, I), (O,) -> (T, O). Not differentiable: for use inside
    autograd functions.
    """
    if _use_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if bias is None:
        return torch.mm(x, weight.t())
    return torch.addmm(bias, x, weight.t())


def exact_matmul_transposed(x, weight, bias=None):
    """`matmul_transposed`, on oneDNN with about half its error, which all that a model computes from
    there on inherits. It takes a sixth longer in a small model's layers and up to a half where there
    are more outputs than SLICE: slices are copied.
    """
    if _IN_ONE_PIECE or not _use_onednn(x, weight):
        return matmul_transposed(x, weight, bias)
    if weight.shape[0] <= SLICE:
        out = _product_in_slices(x, weight)
    else:  # slices of a vocabulary, and a product of each, would be new memory in each call
        out = x.new_empty(x.shape[0], weight.shape[0])
        matmul_transposed_into(out, x, weight)
    return out if bias is None else out.add_(bias)


def matmul_transposed_into(out, x, weight):
    """out = x @ weight.T: (T, I), (O, I) -> (T, O), as exact as `exact_matmul_transposed`. It takes no
    longer than `matmul_transposed` and a copy.
    """
    if not _use_onednn(x, weight):
        out.copy_(matmul_transposed(x, weight))
        return
    for columns, rows in zip(out.split(CACHED_ROWS, dim=1), weight.split(CACHED_ROWS), strict=True):
        # the other way round, so that slices of the smaller factor are copied
        columns.copy_(_product_in_slices(rows, x).t())


def matmul_over_vocabulary(x, weight):
    """x @ weight, a sum over the vocabulary: (T, V), (V, H) -> (T, H). Not differentiable.

    oneDNN adds up more terms one after the other than MKL does. In slices its sums are as exact as
    MKL's, and at a real vocabulary no slower than in one piece.
    """
    if not _use_onednn(x, weight):
        return torch.mm(x, weight)
    return _product_in_slices(x, weight.t())


def _product_in_slices(x, weight):
    """x @ weight.T on oneDNN, each product over a slice of the terms: (T, I), (O, I) -> (T, O)."""
    terms = x.shape[1]
    slices = max(1, -(-terms // SUM_SLICE), min(SUM_SLICES, terms // LEAST_SUM_SLICE))
    total = None
    for part, part_weight in zip(x.chunk(slices, 1), weight.chunk(slices, 1), strict=True):
        if not part_weight.t().is_contiguous():
            # columns of a weight as they lie take oneDNN a thousand times as long
            part_weight = part_weight.contiguous()
        product = torch.ops.mkldnn._linear_pointwise(part, part_weight, None, "none", [], "")
        total = product if total is None else total.add_(product)
    return total


def _use_onednn(x, weight):
    """Whether x's product with `weight` goes to oneDNN."""
    is_fp32 = x.dtype == weight.dtype == torch.float32
    on_cpu = x.device.type == weight.device.type == "cpu"
    return (
        is_fp32
        and on_cpu
        and x.shape[0] >= (MIN_DRAWN if _IN_ONE_PIECE else MIN_TOKENS)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def rounded(x, dtype):
    """`x` in `dtype`, without a gradient. On a CPU it is made once and kept with `x` until that
    changes.

    So a weight is rounded once a step, not once a batch, and queries, keys and values share one
    rounded input. What changes `x` must count as a change to autograd: an update through `.data`
    would not be seen.
    """
    # A tensor made in inference mode has no version, and one kept from there could not be saved
    # for a backward pass later.
    in_inference = x.is_inference() or torch.is_inference_mode_enabled()
    if x.dtype == dtype or x.device.type != "cpu" or in_inference:
        return x.detach().to(dtype)
    kept = getattr(x, "rounded_copy", None)
    if kept is not None and kept.value.dtype != dtype:
        kept = None
    if kept is None or kept.version != x._version:
        if kept is not None and x.is_leaf:
            # A weight's copy is overwritten: the same memory in each step. That of a tensor which
            # autograd computed is not: an earlier graph may still need it.
            value = kept.value.copy_(x.detach())
        else:
            value = x.detach().to(dtype)
        kept = RoundedCopy(x._version, value)
        x.rounded_copy = kept
    return kept.value


def scratch(like, columns, dtype):
    """Uninitialised memory for a (len(like), columns) tensor on `like`'s device. On a CPU it is
    that of the call before, once nobody holds the tensor that was handed out then (views of it do
    not count).

    Above 32 MB glibc gives freed memory back to the system at once, which clears it page by page
    before it hands it out again.
    """
    shape = (like.shape[0], columns)
    size = shape[0] * columns
    memory, last_tensor = _SCRATCH.get(dtype, (None, None))
    in_use = last_tensor is not None and last_tensor() is not None
    # memory made in inference mode could never take part in autograd again
    if like.device.type != "cpu" or torch.is_inference_mode_enabled() or in_use:
        return like.new_empty(shape, dtype=dtype)
    if memory is None or memory.numel() < size:
        memory = like.new_empty(size, dtype=dtype)
    tensor = memory[:size].view(shape)
    _SCRATCH[dtype] = (memory, weakref.ref(tensor))
    return tensor


def weight_gradient(weight, grad, x):
    """grad.T @ x: (T, O), (T, I) -> (O, I), or None where it was added to `weight.grad` itself.

    That is so of a weight that `accumulate_in_place` was called on: of others each batch of a step
    writes a matrix of the weight's size, which autograd reads again and adds up.
    """
    buffer, is_first = grad_buffer(weight)
    on_onednn = _use_onednn(grad, x)
    if not on_onednn and buffer is None:
        return torch.mm(grad.t(), x)
    if not on_onednn and x.dtype == buffer.dtype:
        # beta = 0 does not read the buffer: whatever stands there from the step before, NaN
        # included, counts for nothing
        buffer.addmm_(grad.t(), x, beta=0 if is_first else 1)
        return None
    out = buffer
    if buffer is None:
        out = x.new_empty(grad.shape[1], x.shape[1])
        is_first = True
    # products of oneDNN, or bf16 ones into an fp32 buffer, a slice at a time; each without a name, so
    # that it is freed before the next is made, which then takes its memory
    size = CACHED_ROWS if on_onednn else SLICE
    product = _product_in_slices if on_onednn else matmul_transposed
    for part, part_grad in zip(out.split(size), grad.split(size, dim=1), strict=True):
        if is_first:
            part.copy_(product(part_grad.t(), x.t()))
        else:
            part.add_(product(part_grad.t(), x.t()))
    return out if buffer is None else None


def grad_buffer(weight):
    """The tensor in which a step's gradient of `weight` accumulates, and whether this is the step's
    first gradient, which overwrites it. (None, False) for a weight without `grad_memory`.
    """
    if not hasattr(weight, "grad_memory"):
        return None, False
    is_first = weight.grad is None
    if is_first:
        weight.grad = weight.grad_memory
    return weight.grad, is_first


def accumulate_in_place(module):
    """Let the gradients of the module's trained weights on the CPU accumulate in `.grad` directly,
    by `weight_gradient`, from now on.

    It is the same memory in each step, which the system need not clear each time. For one process
    that calls `backward` and reads `.grad`: hooks on the gradient do not see it.
    """
    for p in module.parameters():
        if p.requires_grad and p.device.type == "cpu":
            p.grad_memory = torch.empty_like(p)


def release_memory(module):
    """Free the memory that `accumulate_in_place` and `scratch` keep; the module's gradients stay as
    they are.
    """
    for p in module.parameters():
        p.__dict__.pop("grad_memory", None)
    _SCRATCH.clear()
