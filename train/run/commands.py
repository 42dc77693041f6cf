"""The commands that a run names when it is done: complete, and to be typed where it was started."""

import os
import shlex
import sys
from pathlib import Path

from train.files import ROOT
from train.settings import Data, Policy, defaults

EVALUATE, PPO = "eval/evaluate.py", "launch/train_ppo.py"
INSTALLED = {EVALUATE: "zeropref-evaluate", PPO: "zeropref-ppo"}  # a wheel's names (setup.cfg)
NEW_TOKENS = Policy.max_new_tokens  # by default, and by evaluation's
LENGTH, PROMPT_LENGTH = Data.max_length, Data.max_prompt_length  # by default
# flags by which another run reads the same rows
DATA = ("data", "columns", "eval_data", "eval_split", "data_split_seed", "truncate_prompt",
        "allow_control_tokens", "allow_template_changes", "max_dropped", "max_implausible")  # fmt: skip


def deepspeed(script: str, flags: dict) -> str:
    """`deepspeed SCRIPT --flag value ...`, quoted for a shell.

    script: its path in the repository; the wheel's command of that name beside one that is running.
    Flags that are None, False or empty are left out, True stands alone, lists become several words.
    """
    running, path = Path(sys.argv[0]), ROOT / script
    if running.name.startswith("zeropref-"):
        path = running.with_name(INSTALLED[script])
    relative = os.path.relpath(path)
    words = ["deepspeed", str(path) if relative.startswith("..") else relative]
    for name, value in flags.items():
        if value is None or value is False or value == []:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def tensorboard(folder: Path) -> str:
    """The command that shows the curves in `folder`."""
    here = os.path.relpath(folder)
    return shlex.join(["tensorboard", "--logdir", str(folder) if here.startswith("..") else here])


def evaluation(settings, folder: Path, config, **models) -> str:
    """The evaluation of a language model that a run has made.

    config: of the model. models: the flags that name models.
    """
    flags = models | {"output": folder / "eval"} | trust(settings)
    return deepspeed(EVALUATE, flags | _room(settings, config))


def trust(settings) -> dict:
    """The flags without which the run's own model cannot be opened."""
    return {
        "trust_remote_code": settings.trust_remote_code,
        "allow_pickle": settings.allow_pickle,
    }


def same_data(settings) -> dict:
    """The flags by which another run reads the same rows, as far as they are not the defaults."""
    by_default = defaults(settings)
    wanted = {name: getattr(settings, name) for name in DATA}
    return {name: value for name, value in wanted.items() if value != by_default[name]}


def _room(settings, config) -> dict:
    """The flags that answers need where the model has no positions for evaluation's default."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return {}
    room = most - (settings.max_prompt_length or settings.max_length)
    if room < 1:
        return {"prompts": 0}
    wanted = getattr(settings, "max_new_tokens", NEW_TOKENS)
    fits = min(room, wanted)
    return {"max_new_tokens": fits} if fits != NEW_TOKENS else {}


def lengths_of_rollouts(settings) -> dict:
    """--max_length, --max_prompt_length and --max_new_tokens of train_ppo.py that fit the lengths of
    another run, as far as they are not the defaults.
    """
    longest = settings.max_length
    new_tokens = max(1, min(NEW_TOKENS, longest // 2))
    prompt = min(settings.max_prompt_length or longest, longest - new_tokens)
    wanted = {
        "max_length": (longest, LENGTH),
        "max_prompt_length": (prompt, PROMPT_LENGTH),
        "max_new_tokens": (new_tokens, NEW_TOKENS),
    }
    return {name: value for name, (value, default) in wanted.items() if value != default}
