"""Models and tokenizers from directories and the hub."""

import json
import os
from pathlib import Path

import torch
import transformers


def load_tokenizer(path, trust_remote_code=False):
    """The tokenizer of a model directory or hub name; ValueError that names it."""
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files raise a dozen types
        raise ValueError(
            f"cannot load a tokenizer from {path}: {' '.join(str(error).split())}"
        ) from error


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


ADAPTER = "it holds an adapter: merge that into its base first (peft's merge_and_unload)"


NO_PICKLE = "a pickle can run its author's code; convert it to safetensors, or pass --allow_pickle if you trust it"


def load_causal_lm(path, dtype=torch.float32, trust_remote_code=False, allow_pickle=False):
    """A causal LM from a directory or hub name: safetensors only, unless `allow_pickle`, which
    prefers them still.

    Raises ValueError that names the path where the model is not there, is damaged, or lacks
    weights, which transformers would draw at random.
    """
    # Without it, transformers asks a service to convert a repository that has pickles only, in the
    # user's name.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    try:
        if (
            Path(path) / "adapter_config.json"
        ).is_file():  # with peft, transformers loads the model that this names
            raise ValueError(ADAPTER)
        if not allow_pickle:
            _refuse_pickle(path)
        lm, report = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        if getattr(lm, "_hf_peft_config_loaded", False):
            raise ValueError(ADAPTER)
    except (
        Exception
    ) as error:  # configuration, code and weights raise a dozen types, and the cure is the same
        advice = "" if allow_pickle or "use_safetensors" not in str(error) else f"; {NO_PICKLE}"
        found = " ".join(str(error).split())
        raise ValueError(
            f"cannot load a causal language model from {path}: {found}{advice}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{path} has no weights for {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        )
    return lm


def _refuse_pickle(path):
    """ValueError for a directory whose weights, or some shard of them, are no safetensors."""
    folder = Path(path)
    if not folder.is_dir():
        return
    named = set()
    if (index := folder / "model.safetensors.index.json").is_file():
        named |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if (config := folder / "config.json").is_file():
        named |= {
            json.loads(config.read_text(encoding="utf-8")).get("transformers_weights")
            or "model.safetensors"
        }
    if not any(folder.glob("*.safetensors")):
        named |= {file.name for file in folder.iterdir() if file.suffix in PICKLES}
    if pickled := sorted(name for name in named if Path(name).suffix in PICKLES):
        raise ValueError(f"its weights are a pickle, {pickled[0]}: {NO_PICKLE}")
    if outside := sorted(name for name in named if Path(name).name != name):
        raise ValueError(f"{outside[0]} is not a file of its own")
