"""The report in TensorBoard: scalars, histograms, PR curves, texts, figures, and a page that joins
train and eval.

Rank 0 alone calls what is in here.
"""

import math
from pathlib import Path

import matplotlib.image
import numpy as np
import scipy.stats
import torch

from train.run.tensorboard import Board

# Pages of TensorBoard's CUSTOM SCALARS: the curves of training and the points of evaluation in one
# chart each.
LAYOUT = {
    "preferences": {
        title: [
            "Multiline",
            [f"{split}/rewards/{name}" for name in names for split in ("train", "val", "eval")],
        ]
        for title, names in (
            ("margins", ["margins"]),
            ("accuracy", ["accuracies"]),
            ("rewards", ["chosen", "rejected"]),
        )
    }
}


def write(
    folder: Path,
    report: dict,
    pages: dict[str, str],
    histograms: dict,
    figures: list[Path],
    step: int,
):
    """Scalars under eval/, histograms, PR curves, texts, figures, and a layout that joins train/,
    val/ and eval/.
    """
    board = Board(folder, total=0, quiet=True)
    board.scalars(dict(scalars(report)), step)
    for name, values in histograms.items():
        section = "evaluation_generations" if name.startswith(("greedy", "sampled")) else "eval"
        board.histogram(
            f"{section}/histogram/{name}", torch.as_tensor(np.ascontiguousarray(values)), step
        )
    for name, (labels, chances) in curves(report, histograms).items():
        board.writer.add_pr_curve(f"eval/pr/{name}", labels, chances, step)
    for name, text in pages.items():
        board.text(f"eval/{name}", text, step)
    for path in figures:
        board.writer.add_image(
            f"eval/{path.stem}", matplotlib.image.imread(path)[..., :3], step, dataformats="HWC"
        )
    board.writer.add_custom_scalars(LAYOUT)
    board.close()


def scalars(report: dict):
    """(tag, value) of every number of the report that has an interval; TensorBoard groups by what
    precedes a slash.

    eval/: the model's preferences, by training's names. evaluation_reference/,
    evaluation_baselines/ and so on: the rest, which it shows below.
    """

    def walk(tag, thing):
        if isinstance(thing, dict) and "value" in thing and "method" in thing:
            if thing["value"] is not None and math.isfinite(thing["value"]):
                yield tag, thing["value"]
        elif isinstance(thing, dict):
            for key, value in thing.items():
                yield from walk(f"{tag}/{key}", value)

    preferences = report["preferences"]
    rest = {name: preferences[name] for name in ("reference", "calibration") if name in preferences}
    rest |= {name: report[name] for name in ("baselines", "distribution", "generations")}
    yield from walk("eval", preferences["model"])
    for name, section in rest.items():
        yield from walk(f"evaluation_{name}", section)


def curves(report: dict, histograms: dict) -> dict:
    """(labels, chances) of two questions: which answer is the chosen one, and which text is in
    distribution.

    A value's chance is its rank's share: the curve is the same, and TensorBoard's thresholds, which
    are spread evenly from 0 to 1, fall between the values wherever those lie.
    """
    share = lambda values: scipy.stats.rankdata(values) / len(values)
    margin = np.asarray(histograms["margins"])
    found = {
        "chosen_or_rejected": (
            np.repeat([1, 0], len(margin)),
            share(np.concatenate([margin, -margin])),
        )
    }
    for name in ("reference", "model"):
        if f"{name}/logp_per_token_in" in histograms:
            both = [histograms[f"{name}/logp_per_token_{side}"] for side in ("in", "out")]
            found[f"in_or_out/{name}"] = (
                np.repeat([1, 0], list(map(len, both))),
                share(np.concatenate(both)),
            )
    return found


def histograms(columns: dict, of_pairs, of_texts, names: list[str]) -> dict:
    """Values by tag: margins, rewards, log-probabilities of responses, and those a token of both
    kinds of text.
    """
    found = {"margins": columns["margin"]}
    found |= {
        f"rewards_{side}": columns[f"{side}_reward"]
        for side in ("chosen", "rejected")
        if f"{side}_reward" in columns
    }
    for number, name in enumerate(names):
        found |= {
            f"{name}/logps_{side}": of_pairs.sums[number, :, i]
            for i, side in enumerate(("chosen", "rejected"))
        }
        found[f"{name}/logp_per_token_in"] = of_pairs.sums[number, :, 0] / of_pairs.lengths[:, 0]
        found[f"{name}/logp_per_token_out"] = of_texts.sums[number, :, 0] / of_texts.lengths[:, 0]
    return found
