"""Matrix products with a weight, on whichever of torch's libraries is faster, and a weight's gradient without detours.

On AMD processors MKL's fp32 products reach 65 to 95 % of oneDNN's speed at the shapes of a language model. Both are
fp32 throughout and differ in the order of their sums only.
"""

import torch

ROWS = 64  # with fewer, reading the weight from memory decides


def times_transposed(x, weight, bias=None):
    """x @ weight.T + bias: (T, H), (V, H), (V,) -> (T, V). Not differentiable: for use inside autograd functions."""
    wide = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    if wide and x.shape[0] >= ROWS and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def rounded(x, dtype):
    """`x` in `dtype`, without a gradient. On a CPU it is made once and kept with `x` until that changes.

    A weight is rounded once a step, not once a row; queries, keys and values read one tensor. What changes `x` must
    count as a change to autograd: an update through `.data` would not be seen.
    """
    if x.dtype == dtype or x.device.type != "cpu" or x.is_inference():
        return x.detach().to(dtype)
    version, kept = getattr(x, "rounded", (None, None))
    if version != x._version or kept.dtype != dtype:
        kept = x.detach().to(dtype)
        x.rounded = x._version, kept
    return kept


def weight_gradient(weight, grad, x):
    """grad.T @ x: (T, V), (T, H) -> (V, H), or None where it went straight into `weight.grad`.

    It does for a weight that `gathers` (see `gather_in_place`): else each row of a step would write a matrix of the
    weight's size, read it again and add it up.
    """
    into = weight.grad if getattr(weight, "gathers", False) else None
    if into is None:
        return torch.mm(grad.t(), x)
    if x.dtype == into.dtype:
        into.addmm_(grad.t(), x)
    else:
        into += torch.mm(grad.t(), x)
    return None


def gather_in_place(module):
    """From now on `.grad` of the module's trained weights on the CPU gathers a step's rows by `weight_gradient`.

    For one process that calls `backward` and reads `.grad`: hooks on the gradient see its first row only.
    """
    for p in module.parameters():
        p.gathers = p.requires_grad and p.device.type == "cpu"
