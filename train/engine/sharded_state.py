"""Everything of a policy that training changes, parameter by parameter, whole and in fp32: the same
for any ZeRO stage and any number of ranks, so that a checkpoint made under one can be continued
under another.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from train.engine import dist, sharded_state

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")  # moments as AdamW names them
# Where DeepSpeed's optimisers keep a rank's flat fp32 weights: stages 1 and 2, stage 3, stage 1
# with bf16.
FLATS = (
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
    "fp32_groups_flat_partition",
)


def shapes(policy, updates: int | None = None) -> dict[str, tuple]:
    """The keys that `tensors` yields, in its order, and their shapes, all fp32. `updates`: if not
    those it has had.
    """
    kinds = (WEIGHT, *MOMENTS) if (policy.updates if updates is None else updates) else (WEIGHT,)
    return {
        f"{name}/{kind}": tuple(getattr(p, "ds_shape", p.shape))
        for name, p in _trained_params(policy)
        for kind in kinds
    }


def weights(policy) -> Iterator[torch.Tensor]:
    """The whole weights alone, in fp32. Every rank calls this and goes through to the end."""
    for _, p in _trained_params(policy):
        yield p.detach() if policy.stage == 0 else safe_get_full_fp32_param(p)


def tensors(policy) -> Iterator[torch.Tensor]:
    """The whole tensors of `shapes`, one after the other. Every rank calls this and goes through to
    the end.
    """
    for _, p in _trained_params(policy):
        yield p.detach() if policy.stage == 0 else safe_get_full_fp32_param(p)
        for moment in MOMENTS if policy.updates else ():
            if policy.stage > 0:
                yield safe_get_full_optimizer_state(p, moment)
            else:  # a parameter without a gradient has no moments yet
                yield policy.optimizer.state.get(p, {}).get(moment, torch.zeros_like(p))


@torch.no_grad()
def restore(policy, read: Callable[[str], torch.Tensor], updates: int):
    """Put back what `tensors` gave, under this policy's own stage and ranks. `read`: the tensor of
    a key.

    `updates`: how many optimiser steps the moments have seen; 0 where there are none. Every rank
    calls this.
    """
    policy.updates = updates
    if updates:
        _make_moments(policy, updates)
    for name, p in _trained_params(policy):
        _set_weight(policy, p, read(f"{name}/{WEIGHT}"))
        for moment in MOMENTS if updates else ():
            _set_moment(policy, p, moment, read(f"{name}/{moment}"))
    if persistent := getattr(policy.optimizer, "persistent_parameters", None):
        persistent[0].partition(
            persistent
        )  # small weights that stage 3 keeps whole: drop the old copies
        persistent[0].all_gather(persistent)


def unchanged_state(lm) -> dict[str, torch.Tensor]:
    """What training leaves as it is and an export needs, by key: buffers, and how frozen weights
    begin, in bf16.
    """
    first = lambda p: (
        getattr(p, "ds_tensor", p).detach().flatten()[:8].to("cpu", torch.bfloat16, copy=True)
    )
    begins = {
        f"frozen/{name}": first(p) for name, p in lm.named_parameters() if not p.requires_grad
    }
    return begins | {f"buffer/{name}": value for name, value in sharded_state.buffers(lm).items()}


def _trained_params(policy):
    return [(name, p) for name, p in policy.module.named_parameters() if p.requires_grad]


def _make_moments(policy, updates):
    """AdamW's state as `updates` steps leave it, moments still 0: torch makes it at the first step
    only.
    """
    adamw = policy.adamw
    if policy.stage == 0:
        flats = [p for group in adamw.param_groups for p in group["params"]]
    else:
        flats = next(
            getattr(policy.optimizer, name) for name in FLATS if hasattr(policy.optimizer, name)
        )
    fused = adamw.defaults["fused"]
    for flat in flats:
        step = torch.tensor(float(updates), device=flat.device if fused else "cpu")
        adamw.state[flat] = {"step": step} | {moment: torch.zeros_like(flat) for moment in MOMENTS}
    policy.link_moments()


def _set_weight(policy, p, value):
    if policy.stage == 3:
        mine = _shard(p, value)
        safe_set_local_fp32_param(p, mine)
        p.ds_tensor.copy_(mine)  # the copy that forward passes gather, in its own type
        return
    if policy.stage > 0:
        safe_set_full_fp32_param(p, value)
    p.copy_(value)


def _set_moment(policy, p, moment, value):
    if policy.stage == 3:
        safe_set_local_optimizer_state(p, _shard(p, value), moment)
    elif policy.stage > 0:
        safe_set_full_optimizer_state(p, value, moment)
    else:
        policy.optimizer.state[p][moment].copy_(value)


def _shard(p, value):
    """This rank's part of a stage-3 parameter, padded with zeros as DeepSpeed does."""
    size = p.ds_tensor.numel()
    flat = value.flatten()[dist.rank() * size : (dist.rank() + 1) * size]
    return torch.nn.functional.pad(flat, (0, size - flat.numel()))


def gather_state_dict(module, dtype=None) -> dict | None:
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
            if dist.is_main():
                state[name] = master.to("cpu", copy=True)
            continue
        with gathered_param(p):
            if dist.is_main():
                state[name] = p.detach().to("cpu", dtype or p.dtype, copy=hasattr(p, "ds_id"))
    return state | buffers(module) if dist.is_main() else None


def buffers(module) -> dict:
    """What a state dict holds besides parameters, copied to the CPU."""
    own = lambda owner, _, leaf: leaf not in module.get_submodule(owner)._non_persistent_buffers_set
    return {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in module.named_buffers()
        if own(*name.rpartition("."))
    }


def gathered_param(p):
    """A context in which parameter `p` is whole. Every rank enters this."""
    if not hasattr(p, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([p])
