"""Check a model and preference pairs before a run, on any machine: no GPU, no weight is loaded.

    python launch/validate.py --model DIR --data pairs.jsonl > report.json
    python launch/validate.py --data a.jsonl b.parquet --eval_split 0.05 --output report.json
    python launch/validate.py --model DIR --data pairs.jsonl --show 3
    python launch/validate.py --model DIR --data pairs.jsonl --show 3 --json > rows.jsonl
    python launch/validate.py --model DIR --data pairs.jsonl --trainer reward --margin scores

Takes training's flags that concern data and does what a run does at its door, by the same
functions: reads every row, renders and tokenises it, and compares the model's configuration with
the token ids in use. The tokens are kept, so that a run with the same flags finds them. The report
is JSON on stdout; what is wrong is said in one line on stderr, what is worth knowing in some more.

--show N prints rows in place of the report: the first N, and each further one that is cut or
dropped, with text, token ids, where a response begins, which tokens are scored, and the end token
(train/data/show.py explains the keys of --json).

Exit codes: 0 usable, 2 flags, tokenizer or model, 4 data.
"""

import collections
import dataclasses
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Flags are read before torch and transformers are imported, which takes seconds.
from train import config
from train.settings import Data, Needs, Scored, check_bounds, flag, shares, sources, token_options

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)


@dataclasses.dataclass
class Settings(Scored, Data):
    """Check a model and preference pairs for training; writes a JSON report to stdout."""

    used_most: ClassVar = """model data columns trainer show output max_length max_prompt_length
        eval_data eval_split"""

    trainer: Literal["dpo", "reward"] = "dpo"
    """Which script is to train on it: launch/train_dpo.py; or launch/train_reward.py, which reads
    margins and scores too, and texts to the end of what the template renders.
    """
    output: str | None = None
    """A file for the report, besides stdout."""
    show: int | None = None
    """Print the first N rows, and any that are cut or dropped, as text and token ids in place of
    the report.
    """
    json: bool = flag(False, needs=Needs("show", but=(None,)))
    """Print the rows of --show as JSON lines."""

    def __post_init__(self, given):
        super().__post_init__(given)
        check_bounds(self, {"show": 0})


def main():
    settings = config.parse(Settings)
    from train import quiet

    quiet.silence_libraries()  # before the libraries that it quiets
    from train.models import builtin
    from train.run import session

    report = {"verdict": "refused", "reason": None, "flags": config.as_dict(settings)}
    with session.refusals():
        try:
            examine(settings, report)
            report["verdict"] = "usable"
        except (ValueError, OSError, builtin.ModelUnavailable) as error:
            report["reason"] = str(error)
            raise
        finally:
            text = json.dumps(report, indent=2)
            if settings.show is None:
                print(text, flush=True)
            if settings.output:
                write_report(settings.output, text + "\n")


def write_report(path: str, text: str):
    """Write the file, and its folder where it is not there. Raises ValueError."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"cannot write to --output {path}: {error.strerror}; choose another file"
        ) from error


def examine(settings, report):
    """Add what is found to `report`, as far as one gets. Raises ValueError for flags and model,
    DataError for data.
    """
    from train.data import chat, dataset, mixing, tokens
    from train.models import builtin, pretrained

    if settings.adapted:
        print(settings.adapted, file=sys.stderr)
    path = settings.model or str(builtin.fetch(say=partial(print, file=sys.stderr)))
    tokenizer = pretrained.load_tokenizer(path, settings.trust_remote_code)
    chat.use_template(tokenizer, settings.chat_template)
    lm_config = model_config(path, settings.trust_remote_code)
    chat.check_fit(lm_config, tokenizer, settings.max_length)
    end_id = chat.Chat(tokenizer).end_id
    data_sources, eval_sources = sources(settings)
    # The held-out data are of the same kind.
    is_reward = settings.trainer == "reward"
    if is_reward:
        kind = tokens.kind_of_scores(data_sources, columns=settings.columns, margin=settings.margin)
    else:
        kind = tokens.kind_of(data_sources, columns=settings.columns)
    parts = {}
    for name, named in {"data": data_sources, "eval_data": eval_sources}.items():
        if named:
            parts[name] = tokens.collect(
                named,
                tokenizer,
                **token_options(settings),
                kind=kind,
                keep_tail=is_reward,
                shares=shares(settings) if name == "data" else (),
            )
            report[name] = describe(parts[name], named)
            for note in parts[name].notes():
                print(f"{name}: {note}", file=sys.stderr)
            if settings.show is not None:
                print_rows(tokenizer, end_id, parts[name], named, settings)
    chat.check_fit(lm_config, tokenizer, settings.max_length, parts.values())
    for part in parts.values():
        tokens.refuse_too_many(part, settings.max_dropped, settings.max_implausible)
    if settings.eval_split and not eval_sources:
        parts["data"], parts["eval_data"] = dataset.split_by_prompt(
            parts["data"], settings.eval_split, settings.data_split_seed
        )
        report["split"] = {"train": len(parts["data"]), "held_out": len(parts["eval_data"])}
    mix = mixing.mix_of(parts["data"])
    for line in mix.lines():
        print(f"data: {line}", file=sys.stderr)
    report["data"]["by_source"] = mix.described()
    if "eval_data" in parts:
        train_prompts, held_out_prompts = (
            set(parts[name].prompts.tolist()) for name in ("data", "eval_data")
        )
        report["held_out_by_source"] = mixing.by_source(parts["eval_data"])
        report["prompts_in_both"] = len(train_prompts & held_out_prompts)


def model_config(path, trust_remote_code):
    """The model's configuration. Raises ValueError."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a dozen types, and the cure is the same
        raise ValueError(
            f"cannot load the configuration of {path}: {' '.join(str(error).split())}"
        ) from error


def print_rows(tokenizer, end_id, data, named, settings):
    """Print the first rows of one data set, and each further one that is cut or dropped, in the
    order of the data.
    """
    from train.data import show, sources

    names = answers_of(data)
    cut = data.truncated.any(axis=1)
    usable = {data.place(i): i for i in range(len(data))}
    dropped = {(each.source, each.row): each for each in data.dropped}
    is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for number, (source, row, content) in enumerate(sources.read_rows(named)):
        place = (source, row)
        if place in dropped:
            record = show.dropped_record(dropped[place], content, names)
        elif number < settings.show or cut[usable[place]]:
            record = show.record(tokenizer, data, usable[place], end_id)
        else:
            continue
        print(json.dumps(record) if settings.json else show.as_text(record, is_coloured))
    sys.stdout.flush()


def describe(data, named) -> dict:
    """What the report says of one data set, a `Tokenised`, and the sources as the user named them."""
    count, dropped = len(data), len(data.dropped)
    names = ("prompt", *answers_of(data))
    prompts = len(set(data.prompts.tolist()))
    cut = dict(zip(names, data.truncated.sum(0).tolist(), strict=True))
    sizes = {name: quantiles(column) for name, column in zip(names, data.lengths.T, strict=True)}
    found = {
        "sources": named,
        "rows": count + dropped,
        "usable": count,
        "dropped": dropped,
        "dropped_reasons": dict(
            collections.Counter(d.reason for d in data.dropped).most_common(20)
        ),
        "dropped_rows": [d._asdict() for d in data.dropped],
        "truncated": {"pairs": int(data.truncated.any(1).sum()), **cut},
        "duplicates": count - len({fingerprint(data, i) for i in range(count)}),
        "prompts": {"distinct": prompts, "repeats": count - prompts},
        "tokens": {**sizes, "pair": quantiles(data.lengths.sum(1)), "all": int(data.lengths.sum())},
        "notes": data.notes(),
        "fingerprint": data.fingerprint,
    }
    if data.targets is not None:
        found["targets"] = quantiles(data.targets, float)
    return found


def answers_of(data) -> tuple[str, ...]:
    """What a row calls its answers."""
    return ("chosen", "rejected") if data.lengths.shape[1] == 3 else ("completion",)


def fingerprint(data, i) -> bytes:
    """Equal for two pairs of the same tokens."""
    start, lengths = data.offsets[i], data.lengths[i]
    return hashlib.sha256(
        lengths.tobytes() + data.ids[start : start + lengths.sum()].tobytes()
    ).digest()


def quantiles(found, kind=int) -> dict | None:
    """What stands at each share of the pairs, tokens say; values that occur, none in between. None
    without any.
    """
    import numpy as np  # not at the top: see there

    if not len(found):
        return None
    values = np.quantile(found, QUANTILES, method="inverted_cdf")
    value_at = {f"{share:g}": kind(value) for share, value in zip(QUANTILES, values, strict=True)}
    mean = float(found.mean())
    return value_at | {"mean": round(mean, 1) if kind is int else mean}


if __name__ == "__main__":
    main()
