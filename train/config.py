"""How a script's settings, one flat dataclass, become its command line.

The class's docstring is the description, the docstring under each field, its own or inherited, the
help:

    settings = config.parse(Settings)   # --name value, --config recipe.yaml, --print_config, --help

Flags given on the command line override the YAML, wherever `--config` stands. Lists take several
values (`--data a.jsonl b.jsonl`), booleans true or false or nothing (`--deterministic`),
dictionaries `--loss_args.tau 2` or `--loss_args '{tau: 2}'`. `--local_rank N`, which the deepspeed
launcher appends, is ignored. A flag that was given and changes nothing is refused, by the `needs`
of its field (train/settings.py: flag); a name of another trainer's is refused with ours
(train/other_trainers.py).

Imports the standard library, jsonargparse and the YAML that it reads with, so that a script can
read its flags, and say what is wrong with them, before it installs signal handlers and imports
torch.
"""

import contextlib
import dataclasses
import difflib
import enum
import functools
import inspect
import io
import json
import math
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from collections import deque
from pathlib import Path

import jsonargparse
import yaml

from train import other_trainers
from train.files import ROOT, near_names, shipped

LAUNCHER_FLAGS = ("--local_rank", "--local-rank")
PARSER_FLAGS = ("config", "print_config", "help")  # what is there besides the fields
PARSER_HELP = (
    "  --config FILE     a YAML file of flags; those on the command line override it",
    "  --print_config    print all flags, and what they come to, as such a file",
    "  -h, --help        this",
)
MOST_NAMED = 20  # of what does not exist
NEGATIVE_NUMBER = re.compile(r"-\.?\d")
# YAML's names for types, and those as which it may read what was meant as a text
TAG = "tag:yaml.org,2002:"
READ_OTHERWISE = [TAG + kind for kind in ("bool", "int", "float", "timestamp")]
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
    HUB = 6  # of launch/export.py: the directory is there, and not on the hub
    PREEMPTED = 85
    INTERRUPTED = 130  # by Ctrl-C, as shells say it


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
        paths, flags, given = _normalise(sys.argv[1:] if argv is None else argv, types_by_name)
        files = [_read_file(parser, path, settings_class) for path in paths]
        # the files first: what is parsed later wins
        configs = [f"--config={json.dumps(values, default=str)}" for values in files if values]
        to_print = [flag for flag in flags if flag.partition("=")[0] == "--print_config"]
        with contextlib.redirect_stdout(stdout):
            values = parser.parse_args(configs + [flag for flag in flags if flag not in to_print])
        values = {name: _with_home(values[name]) for name in types_by_name}
        _refuse_nothing(settings_class, values)
        given |= _changed(settings_class, values, {name for each in files for name in each})
        if "given" in inspect.signature(settings_class).parameters:
            settings = settings_class(**values, given=frozenset(given))
        else:
            settings = settings_class(**values)
        _refuse_unwritable(settings)
        _refuse_idle(settings, given)
        if to_print:
            print(_as_recipe(settings), end="", file=stdout)
            raise SystemExit(int(Exit.DONE))
        return settings
    except jsonargparse.ArgumentError as error:
        fail(f"{_explain(str(error), settings_class)}; see --help")
    except ValueError as error:
        is_recipe = "\n" in str(error)  # a whole translation, which stands for itself
        fail(str(error) if is_recipe else f"{error}; see --help")


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


def named(error: BaseException) -> str:
    """An error's type and the beginning of what it says, in one line."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _with_home(value):
    """`value` with the user's home folder for a ~ that it begins with, or each of a list's, which a
    shell replaces in `--output ~/runs`, and not in `--output=~/runs` or a file.
    """
    if isinstance(value, list):
        return [_with_home(item) for item in value]
    begins = isinstance(value, str) and value.startswith("~")
    return os.path.expanduser(value) if begins else value


def _refuse_nothing(settings_class, values: dict):
    """ValueError for a flag that has a null, as `key:` in a file is one, and needs a value."""
    hints = typing.get_type_hints(settings_class)
    for name, value in values.items():
        if value is None and type(None) not in typing.get_args(hints[name]):
            raise ValueError(
                f"--{name}: expected {_in_words(hints[name])}, got nothing: leave it out for the default"
            )


def _refuse_unwritable(settings):
    """ValueError for a value that must not, or cannot, stand in run.json, logs and model cards."""
    for name, value in as_dict(settings).items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"--{name} {value} is beyond 64 bits: choose one of at most 18 digits")
        text = json.dumps(value, ensure_ascii=False)
        if SECRET.search(text):
            raise ValueError(
                f"--{name} seems to hold a password or a token, and flags are written to run.json: "
                "set HF_TOKEN for the hub, or fetch the file and name it"
            )
        if text != text.encode("utf-8", "replace").decode("utf-8"):
            raise ValueError(f"--{name} is not UTF-8: {value!a}")


def _changed(settings_class, values: dict, names: set[str]) -> set[str]:
    """Those of a file's names that have another value than the default, or than what a None comes to:
    --print_config writes those, too, and they ask for nothing.
    """
    found = set()
    for field in dataclasses.fields(settings_class):
        name, default = field.name, _default(field)
        if name in names and values[name] != default:
            as_if_unset = types.SimpleNamespace(**values | {name: default})
            resolved = _resolved(settings_class, as_if_unset)
            if name not in resolved or values[name] != resolved[name]:
                found.add(name)
    return found


def _resolved(settings_class, flags) -> dict:
    """What flags that are None come to, by name, where the class says so."""
    return settings_class.resolve(flags) if hasattr(settings_class, "resolve") else {}


def _as_recipe(settings) -> str:
    """All flags and their values as a YAML file; what a None comes to is marked."""
    resolved = _to_json_types(_resolved(type(settings), settings))
    values = as_dict(settings) | resolved
    lines = []
    for name, value in values.items():
        text = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=math.inf)
        first, *rest = text.splitlines()
        lines += [f"{first}  # null comes to this" if name in resolved else first, *rest]
    return "\n".join(lines) + "\n"


def _default(field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _refuse_idle(settings, given: set[str]):
    """ValueError for a flag that was given and changes nothing, by its field's `needs`. 0, false and
    nothing ask for nothing where they are the default.
    """
    for field in dataclasses.fields(settings):
        asks_nothing = not getattr(settings, field.name) and not _default(field)
        if asks_nothing or field.name not in given:
            continue
        for need in field.metadata.get("needs", ()):
            if not need.holds(settings):
                raise ValueError(f"--{field.name} changes nothing {need.words(settings)}")


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


class _Parser(jsonargparse.ArgumentParser):
    """A parser whose help is short and in groups: those of the class's `help_groups`, after what it
    calls `used_most`, both names of fields in one string.
    """

    settings_class = None

    def format_help(self):
        fields = {f.name: f for f in dataclasses.fields(self.settings_class)}
        groups = {"used most": getattr(self.settings_class, "used_most", "")}
        groups |= getattr(self.settings_class, "help_groups", {})
        rest = set(fields).difference(*(names.split() for names in groups.values()))
        groups["flags"] = " ".join(name for name in fields if name in rest)
        lines = [f"usage: {self.prog} [--config recipe.yaml] [--name value ...]", ""]
        lines.append(self.description)
        shown = set()
        for title, names in groups.items():
            names = [name for name in names.split() if name in fields and name not in shown]
            shown.update(names)
            if names:
                lines += ["", f"{title}:"]
            for name in names:
                lines += self._explained(fields[name])
        return "\n".join([*lines, "", "help:", *PARSER_HELP]) + "\n"

    def _explained(self, field) -> list[str]:
        """The lines on one flag: what it takes, its docstring, its default."""
        (action,) = (each for each in self._actions if each.dest == field.name)
        hint = _field_types(self.settings_class).get(field.name)
        text, default = " ".join((action.help or "").split()), _to_json_types(_default(field))
        if field.default is not dataclasses.MISSING and default is not None:
            default = default if isinstance(default, str) else json.dumps(default)
            default = default.removeprefix(f"{ROOT}/")  # as the pages name it
            text += f" (default: {default})"
        width = min(shutil.get_terminal_size().columns, 100)
        wrapped = textwrap.wrap(text, width - 8, break_on_hyphens=False, break_long_words=False)
        return [f"  --{field.name} {_taken(hint)}", *(f"        {line}" for line in wrapped)]


def _taken(hint) -> str:
    """What a flag takes, for its help: its choices, or a word for the type."""
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if _is_list(hint):
        return f"{_taken(typing.get_args(hint)[0])} ..."
    if _is_union(hint):
        return "|".join(map(_taken, typing.get_args(hint)))
    words = {bool: "{true,false}", int: "N", float: "X", str: "TEXT", dict: "'{key: value}'"}
    return words.get(typing.get_origin(hint) or hint, "VALUE")


@functools.cache
def _parser(settings_class):
    """A parser with a flag for each field, its help the docstring under the field."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        description=inspect.cleandoc(settings_class.__doc__ or ""),
        # --batch for --batch_size would mean another once there is a --batch_tokens
        allow_abbrev=False,
        exit_on_error=False,  # raise, so that `parse` says it in one line
    )
    parser.settings_class = settings_class
    parser.add_argument("--config", action="config")
    # `given` is `parse`'s own
    parser.add_class_arguments(settings_class, as_group=False, skip={"given"})
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


def _is_text(hint):
    """Whether a flag takes a text, or texts."""
    if _is_list(hint):
        hint = typing.get_args(hint)[0]
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    return hint is str or (bool(choices) and all(isinstance(choice, str) for choice in choices))


def _normalise(argv, types_by_name):
    """Split `argv` into the paths after --config, the other flags, each written `--name=value`, and
    the set of their names.

    Launcher flags go; a bare boolean becomes true; several values of a list become one; `-1e-6` is
    a value. ValueError names all flags that do not exist.
    """
    tokens, configs, flags, given, unknown = deque(argv), [], [], set(), []
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
            unknown.append(name)
            if not equals:
                _take_values(tokens, many=True)
        else:
            values = [value] if equals else _take_values(tokens, many=_is_list(field_type))
            if field_type is bool and not values:
                values = ["true"]
            if name == "config" and values:
                configs.append(values[0])
            else:
                given.add(name)
                flags.append(f"{flag}={_join(values, field_type)}" if values else flag)
    if unknown:
        raise ValueError(_unknown("flag", unknown, types_by_name, "--"))
    return configs, flags, given


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
    is_whole = len(values) == 1 and (values[0].startswith("[") or values[0] == "null")
    if not _is_list(field_type) or is_whole:
        return values[0]
    # Only strings are quoted: the parser reads the other elements as YAML numbers.
    if typing.get_args(field_type) == (str,):
        values = map(json.dumps, values)
    return f"[{', '.join(values)}]"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which YAML's own would take the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} stands twice: keep one", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _keep_texts(root: yaml.Node | None, types_by_name):
    """Let what a flag takes as a text be the text that stands there, where YAML reads a number, a date
    or a boolean: `output: 2026-11-26`, `compile: off`. What is true or false stays so: it is a mistake.
    """
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        name = key.value if isinstance(key, yaml.ScalarNode) else ""
        if _is_text(types_by_name.get(name)):
            for node in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                is_boolean = str(node.value).lower() in ("true", "false")
                if node.tag in READ_OTHERWISE and not is_boolean:
                    node.tag = TAG + "str"


def _read_file(parser, path, settings_class) -> dict:
    """The flags of a YAML file, with one value of a list as a list of one. ValueError names the
    file and all that is wrong in it.
    """
    types_by_name = _field_types(settings_class)

    def refuse(message):
        raise ValueError(f"{path}: {message}")

    if Path(path).suffix in (".jsonl", ".csv", ".parquet"):
        refuse("rows of data: pass it as --data")
    try:
        loader = _Loader(shipped(path).read_text(encoding="utf-8"))
        node = loader.get_single_node()
        _keep_texts(node, types_by_name)
        found = None if node is None else loader.construct_document(node)
    except UnicodeDecodeError as error:
        refuse(f"not UTF-8: {error.reason} at byte {error.start}")
    except FileNotFoundError as error:
        raise ValueError(f"--config {path}: there is no such file{near_names(path)}") from error
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        refuse(f"{where}{getattr(error, 'problem', None) or _shortened(str(error))}")
    if found is None:  # an empty file, or comments
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        refuse("expected lines of `key: value`")
    if other := next(
        (found_as for key, found_as in other_trainers.OTHER_FILES.items() if key in found), None
    ):
        refuse(other)
    if other_trainers.is_recipe(found, types_by_name):
        lines = other_trainers.recipe(found, types_by_name)
        refuse("written for another trainer; here it reads\n" + "\n".join(lines))
    values, problems, unknown = {}, [], []
    for key, value in found.items():
        name, _, inner = key.partition(".")  # loss_args.tau: 2
        if name not in types_by_name:
            unknown.append(key)
            continue
        if _is_list(types_by_name[name]) and value is not None and not isinstance(value, list):
            value = [value]
        value = {inner: value} if inner else value
        try:
            parser.parse_object({name: value}, defaults=False)
        except (jsonargparse.ArgumentError, TypeError) as error:
            if not REQUIRED.search(str(error)):  # flags may supply it
                problems.append(_explain(str(error), settings_class, dashes=""))
        both_nested = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = values[name] | value if both_nested else value
    if unknown:
        problems.insert(0, _unknown("key", unknown, types_by_name, ""))
    if problems:
        refuse("; ".join(problems))
    return values


def _unknown(what, names, types_by_name, dashes):
    """The message for flags or keys that do not exist, with what to write in their place."""
    known = [*types_by_name, *PARSER_FLAGS] if dashes else list(types_by_name)
    said = []
    for name in map(_shortened, names[:MOST_NAMED]):
        hint = other_trainers.hint(name, types_by_name, dashes)
        plain = name.replace("-", "_")
        begun = [other for other in known if plain and other.startswith(f"{plain}_")]
        near = begun or difflib.get_close_matches(plain, known, n=2, cutoff=0.6)
        if hint:
            hint = f": {hint}"
        elif near:
            hint = f" (did you mean {' or '.join(dashes + other for other in near)}?)"
        said.append(f"there is no {what} {dashes}{name}{hint}")
    if len(names) > MOST_NAMED:
        said.append(f"and {len(names) - MOST_NAMED} more")
    return "; ".join(said)


def _explain(message, settings_class, dashes="--"):
    """One line for what jsonargparse says in several, with the flag, the type it takes and what was
    given. What matches none of its known messages is passed on, shortened.
    """
    if found := re.search(r"argument (--[\w.]+)\S*: expected one argument", message):
        return f"{found[1]} needs a value"
    if found := REQUIRED.search(message):
        return "missing: " + ", ".join(f"--{name}" for name in found[1].split(", "))
    if found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        word = found[1].split(maxsplit=1)[0]
        return f"unexpected argument {word!r}: flags are written --name value"
    key = re.search(r'Parser key "([\w.]+)"', message)
    given = re.search(r"(?:Given|Got) value: (.*)", message)  # of one type; others follow below
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
    if _is_list(hint) and typing.get_origin(typing.get_args(hint)[0]) is typing.Literal:
        return "some of " + ", ".join(map(str, typing.get_args(typing.get_args(hint)[0])))
    if _is_union(hint):
        return " or ".join(map(_in_words, typing.get_args(hint)))
    if hint is type(None):
        return "null"
    if hint is bool:
        return "true or false"
    if typing.get_origin(hint) is dict:
        return "{name: value}"
    return hint.__name__ if typing.get_origin(hint) is None else str(hint).replace("typing.", "")


def _shortened(text, limit=200):
    """`text` on one line, cut at `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "..."
