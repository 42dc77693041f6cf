"""The policy under DeepSpeed: the resolved configuration, loading into shards, one backward a row,
one update a step.

A DeepSpeed JSON holds what DeepSpeed owns (ds_configs/); precision, batch, optimiser and clipping
are flags.
"""

import contextlib
import difflib
import json
import logging
import math
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import get_scheduler

from train.engine import dist
from train.losses.products import gather_in_place
from train.models import backbone as models

# Top-level keys of the JSON that DeepSpeed owns here. DeepSpeed itself accepts any key in silence.
OWNED_BY_JSON = (
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "disable_allgather",
    "aio",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "wall_clock_breakdown",
    "steps_per_print",
    "dump_state",
)
OWNED_BY_FLAGS = {
    "bf16": "--precision",
    "bfloat16": "--precision",
    "fp16": "--precision",
    "amp": "--precision",
    "torch_autocast": "--precision",
    "data_types": "--precision",
    "optimizer": "--lr and --weight_decay",
    "scheduler": "--lr_scheduler and --warmup_ratio",
    "gradient_clipping": "--grad_clip",
    "train_batch_size": "--batch_size",
    "train_micro_batch_size_per_gpu": "--micro_tokens",
    "gradient_accumulation_steps": "--batch_size and --micro_tokens",
    "managed_gradient_accumulation": "--batch_size",
    "tensorboard": "--output",
    "activation_checkpointing": "--gradient_checkpointing",
    "zero_allow_untested_optimizer": "--lr",
    "zero_force_ds_cpu_optimizer": "--lr",
}
BUCKET = 25_000_000  # gradient elements that stage 0 sends at a time
PRECISIONS = ("auto", "bf16", "fp32")


def read_config(path) -> dict:
    """A DeepSpeed JSON, checked: ValueError names an unknown key, its nearest neighbour, or the
    flag that owns it.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"DeepSpeed configuration {path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"DeepSpeed configuration {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"DeepSpeed configuration {path} is not a JSON object")
    for key in config:
        if key in OWNED_BY_FLAGS:
            raise ValueError(
                f"{path}: {key!r} belongs to {OWNED_BY_FLAGS[key]}; remove it from the JSON"
            )
    _only_known(path, "", config, OWNED_BY_JSON)
    from deepspeed.runtime.zero import config as zero_config
    from deepspeed.runtime.zero import offload_config

    zero = config.get("zero_optimization", {})
    _only_known(path, "zero_optimization.", zero, _fields(zero_config.DeepSpeedZeroConfig))
    for key, kind in (
        ("offload_optimizer", offload_config.DeepSpeedZeroOffloadOptimizerConfig),
        ("offload_param", offload_config.DeepSpeedZeroOffloadParamConfig),
    ):
        _only_known(path, f"zero_optimization.{key}.", zero.get(key) or {}, _fields(kind))
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage is 0, 1, 2 or 3, not {zero['stage']!r}")
    if zero.get("overlap_comm") and zero.get("stage", 0) != 2:
        raise ValueError(
            f"{path}: zero_optimization.overlap_comm works with stage 2 only, where rows are summed up here"
        )
    return config


def _fields(kind):
    return [
        name for field, info in kind.model_fields.items() for name in (field, info.alias) if name
    ]


def _only_known(path, prefix, block, known):
    if not isinstance(block, dict):
        raise ValueError(f"{path}: {prefix.rstrip('.')} is not a JSON object")
    for key in block:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are: {', '.join(known)}"
            raise ValueError(f"{path}: unknown key {prefix + key!r}{hint}")


def precision_of(flag: str, device: torch.device) -> str:
    """--precision resolved: auto is bf16 on CUDA and fp32 on CPU."""
    if flag not in PRECISIONS:
        raise ValueError(f"--precision is one of {', '.join(PRECISIONS)}, not {flag!r}")
    return flag if flag != "auto" else "bf16" if device.type == "cuda" else "fp32"


def resolve(config: dict, precision: str, grad_clip: float = 0.0) -> dict:
    """The whole configuration that DeepSpeed gets. The loop owns accumulation, so its batch numbers
    are formal.

    Stage 0 computes under autocast over fp32 weights and clips here; stages 1 to 3 hold bf16
    weights beside fp32 masters and accumulate in fp32. With one rank a step's rows still add up
    locally.
    """
    full = json.loads(json.dumps(config))
    stage = stage_of(config)
    full |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offload works with our AdamW, and compiles nothing
        "steps_per_print": config.get("steps_per_print", 10**9),
        "gradient_clipping": grad_clip
        if stage > 0
        else 0.0,  # where it is not said, DeepSpeed clips to 1
    }
    if stage > 0 and precision == "bf16":
        full["bf16"] = {"enabled": True}
        full["data_types"] = {"grad_accum_dtype": "fp32"}
    return full


def frozen(config: dict, policy: dict) -> dict:
    """The whole configuration of a model that is not trained: `config`'s sharding in the policy's
    precision.
    """
    full = {
        key: value
        for key, value in resolve(config, "fp32").items()
        if key != "zero_allow_untested_optimizer"
    }
    full.get("zero_optimization", {}).pop("offload_optimizer", None)
    return full | {key: policy[key] for key in ("bf16",) if key in policy}


def stage_of(config: dict) -> int:
    """The ZeRO stage of a DeepSpeed configuration, 0 where it names none."""
    return config.get("zero_optimization", {}).get("stage", 0)


def autocast_of(stage: int, precision: str):
    """The dtype that forward passes run under, or None: only stage 0 computes in another type than
    its weights'.
    """
    return torch.bfloat16 if stage == 0 and precision == "bf16" else None


def weights_of(stage: int, precision: str) -> torch.dtype:
    """The dtype that the module's weights are held in."""
    return torch.bfloat16 if stage > 0 and precision == "bf16" else torch.float32


@contextlib.contextmanager
def sharded_load(config: dict):
    """Inside, `from_pretrained` fills ZeRO-3 shards directly: no rank holds a whole model. Every
    rank enters this.
    """
    if stage_of(config) < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(config)
    try:
        yield alive
    finally:
        unset_hf_deepspeed_config()


def load_backbone(
    path,
    config: dict,
    precision: str,
    policy_stage: int,
    device,
    layout="packed",
    trust=False,
    allow_pickle=False,
    change=None,
):
    """A Backbone from a model directory or hub name, on `device` or in `config`'s ZeRO-3 shards.
    Every rank calls this.

    `policy_stage` decides the mode that policy and reference share: autocast over fp32 weights, or
    bf16 weights. `change`: called with the causal LM before it is wrapped, to add adapters, say.
    """
    with sharded_load(config):
        lm = models.load(path, weights_of(policy_stage, precision), trust, allow_pickle)
    if change:
        change(lm)
    if stage_of(config) < 3:
        lm.to(device)
    return models.Backbone(lm, layout, autocast=autocast_of(policy_stage, precision))


class Update(NamedTuple):
    """What one optimiser step did."""

    grad_norm: float  # 2-norm over all ranks' shards, before clipping
    lr: float  # the rate that this update used
    applied: bool  # False where a gradient was not finite: weights, moments and schedule stay as they were


class Policy:
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
        self.stage, self.grad_clip = stage_of(config), grad_clip
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
            gather_in_place(module)
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
                dist.world() > 1
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


def whole_state(module, dtype=None) -> dict | None:
    """The module's state dict on rank 0's CPU, parameter by parameter, None on other ranks. Every
    rank calls this.

    A tied weight stands once, under its first name. `dtype`: cast to it; fp32 of a bf16 weight is
    its master.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    state, seen = {}, set()
    for name, p in module.named_parameters(remove_duplicate=False):
        if id(p) in seen:
            continue
        seen.add(id(p))
        if (
            dtype == torch.float32
            and p.dtype != dtype
            and (master := safe_get_full_fp32_param(p)) is not None
        ):
            if dist.first():
                state[name] = master.to("cpu", copy=True)
            continue
        with gathered_one(p):
            if dist.first():
                state[name] = p.detach().to("cpu", dtype or p.dtype, copy=hasattr(p, "ds_id"))
    return state | buffers(module) if dist.first() else None


def buffers(module) -> dict:
    """What a state dict holds besides parameters, copied to the CPU."""
    own = lambda owner, _, leaf: leaf not in module.get_submodule(owner)._non_persistent_buffers_set
    return {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in module.named_buffers()
        if own(*name.rpartition("."))
    }


def gathered_one(p):
    """A context in which parameter `p` is whole. Every rank enters this."""
    if not hasattr(p, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([p])
