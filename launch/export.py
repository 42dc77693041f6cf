"""A model directory out of a training checkpoint, without the run, its GPUs or DeepSpeed.

    python launch/export.py runs/dpo/checkpoints/step-400 my-model
    python launch/export.py runs/dpo/checkpoints/step-400 my-model --export_dtype bf16

Works for checkpoints of any ZeRO stage and number of ranks. Checked twice: the checkpoint against its manifest, and the
directory, loaded again, against the checkpoint.
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
    args = parser.parse_args()
    from train.engine import export, files

    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        fail(f"{args.folder} exists and is not empty; nothing was overwritten", Exit.FLAGS)
    try:
        told = files.manifest(args.checkpoint)
        files.check(args.checkpoint, told["files"], told)
    except files.Damaged as error:
        fail(str(error), Exit.CHECKPOINT)
    if told["flags"].get("lora_rank"):
        fail(f"{args.checkpoint} holds adapters alone: the run itself exports them with the base model", Exit.FLAGS)
    beside = args.folder.with_name(args.folder.name + ".tmp")
    count = write(args.checkpoint, told, beside, args.export_dtype)
    if args.folder.exists():
        args.folder.rmdir()
    export.replace(beside, args.folder)
    print(f"{args.folder}: the model after step {told['step']}, {count:,} parameters in {args.export_dtype}")


def write(checkpoint, told, folder, kind) -> int:
    """Write the model to `folder`, load it again and compare every weight; the number of parameters."""
    import torch
    import transformers

    from train.engine import files, state
    from train.engine.export import DTYPES

    read = files.Reader(checkpoint, told)
    config = transformers.AutoConfig.from_pretrained(checkpoint / "model")
    with torch.device("meta"):
        lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    names = [key.removesuffix(f"/{state.WEIGHT}") for key in read.shapes() if key.endswith(f"/{state.WEIGHT}")]
    weights = {name.removeprefix("lm."): read(f"{name}/{state.WEIGHT}").to(DTYPES[kind]) for name in names}
    lm.load_state_dict(weights, strict=False, assign=True)
    lm.tie_weights()
    if left := [name for name, p in lm.named_parameters() if p.is_meta]:
        fail(f"{checkpoint} has no {left[0]}", Exit.CHECKPOINT)
    lm.save_pretrained(folder, state_dict=weights, max_shard_size="4GB")
    for extra in sorted((checkpoint / "model").iterdir()):
        if not (folder / extra.name).exists():
            (folder / extra.name).write_bytes(extra.read_bytes())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    again = dict(loaded.named_parameters())
    if wrong := [name for name, value in weights.items() if not torch.equal(again[name], value)]:
        fail(f"{folder}: {wrong[0]} is not what was written")
    return sum(p.numel() for p in again.values())


if __name__ == "__main__":
    main()
