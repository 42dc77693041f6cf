"""What an evaluation comes to: the report's content and the tables of rows, and everything that is
written of them. Rank 0 alone calls what is in here.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import yaml

from eval import baselines, board, distribution, figures, preferences, report, reward_measures
from eval.generations import MODES, Generated
from eval.inputs import Inputs, shown_flags, trained
from eval.judges import AnswerScores, Judge
from eval.models import Models
from eval.reward_inputs import RewardInputs
from eval.scores import Scores
from eval.verdict import verdict
from train.config import named
from train.files import write_json
from train.models import builtin
from train.run import card
from train.run.trackers import Trackers


class Results(NamedTuple):
    """What the models made of the inputs."""

    names: list[str]  # of the models, in the scores' order
    pairs: Scores
    texts: Scores
    generated: Generated
    seconds: float  # wall-clock time of loading and scoring, for the report


class Part(NamedTuple):
    """What the evaluation of one model comes to."""

    inputs: Inputs | RewardInputs
    content: dict  # of report.json
    tables: dict  # {table: {column: values}}
    histograms: dict  # values by tag
    texts: dict  # Markdown by tag


def measure(settings, inputs: Inputs, models: Models, results: Results, loss_of) -> Part:
    """The part on the language model.

    loss_of: what train.losses.composition.choose gives for the recipe's loss.
    """
    of_preferences, pair_columns = preferences.measure(results.pairs, loss_of)
    of_baselines, more_columns = baselines.measure(
        inputs.chosen, inputs.rejected, pair_columns["prompt"], pair_columns["correct"]
    )
    of_text, text_columns = distribution.measure(results.pairs, results.texts, results.names)
    of_answers = results.generated.report
    tables = {"pairs": pair_columns | more_columns, "texts": text_columns}
    if rows := results.generated.rows:
        tables["generations"] = {name: [row[name] for row in rows] for name in rows[0]}
    described = {name: as_shown(facts) for name, facts in inputs.described.items()}
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
    histograms = board.histograms(tables["pairs"], results.pairs, results.texts, results.names)
    # of shares of 0 and 1 a histogram says no more than their mean
    histograms |= {
        name: values
        for name, values in results.generated.values.items()
        if not name.endswith("ended")
    }
    texts = {}
    if rows := results.generated.rows:
        for mode in MODES:
            lines = report.samples(rows[: settings.prompts], mode)
            texts[f"generations/{mode}"] = "\n".join(lines)
    return Part(inputs, plain(content), tables, histograms, texts)


def measure_rewards(
    settings, inputs: RewardInputs, judge: Judge, scores: AnswerScores, seconds: float
) -> Part:
    """The part on the reward model, under "rewards" in report.json."""
    chapter, tables = reward_measures.measure(inputs, scores)
    chapter = {
        "model": card.shown(inputs.path),
        "trained": trained(inputs.record),
        "recipe": inputs.recipe,
        "data": as_shown(inputs.described),
        **chapter,
    }
    content = {
        "rewards": chapter,
        "run": {
            "judge": judge.facts,
            "flags": shown_flags(settings),
            "seconds_scoring": seconds,
        },
    }
    answers = tables["answers"]
    chosen = np.asarray(answers["chosen"])
    histograms = {
        "scores_chosen": answers["score"][chosen],
        "scores_rejected": answers["score"][~chosen],
        "score_margins": tables["rewards"]["margin"],
    }
    return Part(inputs, plain(content), tables, histograms, {})


def as_shown(described: dict) -> dict:
    """What folder.describe says of a data set, its sources as a reader may see them."""
    return described | {"sources": [card.shown(source) for source in described["sources"]]}


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


def write(settings, run, parts: list[Part]):
    """Write everything in --output and the models' cards, then say where it lies.

    parts: of the language model, of the reward model, or of both.
    """
    folder = run.path
    content, tables, histograms, texts = {}, {}, {}, {}
    for part in parts:
        # of two parts, both of which say how they were run
        told = content.get("run", {}) | part.content["run"]
        content |= part.content | {"run": told}
        tables |= part.tables
        histograms |= part.histograms
        texts |= part.texts
    drawn = figures.draw(folder / "figures", content, tables)
    write_json(folder / "report.json", content)
    (folder / "report.md").write_text(report.markdown(content, drawn), encoding="utf-8")
    for name, columns in tables.items():
        parquet(folder / f"{name}.parquet", columns)
    texts["report"] = report.markdown(content, [])  # figures stand among TensorBoard's images
    step = parts[0].inputs.record.get("steps", 0)
    trackers = Trackers(settings.report_to, folder, run.record["flags"], run.say)
    has_curves = "tensorboard" in settings.report_to
    board.write(
        folder / "tensorboard",
        content,
        board.Shown(texts, histograms, drawn),
        step=step,
        trackers=trackers,
        writes=has_curves,
    )
    of_models = []
    for part in parts:
        if not settings.card or part.inputs.recipe["from"] is None:
            continue  # training did not write that directory
        chapter = part.content.get("rewards", part.content)
        own = [path for path in drawn if (path.stem == "rewards") == ("rewards" in part.content)]
        try:
            card.update(Path(part.inputs.path), chapter, own, part.inputs.record)
        except (
            OSError,
            ValueError,
            yaml.YAMLError,
        ) as error:  # another's folder, or a card by hand
            run.say(
                f"{part.inputs.path} has no new card: {named(error)}; the report stands, and --card "
                "false leaves the card alone"
            )
            continue
        of_models.append(part.inputs.path)
    word = content.get("verdict", content.get("rewards", {}).get("verdict"))["word"]
    run.finish(verdict=word)
    for line in report.closing(content, folder, of_models, trackers.looks(), has_curves):
        run.say(line)


def parquet(path: Path, columns: dict):
    """Write a table of one row a data row; its column `row` is the number in the data."""
    arrays = {name: pyarrow.array(values) for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)
