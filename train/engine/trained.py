"""A model that is trained under DeepSpeed: one backward a batch, one update a step.

Policy, reward model and value model are each a TrainedModel, with a DeepSpeed configuration of its
own (train/engine/ds_config.py). It is a part of a checkpoint (train/run/checkpoint.py).
"""

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed
import torch
from transformers import get_scheduler

from train.engine import dist, sharded_state
from train.engine.ds_config import zero_stage
from train.engine.later import Later
from train.models.matmul import accumulate_in_place

BUCKET = 25_000_000  # gradient elements that stage 0 sends at a time
SCHEDULE = ("last_epoch", "_step_count", "_last_lr")  # of a scheduler's state; flags make the rest


class Update:
    """What one optimiser step did. Its norm may still be under way from the device: who asks for it,
    or for whether the step was applied, waits until it is here.
    """

    def __init__(self, lr: float, norm: Later, was_applied: bool = True):
        """lr: the rate that this update used. norm: of the gradient. was_applied: False where
        DeepSpeed has said no.
        """
        self.lr = lr
        self._norm, self._was_applied = norm, was_applied

    @functools.cached_property
    def grad_norm(self) -> float:
        """The 2-norm over all ranks' shards, before clipping."""
        return float(self._norm.read())

    @property
    def applied(self) -> bool:
        """False where a gradient was not finite: weights, moments and schedule stay as they were."""
        return self._was_applied and math.isfinite(self.grad_norm)

    def as_dict(self) -> dict:
        """All of it, for a log."""
        return {"grad_norm": self.grad_norm, "lr": self.lr, "applied": self.applied}


class TrainedModel:
    """A module under a DeepSpeed engine: call it on a batch, `backward` its loss, `step` once a step."""

    known_late = True  # see train/run/checkpoint.py

    def __init__(
        self,
        module,
        config: dict,
        *,
        lr: float,
        weight_decay: float,
        grad_clip: float,
        scheduler: str,
        warmup_ratio: float,
        total_steps: int,
        warmup_steps: int = 0,
        num_cycles: float | None = None,
        min_lr: float | None = None,
        tokenizer=None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        """config: what ds_config.resolve gives. scheduler, num_cycles, min_lr: transformers' schedule
        and what it may be told. warmup_steps: in place of warmup_ratio, a share of total_steps.
        tokenizer: saved beside the model's configuration in checkpoints. ValueError for a warm-up
        longer than the run. Every rank calls this.
        """
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.stage, self.grad_clip, self.tokenizer = zero_stage(config), grad_clip, tokenizer
        groups = decay_groups(module, weight_decay)
        # fused on CUDA and on CPUs: where DeepSpeed keeps weights in main memory, that is what steps
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        if warmup_steps > total_steps:
            raise ValueError(
                f"--warmup_steps {warmup_steps} of a run of {total_steps} steps: the rate would never "
                "come to its peak; lower it, or take --warmup_ratio"
            )
        self.schedule = get_scheduler(
            scheduler,
            self.adamw,
            warmup_steps or math.ceil(warmup_ratio * total_steps),
            total_steps,
            scheduler_specific_kwargs=schedule_options(scheduler, num_cycles, min_lr),
        )
        # by which a run that goes on knows the model that it began with
        self._first_state = sharded_state.first_state(module.lm) if dist.is_main() else {}
        # DeepSpeed would advance it at every update: it does not get to know it
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=module, optimizer=self.adamw, config=config
        )
        self._updates = 0  # optimiser steps that were applied
        self._skipped = 0  # and those that were not, because a gradient was not finite
        # the last step, where it is not counted yet, and whether the schedule goes on after it
        self._uncounted: tuple[Update, bool] | None = None
        self._moments_are_linked = self.stage in (0, 3)
        if self.stage == 0:
            # summed up in `step`, once, because nothing in DeepSpeed checks or reports the norm
            self.engine.enable_backward_allreduce = False
            accumulate_in_place(module)
        if module.load_in_fp32 is not None:
            sharded_state.set_masters(self, module.load_in_fp32)

    @property
    def module(self):
        """The module inside the engine."""
        return self.engine.module

    def __call__(self, batch, **options):
        """What the module's forward gives, under the same options. Every rank calls this for each
        of its batches.
        """
        return self.engine(batch, **options)

    def backward(self, loss: torch.Tensor):
        """Add the gradient of `loss`, this batch's part of the step's loss.

        The step's loss is the sum of its parts over all batches of all ranks; what each is divided
        by is the caller's business, and global. DeepSpeed averages over the ranks: that is undone
        here. Every rank calls this for each of its batches, empty ones too.
        """
        self.engine.backward(loss * dist.world_size(), scale_wrt_gas=False)

    def step(self, advance: bool = True) -> Update:
        """Reduce over ranks, clip, update the weights, advance the schedule. Every rank calls this.

        Where the gradient is not finite nothing is changed; that is counted in `skipped`. advance: not
        where the schedule counts something else than updates, whose end says `advance`.

        At stage 0 the host does not wait for the device, but for what it may still have to do of the
        step before. What this step came to is known to whoever asks.
        """
        self._count()
        lr = self.schedule.get_last_lr()[0]
        norm, was_applied = self._step_unsharded() if self.stage == 0 else self._step_sharded()
        update = Update(lr, Later(norm), was_applied)
        self._uncounted = update, advance
        return update

    def _count(self):
        """Count the last step and advance the schedule, where that is still to be done."""
        if self._uncounted is None:
            return
        (update, advance), self._uncounted = self._uncounted, None
        self._skipped += not update.applied
        self._updates += update.applied
        if advance and update.applied:
            self.schedule.step()

    @property
    def updates(self) -> int:
        """Optimiser steps that were applied."""
        self._count()
        return self._updates

    @updates.setter
    def updates(self, count: int):
        self._updates = count

    @property
    def skipped(self) -> int:
        """Optimiser steps that were not, because a gradient was not finite."""
        self._count()
        return self._skipped

    def advance(self):
        """Go on to the schedule's next rate, after no update, too: a policy waits while a value model
        warms up.
        """
        self._count()
        with warnings.catch_warnings():  # torch takes that for a mistake
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.schedule.step()

    def drop(self, batch, **options):
        """Forget the gradient of the step that is under way: weights, moments, counters and schedule
        stay as they are. Every rank calls this.

        batch: any that this rank has just computed; options: of the module's forward. DeepSpeed has no
        word for it at stages 1 to 3 but to meet a gradient that is not finite: it is given one.
        """
        if self.stage == 0:
            self.engine.zero_grad()
            return
        self.backward(self(batch, **options).sum() * math.nan)
        norm, was_applied = self._step_sharded()
        assert not (was_applied and norm.isfinite()), "an update that was to be dropped was applied"
        self.engine.global_steps = self.updates + self.skipped
        self.engine.skipped_steps = self.skipped

    def _step_unsharded(self):
        """Stage 0: DeepSpeed reduces, the norm, the clipping and the check are ours: (the norm, a scalar
        on the device, True).
        """
        if dist.world_size() > 1:
            # one rank has nothing to add, and the buffer would be a second copy of the gradient
            self.engine.buffered_allreduce_fallback(elements_per_buffer=BUCKET)
        params = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(params, self.grad_clip or math.inf)
        # where it is 1 the fused AdamW leaves everything as it is, without the host having looked
        self.adamw.found_inf = (~norm.isfinite()).float()
        self.engine.step()
        # the fused AdamW does not say that it changed them; see models/matmul.py: rounded
        torch.autograd.graph.increment_version(params)
        return norm, True

    def _step_sharded(self):
        """Stages 1 to 3: all of it is DeepSpeed's, and it has waited for the device: (the norm, whether
        DeepSpeed has applied the step).
        """
        self.engine.step()
        norm = torch.as_tensor(float(self.engine.get_global_grad_norm()), dtype=torch.float64)
        was_applied = self.engine.was_step_applied()
        if was_applied and norm.isfinite() and not self._moments_are_linked:
            self.link_moments()
        return norm, was_applied

    def link_moments(self):
        """Let DeepSpeed know where every parameter's AdamW moments lie, for reading them.

        DeepSpeed 0.19 does so after the first parameter group's first update, when the second has
        none yet.
        """
        if self.stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
        self._moments_are_linked = True

    # What a checkpoint holds of it: see train/run/checkpoint.py.

    def state_dict(self) -> dict:
        """Counters and the schedule, for JSON."""
        self._count()
        schedule = self.schedule.state_dict()
        return {
            "updates": self._updates,
            "skipped": self._skipped,
            "schedule": {name: schedule[name] for name in SCHEDULE},
            "stage": self.stage,  # for whoever reads it: another stage continues as well
        }

    def load_state_dict(self, state: dict):
        """Continue from `state_dict`."""
        self._updates, self._skipped = state["updates"], state["skipped"]
        for name, value in state["schedule"].items():
            setattr(self.schedule, name, value)
        for group, lr in zip(self.adamw.param_groups, state["schedule"]["_last_lr"], strict=True):
            group["lr"] = lr
        self.engine.global_steps = self.updates + self.skipped
        self.engine.skipped_steps = self.skipped

    def shapes(self, state: dict | None = None) -> dict[str, tuple]:
        """Keys and shapes of the whole tensors by now, or as the `state_dict` given has it."""
        return sharded_state.shapes(self, state["updates"] if state else self.updates)

    def tensors(self) -> Iterator[torch.Tensor]:
        """The whole fp32 tensors of `shapes`, in that order. Every rank goes through to the end."""
        return sharded_state.tensors(self)

    def load_tensors(self, read: Callable[[str], torch.Tensor], state: dict):
        """Put back what `tensors` gave. Every rank calls this."""
        sharded_state.restore(self, read, state["updates"])

    def rank_tensors(self) -> Callable[[], dict[str, torch.Tensor]]:
        """What makes the tensors of this rank alone: on rank 0 what training leaves as it is."""
        if not dist.is_main():
            return dict
        return lambda: sharded_state.untrained_state(self.module.lm) | self._first_state

    def load_rank_tensors(self, of_ranks: list[dict[str, torch.Tensor]]):
        """Put nothing back: what training leaves as it is comes with the model that the run names.
        ValueError where that is another than the one that the run began with. Every rank calls this.
        """
        different = None
        if dist.is_main():
            here = sharded_state.untrained_state(self.module.lm) | self._first_state
            different = sharded_state.first_difference(here, of_ranks[0])
        if different := dist.broadcast(different):
            raise ValueError(
                f"the model is not the one that this run began with ({different} is another): put it back, "
                "or begin anew: --resume never, or another --output"
            )

    def save_outline(self, folder: Path):
        """Write what makes a model directory of the tensors: configurations and the tokenizer."""
        lm = self.module.lm
        lm.config.architectures = [type(lm).__name__]  # by which an export knows what to make
        lm.config.save_pretrained(folder)
        if lm.can_generate() and lm.generation_config is not None:
            lm.generation_config.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def schedule_options(scheduler: str, num_cycles: float | None, min_lr: float | None) -> dict:
    """What transformers' schedule of that name takes besides warm-up and steps; None is its default."""
    of_min_lr = {"polynomial": "lr_end"}.get(scheduler, "min_lr")
    options = {"num_cycles": num_cycles, of_min_lr: min_lr}
    return {name: value for name, value in options.items() if value is not None}


def decay_groups(module, weight_decay: float) -> list[dict]:
    """AdamW's parameter groups: matrices decay, vectors (norms and biases) do not. None is empty."""
    matrices, vectors = [], []
    for p in module.parameters():
        if p.requires_grad:
            # ZeRO-3 leaves an empty tensor and the true shape beside it
            shape = getattr(p, "ds_shape", p.shape)
            (matrices if len(shape) > 1 else vectors).append(p)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
