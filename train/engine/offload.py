"""A frozen model that lies in main memory while nobody uses it."""

import torch


class Offloaded:
    """Within it a module's weights and buffers are on the device, outside in main memory.

    They are copied there and never back: nothing changes them. On a device that computes in main
    memory nothing moves. It may be entered again within itself.

        place = Offloaded(module, device)
        with place:
            module(...)
    """

    def __init__(self, module: torch.nn.Module, device: torch.device):
        self.device, self._depth = device, 0
        tensors = [] if device.type == "cpu" else [*module.parameters(), *module.buffers()]
        self._moving = [
            (each, self._pinned(each.detach())) for each in tensors
        ]  # and where it rests
        self._leave()

    def _pinned(self, tensor):
        host = tensor.cpu()
        return host.pin_memory() if self.device.type == "cuda" else host

    def _brought(self, host):
        return host.to(self.device, non_blocking=True)

    def __enter__(self):
        self._depth += 1
        if self._depth == 1:
            for each, host in self._moving:
                each.data = self._brought(host)
        return self

    def __exit__(self, *_):
        self._depth -= 1
        if not self._depth:
            self._leave()

    def _leave(self):
        for each, host in self._moving:
            each.data = host
