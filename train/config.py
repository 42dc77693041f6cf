"""How a script's settings, one flat dataclass, become its command line.

The class's docstring is the description, the docstring under each field, its own or inherited, the
help:

    settings = config.parse(Settings)   # --name value, --config recipe.yaml, --print_config, --help

Flags given on the command line override the YAML, wherever `--config` stands. Lists take several
values (`--data a.jsonl b.jsonl`), booleans true or false or nothing (`--deterministic`),
dictionaries `--loss_args.tau 2` or `--loss_args '{tau: 2}'`. `--local_rank N`, which the deepspeed
launcher appends, is ignored.

Imports the standard library and jsonargparse only, so that a script can read its flags, and say
what is wrong with them, before it installs signal handlers and imports torch.
"""

import contextlib
import dataclasses
import difflib
import enum
import inspect
import io
import json
import os
import re
import sys
import types
import typing
from collections import deque
from pathlib import Path

import jsonargparse

LAUNCHER_FLAGS = ("--local_rank", "--local-rank")
PARSER_FLAGS = ("config", "print_config", "help")  # what is there besides the fields
NEGATIVE_NUMBER = re.compile(r"-\.?\d")
# jsonargparse's words for a required flag that is missing
REQUIRED = re.compile(r"following arguments are required: (.*)")
# an address with a user or a signature in it, or a hub token
SECRET = re.compile(r"://\S*[@?]|\bhf_\w{20,}")


class Exit(enum.IntEnum):
    """The exit codes of every script; wrappers and schedulers read them."""

    DONE = 0
    FLAGS = 2
    CHECKPOINT = 3
    DATA = 4
    NONFINITE = 5
    PREEMPTED = 85


def parse(settings_class, argv=None):
    """An instance of the dataclass `settings_class` from `argv` (default: the command line).

    A flag or key that does not exist, a wrong type, an unreadable YAML file, or a ValueError of the
    class's own `__post_init__` prints one line on stderr and exits with Exit.FLAGS.
    """
    parser = _parser(settings_class)
    types_by_name = _field_types(settings_class)
    # one rank is enough to print the help or --print_config
    stdout = sys.stdout if _rank() == 0 else io.StringIO()
    try:
        configs, flags = _normalise(sys.argv[1:] if argv is None else argv, types_by_name)
        for path in configs:
            _check_file(parser, path, settings_class)
        with contextlib.redirect_stdout(stdout):
            # the files first: what is parsed later wins
            values = parser.parse_args([f"--config={path}" for path in configs] + flags)
        settings = settings_class(**{name: values[name] for name in types_by_name})
        _refuse_unwritable(settings)
        return settings
    except jsonargparse.ArgumentError as error:
        fail(f"{_explain(str(error), settings_class)}; see --help")
    except ValueError as error:
        fail(f"{error}; see --help")


def as_dict(settings):
    """The settings as plain JSON-able values: paths as strings, enums as their values, tuples as
    lists.
    """
    return _to_json_types(dataclasses.asdict(settings))


def fail(message, code=Exit.FLAGS):
    """Print `error: message` on stderr and exit with `code`: every rank that calls it exits, only
    rank 0 prints.
    """
    if _rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(int(code))


def _refuse_unwritable(settings):
    """ValueError for a value that must not, or cannot, stand in run.json, logs and model cards."""
    for name, value in as_dict(settings).items():
        text = json.dumps(value, ensure_ascii=False)
        if SECRET.search(text):
            raise ValueError(
                f"--{name} seems to hold a password or a token, and flags are written to run.json: "
                "set HF_TOKEN for the hub, or fetch the file and name it"
            )
        if text != text.encode("utf-8", "replace").decode("utf-8"):
            raise ValueError(f"--{name} is not UTF-8: {value!a}")


def _rank():
    """This process's global rank before anything is initialised: RANK, under a plain srun
    SLURM_PROCID, else 0.
    """
    text = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdigit() else 0


def _to_json_types(value):
    """`value`, and what is in it, as JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): _to_json_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json_types(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _parser(settings_class):
    """A parser with a flag for each field, its help the docstring under the field."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        description=inspect.cleandoc(settings_class.__doc__ or ""),
        usage="%(prog)s [--config recipe.yaml] [--name value ...]",
        # --batch for --batch_size would mean another once there is a --batch_tokens
        allow_abbrev=False,
        exit_on_error=False,  # raise, so that `parse` says it in one line
    )
    parser.add_argument(
        "--config",
        action="config",
        help="a YAML file of flags; those on the command line override it",
    )
    parser.add_class_arguments(settings_class, as_group=False)
    return parser


def _field_types(settings_class):
    """The fields' types by name, without `| None`."""
    hints = typing.get_type_hints(settings_class)
    fields = (f for f in dataclasses.fields(settings_class) if f.init)
    return {f.name: _without_none(hints[f.name]) for f in fields}


def _without_none(hint):
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    return members[0] if _is_union(hint) and len(members) == 1 else hint


def _is_union(hint):
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_list(hint):
    return typing.get_origin(hint) is list


def _normalise(argv, types_by_name):
    """Split `argv` into the paths after --config and the other flags, each written `--name=value`.

    Launcher flags go; a bare boolean becomes true; several values of a list become one; `-1e-6` is
    a value. Raises ArgumentError for a flag that does not exist.
    """
    tokens, configs, flags = deque(argv), [], []
    while tokens:
        token = tokens.popleft()
        flag, equals, value = token.partition("=")
        # --loss_args.tau sets a key of a dictionary, --data+ adds to a list
        name = flag[2:].split(".")[0].removesuffix("+")
        field_type = types_by_name.get(name)
        if flag in LAUNCHER_FLAGS:
            if not equals and tokens and tokens[0].lstrip("-").isdigit():
                tokens.popleft()
        elif not token.startswith("--"):
            flags.append(token)  # -h, or a stray word that the parser refuses
        elif name not in types_by_name and name not in PARSER_FLAGS:
            raise jsonargparse.ArgumentError(
                None, _unknown("flag", name, types_by_name, dashes="--")
            )
        else:
            values = [value] if equals else _take_values(tokens, many=_is_list(field_type))
            if field_type is bool and not values:
                values = ["true"]
            if name == "config" and values:
                configs.append(values[0])
            else:
                flags.append(f"{flag}={_join(values, field_type)}" if values else flag)
    return configs, flags


def _take_values(tokens, many):
    """Take the values that follow a flag off `tokens`: all of them for a list, else at most one."""
    values = []
    while tokens and (many or not values):
        if tokens[0].startswith("-") and not NEGATIVE_NUMBER.match(tokens[0]):
            break  # the next flag
        values.append(tokens.popleft())
    return values


def _join(values, field_type):
    """The values of one flag as one YAML text."""
    if not _is_list(field_type) or (len(values) == 1 and values[0].startswith("[")):
        return values[0]
    # Only strings are quoted: the parser reads the other elements as YAML numbers.
    if typing.get_args(field_type) == (str,):
        values = map(json.dumps, values)
    return f"[{', '.join(values)}]"


def _check_file(parser, path, settings_class):
    """Parse one YAML file alone, so that what is wrong in it is reported with its name; the result
    is not used.
    """
    try:
        parser.parse_path(path, defaults=False)
        return
    except UnicodeDecodeError as error:
        message = f"{path}: not UTF-8: {error.reason} at byte {error.start}"
    except (jsonargparse.ArgumentError, TypeError, OSError) as error:
        if REQUIRED.search(str(error)):
            return  # flags may supply it
        if Path(path).is_file():
            message = f"{path}: {_explain(str(error), settings_class, dashes='')}"
        else:
            message = f"--config {path}: there is no such file"
    raise jsonargparse.ArgumentError(None, message)


def _unknown(what, name, types_by_name, dashes):
    """The message for a flag or key that does not exist, with those it may have meant."""
    names = [*types_by_name, *PARSER_FLAGS]
    near = difflib.get_close_matches(name.replace("-", "_"), names, n=3, cutoff=0.6)
    hint = f" (did you mean {' or '.join(dashes + other for other in near)}?)" if near else ""
    return f"there is no {what} {dashes}{name}{hint}"


def _explain(message, settings_class, dashes="--"):
    """One line for what jsonargparse says in several, with the flag, the type it takes and what was
    given. What matches none of its known messages is passed on, shortened.
    """
    if found := re.search(r"Option '([^']*)' is not accepted", message):
        return _unknown("key", found[1], _field_types(settings_class), dashes)
    if found := re.search(r"argument (--[\w.]+)\S*: expected one argument", message):
        return f"{found[1]} needs a value"
    if found := REQUIRED.search(message):
        return "missing: " + ", ".join(f"--{name}" for name in found[1].split(", "))
    if found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        word = found[1].split(maxsplit=1)[0]
        return f"unexpected argument {word!r}: flags are written --name value"
    key = re.search(r'Parser key "([\w.]+)"', message)
    given = re.search(r"(?:Given|Got) value: (.*)", message, re.DOTALL)
    hints = typing.get_type_hints(settings_class)
    if key and given and (name := key[1].split(".")[0]) in hints:
        return f"{dashes}{key[1]}: expected {_in_words(hints[name])}, got {_shortened(given[1])!r}"
    if message.startswith("Unexpected config"):
        return "expected lines of `key: value`"
    return _shortened(message.replace('in "<unicode string>", ', "at "))


def _in_words(hint):
    """A type as a person writes it: `int or null`, `one of auto, bf16, fp32`."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    if _is_union(hint):
        return " or ".join(map(_in_words, typing.get_args(hint)))
    if hint is type(None):
        return "null"
    if hint is bool:
        return "true or false"
    return hint.__name__ if typing.get_origin(hint) is None else str(hint).replace("typing.", "")


def _shortened(text, limit=200):
    """`text` on one line, cut at `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "..."
