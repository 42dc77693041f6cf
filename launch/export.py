"""A model directory out of a training checkpoint, without the run, its GPUs or DeepSpeed.

    python launch/export.py runs/dpo/checkpoints/step-400 my-model
    python launch/export.py runs/dpo/checkpoints/step-400 my-model --export_dtype bf16

Works for checkpoints of any ZeRO stage and number of ranks; those of LoRA runs hold adapters alone,
which are merged into the model that the run started from. Checked twice: the checkpoint against its
manifest, and the directory, loaded again, against what was to be written.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train.config import (
    Exit,
    fail,
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a step-N directory")
    parser.add_argument("folder", type=Path, help="the model directory to make")
    parser.add_argument(
        "--export_dtype", choices=("fp32", "bf16"), default="fp32", help="type of the weights"
    )
    parser.add_argument(
        "--model", help="the base of LoRA adapters, where it is not where the run had it"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="let the model's own Python code run"
    )
    parser.add_argument(
        "--allow_pickle", action="store_true", help="read the base from a pickle where it is one"
    )
    args = parser.parse_args()
    from train import files
    from train.run import checkpoint_files

    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        fail(f"{args.folder} exists and is not empty; nothing was overwritten", Exit.FLAGS)
    try:
        told = checkpoint_files.read_manifest(args.checkpoint)
        checkpoint_files.verify(args.checkpoint, told["files"], told)
    except checkpoint_files.Damaged as error:
        fail(str(error), Exit.CHECKPOINT)
    beside = args.folder.with_name(args.folder.name + ".tmp")
    if args.model and not told["flags"].get("lora_rank"):
        fail(f"{args.checkpoint} holds a whole model: --model is for adapters", Exit.FLAGS)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        count = write(args.checkpoint, told, beside, args)
    except (ValueError, OSError) as error:
        fail(str(error), Exit.FLAGS)
    if args.folder.exists():
        args.folder.rmdir()
    files.replace_directory(beside, args.folder)
    print(
        f"{args.folder}: the model after step {told['step']}, {count:,} parameters in {args.export_dtype}"
    )


def write(checkpoint, told, folder, args) -> int:
    """Write the model to `folder`, load it again and compare every weight; the number of
    parameters.
    """
    import torch
    import transformers
    from safetensors.torch import load_file

    from train.engine import sharded_state
    from train.run import checkpoint_files, export
    from train.run.checkpoint import rank_file

    read, kept = checkpoint_files.Reader(checkpoint, told), load_file(checkpoint / rank_file(0))
    names = [
        key.removesuffix(f"/{sharded_state.WEIGHT}")
        for key in read.shapes()
        if key.endswith(f"/{sharded_state.WEIGHT}")
    ]
    weights = {name.removeprefix("lm."): read(f"{name}/{sharded_state.WEIGHT}") for name in names}
    if told["flags"].get("lora_rank"):
        lm = adapted(told, weights, kept, args)
        weights = (
            {name: p.detach() for name, p in lm.named_parameters()}
            | sharded_state.buffers(lm)
            | weights
        )
    else:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint / "model", trust_remote_code=args.trust_remote_code
        )
        with torch.device("meta"):
            lm = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=args.trust_remote_code
            )
        lm.load_state_dict(weights, strict=False, assign=True)
        lm.tie_weights()
        if left := [name for name, p in lm.named_parameters() if p.is_meta]:
            fail(f"{checkpoint} has no {left[0]}", Exit.CHECKPOINT)
    buffers = {
        key.removeprefix("buffer/"): value
        for key, value in kept.items()
        if key.startswith("buffer/")
    }
    written = export.weights_to(folder, lm, weights | buffers, export.DTYPES[args.export_dtype])
    for extra in sorted(
        (checkpoint / "model").iterdir()
    ):  # the tokenizer, the settings for generation
        if extra.name != "config.json":
            (folder / extra.name).write_bytes(extra.read_bytes())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", use_safetensors=True, trust_remote_code=args.trust_remote_code
    )
    here, parameters = loaded.state_dict(), dict(loaded.named_parameters())
    same = lambda name: (
        name in written and torch.equal(written[name].to(here[name].dtype), here[name])
    )
    if wrong := [
        name for name in written | parameters | sharded_state.buffers(loaded) if not same(name)
    ]:
        fail(f"{folder}: {wrong[0]} is not what was written")
    return sum(p.numel() for p in parameters.values())


def adapted(told, trained, kept, args):
    """The base model of a LoRA run, in fp32, with adapters that are not the run's yet. ValueError:
    it is another.
    """
    import torch

    from train.engine import ds_config, sharded_state
    from train.models import builtin, lora, pretrained

    flags, held = told["flags"], ds_config.weight_dtype(told["stage"], told["precision"])
    try:
        path = args.model or flags["model"] or builtin.fetch(say=print)
        lm = pretrained.load_causal_lm(
            path, held, args.trust_remote_code, args.allow_pickle
        ).float()
    except (ValueError, builtin.ModelUnavailable) as error:
        raise ValueError(f"{error}; --model names the model that the run started from") from error
    lora.add(lm, flags["lora_rank"], flags["lora_alpha"], flags["lora_targets"])
    shapes, here = (
        {name: p.shape for name, p in lm.named_parameters() if p.requires_grad},
        sharded_state.unchanged_state(lm),
    )
    same = lambda key, value: (
        key in here and torch.equal(here[key][: len(value)], value[: len(here[key])])
    )
    begins = {key: value for key, value in kept.items() if key.startswith("frozen/")}
    if shapes != {name: p.shape for name, p in trained.items()} or not all(
        same(*item) for item in begins.items()
    ):
        raise ValueError(f"{path} is not the base of these adapters: --model names it")
    return lm


if __name__ == "__main__":
    main()
