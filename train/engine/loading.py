"""Loading a model onto this rank's device or into ZeRO-3's shards, and running one that is frozen."""

import contextlib
import logging
from collections.abc import Callable
from functools import partial

import deepspeed
import torch
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from train.engine.ds_config import autocast_dtype, weight_dtype, zero_stage
from train.models import heads, pretrained
from train.models.backbone import Backbone


@contextlib.contextmanager
def sharded_load(config: dict):
    """Let `from_pretrained` fill ZeRO-3 shards directly, so that no rank holds a whole model.

    config: a resolved DeepSpeed configuration; below stage 3 nothing changes. Every rank enters this.
    """
    if zero_stage(config) < 3:
        yield
        return
    alive = HfDeepSpeedConfig(config)  # transformers looks for it as long as it lives
    try:
        yield alive
    finally:
        unset_hf_deepspeed_config()


def load_backbone(
    path,
    config: dict,
    precision: str,
    policy_stage: int,
    device: torch.device,
    *,
    layout: str = "packed",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    change: Callable | None = None,
) -> Backbone:
    """A Backbone from a model directory or hub name, on `device` or in ZeRO-3 shards.

    config: its own resolved DeepSpeed configuration. policy_stage: decides the mode that policy and
    reference share, autocast over fp32 weights or bf16 weights. change: called with the causal LM
    before it is wrapped, to add adapters say. Every rank calls this.
    """
    with sharded_load(config):
        lm = pretrained.load_causal_lm(
            path,
            weight_dtype(policy_stage, precision),
            trust_remote_code,
            allow_pickle,
            device=_straight_to(device, config),
        )
    _settle(lm, config, device, change)
    backbone = Backbone(lm, layout, autocast=autocast_dtype(policy_stage, precision))
    if not change and _is_rounded(path, policy_stage, precision, trust_remote_code):
        backbone.load_in_fp32 = _in_fp32(
            load_backbone,
            path,
            config,
            policy_stage,
            layout=layout,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
    return backbone


def load_score_model(
    path,
    config: dict,
    precision: str,
    policy_stage: int,
    device: torch.device,
    *,
    layout: str = "packed",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    change: Callable | None = None,
    seed: int | None = 0,
    in_deviations: bool = False,
) -> heads.ScoreModel:
    """A ScoreModel as `load_backbone` makes a Backbone. seed: draws the head of a model that has
    none, a causal language model; None makes it of zeros. in_deviations: it gives scores in deviations
    from the mean, by the mean and deviation that the configuration names: the head is divided, the
    mean subtracted, and the configuration says what is left for whoever reads it next. Every rank
    calls this.
    """
    with sharded_load(config):
        lm, has_head = pretrained.load_score_model(
            path,
            weight_dtype(policy_stage, precision),
            trust_remote_code,
            allow_pickle,
            device=_straight_to(device, config),
            needs_head=False,
        )
    deviation, shift = 1.0, 0.0
    if in_deviations:
        deviation = float(getattr(lm.config, "score_std", None) or 1.0)
        shift = float(getattr(lm.config, "score_mean", None) or 0.0) / deviation
        lm.config.score_mean, lm.config.score_std = shift, 1.0
    if not has_head or deviation != 1:
        weight = getattr(lm, heads.HEAD).weight
        sharded = hasattr(weight, "ds_id")
        with (
            deepspeed.zero.GatheredParameters([weight], modifier_rank=0)
            if sharded
            else contextlib.nullcontext()
        ):
            if not has_head:
                heads.draw_head(weight, seed)
            with torch.no_grad():
                weight.div_(deviation)
    _settle(lm, config, device, change)
    model = heads.ScoreModel(lm, layout, autocast_dtype(policy_stage, precision), shift)
    is_made_here = not has_head or deviation != 1
    if _is_rounded(path, policy_stage, precision, trust_remote_code, is_made_here):
        model.load_in_fp32 = _in_fp32(
            load_score_model,
            path,
            config,
            policy_stage,
            layout=layout,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            seed=seed,
            in_deviations=in_deviations,
        )
    return model


def _is_rounded(
    path, policy_stage: int, precision: str, trust_remote_code: bool, is_made_here: bool = False
) -> bool:
    """Whether the module's weights have fewer digits than their files, or than what made them here."""
    held = weight_dtype(policy_stage, precision)
    if held != torch.bfloat16:
        return False
    return is_made_here or pretrained.is_wider(path, held, trust_remote_code)


def _in_fp32(load: Callable, path, config: dict, policy_stage: int, **options) -> Callable:
    """What loads the same module with fp32 weights, sharded alike, in main memory."""
    same = {key: value for key, value in config.items() if key not in ("bf16", "data_types")}
    return partial(load, path, same, "fp32", policy_stage, torch.device("cpu"), **options)


def _straight_to(device: torch.device, config: dict) -> torch.device | None:
    """Where weights go as they are read. A GPU's: the eight ranks of a node would else have eight whole
    models in main memory for a moment, 120 GB of a model of 7B.
    """
    return device if device.type == "cuda" and zero_stage(config) < 3 else None


def _settle(lm, config: dict, device: torch.device, change: Callable | None):
    """Let `change` change `lm`, and put it where it computes."""
    if change:
        change(lm)
    if zero_stage(config) < 3:
        lm.to(device)


def frozen_forward(module, config: dict) -> Callable:
    """What runs a frozen module's forward: itself, or at stage 3 an engine that gathers its shards.

    Every rank calls this.
    """
    if zero_stage(config) < 3:
        return module
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    return engine
