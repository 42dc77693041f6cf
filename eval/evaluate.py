"""What a model makes of preference pairs, of other text and of prompts; better or worse than its
reference, or neither. What a reward model makes of pairs, or of the best of several answers.

    # the built-in pairs and passages
    deepspeed eval/evaluate.py --model runs/dpo/model --reference DIR
    deepspeed eval/evaluate.py --model DIR --reference DIR --data pairs.jsonl --ood wikitext \
        --output runs/eval
    torchrun --nproc_per_node 2 eval/evaluate.py --model DIR --max_rows 200 --output runs/eval
    # a reward model alone
    deepspeed eval/evaluate.py --reward_model runs/reward/model --data rewardbench.parquet --by subset

Scores every row exactly once, with training's own rows, packing and forward pass (eval/scores.py),
and writes report.json, report.md, figures/, pairs.parquet, texts.parquet, generations.parquet,
rewards.parquet, answers.parquet and tensorboard/ to --output; a model directory that training wrote
gets its card, README.md.

The chapters, in the order in which `main` comes to them: eval/inputs.py and eval/models.py (what is
evaluated, and on what), eval/scores.py (the forward pass), eval/generations.py (what the models
write), eval/output.py, which puts together eval/preferences.py, eval/baselines.py,
eval/distribution.py and eval/verdict.py, and writes eval/report.py's page, eval/figures.py and
eval/board.py. Those of a reward model are eval/reward_inputs.py, eval/judges.py (the model and its
scores), eval/reward_measures.py and eval/benchmarks.py. The statistics of samples are
eval/measures.py's, their intervals train/methods/intervals.py's.
"""

import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import ClassVar, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# light modules: flags are read before torch is imported (train/config.py says why)
from train import config, quiet, settings

# What several flags need.
LANGUAGE_MODEL = settings.AnyOf(
    (settings.Needs("model"), settings.Needs("reward_model", unset=True)),
    "where --reward_model stands alone: pass --model, too",
)
# where there is none, 0 prompts are as good as any number
NO_PROMPTS = settings.Needs("prompts", unset=True)
PROMPTS = LANGUAGE_MODEL._replace(needs=(*LANGUAGE_MODEL.needs, NO_PROMPTS))
ANSWERS = (LANGUAGE_MODEL, settings.Needs("prompts"))


@dataclasses.dataclass
class Settings:
    """Evaluate a causal language model on preference pairs, on other text, and by what it writes; or
    a reward model on pairs.
    """

    help_groups: ClassVar = settings.HELP_GROUPS
    used_most: ClassVar = """model reference data output reward_model by ood max_rows prompts
        ds_config"""

    model: str | None = None
    """The model: a directory or hub name. None: SmolLM2-135M-Instruct, or where there is a
    --reward_model, none.
    """
    reference: str | None = settings.flag(None, needs=LANGUAGE_MODEL)
    """The model to compare with, usually the one that training started from. None: margins are
    log-prob differences.
    """
    data: list[str] | None = None
    """Pairs: jsonl, json, csv, parquet files, save_to_disk folders or hub names. None: those that
    the model's training held out, as its run.json says, else the built-in held-out pairs.
    """
    columns: list[str] | None = None
    """Columns that have other names in --data, say prompt=question chosen=better rejected=worse."""
    ood: list[str] | None = settings.flag(None, needs=LANGUAGE_MODEL)
    """Other text: rows with a column "text", a .txt file of paragraphs, or wikitext. None:
    eval/passages.jsonl.
    """
    reward_model: str | None = None
    """A directory or hub name that AutoModelForSequenceClassification loads with one label. It is
    evaluated on --data, whose chosen or rejected may then be lists of answers; beside a --model it
    scores what the models write, too.
    """
    by: str | None = settings.flag(None, needs=settings.Needs("reward_model"))
    """A column of strings that the reward model's rows are told apart by, say subset. RewardBench's
    and RewardBench 2's subsets give their section scores.
    """
    output: str = settings.flag("runs/eval", may_change=True)
    """Folder for the report."""
    max_rows: int | None = None
    """Most pairs, and most texts, the first ones. None: all."""
    ood_tokens: int | None = settings.flag(None, needs=LANGUAGE_MODEL)
    """Most tokens of other text; the last text is cut to fit. None: all."""
    prompts: int = settings.flag(32, needs=PROMPTS)
    """Distinct prompts, the first ones, that the models answer; 0: none."""
    max_new_tokens: int = settings.flag(128, needs=ANSWERS)
    """Most tokens of an answer."""
    temperature: float = settings.flag(1.0, needs=ANSWERS)
    """Of the sampled answers; at 1, and only there, they give the KL to the reference."""
    beta: float | None = settings.flag(None, needs=LANGUAGE_MODEL)
    """A reward is beta * log(pi / pi_ref), or what the loss's row says. None, also in the five
    below: from the model's run.json, else 0.1.
    """
    loss: str | None = settings.flag(None, needs=LANGUAGE_MODEL)
    """The loss, a row of train/losses/composition.py's LOSSES."""
    loss_args: settings.Arguments | None = settings.flag(None, needs=LANGUAGE_MODEL)
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
    truncate_prompt: Literal["keep_end", "keep_system_and_end"] | None = None
    """What a prompt that is too long keeps. None, also in the two below: from the model's run.json,
    else as training has it.
    """
    allow_template_changes: bool | None = None
    """Keep answers that the chat template cuts or changes, as it renders them."""
    max_implausible: float | None = None
    """Largest share of pairs that can hardly be meant before the data is refused; 1 takes all."""
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
    batch_size: int = settings.flag(32, needs=ANSWERS)
    """Answers decoded at once."""
    ds_config: str | None = settings.flag(None, may_change=True)
    """DeepSpeed JSON: ds_configs/frozen_zero3.json shards the models over the ranks, which then are
    scored but write nothing. None: whole on each rank.
    """
    report_to: list[settings.Tracker] = settings.flag(["tensorboard"], may_change=True)
    """Who is told: tensorboard, which shows most, and others, which get scalars and flags; none:
    --output's files alone.
    """
    card: bool = True
    """Write results into the model card of a model directory that training wrote."""
    allow_pickle: bool = False
    """Read weights from pickles (pytorch_model.bin) where there are no safetensors; torch's
    weights_only holds.
    """
    trust_remote_code: bool = False
    """Let the model's repository run its own Python code."""
    seed: int = settings.flag(0, needs=(*ANSWERS, settings.Needs("temperature")))
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
        settings.check_bounds(
            self, at_least, shares=("max_dropped", "max_implausible"), positive=("beta",)
        )
        settings.check_trackers(self.report_to)
        settings.refuse_shares("data", self.data)


def main():
    settings = config.parse(Settings)
    quiet.silence_libraries()  # before the libraries that it quiets
    # everything heavy comes in here, once the flags are known to be sound
    from eval import output
    from train.engine import dist
    from train.run import session

    with session.start(settings, kind="evaluation", interruptible=False) as run:
        began = time.time()
        language, rewards = open_all(settings, run)
        run.folder.start()
        parts = []
        if language:
            judge = rewards[1] if rewards else None
            parts.append(evaluate_language_model(settings, run, language, judge, began))
        if rewards:
            parts.append(evaluate_reward_model(settings, run, rewards, began))
        if dist.is_main():
            output.write(settings, run.folder, parts)
        dist.barrier()


def open_all(settings: Settings, run):
    """((inputs, models, loss) of the language model, (inputs, judge) of the reward model), None for
    what is not asked for: what is wrong with them is said before anything is scored. Every rank calls
    this.
    """
    from eval import inputs, judges, models, reward_inputs, scores
    from train.engine import memory
    from train.losses import composition

    language = rewards = None
    if settings.model or not settings.reward_model:
        opened = inputs.open_inputs(settings, run.folder)
        recipe = opened.recipe
        loss = composition.choose(recipe["loss"], recipe["beta"], recipe["loss_args"])
    if settings.reward_model:
        to_judge = reward_inputs.open_inputs(settings, run.folder)
    advice = f"({scores.OUT_OF_MEMORY_ADVICE})"
    with memory.room_for("loading and checking the models", advice):
        judge = None
        if settings.reward_model:
            judge = judges.open_judge(settings, to_judge, run.folder, run.device)
            rewards = to_judge, judge
        if settings.model or not settings.reward_model:
            judged = models.open_models(settings, run.folder, opened, run.device, judge)
            language = opened, judged, loss
    return language, rewards


def evaluate_language_model(settings: Settings, run, language, judge, began: float):
    """The part of the report on the language model: an output.Part on rank 0, else None. Every rank
    calls this.

    language: eval.inputs.Inputs, eval.models.Models and the loss. judge: eval.judges.Judge, or None.
    began: when the evaluation did, in seconds.
    """
    from eval import generations, models, output, scores
    from train.engine import dist

    opened, judged, loss = language
    if judged.sharded and settings.prompts:
        run.say(f"no generations: {models.SHARDED}")
    scorers = list(judged.by_name.values())
    budget = judged.batch_tokens
    of_pairs = scores.score_all(opened.pairs, scorers, budget, device=run.device, title="pairs")
    of_texts = scores.score_all(opened.texts, scorers, budget, device=run.device, title="texts")
    seconds = time.time() - began
    if not settings.prompts:
        generated = generations.skipped("--prompts is 0")
    elif judged.sharded:
        generated = generations.skipped(models.SHARDED)
    else:
        decoding = generations.Decoding(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            batch_size=settings.batch_size,
        )
        with judge.as_own_class() if judge else contextlib.nullcontext():
            generated = generations.compare(judged, opened.prompts, opened.tokenizer, decoding)
    if not dist.is_main():
        return None
    results = output.Results(list(judged.by_name), of_pairs, of_texts, generated, seconds)
    return output.measure(settings, opened, judged, results, loss)


def evaluate_reward_model(settings: Settings, run, rewards, began: float):
    """The part of the report on the reward model: an output.Part on rank 0, else None. Every rank
    calls this.

    rewards: eval.reward_inputs.RewardInputs and eval.judges.Judge.
    """
    from eval import judges, output
    from train.engine import dist

    opened, judge = rewards
    scores = judges.score_all(judge, opened.data, run.device)
    if not dist.is_main():
        return None
    return output.measure_rewards(settings, opened, judge, scores, time.time() - began)


if __name__ == "__main__":
    main()
