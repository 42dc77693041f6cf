"""The report: verdict, report.json, report.md, rows as parquet, closing lines. Rank 0 alone calls
what is in here.
"""

import math
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from train.losses.metrics import LABELS

MATERIAL = 0.02  # a perplexity that is shown to move by less than this share is called unchanged
# Training's metrics, and what evaluation adds of its own.
TITLES = LABELS | {
    "logps/margins": "log-prob difference, nats",
    "logps/accuracies": "chosen is the likelier",
    "logps/accuracies_per_token": "chosen is the likelier a token",
}
ANSWERS = {
    "length": "length, tokens",
    "ended": "ended by themselves",
    "repetition": "repeated 4-grams",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "reward": "score of the reward model",
    "kl_k1": "KL to the reference, nats an answer (k1)",
    "kl_k1_per_token": "KL to the reference, nats a token (k1)",
    "kl_k3": "KL to the reference, nats an answer (k3)",
    "kl_k3_per_token": "KL to the reference, nats a token (k3)",
}
SIDES, ALONE = {"reference": "before (reference)", "model": "after (model)"}, {"model": "model"}
WORDS = {
    "better": "better",
    "worse": "worse",
    "different": "merely different",
    "unchanged": "unchanged",
    "not compared": "not compared: there is no reference",
}


def verdict(
    preferences: dict, baselines: dict, distribution: dict, generations: dict, unchanged: bool
) -> dict:
    """Better, worse or merely different than the reference, by intervals, in one word, and the
    reasons in sentences.

    Better: accuracy above one half and margin above 0, at no price. Worse: accuracy and margin
    below, or no gain and a price. Else merely different. A price: other text is less likely by a
    material amount, or the reward model prefers the reference's sampled answers.
    """
    trivial = _trivial(baselines)
    if "change" not in distribution:
        return {"word": "not compared", "reasons": trivial}
    if unchanged:
        return {
            "word": "unchanged",
            "reasons": ["The model scores every response and text as the reference does."],
        }
    model = preferences["model"]
    accuracy, margin, fell = (
        model[name] for name in ("rewards/accuracies", "rewards/margins", "chosen_fell")
    )
    ratio = distribution["change"]["out"]["perplexity_ratio"]
    above = _side(accuracy, 0.5)
    gain = above if above == _side(margin, 0) else 0
    pairs = {
        1: "prefers the chosen answers more than the reference does",
        0: "is not shown to prefer the chosen answers more than the reference does",
        -1: "prefers the rejected answers more than the reference does",
    }[gain]
    losing, gaining = _side(ratio, 1 + MATERIAL) > 0, _side(ratio, 1 - MATERIAL) < 0
    other = (
        "less likely than" if losing else "more likely than" if gaining else "about as likely as"
    )
    written, disliked = _written(generations)
    reasons = [
        f"The model {pairs}: reward accuracy {percent(accuracy)} (no preference: 50 %), margin {show(margin)}.",
        *trivial,
        f"The chosen answer itself became less likely in {percent(fell)} of the pairs.",
        f"Text from elsewhere is {other} before: perplexity x {show(ratio, 5)}.",
        *written,
    ]
    price = losing or disliked
    word = (
        "better"
        if gain > 0 and not price
        else "worse"
        if gain < 0 or (gain == 0 and price)
        else "different"
    )
    return {"word": word, "reasons": reasons}


def _trivial(baselines) -> list[str]:
    """What the model's accuracy is to be compared with."""
    bag, longer = baselines["bag_of_words"], baselines["longer_wins"]
    if bag["value"] is None:
        return []
    return [
        f'Without any model a bag of words is right on {bag["value"]:.1%} of these pairs, "longer wins" on '
        f"{longer['value']:.1%}; the model's accuracy less the bag of words': "
        f"{percent(baselines['model_minus_bag_of_words'])}."
    ]


def _written(generations) -> tuple[list[str], bool]:
    """A sentence on the sampled answers, and whether the reward model prefers the reference's."""
    sampled = generations.get("sampled", {})
    if "change" not in sampled:
        return [], False
    change = sampled["change"]
    told = (
        f"Sampled answers changed in length by {show(change['length'], 3)} tokens, in repeated 4-grams by "
        f"{percent(change['repetition'])}, in ending by themselves by {percent(change['ended'])}"
    )
    if found := sampled["model"].get("kl_k3"):
        told += f"; KL to the reference {show(found, 3)} nats an answer"
    if won := sampled.get("win_rate"):
        told += f"; the reward model prefers the new one in {percent(won)}"
    return [f"{told}."], bool(won) and _side(won, 0.5) < 0


def _side(measure: dict, neutral: float) -> int:
    """1 where the whole interval lies above `neutral`, -1 where below, else 0."""
    low, high = measure["interval"] or (-math.inf, math.inf)
    return int(low > neutral) - int(high < neutral)


def show(measure: dict | None, digits: int = 4) -> str:
    """A measure as text: the value and its 95 % interval."""
    if not measure or measure["value"] is None or math.isnan(measure["value"]):
        return "-"
    text, interval = lambda x: f"{x:.{digits}g}", measure.get("interval")
    return text(measure["value"]) + (
        f" [{text(interval[0])}, {text(interval[1])}]" if interval else ""
    )


def percent(measure: dict) -> str:
    """A share, or a change of one, as text."""
    interval = measure.get("interval")
    return f"{measure['value']:.1%}" + (
        f" [{interval[0]:.1%}, {interval[1]:.1%}]" if interval else ""
    )


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
    preferences, recipe, made = report["preferences"], report["recipe"], report["trained"]
    against = (
        f"Against the reference {report['reference']}: **{WORDS[report['verdict']['word']]}**."
    )
    alone = "Without a reference, margins are differences of log-probabilities, in nats."
    lines = [f"# {report['model']}", "", against if report["reference"] else alone, ""]
    lines += [f"* {reason}" for reason in report["verdict"]["reasons"]] + [""]
    if made:
        known = {
            "the {} loss": made["loss"],
            "beta {:g}": made["beta"],
            "learning rate {:g}": made["lr"],
            "{} steps": made["steps"],
            "{} pairs a step": made["batch_size"],
        }
        told = ", ".join(form.format(value) for form, value in known.items() if value is not None)
        other = (
            made["reference"] and report["reference"] and made["reference"] != report["reference"]
        )
        lines += [
            f"Trained from {made['from']}: {told}, on {made['data']} ({made['pairs']} pairs)."
            + (f" Its reference in training was another: {made['reference']}." if other else ""),
            "",
        ]
    lines += [
        f"Evaluated with beta {recipe['beta']:g}, at most {recipe['max_length']} tokens, prompts at most "
        f"{recipe['max_prompt_length'] or recipe['max_length']}, {recipe['layout']} rows, {report['run']['precision']}"
        + (f", as in {recipe['from']}" if recipe["from"] else "")
        + f". Brackets are 95 % intervals ({_methods(preferences)}).",
        "",
    ]
    drawn = {path.stem: [f"![{path.stem}](figures/{path.name})", ""] for path in figures}
    lines += [
        "## Preferences",
        "",
        f"{preferences['pairs']} pairs of {preferences['prompts']} prompts from "
        f"{', '.join(report['data']['sources'])} ({report['data']['dropped']} rows dropped, "
        f"{report['data']['truncated']} truncated).",
        "",
    ]
    lines += _preferences(preferences, report["baselines"]) + drawn.get("preferences", [])
    lines += [
        "## In against out of distribution",
        "",
        *_distribution(report),
        *drawn.get("distribution", []),
    ]
    lines += ["## Generations", "", *_generations(report["generations"])]
    return "\n".join(lines).rstrip() + "\n"


def _sides(section) -> dict:
    """The columns of a table, keys and titles: before and after, or the model alone."""
    return (
        {side: title for side, title in SIDES.items() if side in section}
        if "reference" in section
        else ALONE
    )


def _methods(preferences) -> str:
    return "; ".join(sorted({measure["method"] for measure in preferences["model"].values()}))


def table(header: list, rows: list[list]) -> list[str]:
    """A Markdown table."""
    line = lambda cells: (
        "| "
        + " | ".join(str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells)
        + " |"
    )
    return [line(header), "|---" * len(header) + "|", *map(line, rows), ""]


def _preferences(section, baselines) -> list[str]:
    sides = _sides(section)
    rows = [
        [TITLES[name], *(show(section[side].get(name)) for side in sides)]
        for name in section["model"]
    ]
    lines = table(["measure", *sides.values()], rows)
    if not section.get("loss_by_pair", True):
        lines += [
            "The loss is that of each pair by itself, with a step's baseline 0 and no weights of tokens: not the "
            "one that training shows.",
            "",
        ]
    lines += [
        "Without any model:",
        "",
        *table(
            ["rule", "accuracy", "how"],
            [
                [
                    name.replace("_", " "),
                    show(baselines[name]),
                    baselines[name].get("what", baselines[name]["method"]),
                ]
                for name in ("longer_wins", "bag_of_words")
            ],
        ),
    ]
    by_length = [
        [f"{row['from']:+.0%}", f"{row['to']:+.0%}", row["n"], show(row)]
        for row in section["by_length"]
    ]
    lines += [
        "Accuracy by the difference of chosen's and rejected's tokens, relative to the longer:",
        "",
    ]
    lines += table(["from", "to", "pairs", "accuracy"], by_length)
    lines += [
        f"Rank correlation of margin and length difference: {show(section['length_correlation'])}.",
        "",
    ]
    if "calibration" in section:
        found = section["calibration"]
        chance = found["ece_if_calibrated"]
        lines += [
            f"Calibration of the implied probability: ECE {show(found['ece'])}, where a calibrated model of the same "
            f"confidences would show {chance[0]:.3g} to {chance[1]:.3g}. Mean confidence {show(found['confidence'])}.",
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


def _distribution(report) -> list[str]:
    section, change = report["distribution"], report["distribution"].get("change")
    names = _sides(section)
    inside, outside = section["in_distribution"], section["out_of_distribution"]
    lines = [
        f"In: the {inside['texts']} chosen answers, {inside['tokens']} tokens scored. Out: {outside['texts']} texts of "
        f"{', '.join(report['ood']['sources'])}, {outside['tokens']} tokens scored, each text its own context (mean "
        f"{outside['mean_tokens']:.0f}, longest {outside['longest']} scored tokens), its first token not scored.",
        "",
    ]
    rows = []
    for title, key, moved in (
        ("perplexity", "perplexity", lambda side: f"x {show(side['perplexity_ratio'], 5)}"),
        ("log-prob, nats a token", "logp_per_token", lambda side: show(side["logp_per_token"], 3)),
    ):
        rows += [
            [
                f"{title}, {side}",
                *(show(section[name][side][key]) for name in names),
                *([moved(change[side])] if change else []),
            ]
            for side in ("in", "out")
        ]
    rows += [
        [
            f"{title}, {view.replace('_', ' ')}",
            *(show(section[name][view][measure]) for name in names),
            *([""] if change else []),
        ]
        for view in ("by_text", "by_token")
        for measure, title in (
            ("overlap", "overlap"),
            ("auroc", "AUROC, in over out"),
            ("wasserstein", "Wasserstein distance, nats"),
        )
    ]
    lines += table(["measure", *names.values(), *(["change"] if change else [])], rows)
    if chance := section["model"]["by_text"]["if_alike"]:
        lines += [
            f"Were answers and texts alike, samples of this size would show an overlap by text of "
            f"{chance['overlap'][0]:.3g} to {chance['overlap'][1]:.3g} and a Wasserstein distance of "
            f"{chance['wasserstein'][0]:.3g} to {chance['wasserstein'][1]:.3g} nats.",
            "",
        ]
    return lines


def _generations(section) -> list[str]:
    if "skipped" in section:
        return [f"None: {section['skipped']}.", ""]
    lines = [
        f"{section['prompts']} prompts, at most {section['max_new_tokens']} tokens"
        + (", the same prompts and noise for both" if "reference" in section["greedy"] else "")
        + f"; the sampled answers at temperature {section['temperature']:g}, seed {section['seed']}.",
        "",
    ]
    for mode in ("greedy", "sampled"):
        found = section[mode]
        columns = _sides(found) | ({"change": "change"} if "change" in found else {})
        rows = [
            [title, *(show(found[column].get(name)) for column in columns)]
            for name, title in ANSWERS.items()
            if name in found["model"]
        ]
        lines += [f"### {mode}", "", *table(["measure", *columns.values()], rows)]
        for name, title in (
            ("unchanged", "the same answer, token for token"),
            ("win_rate", "win rate of the model, by the reward model"),
        ):
            lines += [f"* {title}: {show(found[name])}"] if name in found else []
        lines += ["", *samples(section["examples"], mode, len(section["examples"]))]
    return lines


def samples(rows: list[dict], mode: str, most: int) -> list[str]:
    """The `mode` answers of `most` rows before and after as a Markdown table; long texts are cut
    for reading.
    """
    sides = _sides([side for side in SIDES if rows and f"{mode}/{side}/text" in rows[0]])
    cut = lambda text: text if len(text) <= 600 else text[:600] + " ..."
    cells = [
        [row["row"], cut(row["prompt"]), *(cut(row[f"{mode}/{side}/text"]) for side in sides)]
        for row in rows[:most]
    ]
    return table(["row", "prompt", *sides.values()], cells)


def parquet(path: Path, columns: dict):
    """One row a data row; the column `row` is its number in the data."""
    pyarrow.parquet.write_table(
        pyarrow.table({name: pyarrow.array(values) for name, values in columns.items()}), path
    )


def closing(report: dict, folder: Path, carded: str | None) -> list[str]:
    """What is printed at the end: the verdict, the figures that it rests on, where everything lies."""
    model, out = report["preferences"]["model"], report["distribution"]["model"]["out"]
    names = ("rewards/accuracies", "rewards/margins", "chosen_fell")
    names = names if names[0] in model else ("logps/accuracies", "logps/margins")
    rows = [(TITLES[name], show(model[name])) for name in names]
    rows += [
        (f"{name.replace('_', ' ')}, no model", show(report["baselines"][name]))
        for name in ("longer_wins", "bag_of_words")
    ]
    change = report["distribution"].get("change")
    rows.append(
        (
            "perplexity of other text",
            show(out["perplexity"])
            + (f", x {show(change['out']['perplexity_ratio'], 5)}" if change else ""),
        )
    )
    word = WORDS[report["verdict"]["word"]]
    run = (
        Path(carded).resolve().parent if carded else folder
    )  # training's curves beside the evaluation's
    logs = run if folder.resolve().is_relative_to(run) else folder
    return [
        "",
        f"{report['preferences']['pairs']} pairs, {report['ood']['groups']} texts: {word}",
        *(f"{title:<26} {found}" for title, found in rows),
        "",
        f"report       {folder / 'report.md'}, report.json, figures/, *.parquet",
        *([f"model card   {Path(carded) / 'README.md'}"] if carded else []),
        "",
        f"  tensorboard --logdir {logs}",
    ]
