"""A model directory out of a training checkpoint, without the run, its GPUs or DeepSpeed.

    python launch/export.py runs/dpo/checkpoints/step-400 my-model
    python launch/export.py runs/dpo/checkpoints/step-400 my-model --export_dtype bf16

Works for checkpoints of any ZeRO stage and number of ranks; those of LoRA runs hold adapters alone, which are merged
into the model that the run started from. Checked twice: the checkpoint against its manifest, and the directory, loaded
again, against what was to be written.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train.config import Exit, fail  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a step-N directory")
    parser.add_argument("folder", type=Path, help="the model directory to make")
    parser.add_argument("--export_dtype", choices=("fp32", "bf16"), default="fp32", help="type of the weights")
    parser.add_argument("--model", help="the base of LoRA adapters, where it is not where the run had it")
    args = parser.parse_args()
    from train.engine import export, files

    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        fail(f"{args.folder} exists and is not empty; nothing was overwritten", Exit.FLAGS)
    try:
        told = files.manifest(args.checkpoint)
        files.check(args.checkpoint, told["files"], told)
    except files.Damaged as error:
        fail(str(error), Exit.CHECKPOINT)
    beside = args.folder.with_name(args.folder.name + ".tmp")
    count = write(args.checkpoint, told, beside, args.export_dtype, args.model)
    if args.folder.exists():
        args.folder.rmdir()
    export.replace(beside, args.folder)
    print(f"{args.folder}: the model after step {told['step']}, {count:,} parameters in {args.export_dtype}")


def write(checkpoint, told, folder, kind, model=None) -> int:
    """Write the model to `folder`, load it again and compare every weight; the number of parameters."""
    import torch
    import transformers

    from train.engine import export, files, state

    read = files.Reader(checkpoint, told)
    names = [key.removesuffix(f"/{state.WEIGHT}") for key in read.shapes() if key.endswith(f"/{state.WEIGHT}")]
    weights = {name.removeprefix("lm."): read(f"{name}/{state.WEIGHT}") for name in names}
    if told["flags"].get("lora_rank"):
        lm, weights = adapted(checkpoint, told["flags"], weights, model)
    else:
        config = transformers.AutoConfig.from_pretrained(checkpoint / "model")
        with torch.device("meta"):
            lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        lm.load_state_dict(weights, strict=False, assign=True)
        lm.tie_weights()
        if left := [name for name, p in lm.named_parameters() if p.is_meta]:
            fail(f"{checkpoint} has no {left[0]}", Exit.CHECKPOINT)
    written = export.weights_to(folder, lm, weights, export.DTYPES[kind])
    for extra in sorted((checkpoint / "model").iterdir()):  # the tokenizer, the settings for generation
        if extra.name != "config.json":
            (folder / extra.name).write_bytes(extra.read_bytes())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    again = dict(loaded.named_parameters())
    if wrong := [name for name, p in again.items() if not torch.equal(written[name], p)]:
        fail(f"{folder}: {wrong[0]} is not what was written")
    return sum(p.numel() for p in again.values())


def adapted(checkpoint, flags, trained, model):
    """The base model of a LoRA run with its adapters, and all weights by name, those in `trained` as they were."""
    import torch

    from train.models import adapters, backbone, builtin

    path = model or flags["model"] or builtin.fetch(say=print)
    try:
        lm = backbone.load(path, torch.float32, flags["trust_remote_code"], flags["allow_pickle"])
        adapters.add(lm, flags["lora_rank"], flags["lora_alpha"], flags["lora_targets"])
    except ValueError as error:
        fail(f"{error}; adapters need the model that the run started from: --model names it", Exit.FLAGS)
    here = {name: p.detach() for name, p in lm.named_parameters()}
    shapes = lambda named: {name: tuple(p.shape) for name, p in named.items() if ".lora_" in name}
    if shapes(here) != shapes(trained):
        fail(f"{path} is not the base of the adapters in {checkpoint}: --model names it", Exit.FLAGS)
    return lm, here | trained


if __name__ == "__main__":
    main()
