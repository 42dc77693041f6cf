"""The model in a checkpoint, put together without the run, its GPUs or its number of ranks.

What a checkpoint holds is listed in train/run/checkpoint.py. One process does all of this, on a CPU;
in memory the model stands whole, in fp32.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file

from train.engine import ds_config, sharded_state
from train.models import builtin, lora, pretrained
from train.run import checkpoint_files, export
from train.run.checkpoint import rank_file

PARTS = ("policy", "reward_model")  # the trained model's name among the parts of a checkpoint


class Weights(NamedTuple):
    """What a checkpoint holds of the model, by names in transformers' class."""

    trained: dict[str, torch.Tensor]  # whole, fp32
    buffers: dict[str, torch.Tensor]  # whole, as they are
    frozen: dict[str, torch.Tensor]  # the first values of each weight that was not trained, bf16


def read_weights(checkpoint: Path, manifest: dict) -> Weights:
    """All that there is of the model's weights, whichever ranks wrote it."""
    read = checkpoint_files.Reader(checkpoint, manifest)
    part = trained_part(manifest)
    prefix, suffix = f"{part}/lm.", f"/{sharded_state.WEIGHT}"  # `lm` is transformers' class
    trained = {
        key.removeprefix(prefix).removesuffix(suffix): read(key)
        for key in read.shapes()
        if key.startswith(prefix) and key.endswith(suffix)
    }
    untrained = load_file(checkpoint / rank_file(0))  # the same on all ranks: the first wrote it
    return Weights(
        trained=trained,
        buffers=checkpoint_files.under(f"{part}/buffer/", untrained),
        frozen=checkpoint_files.under(f"{part}/frozen/", untrained),
    )


def trained_part(manifest: dict) -> str:
    """The trained model's name among the parts of a checkpoint."""
    return next(name for name in PARTS if name in manifest["parts"])


def _config(checkpoint: Path, manifest: dict, trust_remote_code: bool):
    return transformers.AutoConfig.from_pretrained(
        checkpoint / trained_part(manifest), trust_remote_code=trust_remote_code
    )


def whole_model(checkpoint: Path, manifest: dict, weights: Weights, trust_remote_code: bool):
    """(the model of a run that trained all its weights, its state dict).

    Damaged where a weight is missing.
    """
    config = _config(checkpoint, manifest, trust_remote_code)
    with torch.device("meta"):  # weights of its own would only be drawn to be replaced
        lm = pretrained.auto_class(config).from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    lm.load_state_dict(weights.trained, strict=False, assign=True)
    lm.tie_weights()
    if missing := [name for name, p in lm.named_parameters() if p.is_meta]:
        raise checkpoint_files.Damaged(f"{checkpoint} has no {missing[0]}")
    return lm, weights.trained | weights.buffers


def base_of_adapters(
    checkpoint: Path,
    manifest: dict,
    weights: Weights,
    model: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
):
    """(the base model of a LoRA run with adapters, its state dict in fp32 with the run's adapters).

    model: where the base is, None for where the run had it. ValueError where it cannot be loaded, or
    is another than the run's base.
    """
    flags, stage = manifest["flags"], manifest["parts"][trained_part(manifest)]["stage"]
    # in the type in which the run held it, which may have rounded it
    dtype = ds_config.weight_dtype(stage, manifest["precision"])
    try:
        path = model or flags["model"] or builtin.fetch(say=print)
        config = _config(checkpoint, manifest, trust_remote_code)
        if pretrained.gives_scores(config):  # the head is among what the run has trained
            lm, _ = pretrained.load_score_model(
                path, dtype, trust_remote_code, allow_pickle, needs_head=False
            )
        else:
            lm = pretrained.load_causal_lm(path, dtype, trust_remote_code, allow_pickle)
    except (ValueError, builtin.ModelUnavailable) as error:
        raise ValueError(f"{error}; --model names the model that the run started from") from error
    lm = lm.float()
    lora.add(lm, flags["lora_rank"], flags["lora_alpha"], flags["lora_targets"])
    if not _fit(lm, weights):
        raise ValueError(f"{path} is not the base of these adapters: --model names it")
    base = {name: p.detach() for name, p in lm.named_parameters()}
    return lm, base | sharded_state.buffers(lm) | weights.trained | weights.buffers


def _fit(lm, weights: Weights) -> bool:
    """Whether adapters of the run's shapes belong on `lm`, and its frozen weights begin as the run's."""
    shapes = {name: p.shape for name, p in lm.named_parameters() if p.requires_grad}
    if shapes != {name: value.shape for name, value in weights.trained.items()}:
        return False
    here = sharded_state.untrained_state(lm)
    frozen = {f"frozen/{name}": value for name, value in weights.frozen.items()}
    return frozen.keys() <= here.keys() and not sharded_state.first_difference(here, frozen)


def write(
    folder: Path,
    checkpoint: Path,
    manifest: dict,
    lm,
    state: dict,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
) -> int:
    """Write a model directory, load it again and compare every weight; the number of parameters.

    state: of `lm`, cast to `dtype`; adapters are merged. ValueError where what is loaded is not what
    was written.
    """
    written = export.write_weights(folder, lm, state, dtype)
    for path in sorted(
        (checkpoint / trained_part(manifest)).iterdir()
    ):  # the tokenizer, the settings for generation
        if path.name != "config.json":  # write_weights has made it, with the type of the weights
            (folder / path.name).write_bytes(path.read_bytes())
    loaded = pretrained.auto_class(lm.config).from_pretrained(
        folder, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
    )
    again, parameters = loaded.state_dict(), dict(loaded.named_parameters())
    for name in written | parameters | sharded_state.buffers(loaded):
        if name not in written or not torch.equal(written[name].to(again[name].dtype), again[name]):
            raise ValueError(f"{folder}: {name} is not what was written")
    return sum(p.numel() for p in parameters.values())
