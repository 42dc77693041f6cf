"""What an evaluation starts from: the settings of the model's training, pairs, texts, two
tokenizers that agree.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train import config
from train.data import tokens
from train.data.rows import PAIR_COLUMNS, DataError, Dropped, check_pair
from train.engine import dist
from train.models import pretrained
from train.run import card
from train.settings import Preference, inherited_defaults

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ROOT / "train/data/builtin/held_out.jsonl"
PASSAGES = ROOT / "eval/passages.jsonl"
# Spelt as people say it; the hub's full name, and the split that is made for evaluation.
KNOWN_TEXTS = dict.fromkeys(
    ("wikitext", "wikitext-2-raw-v1"), "Salesforce/wikitext:wikitext-2-raw-v1@test"
)
# Flags of training that an evaluation takes over, and what holds where there is no run.json.
INHERITED = inherited_defaults(Preference)
PROBES = 64  # texts that both tokenizers must split alike


class Inputs(NamedTuple):
    """What is evaluated, and on what."""

    path: str  # the model's directory or hub name
    record: dict  # its run.json, {} where there is none
    recipe: dict  # see `recipe`
    tokenizer: Any
    pairs: Any  # train.data.tokens.Tokenised
    texts: Any  # train.data.tokens.Tokenised, without prompts
    answers: tuple[list[str], list[str]]  # chosen and rejected as text, as `pairs`
    prompts: list  # of eval.generations.Prompt: those that are to be answered
    described: dict  # both data sets, for the report


class Models(NamedTuple):
    """The models under evaluation: train.methods.reference.Live each."""

    model: Any
    reference: Any  # None where there is none
    judge: Any  # eval.generations.RewardModel, or None
    sharded: bool  # over the ranks: scored like others, but not decoded
    budget: int  # tokens a packed row
    facts: dict  # of the machine, for the report

    @property
    def by_name(self) -> dict:
        """The model, then its reference where there is one."""
        return {"model": self.model} | ({"reference": self.reference} if self.reference else {})


def training_record(model: str | None) -> tuple[dict, str | None]:
    """What training wrote beside a model directory (MODEL/../run.json, as OUTPUT/model has it) or
    in it, and where.
    """
    for folder in (
        (Path(model).resolve().parent, Path(model).resolve())
        if model and Path(model).is_dir()
        else ()
    ):
        path = folder / "run.json"
        if not path.is_file():
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if isinstance(record, dict) and "beta" in (record.get("flags") or {}):
            return record, f"{folder.name}/run.json"
    return {}, None


def recipe(settings, record: dict, where: str | None) -> dict:
    """INHERITED, each from a flag, else from training's record, else the default; the ZeRO stage;
    where it is from.
    """
    trained = record.get("flags", {})
    if "precision" in record:
        trained = trained | {"precision": record["precision"]}  # what "auto" came to
    names = [f.name for f in dataclasses.fields(settings) if f.name in INHERITED]
    found = {name: trained.get(name, INHERITED[name]) for name in names}
    given = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    stage = record.get("deepspeed", {}).get("zero_optimization", {}).get("stage", 0)
    return found | given | {"stage": stage, "from": where}


def shown_flags(settings) -> dict:
    """The settings for the report, which others read: of local paths the end, and not where it was
    written.
    """
    found = config.as_dict(settings)
    for name in ("model", "reference", "reward_model", "ds_config", "data", "ood"):
        value = found[name]
        found[name] = (
            list(map(card.shown, value)) if isinstance(value, list) else value and card.shown(value)
        )
    return {name: value for name, value in found.items() if name != "output"}


def trained(record: dict) -> dict | None:
    """What the report says of the training that made the model; None where there is no record of
    it.
    """
    if not record:
        return None
    flags = record["flags"]
    return {
        "from": card.base_of(record)[0],
        "loss": flags.get("loss"),
        "beta": flags["beta"],
        "lr": flags.get("lr"),
        "steps": record.get("steps"),
        "batch_size": flags.get("batch_size"),
        "pairs": (record.get("data") or {}).get("groups"),
        "data": card.shown_sources(record.get("data")),
        "reference": card.shown(record["reference_model"])
        if record.get("reference_model")
        else None,
    }


def read_pairs(settings, recipe: dict, tokenizer):
    """The pairs, tokenised, and their sources."""
    sources = settings.data or [str(PAIRS)]
    data = tokens.prepare(
        sources,
        tokenizer,
        max_length=recipe["max_length"],
        max_prompt_length=recipe["max_prompt_length"],
        max_dropped=settings.max_dropped,
        allow_control_tokens=recipe["allow_control_tokens"],
    )
    return data.select(range(min(len(data), settings.max_rows or len(data)))), sources


def pair_texts(data, sources) -> tuple[list[str], list[str]]:
    """The chosen and the rejected answers of the tokenised pairs as text."""
    rows, _ = tokens.check_rows(sources, check_pair, PAIR_COLUMNS)
    answers = {row.number: row.item[1:] for row in rows}
    return tuple(map(list, zip(*(answers[number] for number in data.rows.tolist()), strict=True)))


def read_texts(settings, recipe: dict, tokenizer, folder: Path):
    """The texts, tokenised, and their sources as the user named them. Texts of fewer than two
    tokens are dropped.
    """
    named = settings.ood or [str(PASSAGES)]
    sources = [_as_rows(source, folder) for source in named]
    data = tokens.prepare(
        sources,
        tokenizer,
        kind="text",
        max_length=recipe["max_length"],
        max_dropped=1.0,
        allow_control_tokens=recipe["allow_control_tokens"],
    )
    long_enough = data.lengths[:, 1] > 1
    dropped = [dataclasses.replace(d) if dataclasses.is_dataclass(d) else d for d in data.dropped]
    dropped += [
        Dropped(", ".join(named), int(number), "one token: there is nothing to predict")
        for number in data.rows[~long_enough]
    ]
    if not long_enough.any():
        raise DataError(f"{', '.join(named)}: no text of two tokens or more in {len(dropped)} rows")
    kept = np.flatnonzero(long_enough)[: settings.max_rows]
    data = dataclasses.replace(data.select(kept), dropped=dropped)
    return _first_tokens(data, settings.ood_tokens), named


def _as_rows(source: str, folder: Path) -> str:
    """A source as tokens.prepare reads it: a .txt file becomes one row a paragraph, in `folder`."""
    if source in KNOWN_TEXTS and not Path(source).exists():
        return KNOWN_TEXTS[source]
    if not source.endswith(".txt"):
        return source
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: not UTF-8 at byte {error.start}: 0x{error.object[error.start]:02x}"
        ) from error
    paragraphs = [part.strip() for part in text.replace("\r\n", "\n").split("\n\n") if part.strip()]
    if not paragraphs:
        raise DataError(f"{source}: no text in it")
    path = folder / f"{Path(source).stem}.jsonl"
    if dist.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps({"text": part}) + "\n" for part in paragraphs), encoding="utf-8"
        )
    return str(path)


def _first_tokens(data, most: int | None):
    """The first texts with `most` tokens in all, the last one cut to fit (a stump of one token
    goes).
    """
    if most is None or data.lengths.sum() <= most:
        return data
    before = np.cumsum(data.lengths[:, 1]) - data.lengths[:, 1]
    kept = data.select(np.flatnonzero(before < most - 1))
    lengths = kept.lengths.copy()
    lengths[-1, 1] = min(lengths[-1, 1], most - before[len(kept) - 1])
    return dataclasses.replace(kept, lengths=lengths)


def same_tokens(tokenizer, path: str, texts: list[str], trust_remote_code: bool):
    """ValueError where the model at `path` reads other token ids than `tokenizer`: the two would
    not compare.
    """
    other = pretrained.load_tokenizer(path, trust_remote_code)
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    problem = None
    if ours != theirs:
        odd = sorted(set(ours.items()) ^ set(theirs.items()))
        problem = (
            f"{len(ours):,} against {len(theirs):,} tokens, of which {odd[0][0]!r} is not the same"
        )
    else:
        split = lambda one, text: one.encode(text, add_special_tokens=False)
        differing = [
            text for text in texts[:PROBES] if split(tokenizer, text) != split(other, text)
        ]
        if differing:
            problem = f"{differing[0][:60]!r} is split otherwise"
    if problem:
        raise ValueError(
            f"the tokenizer of --reference {path} is not --model's ({problem}): the two cannot be compared"
        )
