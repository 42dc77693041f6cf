"""What a model makes of preference pairs, of other text and of prompts; better or worse than its
reference, or neither.

    deepspeed eval/evaluate.py --model runs/dpo/model --reference DIR     # built-in pairs and
    passages deepspeed eval/evaluate.py --model DIR --reference DIR --data pairs.jsonl --ood
    wikitext \
        --output runs/eval
    torchrun --nproc_per_node 2 eval/evaluate.py --model DIR --max_rows 200 --output runs/eval

Scores every row exactly once, with training's own rows, packing and forward pass (eval/scores.py),
and writes report.json, report.md, figures/, pairs.parquet, texts.parquet, generations.parquet and
tensorboard/ to --output; a model directory that training wrote gets its card, README.md. The
chapters: eval/preferences.py, eval/baselines.py, eval/distribution.py, eval/generations.py;
intervals are eval/intervals.py's.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train import (
    config,
    settings,
)

SHARDED = (
    "--ds_config shards the models over the ranks, and decoding needs whole ones; leave it out where a model's "
    "weights fit on one device"
)


@dataclasses.dataclass
class Settings:
    """Evaluate a causal language model on preference pairs, on other text, and by what it writes."""

    model: str | None = None
    """The model: a directory or hub name. None: SmolLM2-135M-Instruct."""
    reference: str | None = None
    """The model to compare with, usually the one that training started from. None: margins are
    log-prob differences.
    """
    data: list[str] | None = None
    """Pairs: jsonl, json, csv, parquet files, save_to_disk folders or hub names. None: the built-in
    held-out pairs.
    """
    ood: list[str] | None = None
    """Other text: rows with a column "text", a .txt file of paragraphs, or wikitext. None:
    eval/passages.jsonl.
    """
    reward_model: str | None = None
    """A directory that AutoModelForSequenceClassification loads, which scores what the models
    write.
    """
    output: str = settings.flag("runs/eval", may_change=True)
    """Folder for the report."""
    max_rows: int | None = None
    """Most pairs, and most texts, the first ones. None: all."""
    ood_tokens: int | None = None
    """Most tokens of other text; the last text is cut to fit. None: all."""
    prompts: int = 32
    """Distinct prompts, the first ones, that the models answer; 0: none."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    temperature: float = 1.0
    """Of the sampled answers; at 1, and only there, they give the KL to the reference."""
    beta: float | None = None
    """Reward = beta * log(pi / pi_ref). None, also in the five below: from the model's run.json,
    else 0.1.
    """
    loss: str | None = None
    """The loss, a row of train/losses/composition.py's LOSSES."""
    loss_args: dict | None = None
    """The loss's own parameters."""
    max_length: int | None = None
    """Most tokens of a prompt and a response together, and of a text."""
    max_prompt_length: int | None = None
    """Most tokens of a prompt; longer ones keep their end."""
    layout: Literal["packed", "padded"] | None = None
    """packed: shared prompts without padding. padded: a padded sequence a response, for models that
    packing refuses.
    """
    precision: Literal["auto", "bf16", "fp32"] | None = None
    """bf16, fp32, or auto: bf16 on CUDA and fp32 on CPU. None: from the model's run.json, else
    auto.
    """
    allow_control_tokens: bool | None = None
    """Keep rows whose text spells out control tokens such as <|im_end|>. None: from run.json, else
    false.
    """
    max_dropped: float = 0.05
    """Largest share of unusable pairs before the data is refused; texts may be dropped freely."""
    micro_tokens: int | None = settings.flag(None, may_change=True)
    """Tokens a packed batch may hold. None: as many as keep the machine busy
    (train/engine/memory.py), on any ranks.
    """
    batch_size: int = 32
    """Answers decoded at once."""
    ds_config: str | None = settings.flag(None, may_change=True)
    """DeepSpeed JSON: ds_configs/frozen_zero3.json shards the models over the ranks, which then are
    scored but write nothing. None: whole on each rank.
    """
    card: bool = True
    """Write results into the model card of a model directory that training wrote."""
    allow_pickle: bool = False
    """Read weights from pickles (pytorch_model.bin) where there are no safetensors; torch's
    weights_only holds.
    """
    trust_remote_code: bool = False
    """Let the model's repository run its own Python code."""
    seed: int = 0
    """Seed of the sampled answers."""

    def __post_init__(self):
        at_least = {
            "max_rows": 1,
            "ood_tokens": 2,
            "prompts": 0,
            "max_new_tokens": 1,
            "temperature": 0,
            "micro_tokens": 1,
            "batch_size": 1,
            "max_length": 2,
            "max_prompt_length": 1,
        }
        settings.check_bounds(self, at_least, shares=("max_dropped",), positive=("beta",))
        if self.reward_model and not self.prompts:
            raise ValueError(
                "--reward_model scores what the models write, and with --prompts 0 they write nothing"
            )


def main():
    settings = config.parse(Settings)
    from train import quiet

    quiet.silence_libraries()  # before the libraries that it quiets
    from eval import scores
    from train.engine import dist, memory
    from train.losses import composition
    from train.run import folder, session

    device, began = dist.init(), time.time()
    with session.at_the_door():
        folder = folder.Run(settings.output, config.as_dict(settings))
        if folder.finished:
            folder.say(
                f"{folder.path} holds this evaluation, finished; another --output repeats it"
            )
            return dist.shutdown()
        inputs = open_inputs(settings, folder)
        loss_of = composition.choose(
            inputs.recipe["loss"], inputs.recipe["beta"], inputs.recipe["loss_args"]
        )
        with memory.room_for("loading and checking the models", f"({scores.LESS})"):
            models = open_models(settings, folder, inputs, device)
    folder.start()
    if models.sharded and settings.prompts:
        folder.say(f"no generations: {SHARDED}")
    judged = list(models.by_name.values())
    of_pairs = scores.score_all(inputs.pairs, judged, models.budget, device, "pairs")
    of_texts = scores.score_all(inputs.texts, judged, models.budget, device, "texts")
    seconds = time.time() - began
    written = generate(settings, inputs, models, device)
    if dist.is_main():
        scored = of_pairs, of_texts, written
        content, tables = measure(settings, inputs, models, loss_of, scored, seconds)
        write(settings, folder, inputs, models, content, tables, scored)
    dist.barrier()
    dist.shutdown()


def open_inputs(settings, folder):
    """The recipe of the model's training, the tokenizer, pairs, texts and prompts. Every rank calls
    this.
    """
    from eval import generations, inputs
    from train.engine import dist
    from train.models import pretrained
    from train.run import folder

    record, where = inputs.training_record(settings.model)
    recipe = inputs.recipe(settings, record, where)
    path = folder.model_path(settings.model)
    tokenizer = pretrained.load_tokenizer(path, settings.trust_remote_code)
    folder.note(model=path, reference_model=settings.reference, recipe=recipe)
    with dist.main_process_first():  # rank 0 tokenises, the others find it in the cache
        pairs, pair_sources = inputs.read_pairs(settings, recipe, tokenizer)
        texts, text_sources = inputs.read_texts(settings, recipe, tokenizer, folder.path / "texts")
    folder.dropped({"data": pairs.dropped, "ood": texts.dropped})
    answers = inputs.pair_texts(pairs, pair_sources)
    if settings.reference:
        inputs.same_tokens(tokenizer, settings.reference, answers[0], settings.trust_remote_code)
    described = {
        "data": folder.describe(pairs, pair_sources),
        "ood": folder.describe(texts, text_sources),
    }
    folder.note(**described)
    prompts = (
        generations.prompts_of(pair_sources, pairs, settings.prompts) if settings.prompts else []
    )
    return inputs.Inputs(path, record, recipe, tokenizer, pairs, texts, answers, prompts, described)


def open_models(settings, folder, opened, device):
    """The frozen model and reference, checked on the first pairs, and the reward model. Every rank
    calls this.
    """
    from eval import inputs
    from train.data import chat
    from train.engine import checks, ds_config, loading, memory
    from train.methods import rewards
    from train.methods.reference import Live
    from train.models import generate
    from train.run import folder

    recipe = opened.recipe
    precision = ds_config.resolve_precision(recipe["precision"], device)
    policy = ds_config.resolve(
        {"zero_optimization": {"stage": recipe["stage"]}}, precision
    )  # as the model was trained
    ds = ds_config.resolve_frozen(
        ds_config.read_config(settings.ds_config) if settings.ds_config else {}, policy
    )
    sharded = ds_config.zero_stage(ds) == 3
    if sharded and settings.reward_model:
        raise ValueError(f"--reward_model scores what the models write; {SHARDED}")

    def load(path):
        module = loading.load_backbone(
            path,
            ds,
            precision,
            recipe["stage"],
            device,
            recipe["layout"],
            settings.trust_remote_code,
            settings.allow_pickle,
        )
        chat.check_fit(module.lm.config, opened.tokenizer, recipe["max_length"])
        return Live(module, ds)

    model = load(opened.path)
    same = settings.reference and Path(settings.reference).resolve() == Path(opened.path).resolve()
    reference = model if same else load(settings.reference) if settings.reference else None
    checks.start(
        model, reference or model, opened.pairs, device, precision, same_weights=bool(same)
    )
    judge = None
    if settings.reward_model:
        judge = rewards.RewardModel(
            settings.reward_model, device, model.module.autocast, settings.trust_remote_code
        )
        judge.check(opened.prompts, settings.max_new_tokens)
    for one in () if sharded or not opened.prompts else filter(None, (model, reference)):
        generate.check(
            one.module.lm, [prompt.ids for prompt in opened.prompts], settings.max_new_tokens
        )
    budget = settings.micro_tokens or (
        memory.CUDA_TOKENS if device.type == "cuda" else memory.CPU_TOKENS
    )
    facts = {
        "precision": precision,
        "row_tokens": budget,
        "hardware": folder.hardware(device),
        "versions": folder.versions(),
    }
    folder.note(**facts)
    return inputs.Models(model, reference, judge, sharded, budget, facts)


def generate(settings, opened, models, device):
    """What the models write: eval.generations.Generated, or the reason why they do not. Every rank
    calls this.
    """
    from eval import generations

    if not settings.prompts:
        return "--prompts is 0"
    if models.sharded:
        return SHARDED
    return generations.compare(
        models.model,
        models.reference,
        opened.prompts,
        opened.tokenizer,
        device,
        budget=models.budget,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
        batch_size=settings.batch_size,
        reward_model=models.judge,
    )


def measure(settings, opened, models, loss_of, scored, seconds):
    """The report, and the per-row tables by name. Rank 0 alone calls this."""
    from eval import baselines, distribution, inputs, preferences
    from eval import report as reporting
    from train.models import builtin
    from train.run import card

    of_pairs, of_texts, written = scored
    preferred, columns = preferences.measure(of_pairs, opened.recipe["beta"], loss_of)
    trivial, more = baselines.measure(*opened.answers, columns["prompt"], columns["correct"])
    names = list(models.by_name)
    text, text_columns = distribution.measure(of_pairs, of_texts, names)
    unchanged = len(names) == 2 and all(
        (s.tokens[0] == s.tokens[1]).all() for s in (of_pairs, of_texts)
    )
    answered = {"skipped": written} if isinstance(written, str) else written.report
    tables = {"pairs": columns | more, "texts": text_columns}
    if not isinstance(written, str) and written.rows:
        tables["generations"] = {
            name: [row[name] for row in written.rows] for name in written.rows[0]
        }
    content = {
        "model": card.shown(settings.model or builtin.REPOSITORY),
        "reference": settings.reference and card.shown(settings.reference),
        "trained": inputs.trained(opened.record),
        "recipe": opened.recipe,
        **{
            name: {**one, "sources": list(map(card.shown, one["sources"]))}
            for name, one in opened.described.items()
        },
        "verdict": reporting.verdict(preferred, trivial, text, answered, unchanged),
        "preferences": preferred,
        "baselines": trivial,
        "distribution": text,
        "generations": answered,
        "run": models.facts | {"flags": inputs.shown_flags(settings), "seconds_scoring": seconds},
    }
    return reporting.clean(content), tables


def write(settings, folder, opened, models, content, tables, scored):
    """Everything in --output and the model's card, then where it lies. Rank 0 alone calls this."""
    from eval import figures, tensorboard
    from eval import report as reporting
    from train.files import write_json
    from train.run import card

    of_pairs, of_texts, written = scored
    drawn = figures.draw(folder.path / "figures", content, tables["pairs"])
    page = reporting.markdown(content, drawn)
    write_json(folder.path / "report.json", content)
    (folder.path / "report.md").write_text(page, encoding="utf-8")
    for name, columns in tables.items():
        reporting.parquet(folder.path / f"{name}.parquet", columns)
    values = tensorboard.histograms(tables["pairs"], of_pairs, of_texts, list(models.by_name))
    pages = {
        "report": reporting.markdown(content, [])
    }  # the figures stand among TensorBoard's images
    if not isinstance(written, str):
        values |= {
            name: column for name, column in written.values.items() if not name.endswith("ended")
        }
        pages |= {
            f"generations/{mode}": "\n".join(
                reporting.samples(written.rows, mode, settings.prompts)
            )
            for mode in ("greedy", "sampled")
        }
    tensorboard.write(
        folder.path / "tensorboard", content, pages, values, drawn, opened.record.get("steps", 0)
    )
    carded = settings.card and opened.recipe["from"] is not None
    if carded:
        card.update(Path(opened.path), content, drawn, opened.record)
    folder.finish(verdict=content["verdict"]["word"])
    for line in reporting.closing(content, folder.path, opened.path if carded else None):
        folder.say(line)


if __name__ == "__main__":
    main()
