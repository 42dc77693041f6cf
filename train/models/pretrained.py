"""Causal language models, score models and tokenizers from directories and the hub.

What cannot be loaded is a ValueError in one line that names the path, which comes from the user's
flags. By default nothing that is loaded runs its author's code: no modules out of the directory
(`trust_remote_code`), no pickles (`allow_pickle`).
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors import safe_open

from train import hub
from train.files import near_names

SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
WITHOUT_DIGITS = ("BOOL", "U8", "I8", "I16", "I32", "I64")  # of which nothing is lost
# File names that torch.load would unpickle.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

IS_ADAPTER = "it holds an adapter: merge that into its base first (peft's merge_and_unload)"
NO_PICKLES = "a pickle can run its author's code; convert it to safetensors, or pass --allow_pickle if you trust it"


class Kind(NamedTuple):
    """A sort of model."""

    auto_class: type  # of transformers
    title: str  # in messages


CAUSAL = Kind(transformers.AutoModelForCausalLM, "a causal language model")
SCORE = Kind(transformers.AutoModelForSequenceClassification, "a reward model")


def load_tokenizer(path, trust_remote_code=False):
    """The tokenizer of a model directory or hub name. Raises ValueError that names the path."""
    _find(path)
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files raise a dozen types
        is_adapter = (Path(path) / "adapter_config.json").is_file()
        why = IS_ADAPTER if is_adapter else _why(path, error)
        raise ValueError(f"cannot load a tokenizer from {path}: {why}") from error


def load_causal_lm(
    path, dtype=torch.float32, trust_remote_code=False, allow_pickle=False, device=None
):
    """A causal LM with weights in `dtype` from a directory or hub name: from safetensors only,
    unless `allow_pickle`, which still prefers them.

    device: where weights go as they are read, one by one; None: as a whole into main memory, or into
    ZeRO-3's shards.

    Raises ValueError that names the path where the model is not there, is damaged, or lacks
    weights, which transformers would draw at random.
    """
    lm, missing = _load(CAUSAL, path, dtype, trust_remote_code, allow_pickle, device)
    _refuse_missing(path, missing)
    return lm


def load_score_model(
    path,
    dtype=torch.float32,
    trust_remote_code=False,
    allow_pickle=False,
    device=None,
    needs_head=True,
):
    """(a model for sequence classification with one label, whether its head was in the files); as
    `load_causal_lm` does it.

    Without `needs_head` a causal language model will do: its body is the same, and its head, which
    transformers has drawn, is for the caller to fill. Raises ValueError besides for a model with
    another number of labels.
    """
    _find(path)
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files raise a dozen types
        raise ValueError(f"cannot load {SCORE.title} from {path}: {_why(path, error)}") from error
    if gives_scores(config) and config.num_labels != 1:
        raise ValueError(f"{path} is no reward model: it has {config.num_labels} outputs, not 1")
    lm, missing = _load(SCORE, path, dtype, trust_remote_code, allow_pickle, device, num_labels=1)
    has_head = "score.weight" not in missing
    if needs_head and not has_head:
        raise ValueError(
            f"{path} is no reward model: it has no score.weight; launch/train_reward.py makes one"
        )
    _refuse_missing(path, [name for name in missing if name != "score.weight"])
    return lm, has_head


def is_wider(path, dtype: torch.dtype, trust_remote_code: bool = False) -> bool:
    """Whether some weight of a model directory or hub name has another type than `dtype`, in whose
    conversion digits are lost; of a directory by its safetensors, else by what it says of itself.
    """
    found = set()
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            found |= {weights.get_slice(name).get_dtype() for name in weights.keys()}
    if found:
        return not found <= {SAFETENSORS_NAMES[dtype], *WITHOUT_DIGITS}
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return config.dtype != dtype


def is_reward_model(path, trust_remote_code: bool = False) -> bool:
    """Whether a model directory or hub name, which has been loaded before, is one that gives scores."""
    return gives_scores(
        transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    )


def gives_scores(config) -> bool:
    """Whether a model of `config` is for sequence classification, by what it says of itself."""
    return any("SequenceClassification" in name for name in config.architectures or ())


def auto_class(config) -> type:
    """The class of transformers that makes a model of `config`."""
    return (SCORE if gives_scores(config) else CAUSAL).auto_class


def _load(kind, path, dtype, trust_remote_code, allow_pickle, device, **options):
    """(a model of a Kind, the names of the weights that were not in its files). Raises ValueError."""
    # Without this, transformers asks a service to convert a repository that has pickles only, in
    # the user's name.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    _find(path)
    try:
        # Where peft is installed, transformers would load the base model that this file names.
        if (Path(path) / "adapter_config.json").is_file():
            raise ValueError(IS_ADAPTER)
        if not allow_pickle:
            _refuse_pickles(path)
        lm, report = kind.auto_class.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            device_map=None if device is None else {"": device},
            **options,
        )
        # an adapter that comes from the hub
        if getattr(lm, "_hf_peft_config_loaded", False):
            raise ValueError(IS_ADAPTER)
    except Exception as error:
        # Configuration, code and weights raise a dozen types, and the cure is the same.
        is_pickle = not allow_pickle and "use_safetensors" in str(error)
        advice = f"; {NO_PICKLES}" if is_pickle else ""
        raise ValueError(
            f"cannot load {kind.title} from {path}: {_why(path, error)}{advice}"
        ) from error
    return lm, sorted(report["missing_keys"])


def _refuse_missing(path, missing):
    """Raise ValueError where weights are missing."""
    if missing:
        names = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise ValueError(f"{path} has no weights for {names}")


def _find(path):
    """Raise ValueError for a folder that is not there; of a hub's name, see whether the hub answers."""
    name = str(path)
    if Path(name).is_dir():
        _refuse_other_folders(Path(name))
        return
    if Path(name).is_file():
        raise ValueError(f"{name} is a file: a model is the directory that it lies in")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise ValueError(f"there is no folder {name}{near_names(name)}")
    hub.settle()


def _refuse_other_folders(folder: Path):
    """Raise ValueError for a folder that holds neither a model nor a tokenizer nor an adapter."""
    if any(folder.glob("*config.json")) or any(folder.glob("*token*")):
        return
    inside = folder / "model"
    is_inside = (inside / "config.json").is_file()
    hint = f": it is {inside}" if is_inside else ": name a model's directory, or a hub name"
    if (folder / "manifest.json").is_file():
        hint = f": it is a checkpoint, of which python launch/export.py {folder} DIR makes a model"
    raise ValueError(f"there is no model in {folder}, which has no config.json{hint}")


def _why(path, error):
    """An error's text on one line; of a name that the hub was not asked for, that."""
    text = " ".join(str(error).split())
    offline = hub.why_offline()
    if not offline or Path(path).is_dir() or "cached files" not in text:
        return text
    return (
        f"there is no such folder{near_names(path)}, and the hub's cache on this machine has no "
        f"model of that name ({offline}); name a folder"
    )


def _refuse_pickles(path):
    """Raise ValueError for a directory whose weights, or some shard of them, are not in safetensors
    files of its own.
    """
    folder = Path(path)
    if not folder.is_dir():
        return  # a hub name: `use_safetensors` sees to it
    names = set()  # the files that transformers would load weights from
    if (index := folder / "model.safetensors.index.json").is_file():
        names |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if (config := folder / "config.json").is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
        names.add(settings.get("transformers_weights") or "model.safetensors")
    if not any(folder.glob("*.safetensors")):
        names |= {file.name for file in folder.iterdir() if file.suffix in PICKLES}
    if pickles := sorted(name for name in names if Path(name).suffix in PICKLES):
        raise ValueError(f"its weights are a pickle, {pickles[0]}: {NO_PICKLES}")
    # an index may name any path
    if outside := sorted(name for name in names if Path(name).name != name):
        raise ValueError(f"{outside[0]} is not a file of its own")
