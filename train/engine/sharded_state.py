"""What training changes in a model, parameter by parameter, whole and in fp32.

The same for any ZeRO stage and any number of ranks, so that a checkpoint made under one stage can be
continued under another. `model` below is a TrainedModel (train/engine/trained.py); `module` and `lm`
are torch modules, sharded or not.
"""

import contextlib
from collections.abc import Callable, Iterator

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from train.engine import dist
from train.models.heads import HEAD

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW names them
# Where DeepSpeed's optimisers keep a rank's flat fp32 weights.
FLAT_WEIGHTS = (
    "single_partition_of_fp32_groups",  # stages 1 and 2
    "fp32_partitioned_groups_flat",  # stage 3
    "fp32_groups_flat_partition",  # stage 1 with bf16
)
FINGERPRINT = 8  # leading values of a weight that say which model it belongs to


def shapes(model, updates: int) -> dict[str, tuple]:
    """The keys that `tensors` yields after `updates` optimiser steps, in its order, and their shapes.

    All are fp32: PARAMETER/weight, and once there was an update PARAMETER/exp_avg and
    PARAMETER/exp_avg_sq.
    """
    kinds = (WEIGHT, *MOMENTS) if updates else (WEIGHT,)
    return {
        f"{name}/{kind}": tuple(getattr(p, "ds_shape", p.shape))
        for name, p in _trained_params(model)
        for kind in kinds
    }


def full_weights(model) -> Iterator[torch.Tensor]:
    """The whole weights alone, in fp32. Every rank calls this and goes through to the end."""
    for _, p in _trained_params(model):
        yield p.detach() if model.stage == 0 else safe_get_full_fp32_param(p)


def tensors(model) -> Iterator[torch.Tensor]:
    """The whole tensors of `shapes`, one by one. Every rank calls this and goes to the end."""
    for _, p in _trained_params(model):
        yield p.detach() if model.stage == 0 else safe_get_full_fp32_param(p)
        for moment in MOMENTS if model.updates else ():
            if model.stage > 0:
                yield safe_get_full_optimizer_state(p, moment)
            else:  # a parameter without a gradient has no moments yet
                yield model.optimizer.state.get(p, {}).get(moment, torch.zeros_like(p))


@torch.no_grad()
def restore(model, read: Callable[[str], torch.Tensor], updates: int):
    """Put back what `tensors` gave, under this model's own stage and ranks. Every rank calls this.

    read: gives the tensor of a key of `shapes`. updates: how many optimiser steps the moments have
    seen; 0 where there are none.
    """
    model.updates = updates
    if updates:
        _make_moments(model, updates)
    for name, p in _trained_params(model):
        _set_weight(model, p, read(f"{name}/{WEIGHT}"))
        for moment in MOMENTS if updates else ():
            _set_moment(model, p, moment, read(f"{name}/{moment}"))
    if persistent := getattr(model.optimizer, "persistent_parameters", None):
        # small weights that stage 3 keeps whole: drop the old copies
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


@torch.no_grad()
def set_masters(model, load: Callable):
    """Let the fp32 masters of stages 1 to 3 begin from the weights as their files have them; DeepSpeed
    makes them of the module's own, which are rounded to bf16. Every rank calls this.

    load: gives the module again, in fp32, sharded at stage 3. Below that rank 0 alone calls it and
    tells the others, for a node need not hold as many whole models as it has ranks. Parameters that
    are not in it, such as adapters, stay as they are.
    """
    tells = dist.is_main() or model.stage == 3
    found = dict(load().named_parameters()) if tells else {}
    names = dist.broadcast([*found])
    for name, p in _trained_params(model):
        if name not in names:
            continue
        if model.stage == 3:
            safe_set_local_fp32_param(p, found[name].ds_tensor.to(p.ds_tensor.device))
            continue
        value = torch.empty(p.shape, dtype=torch.float32, device=p.device)
        if dist.is_main():
            value.copy_(found[name])
        safe_set_full_fp32_param(p, dist.broadcast_tensor(value))


def untrained_state(lm) -> dict[str, torch.Tensor]:
    """What training leaves as it is and an export needs: buffers, and how each frozen weight begins.

    buffer/NAME is whole; frozen/NAME holds the first values in bf16, by which an export of adapters
    tells whether it was given the right base model.
    """
    state = {
        f"frozen/{name}": _first_values(p)
        for name, p in lm.named_parameters()
        if not p.requires_grad
    }
    return state | {f"buffer/{name}": value for name, value in buffers(lm).items()}


def first_state(lm) -> dict[str, torch.Tensor]:
    """How a model that is about to be trained begins: begin/NAME holds the first values in bf16 of each
    weight that comes from files, and not of adapters or a score's head, which may be drawn.
    """
    return {
        f"begin/{name}": _first_values(p)
        for name, p in lm.named_parameters()
        if p.requires_grad and "lora_" not in name and not name.startswith(f"{HEAD}.")
    }


def _first_values(p) -> torch.Tensor:
    """The first values in bf16; of a weight in ZeRO-3's shards, of this rank's."""
    values = getattr(p, "ds_tensor", p).detach().flatten()[:FINGERPRINT]
    return values.to("cpu", torch.bfloat16, copy=True)


def first_difference(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str | None:
    """The name of a weight that is not the same in two of `untrained_state` or `first_state`, as far as
    both have it; shards of one may have fewer values.
    """
    for name in sorted(state.keys() & other.keys()):
        kind, _, weight = name.partition("/")
        size = min(len(state[name]), len(other[name]))
        if kind != "buffer" and not torch.equal(state[name][:size], other[name][:size]):
            return weight
    return None


def gather_state_dict(module, dtype=None) -> dict | None:
    """The module's state dict on rank 0's CPU, None on other ranks. Every rank calls this.

    It is gathered parameter by parameter. A tied weight stands once, under its first name. dtype:
    cast to it; fp32 of a bf16 weight is its master.
    """
    state, seen = {}, set()
    for name, p in module.named_parameters(remove_duplicate=False):
        if id(p) in seen:
            continue
        seen.add(id(p))
        wants_master = dtype == torch.float32 and p.dtype != dtype
        if wants_master and (master := safe_get_full_fp32_param(p)) is not None:
            if dist.is_main():
                state[name] = master.to("cpu", copy=True)
            continue
        with gathered_param(p):
            if dist.is_main():
                state[name] = p.detach().to("cpu", dtype or p.dtype, copy=hasattr(p, "ds_id"))
    return state | buffers(module) if dist.is_main() else None


def buffers(module) -> dict[str, torch.Tensor]:
    """What a state dict holds besides parameters, copied to the CPU."""
    found = {}
    for name, value in module.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if leaf not in module.get_submodule(owner)._non_persistent_buffers_set:
            found[name] = value.detach().to("cpu", copy=True).contiguous()
    return found


def gathered_param(p):
    """A context in which parameter `p` is whole. Every rank enters this."""
    if not hasattr(p, "ds_id"):
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters([p])


def _trained_params(model):
    return [(name, p) for name, p in model.module.named_parameters() if p.requires_grad]


def _make_moments(model, updates):
    """Make AdamW's state as `updates` steps leave it, moments still 0: torch makes it at the first
    step only.
    """
    adamw = model.adamw
    if model.stage == 0:
        weights = [p for group in adamw.param_groups for p in group["params"]]
    else:
        attribute = next(name for name in FLAT_WEIGHTS if hasattr(model.optimizer, name))
        weights = getattr(model.optimizer, attribute)
    fused = adamw.defaults["fused"]
    for weight in weights:
        step = torch.tensor(float(updates), device=weight.device if fused else "cpu")
        moments = {moment: torch.zeros_like(weight) for moment in MOMENTS}
        adamw.state[weight] = {"step": step} | moments
    model.link_moments()


def _set_weight(model, p, value):
    if model.stage == 3:
        shard = _shard_of(p, value)
        safe_set_local_fp32_param(p, shard)
        p.ds_tensor.copy_(shard)  # the copy that forward passes gather, in its own type
        return
    if model.stage > 0:
        safe_set_full_fp32_param(p, value)
    p.copy_(value)


def _set_moment(model, p, moment, value):
    if model.stage == 3:
        safe_set_local_optimizer_state(p, _shard_of(p, value), moment)
    elif model.stage > 0:
        safe_set_full_optimizer_state(p, value, moment)
    else:
        model.optimizer.state[p][moment].copy_(value)


def _shard_of(p, value):
    """This rank's part of a stage-3 parameter, flat, padded with zeros as DeepSpeed does."""
    size = p.ds_tensor.numel()
    flat = value.flatten()[dist.rank() * size : (dist.rank() + 1) * size]
    return torch.nn.functional.pad(flat, (0, size - flat.numel()))
