"""The result: a model directory that transformers loads, written beside its place, checked, and
renamed into it.
"""

import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from train.engine import dist, sharded_state
from train.files import replace_directory, write_json
from train.models import backbone as models
from train.models import lora, pretrained
from train.models.matmul import release_memory

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # nats, mean a token
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}


def model_directory(
    module,
    tokenizer,
    folder: Path,
    rows,
    *,
    export_dtype="auto",
    write_card=None,
    trust_remote_code=False,
) -> float:
    """Write `module` (a Backbone) and the tokenizer to `folder` as safetensors; every rank calls
    this.

    The directory is loaded again before it takes its name, and its log-probabilities on `rows`
    (packed rows on this device) compared with the module's. Returns the mean difference, nats a
    token. RuntimeError where it is too large.
    """
    release_memory(module)  # a second model comes into memory below
    dtype = DTYPES[export_dtype]
    with torch.no_grad():
        ours = [module(row).cpu() for row in rows]
    state = sharded_state.gather_state_dict(module.lm, dtype)
    problem = difference = None
    if dist.is_main():
        try:
            difference = _write(
                state, module, tokenizer, folder, rows, ours, write_card, trust_remote_code
            )
        except Exception as error:  # whatever it is, the other ranks must hear of it
            logging.getLogger("zeropref").exception("export")
            problem = f"{folder} was not written: {error}"
    problem, difference = dist.broadcast((problem, difference))
    if problem:
        raise RuntimeError(problem)
    return difference


def _write(state, module, tokenizer, folder, rows, ours, write_card, trust_remote_code) -> float:
    """Rank 0's part of it: beside, checked, renamed."""
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    saved = next(iter(state.values())).dtype
    weights_to(beside, module.lm, state)
    tokenizer.save_pretrained(beside)
    if write_card:
        write_card(beside)
    state.clear()
    gap = _reload(beside, module, rows, ours, trust_remote_code)
    narrow = module.autocast or torch.bfloat16 in (saved, next(module.parameters()).dtype)
    if not gap <= TOLERANCE[torch.bfloat16 if narrow else torch.float32]:
        raise RuntimeError(
            f"loaded again, its log-probabilities are {gap:.2g} nats a token from the trained model's"
        )
    replace_directory(beside, folder)
    return gap


def weights_to(folder, lm, state: dict, dtype=None) -> dict:
    """Write the weights `state` of `lm`, cast to `dtype`, and its configuration to `folder`;
    returns what was written.

    Adapters are merged, and stand beside it in `folder`/adapter, as peft loads them onto the base
    model.
    """
    adapted, json_safe, whole = bool(lora.layers(lm)), lm, state
    if adapted:
        state = lora.merged(lm, state)
        with torch.device("meta"):  # the same architecture without adapters in it
            json_safe = type(lm)(lm.config)
        json_safe.generation_config = lm.generation_config
    trained = dict(json_safe.named_parameters())
    state = {
        name: value.to(dtype) if dtype and name in trained else value
        for name, value in state.items()
    }
    json_safe.save_pretrained(
        folder, state_dict=dict(state), max_shard_size="4GB"
    )  # which empties what it is given
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved = str(next(iter(state.values())).dtype).removeprefix("torch.")
    write_json(folder / "config.json", config | {"dtype": saved})
    if adapted:
        lm.lora_config.save_pretrained(folder / "adapter")
        alone = {name: value.to(dtype or value.dtype) for name, value in lora.alone(whole).items()}
        save_file(alone, folder / "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    return state


def _reload(folder, module, rows, ours, trust_remote_code) -> float:
    """Mean absolute difference of log-probabilities, nats a token, between the directory's model
    and `ours`.
    """
    first = next(module.parameters())
    # a model that was sharded may not fit on one device a second time
    device = torch.device("cpu") if hasattr(first, "ds_id") else rows[0].input_ids.device
    lm = pretrained.load_causal_lm(folder, first.dtype, trust_remote_code).to(device)
    loaded = models.Backbone(lm, module.layout, module.logits_bytes, module.autocast)
    with torch.no_grad():
        theirs = [loaded(row.to(device)).cpu() for row in rows]
    return float((torch.cat(theirs) - torch.cat(ours)).abs().mean())
