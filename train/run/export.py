"""The result: a model directory that transformers loads, written beside its place, checked, and
renamed into it.

Shapes: T scored tokens, N responses of all batches that are compared.
"""

import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from train.engine import dist, sharded_state
from train.files import follow_umask, replace_directory, write_json
from train.models import lora
from train.models.backbone import outputs_to_compare
from train.models.matmul import release_memory
from train.run import card
from train.run.session import NotWritten, Overflowed

# in the module's own measure of distance: nats a token, or of the mean size of a score
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}


def model_directory(
    module,
    tokenizer,
    folder: Path,
    batches,
    *,
    export_dtype: str = "auto",
    write_card=None,
    trust_remote_code: bool = False,
) -> float:
    """Write `module` (a Backbone or a ScoreModel) and the tokenizer to `folder` as safetensors. Every
    rank calls this.

    The directory is loaded again before it takes its name, and what it gives for `batches` (packed,
    on this device) compared with what the module gives. write_card: called with the folder. Returns
    how far apart they are, in `module.unit`. NotWritten where that is too large, or the disk is full;
    Overflowed where weights, or what they give, are not finite.
    """
    release_memory(module)  # a second model comes into memory below
    with torch.no_grad():
        # (T,) nats, or (N + T,) scores and values
        trained = torch.cat([outputs_to_compare(module, module, each).cpu() for each in batches])
    state = sharded_state.gather_state_dict(module.lm, DTYPES[export_dtype])
    if overflowed := dist.broadcast(
        _not_finite(module, state, trained) if dist.is_main() else None
    ):
        raise Overflowed(overflowed)
    problem = gap = None
    if dist.is_main():
        try:
            unfinished = folder.with_name(folder.name + ".tmp")
            narrow = torch.bfloat16 in (
                module.autocast,
                next(iter(state.values())).dtype,
                next(module.parameters()).dtype,
            )
            _write(unfinished, module, tokenizer, state, write_card)
            gap = _reload(unfinished, module, batches, trained, trust_remote_code)
            if not gap <= TOLERANCE[torch.bfloat16 if narrow else torch.float32]:
                raise RuntimeError(
                    f"loaded again, its {module.gives} are {gap:.2g} {module.unit} from the "
                    "trained model's"
                )
            replace_directory(unfinished, folder)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            logging.getLogger("zeropref").exception("export")
            shutil.rmtree(unfinished, ignore_errors=True)  # a full disk needs the room
            problem = f"{folder} was not written: {error}"
    problem, gap = dist.broadcast((problem, gap))
    if problem:
        raise NotWritten(problem)
    return gap


def _not_finite(module, state: dict, trained: torch.Tensor) -> str | None:
    """What of a model is not finite, or None. trained: what it gives."""
    names = [name for name, _ in module.lm.named_parameters() if name in state]
    names = [name for name in names if not torch.isfinite(state[name]).all()]
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"weights are not finite ({names[0]}{others})"
    if not torch.isfinite(trained).all():
        return f"the model's {module.gives} are not finite"
    return None


def _write(folder, module, tokenizer, state, write_card):
    """Write everything to `folder`; `state` is empty afterwards, to make room for the reload."""
    shutil.rmtree(folder, ignore_errors=True)
    write_weights(folder, module.lm, state)
    tokenizer.save_pretrained(folder)
    if write_card:
        write_card(folder)
    state.clear()


def write_weights(folder: Path, lm, state: dict, dtype: torch.dtype | None = None) -> dict:
    """Write `lm`'s weights `state`, cast to `dtype`, and its configuration; returns what was written.

    Adapters are merged, and stand beside it in `folder`/adapter, as peft loads them onto the base
    model, which their configuration names where it is a repository on the hub.
    """
    adapted, with_adapters, plain_lm = bool(lora.adapted_layers(lm)), state, lm
    if adapted:
        state = lora.merged_state_dict(lm, state)
        with torch.device("meta"):  # the same architecture without adapters in it
            plain_lm = type(lm)(lm.config)
        if lm.can_generate():
            plain_lm.generation_config = lm.generation_config
    parameters = dict(plain_lm.named_parameters())
    state = {
        name: value.to(dtype) if dtype and name in parameters else value
        for name, value in state.items()
    }
    # save_pretrained empties the dict that it is given
    plain_lm.save_pretrained(folder, state_dict=dict(state), max_shard_size="4GB")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved = str(next(iter(state.values())).dtype).removeprefix("torch.")
    write_json(folder / "config.json", config | {"dtype": saved})
    if adapted:
        base = lm.name_or_path
        lm.lora_config.base_model_name_or_path = base if card.is_hub(base) else None
        lm.lora_config.save_pretrained(folder / "adapter")
        adapters = {
            name: value.to(dtype or value.dtype)
            for name, value in lora.adapter_state_dict(with_adapters).items()
        }
        file = folder / "adapter/adapter_model.safetensors"
        save_file(adapters, file, metadata={"format": "pt"})
    follow_umask(*folder.rglob("*.safetensors"))
    return state


def _reload(folder, module, batches, trained, trust_remote_code) -> float:
    """How far what the directory gives is from `trained`, in `module.unit`."""
    # a model that was sharded may not fit on one device a second time
    sharded = hasattr(next(module.parameters()), "ds_id")
    device = torch.device("cpu") if sharded else batches[0].input_ids.device
    loaded = module.load_again(folder, trust_remote_code, device)
    with torch.no_grad():
        found = torch.cat(
            [outputs_to_compare(loaded, loaded, each.to(device)).cpu() for each in batches]
        )
    return module.distance(found, trained)
