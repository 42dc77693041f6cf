"""What an evaluation starts from: the settings of the model's training, a tokenizer that the
reference shares, pairs, texts and prompts.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from eval import generations, held_out
from train import config
from train.data import prompts as data_prompts
from train.data import tokens
from train.data.dataset import Tokenised
from train.data.errors import DataError
from train.data.rows import PAIR_COLUMNS, Dropped, check_pair
from train.engine import dist
from train.methods import setup
from train.methods.rewards import Prompt, prompts_of
from train.models import pretrained
from train.run import card, folder
from train.settings import Preference, inherited_defaults, token_options

ROOT = Path(__file__).resolve().parent.parent
PASSAGES = ROOT / "eval/passages.jsonl"
# Texts as people say their names -> the hub's full name, with the split that is made for evaluation.
KNOWN_TEXTS = dict.fromkeys(
    ("wikitext", "wikitext-2-raw-v1"), "Salesforce/wikitext:wikitext-2-raw-v1@test"
)
# Flags of training that an evaluation takes over, and what holds where there is no run.json.
INHERITED = inherited_defaults(Preference)
NAMES_OF_PLACES = ("model", "reference", "reward_model", "ds_config", "data", "ood")  # flags


class Inputs(NamedTuple):
    """What is evaluated, and on what."""

    path: str  # the model's directory or hub name
    record: dict  # its run.json, {} where there is none
    recipe: dict  # see `recipe_of`
    tokenizer: PreTrainedTokenizerBase
    pairs: Tokenised
    texts: Tokenised  # without prompts
    chosen: list[str]  # the answers of `pairs` as text
    rejected: list[str]
    prompts: list[Prompt]  # those that are to be answered
    described: dict  # both data sets, for the report


def open_inputs(settings, run) -> Inputs:
    """Read everything but the models' weights. Every rank calls this.

    run: the evaluation's train.run.folder.RunFolder. DataError, or ValueError for what flags name.
    """
    record, where = training_record(settings.model)
    recipe = recipe_of(settings, record, where)
    path = run.model_path(settings.model)
    tokenizer = pretrained.load_tokenizer(path, settings.trust_remote_code)
    run.note(model=path, reference_model=settings.reference, recipe=recipe)
    chosen_rows = held_out.choose(settings, record, check_pair)
    text_sources = settings.ood or [str(PASSAGES)]
    with dist.main_process_first():  # rank 0 tokenises, the others find it in the cache
        all_pairs = read_pairs(chosen_rows, tokenizer, recipe)
        pairs = first_rows(all_pairs, settings.max_rows)
        texts = read_texts(
            text_sources, tokenizer, recipe, folder=run.path / "texts", most=settings.max_rows
        )
        texts = first_tokens(texts, settings.ood_tokens)
    run.note_dropped({"data": pairs.dropped, "ood": texts.dropped})
    which = chosen_rows.said(all_pairs)
    run.say(f"data: {which}: {', '.join(map(str, chosen_rows.sources))}, {len(pairs):,} pairs")
    for note in pairs.notes():
        run.say(f"data: {note}")
    chosen, rejected = texts_of_pairs(pairs, chosen_rows)
    if settings.reference:
        setup.check_same_tokens(
            tokenizer,
            settings.reference,
            [pairs],
            "--reference",
            settings.trust_remote_code,
            run.say,
        )
    described = {
        "data": folder.describe(pairs, chosen_rows.sources) | {"which": which},
        "ood": folder.describe(texts, text_sources),
    }
    described["ood"]["begin_with"] = beginning(tokenizer, texts)
    prompts = []
    if settings.prompts:
        prompts, of_prompts = prompts_to_answer(
            settings, record, tokenizer, recipe, pairs, chosen_rows
        )
        if of_prompts:
            described["prompts"] = of_prompts
            run.say(f"prompts: {of_prompts['which']}: {', '.join(of_prompts['sources'])}")
    run.note(**described)
    return Inputs(
        path=path,
        record=record,
        recipe=recipe,
        tokenizer=tokenizer,
        pairs=pairs,
        texts=texts,
        chosen=chosen,
        rejected=rejected,
        prompts=prompts,
        described=described,
    )


def training_record(model: str | None, task: str = "preference") -> tuple[dict, str | None]:
    """What training wrote beside a model directory (MODEL/../run.json, as OUTPUT/model has it) or
    in it, and where; ({}, None) where there is nothing. task: "reward", or "preference", which
    stands for all that makes a language model.
    """
    if not model or not Path(model).is_dir():
        return {}, None
    directory = Path(model).resolve()
    for place in (directory.parent, directory):
        path = place / "run.json"
        if not path.is_file():
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if not isinstance(record, dict) or not record.get("flags"):
            continue
        found = record.get("task")
        is_language = found == "policy" or (found != "reward" and "beta" in record["flags"])
        if found == "reward" if task == "reward" else is_language:
            return record, f"{place.name}/run.json"
    return {}, None


def recipe_of(settings, record: dict, where: str | None, inherited: dict | None = None) -> dict:
    """The values of `inherited` (None: INHERITED), each from a flag, else from training's record,
    else the default there; with the ZeRO stage of the training, and where the record is from.
    """
    inherited = INHERITED if inherited is None else inherited
    trained_with = record.get("flags", {})
    if "precision" in record:
        trained_with = trained_with | {"precision": record["precision"]}  # what "auto" came to
    recipe = {}
    # in the order of evaluation's own flags
    for name in (f.name for f in dataclasses.fields(settings) if f.name in inherited):
        flag = getattr(settings, name)
        recipe[name] = trained_with.get(name, inherited[name]) if flag is None else flag
    stage = record.get("deepspeed", {}).get("zero_optimization", {}).get("stage", 0)
    return recipe | {"stage": stage, "from": where}


def shown_flags(settings) -> dict:
    """The settings for the report, which others read: of local paths the end, and not where it was
    written.
    """
    flags = config.as_dict(settings)
    del flags["output"]
    for name in NAMES_OF_PLACES:
        if isinstance(flags[name], list):
            flags[name] = [card.shown(source) for source in flags[name]]
        elif flags[name]:
            flags[name] = card.shown(flags[name])
    return flags


def trained(record: dict) -> dict | None:
    """What the report says of the training that made the model; None where there is no record of
    it.
    """
    if not record:
        return None
    flags, reference = record["flags"], record.get("reference_model")
    return {
        "from": card.base_of(record)[0],
        "loss": flags.get("loss"),
        **({"algorithm": flags["algorithm"]} if "algorithm" in flags else {}),
        "beta": flags.get("beta"),
        "lr": flags.get("lr"),
        "steps": record.get("steps"),
        "batch_size": flags.get("batch_size"),
        "pairs": (record.get("data") or {}).get("groups"),
        "data": card.shown_sources(record.get("data")),
        "reference": card.shown(reference) if reference else None,
        **_earned(record),
    }


def _earned(record: dict) -> dict:
    """What held-out prompts earned before and after training for rewards; {} for other training."""
    evaluations = record.get("evaluations") or {}
    if "algorithm" not in record["flags"] or len(evaluations) < 2:
        return {}
    steps = sorted(evaluations, key=int)
    first, last = evaluations[steps[0]], evaluations[steps[-1]]
    if "reward" not in first or "reward" not in last:  # no reward applied
        return {}
    return {
        "earned": {
            "rewards": record["rewards"],
            "prompts": last["pairs"],
            "before": first["reward"],
            "after": {"value": last["reward"], "interval": last.get("reward_interval")},
        }
    }


def read_pairs(rows: held_out.Rows, tokenizer, recipe: dict, **options) -> Tokenised:
    """The pairs of `rows`, tokenised. options: more of train.data.tokens.collect."""
    data = tokens.prepare(
        rows.sources,
        tokenizer,
        max_implausible=recipe["max_implausible"],
        **reading(rows, recipe),
        **options,
    )
    return rows.held_out(data)


def reading(rows: held_out.Rows, recipe: dict) -> dict:
    """How `rows` are read as tokens, as train.data.tokens.collect takes it."""
    flags = SimpleNamespace(**recipe, columns=rows.columns)
    return token_options(flags) | {"max_dropped": rows.max_dropped}


def first_rows(data: Tokenised, most: int | None) -> Tokenised:
    """The first `most` groups; all of them for None."""
    return data if most is None or most >= len(data) else data.select(range(most))


def texts_of_pairs(data: Tokenised, rows: held_out.Rows) -> tuple[list[str], list[str]]:
    """The chosen and the rejected answers of the tokenised pairs as text."""
    checked, _ = tokens.check_rows(rows.sources, check_pair, PAIR_COLUMNS, columns=rows.columns)
    items = {row.number: row.item for row in checked}
    pairs = [items[number] for number in data.rows.tolist()]
    return [pair.chosen["content"] for pair in pairs], [pair.rejected["content"] for pair in pairs]


def prompts_to_answer(
    settings, record: dict, tokenizer, recipe: dict, pairs: Tokenised, rows: held_out.Rows
) -> tuple[list[Prompt], dict | None]:
    """The first distinct prompts of the pairs, and None; or, of a policy whose training held out
    prompts without answers, the first of those, and what the report says of them.
    """
    if not settings.data and record.get("task") == "policy" and not rows.is_own:
        own, _ = held_out.of_run(settings, record)
        if own:
            found = data_prompts.prepare(own.sources, tokenizer, **reading(own, recipe))
            if own.split:
                found = found.split(*own.split)[1]
            which = own.said(found.data)
            found = dataclasses.replace(found, data=first_rows(found.data, settings.prompts))
            described = folder.describe(found.data, own.sources) | {"which": which}
            return prompts_of(found), described
    prompts = generations.prompts_of(rows.sources, pairs, settings.prompts, columns=rows.columns)
    return prompts, None


def read_texts(
    sources: list[str], tokenizer, recipe: dict, *, folder: Path, most: int | None
) -> Tokenised:
    """The first `most` texts, tokenised. Those in which nothing is predicted are dropped: of one
    token, where the tokenizer begins its texts with none of its own.

    folder: where .txt files are written as rows.
    """
    data = tokens.prepare(
        [_as_rows(source, folder) for source in sources],
        tokenizer,
        kind="text",
        max_length=recipe["max_length"],
        max_dropped=1.0,  # of text there is plenty
        allow_control_tokens=recipe["allow_control_tokens"],
    )
    named = ", ".join(sources)
    # The prompt of a text is what the tokenizer begins texts with: bos, or nothing.
    long_enough = data.lengths.sum(axis=1) > 1  # (N,)
    dropped = list(data.dropped)
    for number in data.rows[~long_enough]:
        dropped.append(Dropped(named, int(number), "one token: there is nothing to predict"))
    if not long_enough.any():
        raise DataError(f"{named}: no text of two tokens or more in {len(dropped)} rows")
    return dataclasses.replace(data.select(np.flatnonzero(long_enough)[:most]), dropped=dropped)


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
        lines = "".join(json.dumps({"text": part}) + "\n" for part in paragraphs)
        path.write_text(lines, encoding="utf-8")
    return str(path)


def first_tokens(data: Tokenised, most: int | None) -> Tokenised:
    """The first texts with `most` tokens in all, the last one cut to fit; where that would leave
    one token of it, it goes, as there is nothing to predict.
    """
    if most is None or data.lengths[:, 1].sum() <= most:
        return data
    before = np.cumsum(data.lengths[:, 1]) - data.lengths[:, 1]  # (N,) tokens before each text
    texts = data.select(np.flatnonzero(before < most - 1))
    lengths = texts.lengths.copy()  # (n, 2): of the prompt (bos, or nothing) and of the text
    lengths[-1, 1] = min(lengths[-1, 1], most - before[len(texts) - 1])
    return dataclasses.replace(texts, lengths=lengths)


def beginning(tokenizer, texts: Tokenised) -> str | None:
    """What the tokenizer puts before each of the texts of its own accord; None: nothing."""
    ids = texts.group(0).prompt
    return tokenizer.decode(list(ids)) if ids else None
