"""Numbers that the device has not computed yet when the host asks for them to be brought."""

import torch


class Later:
    """A small tensor on its way to the host, which goes on launching work until it reads it."""

    def __init__(self, tensor: torch.Tensor):
        """tensor: nobody writes to it any more."""
        self._value, self._arrived = tensor, None
        if tensor.is_cuda:
            # the copy overlaps only where it goes to page-locked memory
            self._value = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._value.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> torch.Tensor:
        """The values, on the CPU. Waits until the device has come to them."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._value
