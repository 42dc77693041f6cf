"""The report's figures as PNG: an opaque white ground, so that they read the same on a light and on a dark page."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
BEFORE_AFTER = {"reference": "before (reference)", "model": "after (model)"}
VIEWS = {"by_text": "mean of a text, nats a token", "by_token": "a token, nats"}


def draw(folder: Path, report: dict, columns: dict) -> list[Path]:
    """Write preferences.png and distribution.png from the report and the pairs' columns; returns their paths."""
    folder.mkdir(exist_ok=True)
    made = []
    for name, figure in (
        ("preferences", preferences(report, columns)),
        ("distribution", distribution(report["distribution"])),
    ):
        FigureCanvasAgg(figure)
        figure.savefig(
            folder / f"{name}.png", dpi=110, facecolor="white", transparent=False, metadata={"Software": None}
        )
        made.append(folder / f"{name}.png")
    return made


def preferences(report: dict, columns: dict) -> Figure:
    """Margins, rewards of both sides, calibration (with a reference), accuracy by length difference."""
    section, compared = report["preferences"], "calibration" in report["preferences"]
    panels = [_margins, _rewards, _calibration, _by_length] if compared else [_margins, _by_length]
    figure = Figure(figsize=(10, 7 if compared else 3.8), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels) // 2, 2).flat, panels, strict=True):
        panel(axes, section, report["baselines"], columns)
        _tidy(axes)
    figure.suptitle(f"{section['pairs']} pairs, {section['prompts']} prompts")
    return figure


def _margins(axes, section, baselines, columns):
    axes.hist(columns["margin"], bins=30, color=BLUE, alpha=0.8)
    axes.axvline(0, color=GREY, linewidth=1)
    measure = section["model"].get("rewards/margins", section["model"]["logps/margins"])
    axes.axvline(measure["value"], color=ORANGE, linewidth=2, label=f"mean {measure['value']:.3g}")
    if measure["interval"]:
        axes.axvspan(*measure["interval"], color=ORANGE, alpha=0.25, label="95 % interval")
    axes.set(title="Margin of chosen over rejected", xlabel=section["margin"], ylabel="pairs")
    axes.legend(frameon=False)


def _rewards(axes, section, baselines, columns):
    both = np.concatenate([columns["chosen_reward"], columns["rejected_reward"]])
    bins = np.histogram_bin_edges(both, bins=30)
    for side, colour in (("chosen", BLUE), ("rejected", ORANGE)):
        axes.hist(columns[f"{side}_reward"], bins=bins, color=colour, alpha=0.55, label=side)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set(title="Rewards", xlabel="beta x log(pi / reference)", ylabel="responses")
    axes.legend(frameon=False)


def _calibration(axes, section, baselines, columns):
    found = section["calibration"]
    rows = [row for row in found["table"] if row["n"]]
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated")
    x, y = [row["confidence"] for row in rows], [row["accuracy"] for row in rows]
    spread = [[max(0, v - row["interval"][0]) for v, row in zip(y, rows, strict=True)],
              [max(0, row["interval"][1] - v) for v, row in zip(y, rows, strict=True)]]  # fmt: skip
    axes.errorbar(x, y, yerr=spread, color=BLUE, marker="o", linestyle="none", capsize=3, label="pairs, Wilson 95 %")
    axes.set(title=f"Calibration: ECE {found['ece']['value']:.3f}", xlabel="confidence in the preferred answer",
             ylabel="how often it is the chosen one", xlim=(0.48, 1.02), ylim=(-0.02, 1.04))  # fmt: skip
    axes.legend(frameon=False, loc="lower right")


def _by_length(axes, section, baselines, columns):
    rows = section["by_length"]
    names = [f"{100 * row['from']:+.0f} to\n{100 * row['to']:+.0f} %\nn={row['n']}" for row in rows]
    for place, row in enumerate(rows):
        if row["n"]:
            low, high = row["interval"] or (row["value"], row["value"])
            axes.bar(place, row["value"], color=BLUE, alpha=0.8)
            axes.vlines(place, low, high, color="black", linewidth=1.5)
    for name, colour in (("longer_wins", ORANGE), ("bag_of_words", GREEN)):
        if baselines[name]["value"] is not None:
            label = f"{name.replace('_', ' ')}, all pairs: {baselines[name]['value']:.2f}"
            axes.axhline(baselines[name]["value"], color=colour, linewidth=1.5, label=label)
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set(
        title="Accuracy by length difference",
        xlabel="chosen's length over rejected's, relative to the longer",
        ylim=(0, 1.28),
    )
    axes.legend(frameon=False, loc="upper left", fontsize=8)


def distribution(section: dict) -> Figure:
    """In-distribution responses against other text: before and after side by side, by text and by token."""
    names = [name for name in BEFORE_AFTER if name in section]
    figure = Figure(figsize=(5 * len(names) + (len(names) == 1), 7), layout="constrained")
    grid = figure.subplots(2, len(names), squeeze=False, sharex="row", sharey="row")
    for column, name in enumerate(names):
        for row, (view, unit) in enumerate(VIEWS.items()):
            _two_histograms(grid[row][column], section[name][view], unit)
        grid[0][column].set_title(f"{BEFORE_AFTER[name] if len(names) > 1 else 'model'}\n{grid[0][column].get_title()}")
    figure.suptitle(
        "{} chosen responses against {} texts".format(
            section["in_distribution"]["texts"], section["out_of_distribution"]["texts"]
        )
    )
    return figure


def _two_histograms(axes, found, unit):
    edges = np.array(found["histogram"]["edges"])
    for side, colour, label in (("in", BLUE, "in distribution"), ("out", ORANGE, "out of distribution")):
        counts = np.array(found["histogram"][side], dtype=float)
        axes.stairs(counts / counts.sum() / np.diff(edges), edges, color=colour, alpha=0.55, fill=True, label=label)
    axes.set(title=f"overlap {found['overlap']['value']:.2f}, AUROC {found['auroc']['value']:.2f}", ylabel="density",
             xlabel=f"log-probability: {unit}")  # fmt: skip
    axes.legend(frameon=False, loc="upper left")
    _tidy(axes)


def _tidy(axes):
    axes.spines[["top", "right"]].set_visible(False)
