"""The reference model of a preference loss: who gives log pi_ref for a row."""

import logging

import torch

from train.engine import zero


class Live:
    """A frozen model that scores each row as the policy does: same kernels, same precision, same row."""

    def __init__(self, module, config: dict):
        """`config`: with stage 3 the weights stay sharded (ds_configs/frozen_zero3.json), else each rank has them all.

        Every rank calls this.
        """
        module.requires_grad_(False)
        if module.autocast and zero.stage_of(config) < 3:
            _cast_matrices(module)
        self.module = self._forward = module
        if zero.stage_of(config) == 3:
            import deepspeed

            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
            self._forward, *_ = deepspeed.initialize(model=module, config=config)

    @torch.no_grad()
    def __call__(self, row) -> torch.Tensor:
        """(T,) nats, without gradient."""
        return self._forward(row)


# One row a value of --reference.
REFERENCES = {"live": Live}


def _cast_matrices(module):
    """Hold the linear layers' weights in the type that autocast computes in: the same digits, cast once.

    Embeddings and norms stay wide, and so does a head tied to them, for the residual stream's sake.
    """
    tied = module.lm.get_input_embeddings().weight
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight is not tied:
            layer.to(module.autocast)
