"""A model directory out of a training checkpoint, without the run, its GPUs or DeepSpeed.

    python launch/export.py runs/dpo/checkpoints/step-400 my-model
    python launch/export.py runs/dpo/checkpoints/step-400 my-model --export_dtype bf16

Works for checkpoints of any ZeRO stage and number of ranks; those of LoRA runs hold adapters alone,
which are merged into the model that the run started from. Checked twice: the checkpoint against its
manifest, and the directory, loaded again, against what was to be written. What stands in a checkpoint
is told in train/run/checkpoint.py.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train.config import Exit, fail

PART = "policy"  # of a checkpoint: the trained model's name in the script's state


def main():
    args = read_arguments()
    # torch takes seconds to import: --help and a wrong flag are answered before that
    from train import files
    from train.run import checkpoint_files

    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        fail(f"{args.folder} exists and is not empty; nothing was overwritten", Exit.FLAGS)
    try:
        manifest = checkpoint_files.read_manifest(args.checkpoint)
        checkpoint_files.verify(args.checkpoint, manifest["files"], manifest)
    except checkpoint_files.Damaged as error:
        fail(str(error), Exit.CHECKPOINT)
    if args.model and not manifest["flags"].get("lora_rank"):
        fail(f"{args.checkpoint} holds a whole model: --model is for adapters", Exit.FLAGS)
    unfinished = args.folder.with_name(args.folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        count = write(args, manifest, unfinished)
    except (ValueError, OSError) as error:
        fail(str(error), Exit.FLAGS)
    if args.folder.exists():
        args.folder.rmdir()
    files.replace_directory(unfinished, args.folder)
    print(
        f"{args.folder}: the model after step {manifest['step']}, {count:,} parameters in "
        f"{args.export_dtype}"
    )


def read_arguments():
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
    return parser.parse_args()


def write(args, manifest, folder) -> int:
    """Write the model to `folder`, load it again and compare every weight; the number of parameters."""
    import torch
    import transformers

    from train.engine import sharded_state
    from train.run import export

    trained, untrained = read_weights(args.checkpoint, manifest)
    buffers = {
        name.removeprefix("buffer/"): value
        for name, value in untrained.items()
        if name.startswith("buffer/")
    }
    outline = args.checkpoint / PART
    if manifest["flags"].get("lora_rank"):
        lm = base_with_adapters(args, manifest, trained, untrained)
        base = {name: p.detach() for name, p in lm.named_parameters()}
        weights = base | sharded_state.buffers(lm) | trained
    else:
        config = transformers.AutoConfig.from_pretrained(
            outline, trust_remote_code=args.trust_remote_code
        )
        with torch.device("meta"):
            lm = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=args.trust_remote_code
            )
        weights = trained
        lm.load_state_dict(weights, strict=False, assign=True)
        lm.tie_weights()
        if missing := [name for name, p in lm.named_parameters() if p.is_meta]:
            fail(f"{args.checkpoint} has no {missing[0]}", Exit.CHECKPOINT)
    dtype = export.DTYPES[args.export_dtype]
    written = export.write_weights(folder, lm, weights | buffers, dtype)
    for path in sorted(outline.iterdir()):  # the tokenizer, the settings for generation
        if path.name != "config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    return compare(folder, written, args.trust_remote_code)


def compare(folder, written: dict, trust_remote_code: bool) -> int:
    """Load the directory and compare it with what was to be written; the number of parameters."""
    import torch
    import transformers

    from train.engine import sharded_state

    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
    )
    state, parameters = loaded.state_dict(), dict(loaded.named_parameters())
    for name in written | parameters | sharded_state.buffers(loaded):
        if name not in written or not torch.equal(written[name].to(state[name].dtype), state[name]):
            fail(f"{folder}: {name} is not what was written")
    return sum(p.numel() for p in parameters.values())


def read_weights(checkpoint, manifest) -> tuple[dict, dict]:
    """The trained weights by their names in the causal LM, fp32, and what training left as it is."""
    from safetensors.torch import load_file

    from train.engine.sharded_state import WEIGHT
    from train.run.checkpoint import rank_file
    from train.run.checkpoint_files import Reader

    read = Reader(checkpoint, manifest)
    prefix, suffix = f"{PART}/lm.", f"/{WEIGHT}"
    trained = {
        key.removeprefix(prefix).removesuffix(suffix): read(key)
        for key in read.shapes()
        if key.startswith(prefix) and key.endswith(suffix)
    }
    of_rank = load_file(checkpoint / rank_file(0))
    prefix = f"{PART}/"
    untrained = {
        key.removeprefix(prefix): value for key, value in of_rank.items() if key.startswith(prefix)
    }
    return trained, untrained


def base_with_adapters(args, manifest, trained, untrained):
    """The base model of a LoRA run, in fp32, with adapters that are not the run's yet.

    ValueError where it is another than the run's base.
    """
    import torch

    from train.engine import ds_config, sharded_state
    from train.models import builtin, lora, pretrained

    flags, stage = manifest["flags"], manifest["parts"][PART]["stage"]
    dtype = ds_config.weight_dtype(stage, manifest["precision"])
    try:
        path = args.model or flags["model"] or builtin.fetch(say=print)
        lm = pretrained.load_causal_lm(path, dtype, args.trust_remote_code, args.allow_pickle)
    except (ValueError, builtin.ModelUnavailable) as error:
        raise ValueError(f"{error}; --model names the model that the run started from") from error
    lm = lm.float()
    lora.add(lm, flags["lora_rank"], flags["lora_alpha"], flags["lora_targets"])

    ours = sharded_state.untrained_state(lm)

    def agrees(key):
        """Whether a frozen weight begins as the run's did, as far as both go."""
        kept, own = untrained[key], ours.get(key)
        return own is not None and torch.equal(own[: len(kept)], kept[: len(own)])

    shapes = {name: p.shape for name, p in lm.named_parameters() if p.requires_grad}
    same_shapes = shapes == {name: value.shape for name, value in trained.items()}
    frozen = [key for key in untrained if key.startswith("frozen/")]
    if not same_shapes or not all(agrees(key) for key in frozen):
        raise ValueError(f"{path} is not the base of these adapters: --model names it")
    return lm


if __name__ == "__main__":
    main()
