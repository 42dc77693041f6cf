"""The report's figures as PNG: an opaque white ground, so that they read the same on a light and on
a dark page.
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


def draw(folder: Path, report: dict, columns: dict) -> list[Path]:
    """Write preferences.png and distribution.png from the report and the pairs' columns; returns
    their paths.
    """
    folder.mkdir(exist_ok=True)
    made = []
    for name, figure in (
        ("preferences", preferences(report, columns)),
        ("distribution", distribution(report)),
    ):
        FigureCanvasAgg(figure)
        path = folder / f"{name}.png"
        figure.savefig(
            path, dpi=110, facecolor="white", transparent=False, metadata={"Software": None}
        )
        made.append(path)
    return made


def preferences(report: dict, columns: dict) -> Figure:
    """Margins, rewards of both sides, calibration (with a reference), accuracy by length
    difference.
    """
    section, compared = report["preferences"], "calibration" in report["preferences"]
    panels = [_margins, _rewards, _calibration, _by_length] if compared else [_margins, _by_length]
    figure = Figure(figsize=(10, 7.2 if compared else 4), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels) // 2, 2).flat, panels, strict=True):
        panel(axes, section, report["baselines"], columns)
        _tidy(axes)
    figure.suptitle(f"{section['pairs']} pairs of {', '.join(report['data']['sources'])}")
    return figure


def _margins(axes, section, baselines, columns):
    axes.hist(
        columns["margin"],
        bins=shared_edges(np.asarray(columns["margin"])[None]),
        color=BLUE,
        alpha=0.8,
    )
    axes.axvline(0, ymax=BELOW_LEGEND, color=GREY, linewidth=1)
    measure = section["model"].get("rewards/margins", section["model"]["logps/margins"])
    axes.axvline(
        measure["value"],
        ymax=BELOW_LEGEND,
        color=ORANGE,
        linewidth=2,
        label=f"mean {measure['value']:.3g}",
    )
    if measure["interval"]:
        axes.axvspan(
            *measure["interval"],
            ymax=BELOW_LEGEND,
            color=ORANGE,
            alpha=0.25,
            label="its 95 % interval",
        )
    axes.set(title="Margin of chosen over rejected", xlabel=section["margin"])
    _counts(axes, "pairs")


def _rewards(axes, section, baselines, columns):
    both = {side: np.asarray(columns[f"{side}_reward"]) for side in ("chosen", "rejected")}
    bins = shared_edges(np.stack(list(both.values())))
    for (side, values), colour in zip(both.items(), (BLUE, ORANGE), strict=True):
        axes.hist(
            values, bins=bins, color=colour, alpha=0.55, label=f"{side}, mean {values.mean():.3g}"
        )
    axes.axvline(0, ymax=BELOW_LEGEND, color=GREY, linewidth=1)
    axes.set(title="Rewards", xlabel="beta x log(model / reference)")
    _counts(axes, "answers")


def _counts(axes, what):
    """Whole numbers upwards, and room above the bars for the legend."""
    axes.set(ylabel=what, ylim=(0, axes.get_ylim()[1] / BELOW_LEGEND))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper left", ncols=2, fontsize=9)


def _calibration(axes, section, baselines, columns):
    found = section["calibration"]
    rows = [row for row in found["table"] if row["n"]]
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated")
    x, y = [row["confidence"] for row in rows], [row["accuracy"] for row in rows]
    spread = [
        [max(0, v - row["interval"][0]) for v, row in zip(y, rows, strict=True)],
        [max(0, row["interval"][1] - v) for v, row in zip(y, rows, strict=True)],
    ]
    axes.errorbar(
        x,
        y,
        yerr=spread,
        color=BLUE,
        marker="o",
        linestyle="none",
        capsize=3,
        label="pairs, Wilson 95 %",
    )
    for row in rows:
        axes.text((row["from"] + row["to"]) / 2, -0.08, row["n"], ha="center", fontsize=8)
    axes.set(
        title=f"Calibration: ECE {found['ece']['value']:.3f}",
        xlabel="confidence in the preferred answer; at the bottom: pairs",
        ylabel="how often it is the chosen one",
        xlim=(0.48, 1.02),
        ylim=(-0.12, 1.04),
    )
    axes.legend(frameon=False, loc="lower right", fontsize=9)


def _by_length(axes, section, baselines, columns):
    rows = section["by_length"]
    names = [f"{100 * row['from']:+.0f} to\n{100 * row['to']:+.0f} %\nn={row['n']}" for row in rows]
    for place, row in enumerate(rows):
        if row["n"]:
            low, high = row["interval"] or (row["value"], row["value"])
            axes.bar(place, row["value"], color=BLUE, alpha=0.8)
            axes.vlines(place, low, high, color="black", linewidth=1.5)
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle="--", label="chance")
    for name, colour in (("longer_wins", ORANGE), ("bag_of_words", GREEN)):
        if baselines[name]["value"] is not None:
            label = f"{name.replace('_', ' ')}, all pairs: {baselines[name]['value']:.2f}"
            axes.axhline(baselines[name]["value"], color=colour, linewidth=1.5, label=label)
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
    names = [name for name in BEFORE_AFTER if name in section]
    figure = Figure(figsize=(5 * len(names) + 3 * (len(names) == 1), 7.2), layout="constrained")
    grid = figure.subplots(2, len(names), squeeze=False, sharex="row", sharey="row")
    for column, name in enumerate(names):
        who = BEFORE_AFTER[name] if len(names) > 1 else "model"
        for row, (view, unit) in enumerate(VIEWS.items()):
            _two_histograms(
                grid[row][column], section[name], view, f"{who}: log-probability {unit}"
            )
    for row, view in enumerate(VIEWS):
        grid[row][0].set_xlim(_left([section[name] for name in names], view), None)
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2
    )
    inside, outside = section["in_distribution"], section["out_of_distribution"]
    figure.suptitle(
        f"{inside['texts']} chosen answers of {', '.join(report['data']['sources'])} "
        f"against {outside['texts']} texts of {', '.join(report['ood']['sources'])}"
    )
    return figure


def _two_histograms(axes, section, view, what):
    found = section[view]
    edges = np.array(found["histogram"]["edges"])
    for side, colour, label in SIDES:
        share = np.array(found["histogram"][side], dtype=float)
        axes.stairs(
            share / share.sum() / np.diff(edges),
            edges,
            color=colour,
            alpha=0.55,
            fill=True,
            label=label,
        )
    title = f"overlap {found['overlap']['value']:.2f}, AUROC {found['auroc']['value']:.2f}"
    if view == "by_token":
        means = {side: section[side]["logp_per_token"]["value"] for side, *_ in SIDES}
        for side, colour, _ in SIDES:
            axes.axvline(means[side], color=colour, linewidth=1.5, linestyle="--")
        title = f"mean {means['in']:.3f} in, {means['out']:.3f} out; {title}"
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(what, fontsize=9)
    axes.set_ylabel("density, 1/nat")
    _tidy(axes)


def _left(sections, view) -> float:
    """Where a row of panels begins: next to nothing of any sample lies further left."""
    begins = []
    for section in sections:
        found = section[view]["histogram"]
        for side, *_ in SIDES:
            below = np.cumsum(found[side]) / sum(found[side])
            begins.append(found["edges"][np.searchsorted(below, UNSEEN, side="right")])
    return min(begins)


def _tidy(axes):
    axes.spines[["top", "right"]].set_visible(False)
