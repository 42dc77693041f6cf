"""Loading a model onto this rank's device, or into ZeRO-3's shards."""

import contextlib

from train.engine.ds_config import autocast_dtype, weight_dtype, zero_stage
from train.models import backbone as models
from train.models import pretrained


@contextlib.contextmanager
def sharded_load(config: dict):
    """Inside, `from_pretrained` fills ZeRO-3 shards directly: no rank holds a whole model. Every
    rank enters this.
    """
    if zero_stage(config) < 3:
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
        lm = pretrained.load_causal_lm(
            path, weight_dtype(policy_stage, precision), trust, allow_pickle
        )
    if change:
        change(lm)
    if zero_stage(config) < 3:
        lm.to(device)
    return models.Backbone(lm, layout, autocast=autocast_dtype(policy_stage, precision))
