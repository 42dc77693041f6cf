"""Flags that several scripts share, with their help and their bounds; a script's Settings inherit
them and add its own.

In --help and --print_config those of `Data` come first, a script's own last.

Imports the standard library only: scripts read their flags before torch.
"""

import dataclasses
import math
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Data:
    """The model and the data: what a run looks at before it begins."""

    model: str | None = None
    """The policy: a model directory or hub name. None: SmolLM2-135M-Instruct."""
    data: list[str] | None = None
    """Pairs to train on: jsonl, json, csv, parquet, save_to_disk folders or hub names. None: the
    built-in pairs.
    """
    columns: list[str] | None = None
    """Columns that have other names in the data, say prompt=question chosen=better rejected=worse."""
    eval_data: list[str] | None = None
    """Pairs to evaluate on. None: the built-in held-out pairs with built-in data, else what
    --eval_split sets apart.
    """
    eval_split: float = 0.0
    """Share of the training prompts (with all their rows) set apart for evaluation where
    --eval_data is not given.
    """
    data_split_seed: int = 0
    """Seed of that split, which is by prompt."""
    max_length: int = 1024
    """Most tokens of a prompt and a response together; responses are cut at their end."""
    max_prompt_length: int | None = 256
    """Most tokens of a prompt; longer ones keep their end. None: bounded by --max_length alone. The
    default gives way to a --max_length that leaves no room beside it: half of that.
    """
    truncate_prompt: Literal["keep_end", "keep_system_and_end"] = "keep_end"
    """What a prompt that is too long keeps: its end, or bos and the system turn, where they fit,
    and its end.
    """
    chat_template: str | None = None
    """A file with a chat template (Jinja) to use in place of the tokenizer's own."""
    allow_control_tokens: bool = False
    """Accept rows whose text spells out control tokens such as <|im_end|>, instead of dropping
    them.
    """
    allow_template_changes: bool = False
    """Keep answers that the chat template cuts or changes (thoughts that it leaves out, say) as it
    renders them, instead of dropping them.
    """
    max_dropped: float = 0.05
    """Largest share of unusable rows before a run refuses the data."""
    max_implausible: float = 0.5
    """Largest share of rows that can hardly be meant (the prompt at the head of its answers, a
    conversation as JSON in an answer) before a run refuses the data; 1 takes all.
    """
    trust_remote_code: bool = False
    """Let the model's repository run its own Python code."""

    def __post_init__(self):
        check_bounds(self, {}, shares=("eval_split", "max_dropped", "max_implausible"))
        if self.max_prompt_length == Data.max_prompt_length and 1 < self.max_length <= 256:
            self.max_prompt_length = self.max_length // 2


@dataclasses.dataclass
class Training(Data):
    """Besides, how a run trains, saves and goes on."""

    batch_size: int = 16
    """Pairs a step, over all ranks."""
    micro_tokens: int | None = None
    """Tokens a packed row may hold. None: from the free memory."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Most optimiser steps. None: no bound, but 6 steps for the built-in data on a CPU."""
    lr: float = 5e-6
    """Peak learning rate."""
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = "linear"
    """Schedule after warm-up, as transformers names it."""
    warmup_ratio: float = 0.0
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay of matrices; norms and biases never decay."""
    grad_clip: float = 1.0
    """Largest 2-norm of a step's gradient; 0 does not clip."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16, fp32, or auto: bf16 on CUDA and fp32 on CPU. Master weights and sums are fp32 in any
    case.
    """
    ds_config: str = str(ROOT / "ds_configs" / "zero0.json")
    """DeepSpeed JSON: the ZeRO stage, offload, buckets."""
    layout: Literal["packed", "padded"] = "packed"
    """packed: shared prompts without padding. padded: a padded sequence a response, for models that
    packing refuses.
    """
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more work."""
    export_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the weights in OUTPUT/model: fp32, bf16, or auto, the type that they were trained in.
    """
    eval_every: int = 0
    """Steps between evaluations; 0: at the start and at the end only."""
    save_every: int = 0
    """Steps between checkpoints; 0: by --save_minutes alone."""
    save_minutes: float = 30.0
    """Minutes between checkpoints; 0: by --save_every alone. Being told to stop saves in any case.
    """
    keep: int = 2
    """Checkpoints to keep, the newest ones."""
    resume: str = "auto"
    """auto: continue from the newest sound checkpoint in --output. never: start over (a job that
    SLURM has requeued goes on). Else the path of a checkpoint to begin from where --output has none
    of its own, or of one of its own to go back to.
    """
    max_skipped: int = 5
    """Steps in a row that may be skipped because their gradient is not finite; one more ends the
    run.
    """
    log_every: int = 1
    """Steps between readings of the training measures."""
    allow_pickle: bool = False
    """Read weights from pickles (pytorch_model.bin) where there are no safetensors; torch's
    weights_only holds.
    """
    seed: int = 0
    """Seed of the data's order."""

    def __post_init__(self):
        super().__post_init__()
        at_least = {
            "batch_size": 1,
            "micro_tokens": 1,
            "max_steps": 1,
            "log_every": 1,
            "keep": 1,
            "eval_every": 0,
            "lr": 0,
            "save_every": 0,
            "save_minutes": 0,
            "max_skipped": 0,
            "weight_decay": 0,
            "grad_clip": 0,
        }
        check_bounds(self, at_least, shares=("warmup_ratio",), positive=("epochs",))


def check_bounds(settings, at_least: dict, shares=(), positive=()):
    """ValueError for the first flag out of its bounds: its least value, 0 to 1, above 0. None is
    within all.
    """
    given = lambda names: [
        (name, value) for name in names if (value := getattr(settings, name)) is not None
    ]
    for name, value in given(at_least):
        if not value >= at_least[name]:  # nor NaN
            raise ValueError(f"--{name} is at least {at_least[name]}, not {value}")
    for name, value in given(shares):
        if not 0 <= value <= 1:
            raise ValueError(f"--{name} is a share from 0 to 1, not {value}")
    for name, value in given(positive):
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} is a finite number above 0, not {value}")


def sources(settings: Data) -> tuple[list[str], list[str] | None]:
    """The data to train on and to evaluate on, None: none, or a part of the first."""
    folder = ROOT / "train/data/builtin"
    if settings.data:
        return settings.data, settings.eval_data
    held_out = None if settings.eval_split else [str(folder / "held_out.jsonl")]
    return [str(folder / "train.jsonl")], settings.eval_data or held_out
