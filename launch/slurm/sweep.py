"""The combinations of values that a sweep runs.

    python launch/slurm/sweep.py count values.yaml launch/train_dpo.py --config recipe.yaml    # 6
    python launch/slurm/sweep.py 4 values.yaml launch/train_dpo.py --config recipe.yaml   # number
    4's flags

values.yaml maps flags to lists of values, of which all combinations are made, the last flag
changing fastest; or it is a list of mappings from flags to a value. Flags end in a NUL, so that a
shell reads values with blanks whole; the last one is `--output`, a folder in the script's own with
the values in its name.
"""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import yaml


def main(which, path, *command):
    try:
        runs = combinations(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        folders = [folder_of(run) for run in runs]
        if twice := [folder for folder in folders if folders.count(folder) > 1]:
            raise ValueError(f"two combinations would write to {twice[0]}")
        if which == "count":
            return print(len(runs))
        if int(which) >= len(runs):
            raise ValueError(f"there are {len(runs)} combinations, no number {which}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.exit(f"error: sweep of {path}: {error}")
    output = Path(output_of(command)) / folders[int(which)]
    sys.stdout.write(
        "".join(
            f"--{flag}={value}\0" for flag, value in (runs[int(which)] | {"output": output}).items()
        )
    )


def combinations(values) -> list[dict[str, str]]:
    """What each run sets, as the text of a flag's value; ValueError where `values` has neither of
    the two shapes.
    """
    if isinstance(values, dict) and all(isinstance(choices, list) for choices in values.values()):
        values = [
            dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
        ]
    if (
        not isinstance(values, list)
        or not values
        or not all(isinstance(run, dict) and run for run in values)
    ):
        raise ValueError("expected lines of `flag: [values]`, or a list of `{flag: value}`")
    if no := [
        f
        for run in values
        for f in run
        if not re.fullmatch(r"[A-Za-z][\w.]*", str(f)) or f == "output"
    ]:
        raise ValueError(f"{no[0]!r} is not a flag to sweep")
    return [
        {k: v if isinstance(v, str) else json.dumps(v) for k, v in run.items()} for run in values
    ]


def folder_of(run: dict[str, str]) -> str:
    """A name for a combination that cannot leave its folder: letters, digits and `.+-_`, flags and
    values only.
    """
    return "_".join(re.sub(r"[^\w.+-]+", "-", f"{name}-{value}") for name, value in run.items())


def output_of(command) -> str:
    """The --output that a script has settled on, from its flags, its recipe or its default."""
    shown = subprocess.run(
        [sys.executable, *command, "--print_config"], stdout=subprocess.PIPE, text=True
    )
    return (
        yaml.safe_load(shown.stdout)["output"]
        if shown.returncode == 0
        else sys.exit(shown.returncode)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
