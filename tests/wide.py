"""fp64 all the way: transformers' norms, rotary embeddings and softmaxes cast to fp32, which would
hide errors below 1e-7.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode


class Wide(TorchFunctionMode):
    """Inside, a cast to fp32 is a cast to fp64, but where that is `paused`."""

    is_paused = False

    @classmethod
    @contextlib.contextmanager
    def paused(cls):
        """Inside, casts are what they say."""
        cls.is_paused = True
        try:
            yield
        finally:
            cls.is_paused = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if self.is_paused:
            return func(*args, **kwargs)
        if func is torch.Tensor.float:
            return args[0].double()
        if func in (torch.Tensor.to, torch.nn.functional.softmax):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)
