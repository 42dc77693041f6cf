"""What a run makes sure of before its first update: a failure stops it and says which."""

import torch

from train.data.packing import pack
from train.engine import memory
from train.models.backbone import plain_forward

TOLERANCE = {
    "fp32": 1e-4,
    "bf16": 0.05,
}  # nats, mean a token: packed against one sequence at a time


class CheckFailed(ValueError):
    """The numbers of this model on this machine are not what they must be; the message says which."""


@memory.room_for(
    "the check at the start",
    "(two groups of the data): lower --max_length, or take ds_configs/zero3.json over more GPUs",
)
@torch.no_grad()
def start(policy, reference, data, device, precision: str, same_weights: bool):
    """Check the first groups of `data`; returns them as packed rows on `device`. Every rank calls
    this.

    CheckFailed unless packed and shared rows equal one padded sequence a response through
    transformers' own attention, and, where the reference has the policy's weights, the two agree
    bit for bit: margins start at 0.
    """
    row = pack([data.group(i) for i in range(min(2, len(data)))]).to(device)
    packed = policy(row)
    if not torch.isfinite(packed).all():
        raise CheckFailed("start check: the model's log-probabilities are not finite")
    with plain_forward(policy.module):
        alone = policy(row)
    difference = float((packed - alone).abs().mean())
    if not difference <= TOLERANCE[precision]:
        raise CheckFailed(
            f"start check: packed rows differ from one sequence at a time by {difference:.2g} nats a token "
            f"(at most {TOLERANCE[precision]:g}): this model needs --layout padded"
        )
    if not same_weights:
        return [row]
    theirs = reference(row)
    difference = float((packed - theirs).abs().mean())
    if (
        not reference.forwards and not difference <= TOLERANCE[precision]
    ):  # looked up: made in other rows
        raise CheckFailed(
            f"start check: the cached reference is {difference:.2g} nats a token from the policy"
        )
    if reference.forwards and not torch.equal(packed, theirs):
        difference = float((packed - theirs).abs().max())
        raise CheckFailed(
            f"start check: policy and reference have the same weights and differ by up to {difference:.2g} nats; "
            "their precision or their ZeRO settings do not match"
        )
    return [row]
