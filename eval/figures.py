"""The report's figures as PNG: an opaque white ground, so that they read the same on a light and on
a dark page.

`report` below is the content of report.json, or of its chapter on the reward model, `columns` the
pairs' table by column.
"""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.distribution import shared_edges

# Okabe and Ito's colours, told apart by the colour-blind.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
BEFORE_AFTER = {"reference": "before (reference)", "model": "after (model)"}
VIEWS = {"by_text": "of a text, mean nats a token", "by_token": "of a token, nats"}
SIDES = (
    ("in", BLUE, "chosen answers (in distribution)"),
    ("out", ORANGE, "other text (out of distribution)"),
)
BELOW_LEGEND = 0.8  # of the height of a panel whose legend stands at the top
UNSEEN = 0.001  # share of a sample that may lie left of a panel: a few tokens would take half of it


def draw(folder: Path, report: dict, tables: dict) -> list[Path]:
    """Write preferences.png and distribution.png of a language model, rewards.png of a reward model,
    as the report has chapters; returns their paths. tables: {table: {column: values}}.
    """
    folder.mkdir(exist_ok=True)
    figures = {}
    if "preferences" in report:
        figures["preferences"] = preferences(report, tables["pairs"])
        figures["distribution"] = distribution(report)
    if "rewards" in report:
        figures["rewards"] = rewards(report["rewards"], tables)
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        FigureCanvasAgg(figure)  # draws without a display
        # without the name of the software the file depends on nothing but what it shows
        figure.savefig(
            path, dpi=110, facecolor="white", transparent=False, metadata={"Software": None}
        )
        paths.append(path)
    return paths


def preferences(report: dict, columns: dict) -> Figure:
    """Margins, rewards of both sides and calibration (where there are rewards), accuracy by length
    difference.
    """
    section, baselines = report["preferences"], report["baselines"]
    has_rewards = "calibration" in section
    figure = Figure(figsize=(10, 7.2 if has_rewards else 4), layout="constrained")
    axes = figure.subplots(2 if has_rewards else 1, 2).flatten()
    estimates = section["model"]
    name = "rewards/margins" if has_rewards else "logps/margins"
    _margins(axes[0], np.asarray(columns["margin"]), estimates[name])
    axes[0].set(title="Margin of chosen over rejected")
    axes[0].set_xlabel(section["margin"], wrap=True)
    _count_upwards(axes[0], "pairs")
    if has_rewards:
        chosen, rejected = columns["chosen_reward"], columns["rejected_reward"]
        _two_sides(axes[1], np.asarray(chosen), np.asarray(rejected))
        axes[1].set(title="Rewards")
        axes[1].set_xlabel(section["reward"], wrap=True)
        _calibration(axes[2], section["calibration"])
    _by_length(axes[-1], section["by_length"], baselines)
    for panel in axes:
        _tidy(panel)
    figure.suptitle(f"{section['pairs']} pairs of {', '.join(report['data']['sources'])}")
    return figure


def rewards(chapter: dict, tables: dict) -> Figure:
    """Scores of chosen and rejected answers, margins, calibration, accuracy by length difference;
    where rows are told apart, accuracy by that.
    """
    section, answers = chapter["preferences"], tables["answers"]
    by = chapter.get("by", [])
    figure = Figure(figsize=(10, 7.2 + (0.6 + 0.22 * len(by) if by else 0)), layout="constrained")
    heights = [3.6, 3.6, 0.6 + 0.22 * len(by)] if by else [3.6, 3.6]
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    axes = [figure.add_subplot(grid[place // 2, place % 2]) for place in range(4)]
    chosen, score = np.asarray(answers["chosen"]), np.asarray(answers["score"])
    _two_sides(axes[0], score[chosen], score[~chosen])
    axes[0].set(title="Scores", xlabel="score of an answer")
    estimates = section["model"]
    mean = estimates.get("rewards/row_margins", estimates["rewards/margins"])
    _margins(axes[1], np.asarray(tables["rewards"]["margin"]), mean)
    axes[1].set(title="Margin of a row", xlabel="least chosen score less greatest rejected one")
    _count_upwards(axes[1], "rows")
    _calibration(axes[2], section["calibration"])
    _by_length(axes[3], section["by_length"], chapter["baselines"])
    if by:
        axes.append(figure.add_subplot(grid[2, :]))
        _by_value(axes[4], by)
    for panel in axes:
        _tidy(panel)
    figure.suptitle(f"{section['rows']} rows of {', '.join(chapter['data']['sources'])}")
    return figure


def _by_value(axes, rows: list[dict]):
    for place, row in enumerate(rows):
        low, high = row["interval"] or (row["value"], row["value"])
        axes.barh(place, row["value"], color=BLUE, alpha=0.8)
        axes.hlines(place, low, high, color="black", linewidth=1.5)
    names = [f"{row['name']}, n={row['n']}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(title="Accuracy by subset", xlabel="accuracy", xlim=(0, 1.02))


def _margins(axes, margins: np.ndarray, mean: dict):
    """The histogram of margins and the estimate of their mean."""
    axes.hist(margins, bins=shared_edges(margins[None]), color=BLUE, alpha=0.8)
    axes.axvline(0, ymax=BELOW_LEGEND, color=GREY, linewidth=1)
    axes.axvline(
        mean["value"],
        ymax=BELOW_LEGEND,
        color=ORANGE,
        linewidth=2,
        label=f"mean {mean['value']:.3g}",
    )
    if mean["interval"]:
        low, high = mean["interval"]
        axes.axvspan(
            low, high, ymax=BELOW_LEGEND, color=ORANGE, alpha=0.25, label="its 95 % interval"
        )


def _two_sides(axes, chosen: np.ndarray, rejected: np.ndarray):
    """Histograms of what chosen and rejected answers get, on the same bins."""
    bins = shared_edges(chosen[None], rejected[None])
    for side, values, colour in (("chosen", chosen, BLUE), ("rejected", rejected, ORANGE)):
        label = f"{side}, mean {values.mean():.3g}"
        axes.hist(values, bins=bins, color=colour, alpha=0.55, label=label)
    axes.axvline(0, ymax=BELOW_LEGEND, color=GREY, linewidth=1)
    _count_upwards(axes, "answers")


def _count_upwards(axes, what: str):
    """Whole numbers upwards, and room above the bars for the legend."""
    axes.set(ylabel=what, ylim=(0, axes.get_ylim()[1] / BELOW_LEGEND))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper left", ncols=2, fontsize=9)


def _calibration(axes, section: dict):
    rows = [row for row in section["table"] if row["n"]]
    confidence = [row["confidence"] for row in rows]
    accuracy = [row["accuracy"] for row in rows]
    # how far Wilson's interval reaches down and up from the accuracy
    below = [max(0, row["accuracy"] - row["interval"][0]) for row in rows]
    above = [max(0, row["interval"][1] - row["accuracy"]) for row in rows]
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated")
    axes.errorbar(
        confidence,
        accuracy,
        yerr=[below, above],
        color=BLUE,
        marker="o",
        linestyle="none",
        capsize=3,
        label="pairs, Wilson 95 %",
    )
    for row in rows:
        axes.text((row["from"] + row["to"]) / 2, -0.08, row["n"], ha="center", fontsize=8)
    axes.set(
        title=f"Calibration: ECE {section['ece']['value']:.3f}",
        xlabel="confidence in the preferred answer; at the bottom: pairs",
        ylabel="how often it is the chosen one",
        xlim=(0.48, 1.02),
        ylim=(-0.12, 1.04),
    )
    axes.legend(frameon=False, loc="lower right", fontsize=9)


def _by_length(axes, rows: list[dict], baselines: dict):
    for place, row in enumerate(rows):
        if row["n"]:
            low, high = row["interval"] or (row["value"], row["value"])
            axes.bar(place, row["value"], color=BLUE, alpha=0.8)
            axes.vlines(place, low, high, color="black", linewidth=1.5)
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle="--", label="chance")
    for name, colour in (("longer_wins", ORANGE), ("bag_of_words", GREEN)):
        accuracy = baselines[name]["value"]
        if accuracy is not None:
            label = f"{name.replace('_', ' ')}, all pairs: {accuracy:.2f}"
            axes.axhline(accuracy, color=colour, linewidth=1.5, label=label)
    names = [f"{100 * row['from']:+.0f} to\n{100 * row['to']:+.0f} %\nn={row['n']}" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set(
        title="Accuracy by length difference",
        xlabel="chosen's tokens over rejected's, relative to the longer",
        xlim=(-0.6, len(rows) - 0.4),
        ylim=(0, 1.3),
    )
    axes.legend(frameon=False, loc="upper left", ncols=2, fontsize=8)


def distribution(report: dict) -> Figure:
    """In-distribution responses against other text: before and after side by side, by text and by
    token.
    """
    section = report["distribution"]
    models = [name for name in BEFORE_AFTER if name in section]
    compared = len(models) > 1
    figure = Figure(figsize=(10 if compared else 8, 7.2), layout="constrained")
    grid = figure.subplots(2, len(models), squeeze=False, sharex="row", sharey="row")
    for column, name in enumerate(models):
        title = BEFORE_AFTER[name] if compared else "model"
        for row, (view, unit) in enumerate(VIEWS.items()):
            label = f"{title}: log-probability {unit}"
            _two_histograms(grid[row][column], section[name], view, label)
    for row, view in enumerate(VIEWS):
        grid[row][0].set_xlim(_left_end([section[name][view] for name in models]), None)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=2)
    inside, outside = section["in_distribution"], section["out_of_distribution"]
    figure.suptitle(
        f"{inside['texts']} chosen answers of {', '.join(report['data']['sources'])} "
        f"against {outside['texts']} texts of {', '.join(report['ood']['sources'])}"
    )
    return figure


def _two_histograms(axes, section: dict, view: str, label: str):
    """One model's panel: both sides as densities. label: of the x axis."""
    measures = section[view]
    edges = np.array(measures["histogram"]["edges"])
    for side, colour, title in SIDES:
        counts = np.array(measures["histogram"][side], dtype=float)
        density = counts / counts.sum() / np.diff(edges)
        axes.stairs(density, edges, color=colour, alpha=0.55, fill=True, label=title)
    title = f"overlap {measures['overlap']['value']:.2f}, AUROC {measures['auroc']['value']:.2f}"
    if view == "by_token":
        means = {side: section[side]["logp_per_token"]["value"] for side, _, _ in SIDES}
        for side, colour, _ in SIDES:
            axes.axvline(means[side], color=colour, linewidth=1.5, linestyle="--")
        title = f"mean {means['in']:.3f} in, {means['out']:.3f} out; {title}"
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("density, 1/nat")
    _tidy(axes)


def _left_end(measures: list[dict]) -> float:
    """Where a row of panels begins: next to nothing of any sample lies further left."""
    begins = []
    for histogram in (each["histogram"] for each in measures):
        for side, _, _ in SIDES:
            below = np.cumsum(histogram[side]) / sum(histogram[side])
            begins.append(histogram["edges"][np.searchsorted(below, UNSEEN, side="right")])
    return min(begins)


def _tidy(axes):
    axes.spines[["top", "right"]].set_visible(False)
