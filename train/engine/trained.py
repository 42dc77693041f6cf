"""The policy under DeepSpeed: the resolved configuration, loading into shards, one backward a row,
one update a step.

A DeepSpeed JSON holds what DeepSpeed owns (ds_configs/); precision, batch, optimiser and clipping
are flags.
"""

import logging
import math
from typing import NamedTuple

import torch
from transformers import get_scheduler

from train.engine import dist
from train.engine.ds_config import zero_stage
from train.models.matmul import accumulate_in_place

BUCKET = 25_000_000  # gradient elements that stage 0 sends at a time


class Update(NamedTuple):
    """What one optimiser step did."""

    grad_norm: float  # 2-norm over all ranks' shards, before clipping
    lr: float  # the rate that this update used
    applied: bool  # False where a gradient was not finite: weights, moments and schedule stay as they were


class TrainedModel:
    """A Backbone under a DeepSpeed engine: call it on a row, `backward` the row's loss, `step` once
    a step.
    """

    def __init__(
        self,
        module,
        config: dict,
        *,
        lr,
        weight_decay,
        grad_clip,
        scheduler,
        warmup_ratio,
        total_steps,
        betas=(0.9, 0.999),
        eps=1e-8,
    ):
        """`config`: from `resolve`. Every rank calls this."""
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.stage, self.grad_clip = zero_stage(config), grad_clip
        groups = decay_groups(module, weight_decay)
        fused = (
            all(p.device.type == "cuda" for group in groups for p in group["params"])
            or self.stage == 0
        )
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)
        schedule = get_scheduler(
            scheduler, optimizer, math.ceil(warmup_ratio * total_steps), total_steps
        )
        self.engine, self.optimizer, _, self.schedule = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=schedule, config=config
        )
        self.adamw, self.updates = optimizer, 0  # updates: the optimiser steps that were applied
        if (
            self.stage == 0
        ):  # summed up here, once a step, because nothing in DeepSpeed checks or reports the norm
            self.engine.enable_backward_allreduce = False
            accumulate_in_place(module)
        self.skipped, self._linked = 0, self.stage in (0, 3)

    @property
    def module(self):
        """The Backbone inside."""
        return self.engine.module

    def __call__(self, row, log_p2=False):
        """As Backbone.forward."""
        return self.engine(row, log_p2)

    def backward(self, loss):
        """Add d loss to the step's gradient. Every rank calls this for each of its rows, empty ones
        too.
        """
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> Update:
        """Average over ranks, clip, update the weights, advance the schedule. Every rank calls
        this.
        """
        lr = self.schedule.get_last_lr()[0]
        if self.stage > 0:
            self.engine.step()
            norm = float(self.engine.get_global_grad_norm())
            applied = self.engine.was_step_applied() and math.isfinite(norm)
            if applied and not self._linked:
                self.link_moments()
        else:
            if (
                dist.world_size() > 1
            ):  # alone there is nothing to add, and the buffer would be a second copy of the gradient
                self.engine.buffered_allreduce_fallback(elements_per_buffer=BUCKET)
            params = [p for p in self.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.clip_grad_norm_(params, self.grad_clip or math.inf))
            applied = math.isfinite(norm)
            if applied:
                self.engine.step()
                torch.autograd.graph.increment_version(
                    params
                )  # the fused AdamW does not; see losses/products.py
            else:
                self.engine.zero_grad()
        self.skipped += not applied
        self.updates += applied
        return Update(norm, lr, applied)

    def link_moments(self):
        """Let DeepSpeed know where every parameter's AdamW moments lie, for reading them and for
        its checkpoints.

        DeepSpeed 0.19 does so after the first parameter group's first update, when the second has
        none yet.
        """
        if self.stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
        self._linked = True


def decay_groups(module, weight_decay: float) -> list[dict]:
    """AdamW's parameter groups: matrices decay, vectors (norms and biases) do not. No group is
    empty.
    """
    matrices, vectors = [], []
    for p in module.parameters():
        if p.requires_grad:
            shape = getattr(
                p, "ds_shape", p.shape
            )  # ZeRO-3 leaves an empty tensor and the true shape beside it
            (matrices if len(shape) > 1 else vectors).append(p)
    groups = [
        dict(params=matrices, weight_decay=weight_decay),
        dict(params=vectors, weight_decay=0.0),
    ]
    return [group for group in groups if group["params"]]
