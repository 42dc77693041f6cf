"""What a run makes sure of before its first update: a failure stops it and says which."""

import torch

from train.data.packing import pack
from train.engine import memory
from train.models import compiled
from train.models.backbone import outputs_to_compare, plain_forward

# How far what is equal but for rounding may lie apart: packed and one sequence at a time, in the module's
# own measure of distance; policy and a reference that is compiled or cached, in nats a token.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}


class CheckFailed(ValueError):
    """The numbers of this model on this machine are not what they must be; the message says which."""


@memory.room_for(
    "the check at the start",
    "(two groups of the data): lower --max_length, or take ds_configs/zero3.json over more GPUs",
)
@torch.no_grad()
def check_start(policy, reference, data, device, precision: str, same_weights: bool) -> list:
    """Check the first groups of `data`; returns them as packed batches. Every rank calls this.

    policy: a TrainedModel, or what is called like one; reference: None where there is none.

    CheckFailed unless packed and shared prompts equal one padded sequence a response through
    transformers' own attention, and, where the reference has the policy's weights, the two agree bit
    for bit: margins start at 0. Where layers are compiled the two agree uncompiled, and within
    rounding as they are: the compiler makes code of its own for weights of another type, for adapters,
    and for a pass with gradients, which may round elsewhere. A cached reference, scored in other
    batches, agrees within rounding.
    """
    batch = pack([data.group(i) for i in range(min(2, len(data)))]).to(device)
    module = policy.module
    packed = outputs_to_compare(policy, module, batch)  # (T,) nats, or (N + T,) scores and values
    if not torch.isfinite(packed).all():
        raise CheckFailed(f"start check: the model's {module.gives} are not finite")
    with plain_forward(module):
        alone = outputs_to_compare(policy, module, batch)
    difference = module.distance(packed, alone)
    if not difference <= TOLERANCE[precision]:
        is_compiled = module.static_shapes
        remedy = "take --compile off" if is_compiled else "this model needs --layout padded"
        raise CheckFailed(
            f"start check: packed rows differ from one sequence at a time by {difference:.2g} "
            f"{module.unit} (at most {TOLERANCE[precision]:g}): {remedy}"
        )
    if same_weights:
        _compare_with_reference(policy, packed, reference, batch, precision)
    return [batch]


def _compare_with_reference(policy, packed, reference, batch, precision):
    """CheckFailed where a reference with the policy's weights gives other log-probabilities.

    packed: the policy's of the batch, (T,) nats.
    """
    ref_logps = reference(batch)  # (T,) nats
    difference = float((packed - ref_logps).abs().mean())
    is_near = difference <= TOLERANCE[precision]
    if not reference.forwards:  # looked up: made in other batches, so within rounding only
        if not is_near:
            raise CheckFailed(
                f"start check: the cached reference is {difference:.2g} nats a token from the policy"
            )
        return
    modules = [each.module for each in (policy, reference) if each.module is not None]
    if any(module.static_shapes for module in modules):
        if not is_near:
            raise CheckFailed(
                "start check: compiled, policy and reference have the same weights and are "
                f"{difference:.2g} nats a token apart (at most {TOLERANCE[precision]:g}): take "
                "--compile off"
            )
        with compiled.uncompiled(*modules):
            packed, ref_logps = outputs_to_compare(policy, policy.module, batch), reference(batch)
    if not torch.equal(packed, ref_logps):
        difference = float((packed - ref_logps).abs().max())
        raise CheckFailed(
            "start check: policy and reference have the same weights and differ by up to "
            f"{difference:.2g} nats; their precision or their ZeRO settings do not match"
        )
