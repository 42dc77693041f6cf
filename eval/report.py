"""The report as a page, report.md, and as the closing lines on the terminal.

`report` below is the content of report.json, `section` one of its chapters. Lines are Markdown.
"""

from pathlib import Path

from eval import reward_measures
from eval.verdict import WORDS
from train.losses.metrics import LABELS
from train.methods.intervals import show
from train.run import commands

# Training's metrics, and what evaluation adds of its own.
TITLES = LABELS | {
    "logps/margins": "log-prob difference, nats",
    "logps/accuracies": "chosen is the likelier",
    "logps/accuracies_per_token": "chosen is the likelier a token",
}
TITLES_OF_REWARDS = {
    "rewards/accuracies": "accuracy",
    "rewards/accuracies_ties_lost": "accuracy, ties lost",
    "rewards/pair_accuracies": "accuracy of pairs",
    "rewards/row_margins": "margin of a row",
    "rewards/margins": "margin of a pair",
    "rewards/chosen": "score of chosen",
    "rewards/rejected": "score of rejected",
    "loss": "Bradley-Terry loss of a pair",
}
TITLES_OF_ANSWERS = {
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
TITLES_OF_SEPARATION = {
    "overlap": "overlap",
    "auroc": "AUROC, in over out",
    "wasserstein": "Wasserstein distance, nats",
}
# The columns of tables that compare, and of those that cannot.
SIDES = {"reference": "before (reference)", "model": "after (model)"}
ALONE = {"model": "model"}
LONGEST = 600  # characters of an answer that are shown


def markdown(report: dict, figures: list[Path]) -> str:
    """The report as a page; figures lie in the folder figures/ beside it."""
    drawn = {path.stem: [f"![{path.stem}](figures/{path.name})", ""] for path in figures}
    lines = []
    if "preferences" in report:
        lines += _language_model(report, drawn)
    if "rewards" in report:
        level = "##" if lines else "#"
        lines += _reward_model(report["rewards"], report["run"]["judge"], drawn, level)
    return "\n".join(lines).rstrip() + "\n"


def _language_model(report: dict, drawn: dict) -> list[str]:
    """The chapters on a language model. drawn: lines by figure."""
    return [
        *_head(report),
        "## Preferences",
        "",
        *_preferences(report),
        *drawn.get("preferences", []),
        "## In against out of distribution",
        "",
        *_distribution(report),
        *drawn.get("distribution", []),
        "## Generations",
        "",
        *_generations(report["generations"], report.get("prompts")),
    ]


def _reward_model(chapter: dict, judge: dict, drawn: dict, level: str) -> list[str]:
    """The chapter on a reward model. level: of its heading, in hashes."""
    section, recipe, verdict = chapter["preferences"], chapter["recipe"], chapter["verdict"]
    model, data = section["model"], chapter["data"]
    methods = "; ".join(sorted({estimate["method"] for estimate in model.values()}))
    source = f", as in {recipe['from']}" if recipe["from"] else ""
    lines = [
        f"{level} {chapter['model']}",
        "",
        f"As a reward model: **{reward_measures.WORDS[verdict['word']]}**.",
        "",
        *(f"* {reason}" for reason in verdict["reasons"]),
        "",
        *_training(chapter | {"reference": None}),
        f"Evaluated with at most {recipe['max_length']} tokens, prompts at most "
        f"{recipe['max_prompt_length'] or recipe['max_length']}{source}; computed "
        f"{judge['computed']}, {judge['precision']}; the score is read at: {judge['reads']}. Brackets "
        f"are 95 % intervals ({methods}).",
        "",
        f"{section['rows']} rows of {section['prompts']} prompts with {section['answers']} answers "
        f"from {_source(data)} ({data['dropped']} rows dropped, {data['truncated']} truncated).",
        "",
        *table(
            ["measure", "value"],
            [
                [title, show(model[name])]
                for name, title in TITLES_OF_REWARDS.items()
                if name in model
            ],
        ),
        *_benchmark(chapter.get("benchmark")),
    ]
    if by := chapter.get("by"):
        rows = [
            [row["name"], row["n"], show(row), f"{row['ties_lost']:.4g}", show(row["margin"])]
            for row in by
        ]
        lines += table(["subset", "rows", "accuracy", "ties lost", "margin"], rows)
    lines += ["Without any model:", "", *_baselines(chapter["baselines"])]
    lines += _by_length(section)
    lines += [
        "Rank correlation of the score and the tokens of an answer: "
        f"{show(section['score_length_correlation'])}.",
        "",
    ]
    return lines + _calibration(section["calibration"]) + drawn.get("rewards", [])


def _benchmark(benchmark: dict | None) -> list[str]:
    """The sections of RewardBench or RewardBench 2."""
    if benchmark is None:
        return []
    rows = [[name, each["n"], show(each)] for name, each in benchmark["sections"].items()]
    if score := benchmark["score"]:
        rows.append(["score", score["n"], show(score)])
    lines = table([benchmark["name"], "rows", "score, as it defines it"], rows)
    if missing := benchmark["missing"]:
        lines += [f"No score of the whole; no rows of: {', '.join(missing)}.", ""]
        if benchmark["score"]:
            lines[-2] = f"No rows of: {', '.join(missing)}."
    return lines


def _head(report: dict) -> list[str]:
    """Title, verdict, and how model and evaluation were made."""
    recipe, verdict = report["recipe"], report["verdict"]
    if report["reference"]:
        summary = f"Against the reference {report['reference']}: **{WORDS[verdict['word']]}**."
    else:
        summary = "Without a reference, margins are differences of log-probabilities, in nats."
        if reward := report["preferences"].get("reward"):
            summary = f"There is no reference to compare with. A reward is {reward}."
    measures = report["preferences"]["model"].values()
    methods = "; ".join(sorted({measure["method"] for measure in measures}))
    source = f", as in {recipe['from']}" if recipe["from"] else ""
    return [
        f"# {report['model']}",
        "",
        summary,
        "",
        *(f"* {reason}" for reason in verdict["reasons"]),
        "",
        *_training(report),
        f"Evaluated with beta {recipe['beta']:g}, at most {recipe['max_length']} tokens, prompts at "
        f"most {recipe['max_prompt_length'] or recipe['max_length']}, {recipe['layout']} rows, "
        f"{report['run']['precision']}{source}. Brackets are 95 % intervals ({methods}).",
        "",
    ]


def _training(report: dict) -> list[str]:
    """How the model was trained, where that is known."""
    trained = report["trained"]
    if not trained:
        return []
    noun = "prompts" if "algorithm" in trained else "pairs"
    facts = {
        "the {} loss": trained["loss"],
        "the algorithm {}": trained.get("algorithm"),
        "beta {:g}": trained["beta"],
        "learning rate {:g}": trained["lr"],
        "{} steps": trained["steps"],
        f"{{}} {noun} a step": trained["batch_size"],
    }
    known = ", ".join(form.format(value) for form, value in facts.items() if value is not None)
    line = f"Trained from {trained['from']}: {known}, on {trained['data']} ({trained['pairs']} {noun})."
    reference = trained["reference"]
    if reference and report["reference"] and reference != report["reference"]:
        line += f" Its reference in training was another: {reference}."
    if earned := trained.get("earned"):
        line += (
            f" Its reward in training ({', '.join(earned['rewards'])}) on {earned['prompts']} held-out "
            f"prompts: {earned['before']:.4g} before, {show(earned['after'])} after."
        )
    return [line, ""]


def _preferences(report: dict) -> list[str]:
    section = report["preferences"]
    sides = _sides(section)
    lines = [
        f"{section['pairs']} pairs of {section['prompts']} prompts from {_source(report['data'])} "
        f"({report['data']['dropped']} rows dropped, {report['data']['truncated']} truncated).",
        "",
        *([f"A reward is {section['reward']}.", ""] if section.get("reward") else []),
        *table(
            ["measure", *sides.values()],
            [
                [TITLES[name], *(show(section[side].get(name)) for side in sides)]
                for name in section["model"]
            ],
        ),
    ]
    if not section.get("loss_by_pair", True):
        lines += [
            "The loss is that of each pair by itself, with a step's baseline 0 and no weights of "
            "pairs: not the one that training shows.",
            "",
        ]
    lines += ["Without any model:", "", *_baselines(report["baselines"])]
    lines += _by_length(section)
    if "calibration" in section:
        lines += _calibration(section["calibration"])
    return lines


def _source(described: dict) -> str:
    """The sources of a data set, and which rows of theirs they are."""
    which = described.get("which", "--data")
    return ", ".join(described["sources"]) + (f" ({which})" if which != "--data" else "")


def _by_length(section: dict) -> list[str]:
    return [
        "Accuracy by the difference of chosen's and rejected's tokens, relative to the longer:",
        "",
        *table(
            ["from", "to", "pairs", "accuracy"],
            [
                [f"{row['from']:+.0%}", f"{row['to']:+.0%}", row["n"], show(row)]
                for row in section["by_length"]
            ],
        ),
        f"Rank correlation of margin and length difference: {show(section['length_correlation'])}.",
        "",
    ]


def _baselines(section: dict) -> list[str]:
    rows = []
    for name in ("longer_wins", "longest_of_row_wins", "bag_of_words"):
        if name not in section:
            continue
        rule = section[name]
        rows.append([name.replace("_", " "), show(rule), rule.get("what", rule["method"])])
    return table(["rule", "accuracy", "how"], rows)


def _calibration(section: dict) -> list[str]:
    low, high = section["ece_if_calibrated"]
    rows = []
    for row in section["table"]:
        if row["n"]:
            accuracy = show({"value": row["accuracy"], "interval": row["interval"]})
            edges = [f"{row['from']:.2f}", f"{row['to']:.2f}"]
            rows.append([*edges, row["n"], f"{row['confidence']:.3f}", accuracy])
    return [
        f"Calibration of the implied probability: ECE {show(section['ece'])}, where a calibrated "
        f"model of the same confidences would show {low:.3g} to {high:.3g}. Mean confidence "
        f"{show(section['confidence'])}.",
        "",
        *table(["confidence from", "to", "pairs", "mean confidence", "accuracy"], rows),
    ]


def _distribution(report: dict) -> list[str]:
    section = report["distribution"]
    change = section.get("change")
    sides = _sides(section)
    inside, outside = section["in_distribution"], section["out_of_distribution"]
    begin_with = report["ood"].get("begin_with")
    first_token = "not scored" if begin_with is None else f"scored after {begin_with!r}"
    lines = [
        f"In: the {inside['texts']} chosen answers, {inside['tokens']} tokens scored. Out: "
        f"{outside['texts']} texts of {', '.join(report['ood']['sources'])}, {outside['tokens']} "
        f"tokens scored, each text its own context (mean {outside['mean_tokens']:.0f}, longest "
        f"{outside['longest']} scored tokens), its first token {first_token}.",
        "",
    ]
    header, rows = ["measure", *sides.values()], []
    for side in ("in", "out"):
        rows.append([f"perplexity, {side}", *(show(section[s][side]["perplexity"]) for s in sides)])
        if change:
            rows[-1].append(f"x {show(change[side]['perplexity_ratio'], 5)}")
    for side in ("in", "out"):
        logps = (show(section[s][side]["logp_per_token"]) for s in sides)
        rows.append([f"log-prob, nats a token, {side}", *logps])
        if change:
            rows[-1].append(show(change[side]["logp_per_token"], 3))
    for view in ("by_text", "by_token"):
        for name, title in TITLES_OF_SEPARATION.items():
            values = (show(section[s][view][name]) for s in sides)
            rows.append([f"{title}, {view.replace('_', ' ')}", *values])
            if change:
                rows[-1].append("")
    if change:
        header.append("change")
    lines += table(header, rows)
    if chance := section["model"]["by_text"]["if_alike"]:
        (low, high), (near, far) = chance["overlap"], chance["wasserstein"]
        lines += [
            "Were answers and texts alike, samples of this size would show an overlap by text of "
            f"{low:.3g} to {high:.3g} and a Wasserstein distance of {near:.3g} to {far:.3g} nats.",
            "",
        ]
    return lines


def _generations(section: dict, prompts: dict | None) -> list[str]:
    """prompts: the data set that they are of, where it is not that of the pairs."""
    if "skipped" in section:
        return [f"None: {section['skipped']}.", ""]
    both = ", the same prompts and noise for both" if "reference" in section["greedy"] else ""
    of = f" of {_source(prompts)}" if prompts else ""
    lines = [
        f"{section['prompts']} prompts{of}, at most {section['max_new_tokens']} tokens{both}; the "
        f"sampled answers at temperature {section['temperature']:g}, seed {section['seed']}.",
        "",
    ]
    for mode in ("greedy", "sampled"):
        estimates = section[mode]
        columns = dict(_sides(estimates))
        if "change" in estimates:
            columns["change"] = "change"
        rows = [
            [title, *(show(estimates[column].get(name)) for column in columns)]
            for name, title in TITLES_OF_ANSWERS.items()
            if name in estimates["model"]
        ]
        lines += [f"### {mode}", "", *table(["measure", *columns.values()], rows)]
        if "unchanged" in estimates:
            lines.append(f"* the same answer, token for token: {show(estimates['unchanged'])}")
        if "win_rate" in estimates:
            rate = show(estimates["win_rate"])
            lines.append(f"* win rate of the model, by the reward model: {rate}")
        lines += ["", *samples(section["examples"], mode)]
    return lines


def samples(rows: list[dict], mode: str) -> list[str]:
    """The `mode` answers to some prompts before and after as a table; long texts are cut for
    reading.

    rows: eval.generations.Generated.rows, some of them.
    """
    sides = _sides([side for side in SIDES if rows and f"{mode}/{side}/text" in rows[0]])
    cells = []
    for row in rows:
        # the number stands before the prompt: TensorBoard breaks a column of its own into letters
        texts = [f"{row['row']}: {row['prompt']}"]
        texts += [row[f"{mode}/{side}/text"] for side in sides]
        cells.append([_cut(text) for text in texts])
    return table(["row: prompt", *sides.values()], cells)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def _sides(section) -> dict[str, str]:
    """The columns of a table, keys and titles: before and after, or the model alone."""
    if "reference" not in section:
        return ALONE
    return {side: title for side, title in SIDES.items() if side in section}


def table(header: list, rows: list[list]) -> list[str]:
    """A Markdown table, and a blank line."""
    return [_line(header), "|---" * len(header) + "|", *map(_line, rows), ""]


def _line(cells: list) -> str:
    texts = (str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells)
    return f"| {' | '.join(texts)} |"


def closing(
    report: dict, folder: Path, model_dirs: list[str], looks: dict[str, str], has_curves: bool
) -> list[str]:
    """What is printed at the end: the verdict, the figures that it rests on, where everything lies.

    model_dirs: the model directories whose cards were written. looks: where trackers show it, by
    name. has_curves: there are TensorBoard's files.
    """
    lines = []
    if "preferences" in report:
        lines += _closing_language_model(report)
    if "rewards" in report:
        lines += _closing_reward_model(report["rewards"])
    lines += ["", f"report       {folder / 'report.md'}, report.json, figures/, *.parquet"]
    logs = folder
    for model_dir in model_dirs:
        lines.append(f"model card   {Path(model_dir) / 'README.md'}")
        run = Path(model_dir).resolve().parent
        if folder.resolve().is_relative_to(run):  # training's curves beside the evaluation's
            logs = run
    lines += [f"{name:<12} {look}" for name, look in looks.items()]
    return [*lines, "", f"  {commands.tensorboard(logs)}"] if has_curves else lines


def _closing_reward_model(chapter: dict) -> list[str]:
    section = chapter["preferences"]
    shown = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    rows = [(TITLES_OF_REWARDS[name], show(section["model"][name])) for name in shown]
    for name in ("longer_wins", "bag_of_words"):
        rows.append((f"{name.replace('_', ' ')}, no model", show(chapter["baselines"][name])))
    rows.append(("score and length, rank", show(section["score_length_correlation"])))
    if benchmark := chapter.get("benchmark"):
        rows += [(f"{benchmark['name']}: {n}", show(s)) for n, s in benchmark["sections"].items()]
        if benchmark["score"]:
            rows.append((benchmark["name"], show(benchmark["score"])))
    word = reward_measures.WORDS[chapter["verdict"]["word"]]
    head = f"{section['rows']} rows of answers, reward model: {word}"
    return ["", head, *(f"{title:<26} {value}" for title, value in rows)]


def _closing_language_model(report: dict) -> list[str]:
    model, outside = report["preferences"]["model"], report["distribution"]["model"]["out"]
    names = ("rewards/accuracies", "rewards/margins", "chosen_fell")
    if names[0] not in model:  # there is no reference, and the loss's rewards need one
        names = ("logps/accuracies", "logps/margins")
    names = [name for name in names if name in model]
    rows = [(TITLES[name], show(model[name])) for name in names]
    for name in ("longer_wins", "bag_of_words"):
        rows.append((f"{name.replace('_', ' ')}, no model", show(report["baselines"][name])))
    perplexity = show(outside["perplexity"])
    if change := report["distribution"].get("change"):
        perplexity += f", x {show(change['out']['perplexity_ratio'], 5)}"
    rows.append(("perplexity of other text", perplexity))
    word = WORDS[report["verdict"]["word"]]
    head = f"{report['preferences']['pairs']} pairs, {report['ood']['groups']} texts: {word}"
    lines = ["", head, *(f"{title:<26} {value}" for title, value in rows)]
    if formula := report["preferences"].get("reward"):
        lines.append(f"(a reward is {formula})")
    return lines
