"""The reference model of a preference loss: who gives log pi_ref for a row."""

import logging

import torch

from train.engine import zero

KINDS = ("live",)


class Live:
    """A frozen model that scores each row as the policy does: same kernels, same precision, same row."""

    def __init__(self, module, config: dict):
        """`config`: with stage 3 the weights stay sharded (ds_configs/frozen_zero3.json), else each rank holds them all.

        Every rank calls this.
        """
        module.requires_grad_(False)
        self.module = self._forward = module
        if zero.stage_of(config) == 3:
            import deepspeed

            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
            self._forward, *_ = deepspeed.initialize(model=module, config=config)

    @torch.no_grad()
    def __call__(self, row) -> torch.Tensor:
        """(T,) nats, without gradient."""
        return self._forward(row)
