"""What an evaluation comes to: the report's content and the tables of rows, and everything that is
written of them. Rank 0 alone calls what is in here.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from eval import baselines, board, distribution, figures, preferences, report
from eval.generations import MODES, Generated
from eval.inputs import Inputs, shown_flags, trained
from eval.models import Models
from eval.scores import Scores
from eval.verdict import verdict
from train.files import write_json
from train.models import builtin
from train.run import card


class Results(NamedTuple):
    """What the models made of the inputs."""

    names: list[str]  # of the models, in the scores' order
    pairs: Scores
    texts: Scores
    generated: Generated
    seconds: float  # wall-clock time of loading and scoring, for the report


def measure(
    settings, inputs: Inputs, models: Models, results: Results, loss_of
) -> tuple[dict, dict]:
    """(the content of report.json, {table: {column: values}}).

    loss_of: what train.losses.composition.choose gives for the recipe's loss.
    """
    of_preferences, pair_columns = preferences.measure(
        results.pairs, inputs.recipe["beta"], loss_of
    )
    of_baselines, more_columns = baselines.measure(
        inputs.chosen, inputs.rejected, pair_columns["prompt"], pair_columns["correct"]
    )
    of_text, text_columns = distribution.measure(results.pairs, results.texts, results.names)
    of_answers = results.generated.report
    tables = {"pairs": pair_columns | more_columns, "texts": text_columns}
    if rows := results.generated.rows:
        tables["generations"] = {name: [row[name] for row in rows] for name in rows[0]}
    described = {
        name: {**facts, "sources": [card.shown(source) for source in facts["sources"]]}
        for name, facts in inputs.described.items()
    }
    content = {
        "model": card.shown(settings.model or builtin.REPOSITORY),
        "reference": settings.reference and card.shown(settings.reference),
        "trained": trained(inputs.record),
        "recipe": inputs.recipe,
        **described,
        "verdict": verdict(
            of_preferences, of_baselines, of_text, of_answers, unchanged=_unchanged(results)
        ),
        "preferences": of_preferences,
        "baselines": of_baselines,
        "distribution": of_text,
        "generations": of_answers,
        "run": models.facts | {"flags": shown_flags(settings), "seconds_scoring": results.seconds},
    }
    return plain(content), tables


def _unchanged(results: Results) -> bool:
    """Whether model and reference give every scored token the same log-probability."""
    scores = (results.pairs, results.texts)
    return all(len(s.tokens) == 2 and (s.tokens[0] == s.tokens[1]).all() for s in scores)


def plain(thing):
    """The same with plain Python numbers, and null for what is not a number: JSON has no NaN."""
    if isinstance(thing, dict):
        return {str(key): plain(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [plain(value) for value in thing]
    if isinstance(thing, np.generic):
        thing = thing.item()
    return None if isinstance(thing, float) and not math.isfinite(thing) else thing


def write(settings, run, inputs: Inputs, content: dict, tables: dict, results: Results):
    """Write everything in --output and the model's card, then say where it lies."""
    folder, generated = run.path, results.generated
    drawn = figures.draw(folder / "figures", content, tables["pairs"])
    write_json(folder / "report.json", content)
    (folder / "report.md").write_text(report.markdown(content, drawn), encoding="utf-8")
    for name, columns in tables.items():
        parquet(folder / f"{name}.parquet", columns)
    histograms = board.histograms(tables["pairs"], results.pairs, results.texts, results.names)
    # of shares of 0 and 1 a histogram says no more than their mean
    histograms |= {
        name: values for name, values in generated.values.items() if not name.endswith("ended")
    }
    texts = {"report": report.markdown(content, [])}  # figures stand among TensorBoard's images
    if generated.rows:
        for mode in MODES:
            lines = report.samples(generated.rows[: settings.prompts], mode)
            texts[f"generations/{mode}"] = "\n".join(lines)
    shown = board.Shown(texts, histograms, drawn)
    board.write(folder / "tensorboard", content, shown, step=inputs.record.get("steps", 0))
    has_card = settings.card and inputs.recipe["from"] is not None  # training wrote that directory
    if has_card:
        card.update(Path(inputs.path), content, drawn, inputs.record)
    run.finish(verdict=content["verdict"]["word"])
    for line in report.closing(content, folder, inputs.path if has_card else None):
        run.say(line)


def parquet(path: Path, columns: dict):
    """Write a table of one row a data row; its column `row` is the number in the data."""
    arrays = {name: pyarrow.array(values) for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)
