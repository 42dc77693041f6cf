"""The DeepSpeed configuration: what the JSON owns, what the flags own, and what follows from both."""

import difflib
import json

import pydantic
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.zero import config as zero_config
from deepspeed.runtime.zero import offload_config

from train.files import near_names, shipped

PRECISIONS = ("auto", "bf16", "fp32")
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
# What DeepSpeed looks at only when it is used, of the keys that it owns here.
BOOLEANS = (
    "prescale_gradients",
    "disable_allgather",
    "memory_breakdown",
    "wall_clock_breakdown",
    "dump_state",
)
BLOCKS = ("aio", "comms_logger", "flops_profiler")
COMMUNICATION_TYPES = ("fp32", "fp16", "bf16")
# Of zero_optimization: what a run cannot do, and why.
UNSUPPORTED = {
    "legacy_stage1": "DeepSpeed has none any more",
    "zenflow": "it needs DeepSpeed's own optimiser, and --lr is torch's AdamW's",
}


def read_config(path) -> dict:
    """A DeepSpeed JSON, checked.

    ValueError names an unknown key, its nearest neighbour, the flag that owns it, or what a value may
    be.
    """
    try:
        text = shipped(path).read_text(encoding="utf-8-sig")  # with or without Windows' mark
        config = json.loads(text, object_pairs_hook=_once_each)
    except FileNotFoundError as error:
        near = near_names(path)
        raise ValueError(f"DeepSpeed configuration {path} does not exist{near}") from error
    except OSError as error:
        raise ValueError(
            f"DeepSpeed configuration {path} cannot be read: {error.strerror}"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"DeepSpeed configuration {path} is not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"DeepSpeed configuration {path} is not a JSON object")
    if owned := [key for key in config if key in OWNED_BY_FLAGS]:
        whose = ", ".join(f"{key!r} belongs to {OWNED_BY_FLAGS[key]}" for key in owned)
        them = "them" if len(owned) > 1 else "it"
        raise ValueError(f"{path}: {whose}; remove {them} from the JSON")
    _only_known(path, "", config, OWNED_BY_JSON)
    _refuse_values(path, config)
    zero = config.get("zero_optimization", {})
    _only_known(path, "zero_optimization.", zero, _fields(zero_config.DeepSpeedZeroConfig))
    for key, kind in (
        ("offload_optimizer", offload_config.DeepSpeedZeroOffloadOptimizerConfig),
        ("offload_param", offload_config.DeepSpeedZeroOffloadParamConfig),
    ):
        _only_known(path, f"zero_optimization.{key}.", zero.get(key) or {}, _fields(kind))
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage is 0, 1, 2 or 3, not {zero['stage']!r}")
    _refuse_zero(path, zero)
    scaled = config.get("prescale_gradients") or config.get("gradient_predivide_factor", 1) != 1
    if scaled and zero.get("stage", 0) > 1 and zero.get("reduce_scatter", True):
        raise ValueError(
            f"{path}: prescale_gradients and gradient_predivide_factor need "
            "zero_optimization.reduce_scatter false at stages 2 and 3"
        )
    if zero.get("overlap_comm") and zero.get("stage", 0) != 2:
        raise ValueError(
            f"{path}: zero_optimization.overlap_comm works with stage 2 only, where rows are summed up "
            "here"
        )
    return config


def _once_each(pairs) -> dict:
    """The object of a JSON; ValueError where a key stands twice, of which json's own takes the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice: keep one")
    return found


def _refuse_values(path, config: dict):
    """ValueError for a value beside zero_optimization that DeepSpeed would trip over in mid-run."""
    for key, value in config.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        expected = None
        if key in BOOLEANS and not isinstance(value, bool):
            expected = "true or false"
        elif key in BLOCKS and not isinstance(value, dict):
            expected = "a JSON object"
        elif key == "communication_data_type" and value not in COMMUNICATION_TYPES:
            expected = f"one of {', '.join(COMMUNICATION_TYPES)}"
        elif key == "steps_per_print" and not (is_number and value >= 1):
            expected = "a number from 1 on"
        elif key == "gradient_predivide_factor" and not (is_number and value > 0):
            expected = "a number above 0"
        if expected:
            raise ValueError(f"{path}: {key} is {expected}, not {json.dumps(value)}")


def _refuse_zero(path, zero: dict):
    """ValueError for what zero_optimization cannot be, or would be without effect."""
    for key in zero:
        if zero[key] and key in UNSUPPORTED:
            raise ValueError(f"{path}: no zero_optimization.{key}: {UNSUPPORTED[key]}")
    if not zero.get("compute_grad_norm", True):
        raise ValueError(
            f"{path}: no zero_optimization.compute_grad_norm false: by the norm a run sees gradients "
            "that are not finite"
        )
    try:
        parsed = zero_config.DeepSpeedZeroConfig(**zero)
    except pydantic.ValidationError as error:
        (problem, *_) = error.errors()
        name = ".".join(["zero_optimization", *map(str, problem["loc"])])
        given = f", not {json.dumps(problem['input'])}" if problem["loc"] else ""
        raise ValueError(f"{path}: {name}: {problem['msg']}{given}") from error
    for key, first_stage in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = getattr(parsed, key)
        device = offload.device if offload else "none"  # an Enum of str
        if device == "none":
            continue
        if parsed.stage < first_stage:
            raise ValueError(
                f"{path}: zero_optimization.{key} changes nothing at stage {int(parsed.stage)}: it "
                f"counts from stage {first_stage} on"
            )
        if device == "nvme":
            if offload.nvme_path is None:
                raise ValueError(
                    f"{path}: zero_optimization.{key}.nvme_path says where to: it is missing"
                )
            if not AsyncIOBuilder().is_compatible(verbose=False):
                raise ValueError(
                    f"{path}: zero_optimization.{key}.device nvme needs libaio, with its headers "
                    '(Debian: libaio-dev); "cpu" needs neither'
                )
    offload = parsed.offload_optimizer
    if offload and (offload.ratio < 1 or offload.super_offload):
        raise ValueError(
            f"{path}: zero_optimization.offload_optimizer's ratio and super_offload need DeepSpeed's "
            "own optimiser, and --lr is torch's AdamW's: leave them out"
        )


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


def resolve_precision(flag: str, device: torch.device) -> str:
    """--precision resolved: auto is bf16 on GPUs that compute in it (sm80, an A100, and later), fp32
    on others and on a CPU.
    """
    if flag not in PRECISIONS:
        raise ValueError(f"--precision is one of {', '.join(PRECISIONS)}, not {flag!r}")
    if flag != "auto":
        return flag
    if device.type != "cuda":
        return "fp32"
    # V100 and T4 take bf16 and compute it in steps of other types
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"


def resolve(config: dict, precision: str, grad_clip: float = 0.0) -> dict:
    """The whole configuration that DeepSpeed gets of a model that is trained.

    The loop owns accumulation, so DeepSpeed's batch numbers are formal. Stage 0 computes under
    autocast over fp32 weights and clips by itself (engine/trained.py); stages 1 to 3 hold bf16
    weights beside fp32 masters and accumulate in fp32: a bf16 sum over a step's batches would lose
    the small ones.
    """
    full = json.loads(json.dumps(config))  # a deep copy
    stage = zero_stage(config)
    full |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offload works with our AdamW, and compiles nothing
        "steps_per_print": config.get("steps_per_print", 10**9),
        # it waits for the device twice a batch, for a number that nobody reads: Meter has its own
        "timers": {"throughput": {"enabled": False}},
        # where it is not said, DeepSpeed clips to 1
        "gradient_clipping": grad_clip if stage > 0 else 0.0,
    }
    if stage == 3:  # said by nobody, DeepSpeed takes true; see read_config
        full["zero_optimization"].setdefault("overlap_comm", False)
    if stage > 0 and precision == "bf16":
        full["bf16"] = {"enabled": True}
        full["data_types"] = {"grad_accum_dtype": "fp32"}
    return full


def resolve_frozen(config: dict, policy: dict) -> dict:
    """The whole configuration of a model that is not trained.

    config: its own JSON, which says how it is sharded. policy: the trained model's resolved
    configuration, whose precision it shares.
    """
    full = resolve(config, "fp32")
    del full["zero_allow_untested_optimizer"]
    full.get("zero_optimization", {}).pop("offload_optimizer", None)
    return full | {key: policy[key] for key in ("bf16",) if key in policy}


def zero_stage(config: dict) -> int:
    """The ZeRO stage of a DeepSpeed configuration, 0 where it names none."""
    return config.get("zero_optimization", {}).get("stage", 0)


def autocast_dtype(stage: int, precision: str):
    """The dtype that forward passes run under, or None.

    Only stage 0 computes in another type than its weights'.
    """
    return torch.bfloat16 if stage == 0 and precision == "bf16" else None


def weight_dtype(stage: int, precision: str) -> torch.dtype:
    """The dtype that the module's weights are held in."""
    return torch.bfloat16 if stage > 0 and precision == "bf16" else torch.float32
