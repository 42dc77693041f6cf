"""The result: a model directory that transformers loads, written beside its place, checked, and renamed into it."""

import json
import os
import shutil
from pathlib import Path

import torch

from train.engine import dist, zero
from train.models import backbone as models

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # nats, mean a token
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}


def model_directory(module, tokenizer, folder: Path, rows, *, export_dtype="auto", write_card=None) -> float:
    """Write `module` (a Backbone) and the tokenizer to `folder` as safetensors; every rank calls this.

    The directory is loaded again before it takes its name, and its log-probabilities on `rows` (packed rows on this
    device) compared with the module's. Returns the mean difference, nats a token. RuntimeError where it is too large.
    """
    dtype = DTYPES[export_dtype]
    with torch.no_grad():
        ours = [module(row).cpu() for row in rows]
    state = zero.whole_state(module.lm, dtype)
    beside = folder.with_name(folder.name + ".tmp")
    problem = difference = None
    if dist.first():
        shutil.rmtree(beside, ignore_errors=True)
        saved_dtype = next(iter(state.values())).dtype
        module.lm.save_pretrained(beside, state_dict=state, max_shard_size="4GB")
        config = json.loads((beside / "config.json").read_text(encoding="utf-8"))
        write_json(beside / "config.json", config | {"dtype": str(saved_dtype).removeprefix("torch.")})
        tokenizer.save_pretrained(beside)
        if write_card:
            write_card(beside)
        del state
        difference = _reload(beside, module, rows, ours)
        if (
            not difference
            <= TOLERANCE[torch.bfloat16 if module.autocast or saved_dtype == torch.bfloat16 else torch.float32]
        ):
            problem = (
                f"{beside} loads with log-probabilities {difference:.2g} nats a token away from the trained model's"
            )
        else:
            replace(beside, folder)
    problem, difference = dist.share((problem, difference))
    if problem:
        raise RuntimeError(problem)
    return difference


def _reload(folder, module, rows, ours) -> float:
    """Mean absolute difference of log-probabilities, nats a token, between the directory's model and `ours`."""
    device = rows[0].input_ids.device
    lm = models.load(folder, next(module.parameters()).dtype).to(device)
    loaded = models.Backbone(lm, module.layout, module.logits_bytes, module.autocast)
    with torch.no_grad():
        theirs = [loaded(row).cpu() for row in rows]
    return float((torch.cat(theirs) - torch.cat(ours)).abs().mean())


def replace(new: Path, old: Path):
    """Put the finished directory `new` where `old` stands or stood; `old` is gone only when `new` has its name."""
    if old.exists():
        aside = old.with_name(old.name + ".old")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(old, aside)
        os.rename(new, old)
        shutil.rmtree(aside)
    else:
        os.rename(new, old)


def write_json(path: Path, content):
    """Write JSON to a temporary name, flushed to disk, and rename it."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(beside, path)
