"""The result: a model directory that transformers loads, written beside its place, checked, and
renamed into it.
"""

import json
import logging
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from train.engine import dist, zero
from train.losses.products import let_go
from train.models import adapters
from train.models import backbone as models

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
    let_go(module)  # a second model comes into memory below
    dtype = DTYPES[export_dtype]
    with torch.no_grad():
        ours = [module(row).cpu() for row in rows]
    state = zero.whole_state(module.lm, dtype)
    problem = difference = None
    if dist.first():
        try:
            difference = _write(
                state, module, tokenizer, folder, rows, ours, write_card, trust_remote_code
            )
        except Exception as error:  # whatever it is, the other ranks must hear of it
            logging.getLogger("zeropref").exception("export")
            problem = f"{folder} was not written: {error}"
    problem, difference = dist.share((problem, difference))
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
    replace(beside, folder)
    return gap


def weights_to(folder, lm, state: dict, dtype=None) -> dict:
    """Write the weights `state` of `lm`, cast to `dtype`, and its configuration to `folder`;
    returns what was written.

    Adapters are merged, and stand beside it in `folder`/adapter, as peft loads them onto the base
    model.
    """
    adapted, plain, whole = bool(adapters.layers(lm)), lm, state
    if adapted:
        state = adapters.merged(lm, state)
        with torch.device("meta"):  # the same architecture without adapters in it
            plain = type(lm)(lm.config)
        plain.generation_config = lm.generation_config
    trained = dict(plain.named_parameters())
    state = {
        name: value.to(dtype) if dtype and name in trained else value
        for name, value in state.items()
    }
    plain.save_pretrained(
        folder, state_dict=dict(state), max_shard_size="4GB"
    )  # which empties what it is given
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved = str(next(iter(state.values())).dtype).removeprefix("torch.")
    write_json(folder / "config.json", config | {"dtype": saved})
    if adapted:
        lm.lora_config.save_pretrained(folder / "adapter")
        alone = {
            name: value.to(dtype or value.dtype) for name, value in adapters.alone(whole).items()
        }
        save_file(alone, folder / "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    return state


def _reload(folder, module, rows, ours, trust_remote_code) -> float:
    """Mean absolute difference of log-probabilities, nats a token, between the directory's model
    and `ours`.
    """
    first = next(module.parameters())
    # a model that was sharded may not fit on one device a second time
    device = torch.device("cpu") if hasattr(first, "ds_id") else rows[0].input_ids.device
    lm = models.load(folder, first.dtype, trust_remote_code).to(device)
    loaded = models.Backbone(lm, module.layout, module.logits_bytes, module.autocast)
    with torch.no_grad():
        theirs = [loaded(row.to(device)).cpu() for row in rows]
    return float((torch.cat(theirs) - torch.cat(ours)).abs().mean())


def replace(new: Path, old: Path):
    """Put the finished directory `new` where `old` stands or stood; `old` is gone only when `new`
    has its name.
    """
    if old.exists():
        aside = old.with_name(old.name + ".old")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(old, aside)
        os.rename(new, old)
        shutil.rmtree(aside)
    else:
        os.rename(new, old)


def write_json(path: Path, content):
    """Write JSON, as `write_text` does."""
    write_text(
        path, json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def write_text(path: Path, text: str):
    """Write a small file under a temporary name, flushed to disk, and rename it."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    to_disk(beside)
    os.rename(beside, path)


def to_disk(path: Path):
    """Come back when what was written to a file, or the names in a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def plain(value):
    """The same with null for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
