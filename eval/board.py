"""The report in TensorBoard: scalars, histograms, PR curves, texts, figures, and a page that joins
train and eval.

Rank 0 alone calls what is in here.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib.image
import numpy as np
import scipy.stats
import torch

from train.losses import metrics
from train.run.tensorboard import Board, overview
from train.run.trackers import Trackers


class Shown(NamedTuple):
    """What TensorBoard shows of an evaluation beside the report's numbers."""

    texts: dict[str, str]  # Markdown pages by tag
    histograms: dict[str, np.ndarray]  # values by tag, see `histograms`
    figures: list[Path]  # PNG files


def write(
    folder: Path,
    report: dict,
    shown: Shown,
    step: int,
    trackers: Trackers | None = None,
    writes: bool = True,
):
    """Scalars under eval/, histograms, PR curves, texts, figures, and a layout that joins train/,
    val/ and eval/. step: the training step that all of it belongs to. trackers: they get the scalars.
    writes: TensorBoard's files.
    """
    board = Board(folder, total=0, quiet=True, writes=writes, trackers=trackers)
    board.scalars(dict(scalars(report)), step)
    if not writes:
        board.close(patience=60)
        return
    for name, values in shown.histograms.items():
        section = "evaluation_generations" if name.startswith(("greedy", "sampled")) else "eval"
        values = torch.as_tensor(np.ascontiguousarray(values))
        board.histogram(f"{section}/histogram/{name}", values, step)
    for name, (labels, chances) in curves(shown.histograms).items():
        board.writer.add_pr_curve(f"eval/pr/{name}", labels, chances, step)
    for name, text in shown.texts.items():
        board.text(f"eval/{name}", text, step)
    for path in shown.figures:
        pixels = matplotlib.image.imread(path)[..., :3]  # (height, width, colours) without alpha
        board.writer.add_image(f"eval/{path.stem}", pixels, step, dataformats="HWC")
    of = metrics.METRICS if "preferences" in report else metrics.REWARD_METRICS
    board.custom_scalars(overview({metric.name for metric in of}))
    board.close(patience=60)


def scalars(report: dict) -> Iterator[tuple[str, float]]:
    """(tag, value) of every estimate of the report; TensorBoard groups by what precedes a slash.

    eval/: the model's preferences, by training's names. evaluation_reference/,
    evaluation_baselines/ and so on: the rest, which it shows below. A reward model that stands alone
    has the same tags; beside a language model its are under evaluation_rewards/.
    """
    if "preferences" in report:
        yield from _of_language_model(report)
    if "rewards" not in report:
        return
    chapter = report["rewards"]
    section, alone = chapter["preferences"], "preferences" not in report
    yield from _estimates("eval" if alone else "evaluation_rewards", section["model"])
    prefix = "evaluation_" if alone else "evaluation_rewards/"
    yield from _estimates(f"{prefix}calibration", section["calibration"])
    yield from _estimates(f"{prefix}baselines", chapter["baselines"])
    for name in ("length_correlation", "score_length_correlation"):
        yield from _estimates(f"{prefix}{name}", {"rho": section[name]})
    for row in chapter.get("by", ()):
        yield from _estimates(f"{prefix}accuracy_by/{row['name']}", row)
    if benchmark := chapter.get("benchmark"):
        scores = benchmark["sections"] | {"score": benchmark["score"]}
        yield from _estimates(f"{prefix}benchmark", scores)


def _of_language_model(report: dict) -> Iterator[tuple[str, float]]:
    """The estimates of a language model's chapters."""
    preferences = report["preferences"]
    yield from _estimates("eval", preferences["model"])
    for name in ("reference", "change", "calibration"):
        if name in preferences:
            yield from _estimates(f"evaluation_{name}", preferences[name])
    for name in ("baselines", "distribution", "generations"):
        yield from _estimates(f"evaluation_{name}", report[name])


def _estimates(tag: str, section) -> Iterator[tuple[str, float]]:
    """The finite estimates in nested dictionaries; a tag is the path of keys."""
    if not isinstance(section, dict):
        return
    if "value" in section and "method" in section:
        if section["value"] is not None and math.isfinite(section["value"]):
            yield tag, section["value"]
        return
    for key, value in section.items():
        yield from _estimates(f"{tag}/{key}", value)


def curves(histograms: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(labels, chances) of two questions: which answer is the chosen one, and which text is in
    distribution.

    A value's chance is its rank over the number of values: the curve is the same, and TensorBoard's
    thresholds, which are spread evenly from 0 to 1, fall between the values wherever those lie.
    """
    margin = np.asarray(histograms.get("margins", histograms.get("score_margins")))
    questions = {"chosen_or_rejected": _ranked(margin, -margin)}
    for name in ("reference", "model"):
        if f"{name}/logp_per_token_in" in histograms:
            inside = histograms[f"{name}/logp_per_token_in"]
            outside = histograms[f"{name}/logp_per_token_out"]
            questions[f"in_or_out/{name}"] = _ranked(inside, outside)
    return questions


def _ranked(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(labels, chances) of n positive and m negative values, (n + m,) each."""
    values = np.concatenate([positive, negative])
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    return labels, scipy.stats.rankdata(values) / len(values)


def histograms(columns: dict, of_pairs, of_texts, names: list[str]) -> dict[str, np.ndarray]:
    """Values by tag: margins, rewards, log-probabilities of responses, and those a token of both
    kinds of text.

    columns: of the pairs' table. of_pairs, of_texts: eval.scores.Scores; names: of their models.
    """
    values = {"margins": columns["margin"]}
    for side in ("chosen", "rejected"):
        if f"{side}_reward" in columns:
            values[f"rewards_{side}"] = columns[f"{side}_reward"]
    for i, name in enumerate(names):
        logps, text_logps = of_pairs.sums[i], of_texts.sums[i]  # (N, 2) and (n, 1) nats
        values[f"{name}/logps_chosen"] = logps[:, 0]
        values[f"{name}/logps_rejected"] = logps[:, 1]
        values[f"{name}/logp_per_token_in"] = logps[:, 0] / of_pairs.lengths[:, 0]
        values[f"{name}/logp_per_token_out"] = text_logps[:, 0] / of_texts.lengths[:, 0]
    return values
