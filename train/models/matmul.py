"""Matrix products with a weight, on whichever of torch's libraries is faster, and a weight's
gradient without detours.

On AMD processors MKL's fp32 products reach 65 to 95 % of oneDNN's speed at the shapes of a language
model. Both are fp32 throughout and differ in the order of their sums only.
"""

import weakref

import torch

ROWS = 64  # with fewer, reading the weight from memory decides
SLICE = 4096  # rows of a weight
_SCRATCH = {}  # dtype: the memory, who has it


def matmul_transposed(x, weight, bias=None):
    """x @ weight.T + bias: (T, H), (V, H), (V,) -> (T, V). Not differentiable: for use inside
    autograd functions.
    """
    wide = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    if (
        wide
        and x.shape[0] >= ROWS
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def rounded(x, dtype):
    """`x` in `dtype`, without a gradient. On a CPU it is made once and kept with `x` until that
    changes.

    A weight is rounded once a step, not once a row; queries, keys and values read one tensor. What
    changes `x` must count as a change to autograd: an update through `.data` would not be seen.
    """
    if (
        x.dtype == dtype
        or x.device.type != "cpu"
        or x.is_inference()
        or torch.is_inference_mode_enabled()
    ):
        return x.detach().to(dtype)
    version, kept = getattr(x, "rounded", (None, None))
    if version != x._version or kept.dtype != dtype:
        same = (
            x.is_leaf and kept is not None and kept.dtype == dtype
        )  # a weight's memory serves again
        kept = kept.copy_(x.detach()) if same else x.detach().to(dtype)
        x.rounded = x._version, kept
    return kept


def scratch(like, columns, dtype):
    """Memory for a (len(like), columns) tensor; on a CPU that of the call before, once nobody holds
    that tensor itself (views of it do not count).

    Above 32 MB glibc gives memory back at once, and the system clears what it hands out again, page
    by page.
    """
    shape = like.shape[0], columns
    memory, holder = _SCRATCH.get(dtype, (None, None))
    if (
        like.device.type != "cpu"
        or torch.is_inference_mode_enabled()
        or (holder and holder() is not None)
    ):
        return like.new_empty(shape, dtype=dtype)
    if memory is None or memory.numel() < shape[0] * columns:
        memory = like.new_empty(shape[0] * columns, dtype=dtype)
    out = memory[: shape[0] * columns].view(shape)
    _SCRATCH[dtype] = memory, weakref.ref(out)
    return out


def weight_gradient(weight, grad, x):
    """grad.T @ x: (T, V), (T, H) -> (V, H), or None where it went straight into `weight.grad`.

    It does for a weight that `gathers` (see `gather_in_place`): else each row of a step would write
    a matrix of the weight's size, read it again and add it up.
    """
    into, first = grad_buffer(weight)
    if into is None:
        return torch.mm(grad.t(), x)
    if x.dtype == into.dtype:
        into.addmm_(grad.t(), x, beta=0 if first else 1)  # 0 reads nothing, whatever stands there
        return None
    for part, rows in zip(
        into.split(SLICE), grad.t().split(SLICE), strict=True
    ):  # none too large for the allocator
        part.copy_(torch.mm(rows, x)) if first else part.add_(torch.mm(rows, x))
    return None


def grad_buffer(weight):
    """Where a step's gradient of `weight` gathers, and whether it has yet to be overwritten; None
    where it does not.
    """
    if not hasattr(weight, "gathers"):
        return None, False
    first = weight.grad is None
    if first:
        weight.grad = weight.gathers
    return weight.grad, first


def release_memory(module):
    """Give back the memory that `gather_in_place` and `scratch` keep; the module's gradients stay
    as they are.
    """
    for p in module.parameters():
        p.__dict__.pop("gathers", None)
    _SCRATCH.clear()


def accumulate_in_place(module):
    """From now on `.grad` of the module's trained weights on the CPU gathers a step's rows by
    `weight_gradient`.

    It is the same memory in each step, which the system need not clear each time. For one process
    that calls `backward` and reads `.grad`: hooks on the gradient do not see it.
    """
    for p in module.parameters():
        if p.requires_grad and p.device.type == "cpu":
            p.gathers = torch.empty_like(p)
