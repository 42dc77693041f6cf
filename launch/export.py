"""A model directory out of a training checkpoint, without the run, its GPUs or DeepSpeed.

    python launch/export.py runs/dpo/checkpoints/step-400 my-model
    python launch/export.py runs/dpo/checkpoints/step-400 my-model --export_dtype bf16
    python launch/export.py runs/dpo/checkpoints/step-400 my-model --push_to_hub org/my-model

Works for checkpoints of any ZeRO stage and number of ranks; those of LoRA runs hold adapters alone,
which are merged into the model that the run started from. Checked twice: the checkpoint against its
manifest, and the directory, loaded again, against what was to be written. What stands in a checkpoint
is told in train/run/checkpoint.py.
"""

import argparse
import difflib
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train import hub, quiet
from train.config import Exit, fail, named
from train.files import near_names


def main():
    args = read_arguments()
    quiet.silence_libraries()
    # torch takes seconds to import: --help and a wrong flag are answered before that
    from train import files
    from train.run import checkpoint_files, checkpoint_model, export

    refuse_other_folders(args.checkpoint)
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        fail(f"{args.folder} exists and is not empty; nothing was overwritten", Exit.FLAGS)
    if args.hub_public and not args.push_to_hub:
        fail("--hub_public changes nothing without --push_to_hub")
    if args.push_to_hub:
        try:
            warning = hub.check_upload(args.push_to_hub, args.hub_public)
        except ValueError as error:
            fail(str(error))
        if warning:
            print(f"warning: --push_to_hub {args.push_to_hub} is not checked: {warning}")
    unfinished = args.folder.with_name(args.folder.name + ".tmp")
    try:
        args.folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {args.folder}: {error.strerror}; choose another folder")
    try:
        manifest = checkpoint_files.read_manifest(args.checkpoint)
        checkpoint_files.verify(args.checkpoint, manifest["files"], manifest)
        has_adapters = bool(manifest["flags"].get("lora_rank"))
        if args.model and not has_adapters:
            raise ValueError(f"{args.checkpoint} holds a whole model: --model is for adapters")
        shutil.rmtree(unfinished, ignore_errors=True)
        weights = checkpoint_model.read_weights(args.checkpoint, manifest)
        if has_adapters:
            lm, state = checkpoint_model.base_of_adapters(
                args.checkpoint,
                manifest,
                weights,
                args.model,
                args.trust_remote_code,
                args.allow_pickle,
            )
        else:
            lm, state = checkpoint_model.whole_model(
                args.checkpoint, manifest, weights, args.trust_remote_code
            )
        count = checkpoint_model.write(
            unfinished,
            args.checkpoint,
            manifest,
            lm,
            state,
            dtype=export.DTYPES[args.export_dtype],
            trust_remote_code=args.trust_remote_code,
        )
    except checkpoint_files.Damaged as error:
        fail(str(error), Exit.CHECKPOINT)
    except (ValueError, OSError) as error:
        fail(str(error), Exit.FLAGS)
    if args.folder.exists():
        args.folder.rmdir()
    files.replace_directory(unfinished, args.folder)
    print(
        f"{args.folder}: the model after step {manifest['step']}, {count:,} parameters in "
        f"{args.export_dtype}"
    )
    if args.push_to_hub:
        push(args)


def push(args: argparse.Namespace):
    """Upload the directory, or exit with the command that does it later."""
    try:
        print(hub.upload(args.folder, args.push_to_hub, args.hub_public))
    except Exception as error:  # the client has dozens of types
        later = hub.upload_command(args.folder, args.push_to_hub, args.hub_public)
        fail(f"{args.folder} was not uploaded ({named(error)}); later: {later}", Exit.HUB)


def refuse_other_folders(checkpoint: Path):
    """Exit where that is no checkpoint, with one that may be meant."""
    if (checkpoint / "manifest.json").is_file():
        return
    if not checkpoint.is_dir():
        why = f"there is no folder {checkpoint}{near_names(checkpoint)}"
    else:
        why = f"{checkpoint} is no checkpoint: it has no manifest.json"
    run = checkpoint.parent if checkpoint.name in ("model", "checkpoints") else checkpoint
    there = sorted(
        run.glob("checkpoints/step-*/manifest.json"), key=lambda path: path.stat().st_mtime
    )
    hint = f"the newest there is {there[-1].parent}" if there else "they lie in OUTPUT/checkpoints"
    fail(f"{why}; {hint}", Exit.CHECKPOINT)


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, with the nearest flag."""

    def error(self, message):
        """Exit with the line."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        wrong = message.rpartition("unrecognized arguments: ")[2].split()[0]
        near = difflib.get_close_matches(wrong, flags, 1) if wrong.startswith("-") else []
        hint = f" (did you mean {near[0]}?)" if near else ""
        fail(f"{message}{hint}; expected: export.py CHECKPOINT FOLDER [flags], see --help")


def read_arguments() -> argparse.Namespace:
    """The command line, or an exit with what is wrong with it."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, help="a step-N directory")
    parser.add_argument("folder", type=Path, help="the model directory to make")
    parser.add_argument(
        "--export_dtype", choices=("fp32", "bf16"), default="fp32", help="type of the weights"
    )
    parser.add_argument(
        "--model",
        type=os.path.expanduser,
        help="the base of LoRA adapters, where it is not where the run had it",
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="let the model's own Python code run"
    )
    parser.add_argument(
        "--allow_pickle", action="store_true", help="read the base from a pickle where it is one"
    )
    parser.add_argument(
        "--push_to_hub", metavar="ORG/NAME", help="upload the directory to the model hub, too"
    )
    parser.add_argument(
        "--hub_public", action="store_true", help="everybody may see it there; else it is private"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
