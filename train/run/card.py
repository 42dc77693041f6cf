"""The model card: README.md of a model directory, filled from what a run knows of itself and what
its evaluation found.

    export.model_directory(..., write_card=card.from_run(run.record))      # training
    card.update(model_dir, report, figures, record)                        # evaluation

Nothing in it is guessed: a fact that run.json or report.json lacks is left out. Of a local path the
last component is shown, and of the flags those alone that train/settings.py gives a title for the
card, so that nothing else of a command line can slip in. What stands between the two MARKS belongs
to evaluations, a section a data set: another evaluation on the same data replaces its section, and
its figures in the model-index, and leaves those on other data. The rest of a README.md, edited by
hand or not, is left alone.
"""

import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from train.data.sources import READERS, suffix_of
from train.files import write_text
from train.losses import composition, reward
from train.losses.algorithms import ALGORITHMS
from train.losses.metrics import LABELS, METRICS, POLICY_METRICS, REWARD_METRICS, Metric
from train.models import builtin
from train.settings import Policy, Preference, Reward, card_titles, with_share

README = "README.md"
FIGURES = "figures"
MARKS = ("<!-- evaluation: begin -->", "<!-- evaluation: end -->")
# before the section of a data set, between the MARKS, with what identifies the data
SECTION = re.compile(r"^<!-- data: (\S+) -->\n", re.M)
# org/name; a path that exists goes before it, as where data are read (train/data/sources.py)
EXAMPLES = 3  # answers before and after that a card shows
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
LICENCE = "apache-2.0"  # of the built-in model and of the built-in pairs, which are English
# Training's metrics for the model-index: name in METRICS, name there.
TRAINED = (
    ("rewards/accuracies", "reward_accuracy"),
    ("rewards/margins", "reward_margin"),
    ("loss", "loss"),
    ("reward", "reward"),
)
# report.json's measures: title, name in the model-index ("": not there), path of keys; SIDE is
# model or reference.
SIDE = "*"
MEASURES = (
    (
        LABELS["rewards/accuracies"],
        "reward_accuracy",
        ("preferences", SIDE, "rewards/accuracies"),
    ),
    (LABELS["rewards/margins"], "reward_margin", ("preferences", SIDE, "rewards/margins")),
    (LABELS["loss"], "loss", ("preferences", SIDE, "loss")),
    (
        "pairs whose chosen answer became less likely",
        "chosen_fell",
        ("preferences", SIDE, "chosen_fell"),
    ),
    (LABELS["logps/chosen_per_token"], "", ("preferences", SIDE, "logps/chosen_per_token")),
    (LABELS["logps/rejected_per_token"], "", ("preferences", SIDE, "logps/rejected_per_token")),
    ("perplexity of chosen answers", "", ("distribution", SIDE, "in", "perplexity")),
    ("perplexity of out-of-distribution text", "", ("distribution", SIDE, "out", "perplexity")),
    ("bag of words on the same pairs, no model: accuracy", "", ("baselines", "bag_of_words")),
    ("longer answer wins, no model: accuracy", "", ("baselines", "longer_wins")),
    (
        "overlap of chosen answers and out-of-distribution text",
        "",
        ("distribution", SIDE, "by_token", "overlap"),
    ),
    ("sampled answers: length, tokens", "", ("generations", "sampled", SIDE, "length")),
    ("sampled answers: end by themselves", "", ("generations", "sampled", SIDE, "ended")),
    ("sampled answers: distinct-1", "", ("generations", "sampled", SIDE, "distinct_1")),
    ("sampled answers: distinct-2", "", ("generations", "sampled", SIDE, "distinct_2")),
    ("sampled answers: repeated 4-grams", "", ("generations", "sampled", SIDE, "repetition")),
    ("sampled answers: KL to the reference, nats", "kl", ("generations", "sampled", SIDE, "kl_k3")),
    ("sampled answers: score of the reward model", "", ("generations", "sampled", SIDE, "reward")),
    (
        "sampled answers: win rate over the reference",
        "win_rate",
        ("generations", "sampled", "win_rate"),
    ),
)
# What one gets right without a model, as run.json has it, and its title.
BASELINES = {"longer_wins": "longer answer wins", "bag_of_words": "bag of words"}
LOAD = """## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")  # this directory, or its name once it is on a hub
tokenizer = AutoTokenizer.from_pretrained(".")
messages = [{"role": "user", "content": "How was your day?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=128, do_sample=True)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""

LOAD_REWARD = """## How to load

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(".")  # this directory, or its name once it is on a hub
tokenizer = AutoTokenizer.from_pretrained(".")
messages = [{"role": "user", "content": "How was your day?"}, {"role": "assistant", "content": "Fine, thanks!"}]
text = tokenizer.apply_chat_template(messages, tokenize=False)
inputs = tokenizer([text], add_special_tokens=False, padding=True, return_tensors="pt")
print(model(**inputs).logits[:, 0])  # higher is better; differences count, the zero does not
```
"""


class Task(NamedTuple):
    """What cards of one sort of training have in common."""

    pipeline: str  # the hub's name of what the model does
    title: str  # in the model-index
    tag: str
    trained_on: str
    metrics: tuple[Metric, ...]
    losses: dict  # whose rows have a `paper`
    usual_loss: str  # the method's name takes the place of this loss's
    method: str
    titles: dict[str, str]  # of flags
    load: str
    flag: str = "loss"  # which names a row of `losses`
    noun: str = "pairs"  # what it is evaluated on


TASKS = {
    "preference": Task(
        pipeline="text-generation",
        title="Preference alignment",
        tag="preference-optimization",
        trained_on="preference pairs",
        metrics=METRICS,
        losses=composition.LOSSES,
        usual_loss="sigmoid",
        method="dpo",
        titles=card_titles(Preference),
        load=LOAD,
    ),
    "reward": Task(
        pipeline="text-classification",
        title="Reward modelling",
        tag="reward-model",
        trained_on="judged answers",
        metrics=REWARD_METRICS,
        losses=reward.LOSSES,
        usual_loss="bradley_terry",
        method="reward",
        titles=card_titles(Reward),
        load=LOAD_REWARD,
    ),
    "policy": Task(
        pipeline="text-generation",
        title="Reinforcement learning",
        tag="reinforcement-learning",
        trained_on="its own answers to prompts, by their rewards,",
        metrics=POLICY_METRICS,
        losses=ALGORITHMS,
        usual_loss="ppo",
        method="ppo",
        titles=card_titles(Policy),
        load=LOAD,
        flag="algorithm",
        noun="prompts",
    ),
}


def task_of(record: dict) -> Task:
    """The sort of training that run.json is of."""
    return TASKS[record.get("task", "preference")]


def from_run(record: dict, **later) -> Callable[[Path], None]:
    """A function that writes a run's card into a folder, for `export.model_directory` to call.

    `record`: what run.json holds, read when the card is written. `later`: facts that run.json gets
    only after the export, say `seconds=`.
    """

    def write_card(folder):
        _write(Path(folder), _metadata(record), _body(record | later))

    return write_card


def update(
    model_dir, report: dict, figures: Sequence[Path] = (), record: dict | None = None
) -> Path | None:
    """Put an evaluation's report.json and figures into the card of `model_dir`, in the place of its
    data set; the card's path. Rank 0 calls this.

    `record`: the run.json of the run that made the model, whose card is written anew where
    README.md has none of our marks or is not there. Without it a README.md that is there is added
    to; where there is none, nothing is written and None returned: another's model directory is not
    ours to fill.
    """
    folder = Path(model_dir)
    path = folder / README
    card = ModelCard.load(path) if path.exists() else None
    if card is None and not record:
        return None
    if record and (card is None or MARKS[0] not in card.text):
        metadata, body = _metadata(record), _body(record)
    else:
        metadata, body = card.data, card.text
    task = task_of(record or {})
    data = report.get("data")
    results = [
        _result(name, title, measure, data, task)
        for title, name, keys in MEASURES
        if name and (measure := _at(report, keys))
    ]
    if results:
        metadata.model_name = metadata.model_name or folder.resolve().name
        others = [r for r in metadata.eval_results or () if not _same_data(r, results[0])]
        metadata.eval_results = others + results
    sections = _sections(body)
    key = _key_of(data)
    place = f"{FIGURES}/{key}" if [*sections][:1] not in ([], [key]) else FIGURES
    for figure in figures:
        (folder / place).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(figure, folder / place / Path(figure).name)
    section = _evaluation(report, [f"{place}/{Path(figure).name}" for figure in figures])
    sections[key] = section
    text = "\n\n".join(
        f"<!-- data: {key} -->\n{each.strip()}" if key else each.strip()
        for key, each in sections.items()
    )
    _write(folder, metadata, _between(body, text))
    return path


def _sections(body: str) -> dict[str, str]:
    """The sections of evaluations by what identifies their data, in the card's order; under "" what
    an earlier version wrote, which knew of one section only.
    """
    inside = body.partition(MARKS[0])[2].partition(MARKS[1])[0]
    before, *parts = SECTION.split(inside)  # ..., key, section, key, section
    old = {"": before} if before.strip() else {}
    return old | dict(zip(parts[::2], parts[1::2], strict=True))


def _key_of(described: dict | None) -> str:
    """What identifies a data set in a card: which rows it is of, else its name, without a space."""
    fingerprint = (described or {}).get("rows_fingerprint")
    return fingerprint[:12] if fingerprint else re.sub(r"\W+", "-", shown_sources(described))


def _same_data(one: EvalResult, other: EvalResult) -> bool:
    """Whether two entries of the model-index are of the same rows."""
    names = ("dataset_name", "dataset_revision")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _write(folder: Path, metadata: ModelCardData, body: str):
    """Write README.md, whole or not at all.

    ModelCard parses the text again before anything is written: a model-index that is not valid
    raises.
    """
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body.strip()}\n")
    write_text(folder / README, str(card))


def _between(body: str, section: str) -> str:
    """`body` with `section` in place of what stands between the marks; at the end where there are
    no marks.
    """
    before, begin, rest = body.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (begin and end):
        before, after = body.rstrip() + "\n\n", "\n"
    return f"{before}{MARKS[0]}\n{section}\n{MARKS[1]}{after}"


def shown(source) -> str:
    """A source as a reader may see it: a hub name as it is, of a local path its last component, or
    the last two where that is "model", as a run's is.
    """
    text = str(source)
    if is_hub(text):
        return text
    parts = Path(text).parts
    # the built-in files lie wherever the repository was checked out
    if parts[-4:-1] == ("train", "data", "builtin") or parts[-2:] == ("eval", "passages.jsonl"):
        return f"zeropref's built-in {parts[-1]}"
    return "/".join(parts[-2 if parts[-1:] == ("model",) else -1 :]).lstrip("/") or text


def is_hub(source) -> bool:
    """Whether a flag's value names a repository on the hub: org/name that is no path here, with
    :config or @split for data.
    """
    name = re.split("[:@]", str(source))[0]
    local = os.path.exists(str(source)) or name.startswith((".", "~")) or suffix_of(name) in READERS
    return HUB_NAME.fullmatch(name) is not None and not local


def shown_sources(described: dict | None) -> str:
    """The sources of a data set that `train.run.folder.describe` described, as a reader may see
    them.
    """
    sources = (described or {}).get("sources", ())
    return ", ".join(map(shown, sources)) or "unnamed pairs"


def base_of(record: dict) -> tuple[str, bool]:
    """(name of the model that training began with, whether that is a repository on the hub)."""
    model = record["flags"].get("model")
    return (builtin.REPOSITORY, True) if model is None else (shown(model), is_hub(model))


def _method(record: dict) -> tuple[str, str | None]:
    """(short name, arXiv id of the paper) of the run's loss, of the first one in a weighted sum."""
    task = task_of(record)
    loss = record["flags"].get(task.flag) or "preference"
    first = re.split("[:,]", loss)[0].strip()
    paper = task.losses[first].paper if first in task.losses else None
    return task.method if loss == task.usual_loss else loss, paper


def _metadata(record: dict) -> ModelCardData:
    """The card's YAML head, with the model-index of training's own evaluation."""
    flags = record["flags"]
    task = task_of(record)
    base, on_hub = base_of(record)
    method, paper = _method(record)
    sources = [with_share(word)[0] for word in flags.get("data") or ()]
    datasets = [re.split("[:@]", source)[0] for source in sources if is_hub(source)]
    last = _evaluations(record)[-1]
    title_of = {metric.name: metric.label for metric in task.metrics}
    results = []
    for metric, name in TRAINED:
        if math.isfinite(last.get(metric, math.nan)):
            measure = {
                "value": last[metric],
                "n": last.get("pairs"),
                "interval": last.get(f"{metric}_interval"),
            }
            results.append(_result(name, title_of[metric], measure, record.get("eval_data"), task))
    builtin_only = flags.get("model") is None and flags.get("data") is None
    tags = ["zeropref", "deepspeed", task.tag, method]
    return ModelCardData(
        license=LICENCE if builtin_only else None,
        language="en" if builtin_only else None,
        library_name="transformers",
        pipeline_tag=task.pipeline,
        tags=tags + [f"arxiv:{paper}"] if paper else tags,
        model_name=f"{base.rpartition('/')[2]}-{method}",
        base_model=base if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        datasets=datasets or None,
        eval_results=results or None,
    )


def _result(
    name: str, title: str, measure: dict, data: dict | None, task: Task = TASKS["preference"]
) -> EvalResult:
    """An entry of the model-index. An interval that is no number is left out: JSON has no NaN.

    data: what folder.describe says of the data; the revision tells rows of the same name apart.
    """
    dataset = shown_sources(data)
    interval = measure.get("interval")
    args = {}
    if measure.get("n") is not None:
        args["n"] = measure["n"]
    if interval is not None and not _broken(interval):
        args["interval_95"] = interval
    return EvalResult(
        task_type=task.pipeline,
        task_name=task.title,
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_revision=((data or {}).get("rows_fingerprint") or "")[:12] or None,
        metric_type=name,
        metric_name=title,
        metric_value=measure["value"],
        metric_args=args or None,
    )


def _broken(interval) -> bool:
    """Whether an end is NaN, infinite or null."""
    return not all(isinstance(end, float | int) and math.isfinite(end) for end in interval)


def _at(report: dict, keys: Sequence[str], side: str = "model") -> dict | None:
    """The measure at a path of keys; None where there is none, or no finite value."""
    for key in keys:
        report = report.get(side if key == SIDE else key) if isinstance(report, dict) else None
    value = report.get("value") if isinstance(report, dict) else None
    return report if isinstance(value, float | int) and math.isfinite(value) else None


def _evaluations(record: dict) -> list[dict]:
    """run.json's evaluations from first to last; one that is empty where there was none."""
    by_step = record.get("evaluations") or {}  # JSON's keys are strings: "60" comes before "155"
    return [by_step[step] for step in sorted(by_step, key=int)] or [{}]


def _table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table."""

    def line(cells):
        escaped = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(escaped)} |\n"

    return "".join(map(line, [head, ["---"] * len(head), *rows]))


def _number(value) -> str:
    """A float with four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(interval) -> str:
    return "" if not interval or _broken(interval) else f"[{interval[0]:.4g}, {interval[1]:.4g}]"


def _body(record: dict) -> str:
    """The card of a training run, with a place for an evaluation."""
    flags = record["flags"]
    base, on_hub = base_of(record)
    method, paper = _method(record)
    link = f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`"
    cited = f" ([arXiv {paper}](https://arxiv.org/abs/{paper}))" if paper else ""
    other_reference = flags.get("reference_model")
    reference = f"`{shown(other_reference)}`" if other_reference else "the model as training began"
    origin = _origin(record)
    task = task_of(record)
    compared = "" if task.pipeline != "text-generation" else f" The reference was {reference}."
    parts = [
        f"# {base.rpartition('/')[2]}-{method}\n",
        f"{link}, trained on {task.trained_on} with the `{flags.get(task.flag)}` {task.flag}{cited} by zeropref on "
        f"DeepSpeed.{compared} Beyond what is written below nothing was tested; "
        "what the base model's card says of its uses, limits and licence holds here too.\n",
        f"The weights that training began with: {origin}.\n" if origin else "",
        _results(record),
        _scores(record),
        f"{MARKS[0]}\n{MARKS[1]}\n",
        task.load,
        "## Training\n",
        _data_table(record),
        _hyperparameters(record),
        _machine(record),
    ]
    return "\n".join(part for part in parts if part)


def _origin(record: dict) -> str:
    """Where the built-in model's weights came from, which differ by source; nothing for other
    models.
    """
    if record["flags"].get("model") is not None or "model" not in record:
        return ""
    try:
        return builtin.source(record["model"])
    except ValueError:  # the folder does not say: nothing is guessed
        return ""


def _results(record: dict) -> str:
    """What training's own held-out pairs say, before and after."""
    evaluations = _evaluations(record)
    first, last = evaluations[0], evaluations[-1]
    rows = []
    for metric in task_of(record).metrics:
        name = metric.name
        if metric.in_table and name in first and name in last:
            interval = _interval(last.get(f"{name}_interval"))
            rows.append((metric.title, _number(first[name]), _number(last[name]), interval))
    if not rows:
        return ""
    baselines = record.get("baselines") or {}
    rows += [
        (f"without a model: {title}", "", _number(baselines[name]), "")
        for name, title in BASELINES.items()
        if name in baselines
    ]
    dataset = shown_sources(record.get("eval_data"))
    table = _table(("", "before", "after", "95 % interval"), rows)
    noun = task_of(record).noun
    if noun == "pairs" and "rewards/margins" not in last:
        noun = "answers"  # judged one by one
    table += _compared(record.get("comparison") or {})
    examples = _before_and_after(record.get("answers") or {})
    about = f"\nHere {record['rewards']}.\n" if "rewards" in record else ""
    return (
        f"## Results of training\n\n{last.get('pairs')} held-out {noun} of {dataset}:\n\n"
        f"{table}{about}{examples}"
    )


def _compared(comparison: dict) -> str:
    """How the answers after did against those before, prompt by prompt."""
    if not (win_rate := comparison.get("win_rate")):
        return ""
    interval = _interval(win_rate.get("interval"))
    return (
        f"\nAnswers to the same prompts with the same noise earn more after than before in "
        f"{_number(win_rate['value'])} {interval} of the cases, ties counted one half; "
        f"{_number(comparison['unchanged']['value'])} are the same.\n"
    )


def _before_and_after(answers: dict) -> str:
    """The first held-out prompts with their answers before and after, and the rewards of those."""
    parts = []
    pairs = zip(answers.get("before", ()), answers.get("after", ()), strict=False)
    for before, after in [*pairs][:EXAMPLES]:
        parts.append(f"\n**Prompt**\n\n{_literal(before['prompt'])}")
        for when, one in (("Before", before), ("After", after)):
            parts.append(f"{when} (reward {_number(one['reward'])})\n\n{_literal(one['answer'])}")
    return "\n".join(parts)


def _scores(record: dict) -> str:
    """What a reward model's scores are like."""
    scale = record.get("scores")
    if not scale:
        return ""
    return (
        f"Scores of {scale['answers']} {scale['data']} answers: mean {_number(scale['mean'])}, standard "
        f"deviation {_number(scale['std'])}. They are in config.json as `score_mean` and `score_std`; the "
        "model's scores are as they are, not divided by them.\n"
    )


def _data_table(record: dict) -> str:
    """The data sets: where from, how large, and what identifies them."""
    rows = []
    for title, name in (("training", "data"), ("held out", "eval_data")):
        if described := record.get(name):
            counts = (f"{described[key]:,}" for key in ("groups", "tokens", "dropped", "truncated"))
            fingerprint = f"`{described['fingerprint'][:16]}`"
            rows.append((title, _shown_mix(described), *counts, fingerprint))
    if not rows:
        return ""
    head = ("data", "source", "pairs", "tokens", "dropped", "truncated", "fingerprint")
    return _table(head, rows)


def _shown_mix(described: dict) -> str:
    """The sources of a data set, with the shares that an epoch took of them."""
    parts = (described.get("by_source") or {}).values()
    if all(part.get("share", 1) == 1 for part in parts):
        return shown_sources(described)
    return ", ".join(
        shown(part["source"]) + (f" ({part['share']:g} an epoch)" if part["share"] < 1 else "")
        for part in parts
    )


def _hyperparameters(record: dict) -> str:
    """The flags that have a title for the card, and what the run made of others."""
    flags = record["flags"]
    rows = [
        (title, _number(flags[name]))
        for name, title in task_of(record).titles.items()
        if flags.get(name) not in (None, {})
    ]
    rows += [(name, record[name]) for name in ("steps", "precision") if name in record]
    if "deepspeed" in record:
        stage = record["deepspeed"].get("zero_optimization", {}).get("stage", 0)
        rows.append(("ZeRO stage", stage))
    if record.get("skipped_steps"):
        rows.append(("steps skipped for a non-finite gradient", record["skipped_steps"]))
    return _table(("hyper-parameter", "value"), rows)


def _machine(record: dict) -> str:
    """Hardware, time, speed and versions, a line each."""
    lines = []
    if hardware := record.get("hardware"):
        processes = f"{hardware['world']} process{'es' if hardware['world'] > 1 else ''}"
        threads = f" of {hardware['threads']} threads" if hardware["device"] == "cpu" else ""
        where = f"{hardware['kind']} ({hardware['device']})"
        lines.append(f"Hardware: {processes}{threads} on {where}.")
    if "seconds" in record:
        lines.append(f"Time: {_duration(record['seconds'])}, evaluation included.")
    if perf := record.get("perf"):
        pairs, tokens = perf["perf/pairs_per_second"], perf["perf/tokens_per_second"]
        lines.append(f"Speed at the end: {pairs:.3g} pairs/s, {tokens:.4g} tokens/s.")
    if versions := record.get("versions"):
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines.append(f"Versions: {listed}.")
    # two spaces at a line's end break it in Markdown
    return "\n".join(f"{line}  " for line in lines) + "\n" if lines else ""


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _evaluation(report: dict, figures: Sequence[str]) -> str:
    """The section that an evaluation fills: measures of both models, figures, examples."""
    rows = []
    for title, _, keys in MEASURES:
        after = _at(report, keys)
        before = _at(report, keys, "reference") if SIDE in keys else None
        if after:
            rows.append(
                (
                    title,
                    _number(before["value"]) if before else "",
                    _number(after["value"]),
                    _interval(after.get("interval")),
                    after.get("n", ""),
                )
            )
    reference = report.get("reference")
    verdict = report.get("verdict") or {"reasons": ()}
    data = report.get("data") or {}
    which = data.get("which", "--data")
    named = shown_sources(data) + (f", {which}" if which != "--data" else "")
    parts = [f"## Evaluation on {named}\n"]
    if reference and "word" in verdict:
        parts.append(f"Against {shown(reference)}: **{verdict['word']}**.\n")
    parts += [f"* {reason}" for reason in verdict["reasons"]]
    compared = "; without a reference to compare with"
    if reference:
        compared = f"; before is {shown(reference)}, after this model"
    elif "reference" not in report:  # of a reward model, which has none
        compared = ""
    parts.append(f"\nPairs of {named}{compared}.\n")
    if rows:
        parts.append(_table(("", "before", "after", "95 % interval", "n"), rows))
    if reward := (report.get("preferences") or {}).get("reward"):
        parts.append(f"Here a reward is {reward}.\n")
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})\n" for name in figures]
    if examples := (report.get("generations") or {}).get("examples"):
        parts += ["### Answers\n", *map(_example, examples)]
    return "\n".join(parts)


def _example(row: dict) -> str:
    """A prompt and what was written to it, as literal text."""
    lines = [f"**Prompt**\n\n{_literal(row['prompt'])}"]
    for mode in ("greedy", "sampled"):
        for side, when in (("reference", "Before"), ("model", "After")):
            key = f"{mode}/{side}"
            if f"{key}/text" in row:
                cut = "" if row[f"{key}/ended"] else ", cut at the token limit"
                lines.append(f"{when} ({mode}{cut})\n\n{_literal(row[f'{key}/text'])}")
    return "\n".join(lines)


def _literal(text: str) -> str:
    """A fenced block whose fence is longer than any in `text`; our marks in it are broken up."""
    # what a model writes must neither end its block nor look like a place for an evaluation
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    text = re.sub("<!--(?= (evaluation|data): )", "<!- -", text)
    return f"{fence}text\n{text}\n{fence}\n"
