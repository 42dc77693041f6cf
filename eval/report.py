"""The report: verdict, report.json, report.md, rows as parquet, TensorBoard. Rank 0 alone calls what is in here."""

import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from train.engine.board import Board

MATERIAL = 0.02  # a perplexity that is shown to move by less than this share is called unchanged
TITLES = {
    "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin", "rewards/chosen": "reward of chosen",
    "rewards/rejected": "reward of rejected", "loss": "loss", "chosen_fell": "chosen became less likely",
    "logps/chosen": "log-prob of chosen, nats", "logps/rejected": "log-prob of rejected, nats",
    "logps/margins": "log-prob difference, nats", "logps/accuracies": "chosen is the likelier",
    "logps/chosen_per_token": "log-prob of chosen, nats a token",
    "logps/rejected_per_token": "log-prob of rejected, nats a token",
    "logps/accuracies_per_token": "chosen is the likelier a token",
}  # fmt: skip
# Pages of TensorBoard's CUSTOM SCALARS: the curves of training and the points of evaluation in one chart each.
LAYOUT = {
    "preferences": {
        title: ["Multiline", [f"{split}/rewards/{name}" for name in names for split in ("train", "val", "eval")]]
        for title, names in (
            ("margins", ["margins"]),
            ("accuracy", ["accuracies"]),
            ("rewards", ["chosen", "rejected"]),
        )
    }
}
WORDS = {"better": "better", "worse": "worse", "different": "merely different", "unchanged": "unchanged",
         "not compared": "not compared: there is no reference"}  # fmt: skip


def verdict(preferences: dict, baselines: dict, distribution: dict, unchanged: bool) -> dict:
    """Better, worse or merely different than the reference, by intervals, in one word, and the reasons in sentences.

    Better: accuracy above one half and margin above 0, and text from elsewhere not made less likely by a material
    amount. Worse: accuracy and margin below, or no gain and other text less likely. Else merely different.
    """
    reasons, bag = [], baselines["bag_of_words"]
    if bag["value"] is not None:
        reasons.append(f"A bag of words, without any model, is right on {bag['value']:.1%} of these pairs, and "
                       f"\"longer wins\" on {baselines['longer_wins']['value']:.1%}: compare.")  # fmt: skip
    if "change" not in distribution:
        return {"word": "not compared", "reasons": reasons}
    if unchanged:
        return {"word": "unchanged", "reasons": ["The model scores every response and text as the reference does."]}
    model = preferences["model"]
    accuracy, margin, fell = (model[name] for name in ("rewards/accuracies", "rewards/margins", "chosen_fell"))
    ratio = distribution["change"]["out"]["perplexity_ratio"]
    above = _side(accuracy, 0.5)
    gain = above if above == _side(margin, 0) else 0
    pairs = {
        1: "prefers the chosen answers more than the reference does",
        0: "is not shown to prefer the chosen answers",
        -1: "prefers the rejected answers more than the reference does",
    }[gain]
    losing, gaining = _side(ratio, 1 + MATERIAL) > 0, _side(ratio, 1 - MATERIAL) < 0
    other = "less likely" if losing else "more likely" if gaining else "about as likely as before"
    reasons = (
        [
            f"The model {pairs}: reward accuracy {show(accuracy)}, margin {show(margin)}.",
            f"Text from elsewhere is {other} (perplexity x {show(ratio)}).",
        ]
        + ([f"Chosen answers lost log-probability in {show(fell)} of the pairs."] if fell["value"] > 0.5 else [])
        + reasons
    )
    word = "better" if gain > 0 and not losing else "worse" if gain < 0 or (gain == 0 and losing) else "different"
    return {"word": word, "reasons": reasons}


def _side(measure: dict, neutral: float) -> int:
    """1 where the whole interval lies above `neutral`, -1 where below, else 0."""
    low, high = measure["interval"] or (-math.inf, math.inf)
    return int(low > neutral) - int(high < neutral)


def show(measure: dict | None, digits: int = 4) -> str:
    """A measure as text: the value and its 95 % interval."""
    if not measure or measure["value"] is None or math.isnan(measure["value"]):
        return "-"
    text = lambda x: f"{x:.{digits}g}"
    interval = measure.get("interval")
    return text(measure["value"]) + (f" [{text(interval[0])}, {text(interval[1])}]" if interval else "")


def clean(thing):
    """The same with plain Python numbers, and null for what is not a number: JSON has no NaN."""
    if isinstance(thing, dict):
        return {str(key): clean(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [clean(value) for value in thing]
    if isinstance(thing, np.generic):
        thing = thing.item()
    return None if isinstance(thing, float) and not math.isfinite(thing) else thing


def markdown(report: dict, figures: list[Path]) -> str:
    """The report as a page; figures lie in the folder figures/ beside it."""
    preferences, recipe = report["preferences"], report["recipe"]
    lines = [
        f"# {report['model']}",
        "",
        f"Against the reference {report['reference']}: **{WORDS[report['verdict']['word']]}**."
        if report["reference"]
        else "Without a reference, margins are differences of log-probabilities, in nats.",
        "",
    ]
    lines += [f"* {reason}" for reason in report["verdict"]["reasons"]]
    lines += [
        "",
        f"Intervals are 95 %, {_methods(preferences)}. beta {recipe['beta']}, at most {recipe['max_length']} tokens, "
        f"prompts at most {recipe['max_prompt_length']}, {recipe['layout']} rows, {report['run']['precision']}"
        + (f", as in {recipe['from']}." if recipe["from"] else "."),
        "",
    ]
    lines += ["## Preferences", "", f"{preferences['pairs']} pairs of {preferences['prompts']} prompts "
              f"({report['data']['dropped']} rows dropped, {report['data']['truncated']} truncated).", ""]  # fmt: skip
    lines += _preferences(preferences, report["baselines"])
    lines += [f"![{path.stem}](figures/{path.name})\n" for path in figures if path.stem == "preferences"]
    lines += ["## In against out of distribution", "", *_distribution(report["distribution"])]
    lines += [f"![{path.stem}](figures/{path.name})\n" for path in figures if path.stem == "distribution"]
    lines += ["## Generations", "", *_generations(report["generations"])]
    return "\n".join(lines) + "\n"


def _methods(preferences) -> str:
    return "; ".join(sorted({measure["method"] for measure in preferences["model"].values()}))


def table(header: list, rows: list[list]) -> list[str]:
    """A Markdown table."""
    line = lambda cells: "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |"
    return [line(header), "|---" * len(header) + "|", *map(line, rows), ""]


def _preferences(section, baselines) -> list[str]:
    model, reference = section["model"], section.get("reference", {})
    sides = ["model", "reference"] if reference else ["model"]
    found = {"model": model, "reference": reference}
    rows = [
        [title, *(show(found[side].get(name)) for side in sides)] for name, title in TITLES.items() if name in model
    ]
    lines = table(["measure", *sides], rows)
    lines += ["Without any model:", "", *table(["rule", "accuracy", "how"], [
        [name.replace("_", " "), show(baselines[name]), baselines[name].get("what", baselines[name]["method"])]
        for name in ("longer_wins", "bag_of_words")])]  # fmt: skip
    lines += [
        "Accuracy by chosen's length over rejected's, relative to the longer:",
        "",
        *table(
            ["from", "to", "pairs", "accuracy"],
            [[f"{row['from']:+.0%}", f"{row['to']:+.0%}", row["n"], show(row)] for row in section["by_length"]],
        ),
    ]
    lines += [f"Rank correlation of margin and length difference: {show(section['length_correlation'])}.", ""]
    if "calibration" in section:
        found = section["calibration"]
        chance = found["ece_if_calibrated"]
        lines += [
            f"Calibration of the implied probability: ECE {show(found['ece'])}; calibrated, these confidences "
            f"would show {chance[0]:.3g} to {chance[1]:.3g}. Mean confidence {show(found['confidence'])}.",
            "",
        ]
        lines += table(
            ["confidence from", "to", "pairs", "mean confidence", "accuracy"],
            [
                [
                    f"{row['from']:.2f}",
                    f"{row['to']:.2f}",
                    row["n"],
                    f"{row['confidence']:.3f}",
                    show({"value": row["accuracy"], "interval": row["interval"]}),
                ]
                for row in found["table"]
                if row["n"]
            ],
        )
    return lines


def _distribution(section) -> list[str]:
    names = [name for name in ("reference", "model") if name in section]
    inside, outside = section["in_distribution"], section["out_of_distribution"]
    lines = [
        f"In: {inside['texts']} chosen responses, {inside['tokens']} tokens scored. Out: {outside['texts']} texts, "
        f"{outside['tokens']} tokens scored, each text its own context (mean {outside['mean_tokens']:.0f}, longest "
        f"{outside['longest']} scored tokens), its first token not scored.",
        "",
    ]
    rows = [
        [f"perplexity, {side}", *(show(section[name][side]["perplexity"]) for name in names)] for side in ("in", "out")
    ]
    rows += [
        [f"log-prob a token, {side}", *(show(section[name][side]["logp_per_token"]) for name in names)]
        for side in ("in", "out")
    ]
    rows += [[f"{measure}, {view.replace('_', ' ')}", *(show(section[name][view][measure]) for name in names)]
             for view in ("by_text", "by_token") for measure in ("overlap", "auroc", "wasserstein")]  # fmt: skip
    lines += table(["measure", *names], rows)
    if chance := section["model"]["by_text"]["if_alike"]:
        lines += [
            f"Were the texts of one kind, so many would show an overlap by text of {chance['overlap'][0]:.3g} to "
            f"{chance['overlap'][1]:.3g} and a Wasserstein distance of {chance['wasserstein'][0]:.3g} to "
            f"{chance['wasserstein'][1]:.3g}.",
            "",
        ]
    return lines


def _generations(section) -> list[str]:
    if "skipped" in section:
        return [f"None: {section['skipped']}.", ""]
    lines = [
        f"{section['prompts']} prompts, at most {section['max_new_tokens']} tokens, "
        f"temperature {section['temperature']}, seed {section['seed']}, the same for both.",
        "",
    ]
    for mode in ("greedy", "sampled"):
        sides = [side for side in ("reference", "model") if side in section[mode]]
        names = list(dict.fromkeys(name for side in sides for name in section[mode][side]))
        rows = [[name.replace("_", " "), *(show(section[mode][side].get(name)) for side in sides)] for name in names]
        lines += [f"### {mode}", "", *table(["measure", *sides], rows)]
        lines += [
            f"* {name.replace('_', ' ')}: {show(found)}" for name, found in section[mode].items() if name not in sides
        ] + [""]
    return lines


def samples(rows: list[dict], most: int) -> str:
    """Answers before and after as a Markdown table, greedy ones; long texts are cut for reading."""
    keys = [
        f"greedy/{side}/text" for side in ("reference", "model") if f"greedy/{side}/text" in (rows[0] if rows else {})
    ]
    cut = lambda text: text if len(text) <= 600 else text[:600] + " ..."
    return "\n".join(
        table(
            ["row", "prompt", *(key.split("/")[1] for key in keys)],
            [[row["row"], cut(row["prompt"]), *(cut(row[key]) for key in keys)] for row in rows[:most]],
        )
    )


def parquet(path: Path, columns: dict):
    """One row a data row; the column `row` is its number in the data."""
    pyarrow.parquet.write_table(pyarrow.table({name: pyarrow.array(values) for name, values in columns.items()}), path)


def tensorboard(folder: Path, report: dict, pages: dict[str, str], histograms: dict, figures: list[Path], step: int):
    """Scalars under eval/, histograms, PR curves, texts, figures, and a layout that joins train/, val/ and eval/."""
    board = Board(folder, total=0, quiet=True)
    board.scalars(dict(scalars(report)), step, "eval/")
    for name, values in histograms.items():
        board.histogram(f"eval/histogram/{name}", torch.as_tensor(np.ascontiguousarray(values)), step)
    for name, (labels, chances) in curves(report, histograms).items():
        board.writer.add_pr_curve(f"eval/pr/{name}", labels, chances, step)
    for name, text in pages.items():
        board.text(f"eval/{name}", text, step)
    for path in figures:
        board.writer.add_image(f"eval/{path.stem}", matplotlib.image.imread(path)[..., :3], step, dataformats="HWC")
    board.writer.add_custom_scalars(LAYOUT)
    board.close()


def scalars(report: dict):
    """(tag, value) of every number of the report that has an interval, the model's own without a prefix."""

    def walk(tag, thing):
        if isinstance(thing, dict) and "value" in thing and "method" in thing:
            if thing["value"] is not None and math.isfinite(thing["value"]):
                yield tag, thing["value"]
        elif isinstance(thing, dict):
            for key, value in thing.items():
                yield from walk(f"{tag}/{key}" if tag else key, value)

    preferences = report["preferences"]
    yield from walk("", preferences["model"])
    yield from walk("", {name: preferences[name] for name in ("reference", "calibration") if name in preferences})
    yield from walk("", {name: report[name] for name in ("baselines", "distribution", "generations")})


def curves(report: dict, histograms: dict) -> dict:
    """(labels, chances) of two questions: which answer is the chosen one, and which text is in distribution."""
    margin = np.asarray(histograms["margins"])
    sure = 1 / (1 + np.exp(-np.clip(margin, -500, 500)))
    found = {"chosen_or_rejected": (np.repeat([1, 0], len(margin)), np.concatenate([sure, 1 - sure]))}
    for name in ("reference", "model"):
        if f"{name}/logp_per_token_in" in histograms:
            both = [histograms[f"{name}/logp_per_token_{side}"] for side in ("in", "out")]
            found[f"in_or_out/{name}"] = (
                np.repeat([1, 0], list(map(len, both))),
                np.exp(np.minimum(np.concatenate(both), 0)),
            )
    return found


def histograms(columns: dict, of_pairs, of_texts, names: list[str]) -> dict:
    """Values by tag: margins, rewards, log-probabilities of responses, and those a token of both kinds of text."""
    found = {"margins": columns["margin"]}
    found |= {
        f"rewards_{side}": columns[f"{side}_reward"] for side in ("chosen", "rejected") if f"{side}_reward" in columns
    }
    for number, name in enumerate(names):
        found |= {f"{name}/logps_{side}": of_pairs.sums[number, :, i] for i, side in enumerate(("chosen", "rejected"))}
        found[f"{name}/logp_per_token_in"] = of_pairs.sums[number, :, 0] / of_pairs.lengths[:, 0]
        found[f"{name}/logp_per_token_out"] = of_texts.sums[number, :, 0] / of_texts.lengths[:, 0]
    return found


def closing(report: dict, folder: Path, carded: str | None) -> list[str]:
    """What is printed at the end: the verdict, the figures that it rests on, where everything lies."""
    model, out = report["preferences"]["model"], report["distribution"]["model"]["out"]
    first = [
        name for name in ("rewards/accuracies", "rewards/margins", "logps/margins", "logps/accuracies") if name in model
    ][:2]
    lines = [
        "",
        f"{report['preferences']['pairs']} pairs, {report['ood']['groups']} texts: {WORDS[report['verdict']['word']]}",
    ]
    lines += [f"{TITLES[name]:<26} {show(model[name])}" for name in first]
    lines += [f"{title:<26} {show(report['baselines'][name])}" for title, name in
              (("longer wins, no model", "longer_wins"), ("bag of words, no model", "bag_of_words"))]  # fmt: skip
    lines += [f"{'perplexity of texts':<26} {show(out['perplexity'])}", "",
              f"report       {folder / 'report.md'}, report.json, figures/, pairs.parquet, texts.parquet"]  # fmt: skip
    return (
        lines
        + ([f"model card   {Path(carded) / 'README.md'}"] if carded else [])
        + ["", f"  tensorboard --logdir {folder}"]
    )
