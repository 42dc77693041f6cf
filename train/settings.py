"""Flags that several scripts share, each with its help and what a run may do with it; a script's
Settings inherit them and add its own.

    class Settings(settings.Preference):
        reference_ds_config: str | None = settings.flag(None, may_change=True)
        "DeepSpeed JSON for the reference."     # the help

In --print_config those of `Data` come first, a script's own last; --help has them by HELP_GROUPS.
What a flag changes may hang on another flag: `needs=` beside it says on which.

Imports the standard library and the table of algorithms only: scripts read their flags before torch.
"""

import copy
import dataclasses
import importlib.util
import math
import os
import re
from fractions import Fraction
from typing import Any, ClassVar, Literal, NamedTuple

from train.files import ROOT
from train.losses.algorithms import ALGORITHMS

# --help shows a script's `used_most` first, then these; tests/test_settings.py holds that every flag
# of every script is in one of them.
HELP_GROUPS = {
    "model": """model reference reference_model reference_every reference_mixup reward_model
        value_model lora_rank lora_alpha lora_targets chat_template trust_remote_code allow_pickle""",
    "data": """data eval_data eval_split data_split_seed columns ood by max_length max_prompt_length
        truncate_prompt max_rows ood_tokens max_dropped max_implausible allow_control_tokens
        allow_template_changes trainer""",
    "loss": """loss beta loss_args margin algorithm kl_coef target_kl clip_low clip_high dual_clip
        scale_advantages gamma lam value_lam value_clip""",
    "rewards": "reward reward_weights reward_clip missing_end_penalty",
    "answers": """prompts samples_per_prompt max_new_tokens temperature epochs_per_rollout minibatches
        max_resamples""",
    "training": """lr lr_scheduler warmup_ratio warmup_steps num_cycles min_lr value_lr value_warmup
        batch_size epochs max_steps weight_decay grad_clip seed deterministic""",
    "memory": """ds_config reference_ds_config value_ds_config reward_ds_config precision micro_tokens
        decode_batch offload_frozen layout compile gradient_checkpointing""",
    "saving": """output save_every save_minutes keep resume max_skipped export_dtype card push_to_hub
        hub_public""",
    "logging": "log_every eval_every report_to show json",
}


class Needs(NamedTuple):
    """What another flag has to be for a flag to change anything; a script without that flag asks
    nothing.
    """

    flag: str
    among: tuple = ()  # it has one of these values; (): it is set
    but: tuple = ()  # it has none of these values
    unset: bool = False  # it is not set: None, 0, false or empty

    def holds(self, settings) -> bool:
        """Whether it is so."""
        if not hasattr(settings, self.flag):
            return True
        value = getattr(settings, self.flag)
        if self.among or self.but:
            return value not in self.but and (not self.among or value in self.among)
        return bool(value) != self.unset

    def words(self, settings) -> str:
        """What stands against it, and the way out, behind "--x changes nothing"."""
        value = getattr(settings, self.flag)
        if self.among:
            return f"with --{self.flag} {value}: it counts with {listed(self.among)}"
        if self.but and value is not None:
            return f"with --{self.flag} {value}: it counts with another --{self.flag}"
        if self.unset:
            return f"beside --{self.flag}: leave one of them out"
        return f"without --{self.flag}"


class AnyOf(NamedTuple):
    """One of several Needs is enough."""

    needs: tuple[Needs, ...]
    said: str  # what stands against it, and the way out, behind "--x changes nothing"

    def holds(self, settings) -> bool:
        """Whether one of them is so."""
        return any(need.holds(settings) for need in self.needs)

    def words(self, settings) -> str:
        """As Needs.words."""
        return self.said


def listed(choices) -> str:
    """ "a, b or c"."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


def flag(
    default,
    *,
    may_change: bool = False,
    card: tuple[int, str] | None = None,
    inherited: bool = False,
    needs: Needs | AnyOf | tuple = (),
):
    """A dataclass field with `default`, for a flag of which more is to be known than that.

    may_change: a run may be resumed with another value, for the flag says where the run writes,
    what it shows or how it fits the machine, and not what it computes. card: the place and the
    title of its row in the model card's table; others stay out of the card. inherited: an
    evaluation takes its value from the run.json of the model's training. needs: all that has to
    hold of other flags for this one to change anything; config.parse refuses it otherwise.
    """
    needs = (needs,) if isinstance(needs, Needs | AnyOf) else needs
    metadata = {"may_change": may_change, "card": card, "inherited": inherited, "needs": needs}
    if isinstance(default, dict | list):  # a fresh one for each instance
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def names_that_may_change(settings) -> set[str]:
    """The flags of a Settings class, or of an instance, that may differ where a run is resumed."""
    return {f.name for f in dataclasses.fields(settings) if f.metadata.get("may_change")}


def telling(settings) -> dict[str, Any]:
    """The flags of an instance that tell its run from others: what it computes, as far as people
    look at it first or it is not at its default.
    """
    usual, told = defaults(settings), set(settings.used_most.split())
    return {
        name: getattr(settings, name)
        for name in (f.name for f in dataclasses.fields(settings))
        if name not in names_that_may_change(settings)
        and (name in told or getattr(settings, name) != usual.get(name))
    }


def defaults(settings) -> dict[str, Any]:
    """The default of every flag of a Settings class, or of an instance, that has one."""
    found = {}
    for f in dataclasses.fields(settings):
        if f.default is not dataclasses.MISSING:
            found[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            found[f.name] = f.default_factory()
    return found


def card_titles(settings) -> dict[str, str]:
    """The titles of the flags that go into the model card, by name and in the card's order."""
    shown = [f for f in dataclasses.fields(settings) if f.metadata.get("card")]
    shown.sort(key=lambda f: f.metadata["card"])
    return {f.name: f.metadata["card"][1] for f in shown}


def inherited_defaults(settings) -> dict[str, Any]:
    """The flags of training that an evaluation inherits, with what holds where there is no
    run.json.
    """
    values = defaults(settings)
    names = [f.name for f in dataclasses.fields(settings) if f.metadata.get("inherited")]
    return {name: values[name] for name in names}


# What several flags need.
WARMS_UP = Needs("lr_scheduler", but=("constant",))
HELD_OUT_ROWS = AnyOf(
    (Needs("data", unset=True), Needs("eval_data"), Needs("eval_split")),
    "without held-out rows: pass --eval_data or --eval_split",
)
HAS_REFERENCE = Needs("reference", among=("live", "cached"))
REFERENCE_APART = AnyOf(
    (
        Needs("lora_rank", unset=True),
        Needs("reference_model"),
        Needs("reference", among=("cached",)),
    ),
    "with --lora_rank: the reference is the policy without its adapters, unless --reference_model "
    "names another",
)


def algorithms(is_one) -> tuple[str, ...]:
    """The names of the rows of ALGORITHMS of which `is_one` says so."""
    return tuple(name for name, row in ALGORITHMS.items() if is_one(row))


VALUE_MODEL = Needs("algorithm", among=algorithms(lambda row: row.needs_critic))
DISCOUNTED = Needs("algorithm", among=algorithms(lambda row: row.advantage != "group"))
COMPARES_SAMPLES = Needs("algorithm", but=algorithms(lambda row: not row.needs_groups))
HAS_KL = Needs("algorithm", among=algorithms(lambda row: row.kl.place != "none"))
FROZEN = AnyOf(
    (Needs("reward_model"), HAS_KL),
    "without a frozen model: it counts with --reward_model, or with an algorithm that has a KL",
)
MOVES_THE_RATIO = AnyOf(
    (
        Needs("algorithm", but=algorithms(lambda row: row.epochs * row.minibatches == 1)),
        Needs("minibatches", but=(None, 1)),
        Needs("epochs_per_rollout", but=(None, 1)),
    ),
    "with one update a rollout, in which the ratio is 1: it counts with --minibatches or "
    "--epochs_per_rollout above 1",
)
CLIPS_A_RATIO = Needs("algorithm", but=algorithms(lambda row: row.ratio in ("weight", "gate")))


# The packages are called the same, accelerate's classes for them, too (train/run/trackers.py).
Tracker = Literal[
    "tensorboard",
    "wandb",
    "mlflow",
    "trackio",
    "comet_ml",
    "aim",
    "clearml",
    "dvclive",
    "swanlab",
    "none",
]
# What an epoch takes of a source, behind its name: pairs.jsonl:0.3. Other whole numbers are a hub
# data set's configuration, org/name:2022.
SHARE = re.compile(r"(.+):(\d{1,3}\.\d+|\.\d+|[01])")

# Of a loss: with the types, so that `--loss_args.tau 2` is a number.
Arguments = dict[str, bool | int | float | str]


@dataclasses.dataclass
class Data:
    """The model and the data: what a run looks at before it begins."""

    builtin_data: ClassVar = ("train.jsonl", "held_out.jsonl")  # to train and to evaluate on
    help_groups: ClassVar = HELP_GROUPS

    # The names of what the user gave, by config.parse: those stay as they are.
    given: dataclasses.InitVar[frozenset] = frozenset()

    model: str | None = None
    """The policy: a model directory or hub name. None: SmolLM2-135M-Instruct."""
    data: list[str] | None = None
    """Pairs to train on: jsonl, json, csv, parquet, save_to_disk folders or hub names, of which an
    epoch takes a share where one follows: a.jsonl:0.3 b.jsonl. None: the built-in pairs.
    """
    columns: list[str] | None = None
    """Columns that have other names in the data, say prompt=question chosen=better rejected=worse."""
    eval_data: list[str] | None = None
    """Pairs to evaluate on. None: the built-in held-out pairs with built-in data, else what
    --eval_split sets apart.
    """
    eval_split: float = flag(0.0, needs=Needs("eval_data", unset=True))
    """Share of the training prompts (with all their rows) set apart for evaluation where
    --eval_data is not given.
    """
    data_split_seed: int = flag(0, needs=Needs("eval_split"))
    """Seed of that split, which is by prompt."""
    max_length: int = flag(1024, card=(11, "most tokens of prompt and response"), inherited=True)
    """Most tokens of a prompt and a response together; responses are cut at their end."""
    max_prompt_length: int | None = flag(256, card=(12, "most tokens of a prompt"), inherited=True)
    """Most tokens of a prompt; longer ones keep their end. None: bounded by --max_length alone. The
    default gives way to a --max_length that leaves no room beside it: half of that.
    """
    truncate_prompt: Literal["keep_end", "keep_system_and_end"] = flag("keep_end", inherited=True)
    """What a prompt that is too long keeps: its end, or bos and the system turn, where they fit,
    and its end.
    """
    chat_template: str | None = None
    """A file with a chat template (Jinja) to use in place of the tokenizer's own."""
    allow_control_tokens: bool = flag(False, inherited=True)
    """Accept rows whose text spells out control tokens such as <|im_end|>, instead of dropping
    them.
    """
    allow_template_changes: bool = flag(False, inherited=True)
    """Keep answers that the chat template cuts or changes (thoughts that it leaves out, say) as it
    renders them, instead of dropping them.
    """
    max_dropped: float = 0.05
    """Largest share of unusable rows before a run refuses the data."""
    max_implausible: float = flag(0.5, inherited=True)
    """Largest share of rows that can hardly be meant (the prompt at the head of its answers, a
    conversation as JSON in an answer) before a run refuses the data; 1 takes all.
    """
    trust_remote_code: bool = False
    """Let the model's repository run its own Python code."""

    def __post_init__(self, given):
        check_bounds(
            self,
            {"max_length": 2, "max_prompt_length": 1},
            shares=("eval_split", "max_dropped", "max_implausible"),
        )
        check_mix(self.data)
        refuse_shares("eval_data", self.eval_data)
        default = Data.max_prompt_length
        self.adapted = ""  # what was changed to fit, to be said
        is_default = self.max_prompt_length == default and "max_prompt_length" not in given
        if is_default and 1 < self.max_length <= default:
            self.max_prompt_length = self.max_length // 2
            self.adapted = (
                f"--max_prompt_length {default} leaves no room in --max_length {self.max_length}: "
                f"{self.max_prompt_length} is taken"
            )


@dataclasses.dataclass
class Training(Data):
    """How a run trains, saves and goes on, besides."""

    batch_size: int = flag(16, card=(9, "pairs a step"))
    """Pairs a step, over all ranks."""
    micro_tokens: int | None = flag(None, may_change=True)
    """Tokens a packed batch may hold. None: from the free memory."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Most optimiser steps. None: no bound, but 6 steps for the built-in data on a CPU."""
    lr: float = flag(5e-6, card=(4, "learning rate (AdamW)"))
    """Peak learning rate."""
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
    ] = flag("linear", card=(5, "schedule"))
    """Schedule after warm-up, as transformers names it."""
    warmup_ratio: float = flag(0.0, card=(6, "warm-up, share of the steps"), needs=WARMS_UP)
    """Share of the steps in which the learning rate rises from 0."""
    warmup_steps: int = flag(0, needs=(WARMS_UP, Needs("warmup_ratio", unset=True)))
    """Steps (of train_ppo.py: rollouts) in which the learning rate rises from 0, in place of
    --warmup_ratio.
    """
    num_cycles: float | None = flag(
        None,
        needs=Needs("lr_scheduler", among=("cosine", "cosine_with_restarts", "cosine_with_min_lr")),
    )
    """Waves of a cosine schedule. None: half a one, which ends at 0; one for cosine_with_restarts."""
    min_lr: float | None = flag(
        None, needs=Needs("lr_scheduler", among=("cosine_with_min_lr", "polynomial"))
    )
    """Learning rate at the end of cosine_with_min_lr, which needs it, and of polynomial. None: 1e-7
    for polynomial. A value model's ends at the same share of its peak.
    """
    weight_decay: float = flag(0.0, card=(7, "weight decay"))
    """AdamW's decoupled decay of matrices; norms and biases never decay."""
    grad_clip: float = flag(1.0, card=(8, "largest gradient norm"))
    """Largest 2-norm of a step's gradient; 0 does not clip."""
    precision: Literal["auto", "bf16", "fp32"] = flag("auto", inherited=True)
    """bf16, fp32, or auto: bf16 on GPUs that have it (A100 and later), else fp32. Master weights are
    fp32 in any case.
    """
    ds_config: str = flag(str(ROOT / "ds_configs" / "zero0.json"), may_change=True)
    """DeepSpeed JSON: the ZeRO stage, offload, buckets."""
    layout: Literal["packed", "padded"] = flag("packed", inherited=True)
    """packed: shared prompts without padding. padded: a padded sequence a response, for models that
    packing refuses.
    """
    deterministic: bool = flag(False, may_change=True)
    """Make gradients on CUDA the same bits each time, whatever the length: attention's backward pass
    then adds up in a fixed order, which is slower. Elsewhere they are so in any case.
    """
    compile: Literal["auto", "off"] = flag("off", may_change=True)
    """auto: compile each decoder layer, for a few shapes that batches are filled up to; not at ZeRO
    stage 3, with --layout padded or --deterministic, nor on CUDA without flash attention, which is
    said once.
    """
    gradient_checkpointing: bool = flag(False, may_change=True)
    """Recompute activations in the backward pass: less memory, about a third more work."""
    export_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the weights in OUTPUT/model: fp32, bf16, or auto, the type that they were trained in.
    """
    eval_every: int = flag(0, needs=HELD_OUT_ROWS)
    """Steps between evaluations; 0: at the start and at the end only."""
    save_every: int = flag(0, may_change=True)
    """Steps between checkpoints; 0: by --save_minutes alone."""
    save_minutes: float = flag(30.0, may_change=True)
    """Minutes between checkpoints; 0: by --save_every alone. Being told to stop saves in any case.
    """
    keep: int = flag(2, may_change=True)
    """Checkpoints to keep, the newest ones."""
    resume: str = flag("auto", may_change=True)
    """auto: continue from the newest sound checkpoint in --output. never: start over (a job that
    SLURM has requeued goes on). Else the path of a checkpoint to begin from where --output has none
    of its own, or of one of its own to go back to.
    """
    max_skipped: int = flag(5, may_change=True)
    """Steps in a row that may be skipped because their gradient is not finite; one more ends the
    run.
    """
    log_every: int = flag(1, may_change=True)
    """Steps between readings of the training measures."""
    report_to: list[Tracker] = flag(["tensorboard"], may_change=True)
    """Who is told of the run: tensorboard, which shows most, and others, which get scalars, flags and
    results; none: OUTPUT/logs and run.json alone.
    """
    push_to_hub: str | None = flag(None, may_change=True)
    """ORG/NAME on the model hub, to which OUTPUT/model is uploaded when the run is done."""
    hub_public: bool = flag(False, may_change=True, needs=Needs("push_to_hub"))
    """Everybody may see that repository; else it is private."""
    allow_pickle: bool = False
    """Read weights from pickles (pytorch_model.bin) where there are no safetensors; torch's
    weights_only holds.
    """
    lora_rank: int = 0
    """Rank of LoRA adapters, which are trained in place of the weights; 0: the weights are. Needs
    peft.
    """
    lora_alpha: float = flag(16.0, needs=Needs("lora_rank"))
    """LoRA's scale: adapters count alpha / rank times."""
    lora_targets: list[str] | None = flag(None, needs=Needs("lora_rank"))
    """Layers that get adapters, by the end of their names. None: all linear ones but the head."""
    seed: int = flag(0, card=(10, "seed of the data's order"))
    """Seed of the data's order, of LoRA's adapters and of a score model's head."""

    def __post_init__(self, given):
        super().__post_init__(given)
        at_least = {
            "batch_size": 1,
            "micro_tokens": 1,
            "max_steps": 1,
            "log_every": 1,
            "keep": 1,
            "eval_every": 0,
            "lr": 0,
            "save_every": 0,
            "save_minutes": 0,
            "max_skipped": 0,
            "weight_decay": 0,
            "grad_clip": 0,
            "lora_rank": 0,
            "warmup_steps": 0,
            "min_lr": 0,
        }
        check_bounds(self, at_least, shares=("warmup_ratio",), positive=("epochs", "num_cycles"))
        check_trackers(self.report_to)
        if self.min_lr is None and self.lr_scheduler == "cosine_with_min_lr":
            raise ValueError("--lr_scheduler cosine_with_min_lr needs --min_lr, where it ends")
        end = 1e-7 if self.min_lr is None and self.lr_scheduler == "polynomial" else self.min_lr
        if end is not None and not end < self.lr:
            default = "" if self.min_lr is not None else ", polynomial's default,"
            raise ValueError(
                f"--min_lr {end}{default} is not below --lr {self.lr}: choose a smaller --min_lr"
            )


@dataclasses.dataclass
class Preference(Training):
    """What preference training minimises, besides."""

    used_most: ClassVar = "model data output loss beta lr batch_size epochs max_length ds_config"

    # Here and not in the script, because a dataclass lists what it inherits first, and run.json shows
    # where a run writes before what it minimises.
    output: str = flag("runs/dpo", may_change=True)
    """Folder for the model, TensorBoard, logs and run.json."""
    loss: str = flag("sigmoid", card=(1, "loss"), inherited=True)
    """The loss, sigmoid (DPO), robust, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard, aot,
    aot_unpaired, apo_zero, apo_down, discopop, sft, sigmoid_norm, simpo, orpo, cpo, kto, dpop, rpo
    or rdpo, or a weighted sum: sigmoid:0.8,sft:0.2.
    """
    beta: float = flag(0.1, card=(2, "beta"), inherited=True)
    """Strength of the pull towards the reference: a reward is beta * log(pi / pi_ref), or what the
    loss's row says.
    """
    loss_args: Arguments = flag({}, card=(3, "parameters of the loss"), inherited=True)
    """The losses' own parameters and those across losses, say '{label_smoothing: 0.1, ld_alpha:
    0.5}'.
    """

    def __post_init__(self, given):
        super().__post_init__(given)
        check_bounds(self, {}, positive=("beta",))


@dataclasses.dataclass
class Scored:
    """What a reward model reads of its data, besides."""

    margin: Literal["column", "scores", "none"] = flag(
        "column",
        card=(2, "margin"),
        needs=(Needs("loss", among=("bradley_terry",)), Needs("trainer", among=("reward",))),
    )
    """Of a reward model's pairs: by how much chosen must be better. column: the column margin, where
    a row has one; scores: the difference of score_chosen and score_rejected; none: not asked for.
    """


@dataclasses.dataclass
class Reward(Scored, Training):
    """What the training of a reward model minimises, besides."""

    used_most: ClassVar = (
        "model data output loss lr batch_size epochs max_length eval_split ds_config"
    )

    output: str = flag("runs/reward", may_change=True)
    """Folder for the model, TensorBoard, logs and run.json."""
    loss: str = flag("bradley_terry", card=(1, "loss"))
    """The loss, a row of train/losses/reward.py's LOSSES: bradley_terry for pairs, logistic and
    squared for answers that have labels or scores.
    """
    loss_args: Arguments = flag({}, card=(3, "parameters of the loss"))
    """The loss's own parameters, say '{label_smoothing: 0.1, centering: 0.01}'."""
    lr: float = flag(1e-5, card=(4, "learning rate (AdamW)"))
    """Peak learning rate. 1e-5 is for all weights of a model of 135M parameters over fp32 masters:
    twice DPO's, since a new head has to be learnt. 7B takes 3e-6 to 9e-6, LoRA about 1e-4.
    """


@dataclasses.dataclass
class Policy(Training):
    """What reinforcement learning maximises, and how, besides. Numbers that are None are the
    algorithm's own (train/losses/algorithms.py: ALGORITHMS).
    """

    builtin_data: ClassVar = ("prompts.jsonl", "held_out_prompts.jsonl")
    used_most: ClassVar = """model data output algorithm reward reward_model samples_per_prompt lr
        batch_size max_new_tokens"""
    # What takes the place of defaults where no prompts are named: few short answers, and a rate at
    # which a few rollouts show something.
    demonstration: ClassVar = {
        "batch_size": 8,
        "max_new_tokens": 48,
        "lr": 2e-5,
        "lr_scheduler": "constant",
        "decode_batch": 64,
    }
    default_reward: ClassVar = "regex:[?]"  # with built-in prompts: an answer that asks back
    # the value model's rate over the policy's: Ouyang et al. 2022 and most code since train critics faster
    value_lr_times: ClassVar = 10

    data: list[str] | None = None
    """Prompts to train on: rows with a prompt, or preference pairs, whose answers are not read; of
    which an epoch takes a share where one follows: a.jsonl:0.3 b.jsonl. None: the built-in prompts.
    """
    eval_data: list[str] | None = None
    """Prompts to evaluate on. None: the built-in held-out prompts with built-in data, else what
    --eval_split sets apart.
    """
    batch_size: int = flag(16, card=(9, "prompts a rollout"))
    """Prompts a rollout, over all ranks."""
    epochs: float = 1.0
    """Passes over the prompts."""
    max_steps: int | None = None
    """Most rollouts. None: no bound, but 8 for the built-in prompts on a CPU."""
    lr: float = flag(1e-6, card=(4, "learning rate (AdamW)"))
    """Peak learning rate of the policy. The peers take 5e-7 to 3e-6; LoRA takes ten times that."""
    eval_every: int = flag(0, needs=HELD_OUT_ROWS)
    """Rollouts between evaluations on the held-out prompts; 0: at the start and at the end only."""
    save_every: int = flag(0, may_change=True)
    """Rollouts between checkpoints; 0: by --save_minutes alone."""
    log_every: int = flag(1, may_change=True)
    """Rollouts between those that TensorBoard shows."""
    output: str = flag("runs/ppo", may_change=True)
    """Folder for the model, TensorBoard, logs and run.json."""
    algorithm: Literal[tuple(ALGORITHMS)] = flag("grpo", card=(1, "algorithm"))
    """A row of train/losses/algorithms.py's ALGORITHMS: how advantages are made, what is clipped, what
    the loss is divided by.
    """
    reward: list[str] | None = flag(None, card=(2, "reward"))
    """Sources of reward: regex:PATTERN, exact:COLUMN, number:COLUMN, length:LO-HI, ended,
    overlong:BUFFER, repetition, json, or MODULE:FUNCTION. None: --reward_model, or with built-in
    prompts regex:[?], a question back.
    """
    reward_model: str | None = None
    """A reward model as one more source: a directory or hub name for sequence classification."""
    reward_weights: list[float] | None = None
    """A weight for each source, --reward's first. None: 1 each."""
    missing_end_penalty: float = 0.0
    """Subtracted from the reward of an answer that was cut at --max_new_tokens."""
    reward_clip: float | None = None
    """Largest size of the weighted reward; None: no bound."""
    samples_per_prompt: int | None = None
    """Answers to each prompt of a rollout."""
    max_new_tokens: int = flag(128, card=(13, "most tokens of an answer"))
    """Most tokens of an answer."""
    temperature: float = 1.0
    """Divides logits, for sampling and for every log-probability alike."""
    decode_batch: int | None = None
    """Answers decoded at once. None: as many as half of the free memory holds, up to 512 on a GPU and
    128 on a CPU; run.json says how many.
    """
    epochs_per_rollout: int | None = None
    """Passes over a rollout's samples."""
    minibatches: int | None = None
    """Updates a pass."""
    kl_coef: float | None = flag(None, card=(3, "KL coefficient"), needs=HAS_KL)
    """Strength of the pull towards the reference."""
    target_kl: float = flag(0.0, needs=MOVES_THE_RATIO)
    """Where an update would meet a policy further than 1.5 times this from the one that drew the
    rollout (nats a token, k2), it and the rollout's later ones are left out; 0: never.
    """
    clip_low: float | None = flag(None, needs=(Needs("algorithm", but=("cispo",)), MOVES_THE_RATIO))
    """How far the ratio may fall below 1."""
    clip_high: float | None = flag(None, needs=MOVES_THE_RATIO)
    """How far the ratio may rise above 1."""
    dual_clip: float | None = flag(None, needs=(CLIPS_A_RATIO, MOVES_THE_RATIO))
    """Bound of the loss where the advantage is negative, as a multiple of it, above 1; None: none."""
    scale_advantages: Literal["group", "batch", "none"] | None = flag(None, needs=COMPARES_SAMPLES)
    """What an advantage over a group is divided by: the group's deviation, the rollout's, nothing."""
    gamma: float = flag(1.0, needs=DISCOUNTED)
    """Discount of a later token's reward."""
    lam: float = flag(0.95, needs=VALUE_MODEL)
    """Lambda of generalised advantage estimation, for --algorithm ppo."""
    value_lam: float | None = flag(None, needs=VALUE_MODEL)
    """Lambda of the returns that the value model learns; None: --lam."""
    value_model: str | None = flag(None, needs=VALUE_MODEL)
    """Where the value model begins: a directory for sequence classification. None: the reward model
    where it reads the same tokens, else the policy's body with a head of zeros.
    """
    value_lr: float | None = flag(None, needs=VALUE_MODEL)
    """Peak learning rate of the value model; None: ten times --lr."""
    value_clip: float | None = flag(None, needs=VALUE_MODEL)
    """How far a value may move from the rollout's before its loss is clipped; 0: no clipping."""
    value_warmup: int = flag(0, needs=VALUE_MODEL)
    """Rollouts at the start in which the value model learns alone."""
    value_ds_config: str | None = flag(None, may_change=True, needs=VALUE_MODEL)
    """DeepSpeed JSON for the value model. None: --ds_config."""
    reference_ds_config: str | None = flag(
        None,
        may_change=True,
        needs=(HAS_KL, Needs("kl_coef", but=(0,)), Needs("lora_rank", unset=True)),
    )
    """DeepSpeed JSON for the reference. None: ds_configs/frozen_zero3.json beside a stage-3 policy,
    else whole on each rank.
    """
    reward_ds_config: str | None = flag(None, may_change=True, needs=Needs("reward_model"))
    """DeepSpeed JSON for the reward model. None: ds_configs/frozen_zero3.json beside a stage-3 policy,
    else whole on each rank.
    """
    offload_frozen: bool = flag(False, may_change=True, needs=FROZEN)
    """Keep reference and reward model in main memory between uses. On a CPU they lie there anyway."""
    max_resamples: int | None = flag(None, needs=COMPARES_SAMPLES)
    """How often a prompt whose samples all have the same reward is answered anew."""

    def __post_init__(self, given):
        super().__post_init__(given)
        if self.data is None:
            self._be_a_demonstration(given)
        at_least = {
            "samples_per_prompt": 1,
            "max_new_tokens": 1,
            "decode_batch": 1,
            "epochs_per_rollout": 1,
            "minibatches": 1,
            "kl_coef": 0,
            "clip_low": 0,
            "clip_high": 0,
            "missing_end_penalty": 0,
            "target_kl": 0,
            "value_clip": 0,
            "value_warmup": 0,
            "max_resamples": 0,
            "value_lr": 0,
        }
        check_bounds(
            self,
            at_least,
            shares=("gamma", "lam", "value_lam"),
            positive=("temperature", "dual_clip", "reward_clip"),
        )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(
                f"--dual_clip is above 1, not {self.dual_clip}: up to there no token whose advantage is "
                "negative would be learnt from; 3 is usual"
            )
        weights = self.reward_weights
        if not all(map(math.isfinite, weights or ())):
            raise ValueError(f"--reward_weights are finite numbers, not {listed(weights)}")
        sources = len(self.reward or ()) + bool(self.reward_model)
        if weights is not None and len(weights) != sources:
            raise ValueError(
                f"--reward_weights: {len(weights)} for {sources} "
                f"source{'s' * (sources != 1)}: one for each --reward, then for --reward_model"
            )
        for spec in self.reward or ():
            kind, _, buffer = spec.partition(":")
            if kind == "overlong" and buffer.isdecimal() and int(buffer) > self.max_new_tokens:
                raise ValueError(
                    f"--reward {spec}: the buffer is more than --max_new_tokens {self.max_new_tokens}, and every "
                    "answer would be too long: take a smaller one"
                )
        if self.max_prompt_length is None or self.max_prompt_length + self.max_new_tokens > (
            self.max_length
        ):
            room = self.max_length - self.max_new_tokens
            if room > 0:
                fits = f"--max_prompt_length {room}"
            else:  # where half of --max_length was taken for the prompt, it will be again
                prompt = self.max_new_tokens if self.adapted else self.max_prompt_length or 256
                fits = f"--max_length {self.max_new_tokens + prompt}"
            raise ValueError(
                f"--max_length {self.max_length} has no room for a prompt of "
                f"{self.max_prompt_length or 'any length'} and {self.max_new_tokens} new tokens: "
                f"{fits} would fit"
            )

    @classmethod
    def resolve(cls, flags) -> dict[str, Any]:
        """What flags that are None come to, by name; they stay None, and are not in there, where the
        algorithm has no use for them, and where the data or the machine decide. flags: has all flags
        as attributes.
        """
        row = ALGORITHMS[flags.algorithm]
        found = {
            "samples_per_prompt": row.samples,
            "epochs_per_rollout": row.epochs,
            "minibatches": row.minibatches,
            "max_resamples": row.resamples,
            "kl_coef": row.kl.coef,
            "clip_low": row.clip_low,
            "clip_high": row.clip_high,
            "dual_clip": row.dual_clip or None,  # 0 there says that there is none
            "scale_advantages": row.scale,
            "value_clip": row.value_clip,
            "value_lr": cls.value_lr_times * flags.lr,
            "value_lam": flags.lam,
        }
        if not flags.data and not flags.reward_model:
            found["reward"] = [cls.default_reward]
        needs = {f.name: f.metadata.get("needs", ()) for f in dataclasses.fields(cls)}
        return {
            name: value
            for name, value in found.items()
            if getattr(flags, name) is None
            and value is not None
            and all(need.holds(flags) for need in needs[name] if isinstance(need, Needs))
        }

    def _be_a_demonstration(self, given):
        """Put the demonstration's values where the defaults stand and nothing was given."""
        by_default = defaults(self)
        changed = []
        for name, value in self.demonstration.items():
            if getattr(self, name) == by_default[name] and name not in given:
                setattr(self, name, value)
                changed.append(f"--{name} {value}")
        if changed:
            self.adapted = f"built-in prompts, a demonstration: {' '.join(changed)}"


def check_bounds(settings, at_least: dict, shares=(), positive=()):
    """ValueError for the first flag out of its bounds; None is within all.

    at_least: the least value by name; shares: names of flags from 0 to 1; positive: of flags that
    are finite and above 0.
    """

    def set_values(names):
        values = [(name, getattr(settings, name)) for name in names]
        return [(name, value) for name, value in values if value is not None]

    # each condition is put so that NaN fails it
    for name, value in set_values(at_least):
        if value == math.inf:
            raise ValueError(f"--{name} is a finite number, not {value}")
        if not value >= at_least[name]:
            raise ValueError(f"--{name} is at least {at_least[name]}, not {value}")
    for name, value in set_values(shares):
        if not 0 <= value <= 1:
            raise ValueError(f"--{name} is a share from 0 to 1, not {value}")
    for name, value in set_values(positive):
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} is a finite number above 0, not {value}")


def check_trackers(names: list[str]):
    """ValueError where a tracker's package is not installed, with what installs it."""
    if "none" in names and len(names) > 1:
        raise ValueError("--report_to none stands alone")
    found = {name: importlib.util.find_spec(name) for name in names if name != "none"}
    # a folder of that name, as wandb makes one, is no package: it has no origin
    absent = [name for name, spec in found.items() if spec is None or spec.origin is None]
    if absent:
        raise ValueError(
            f"--report_to {' '.join(absent)}: not installed (pip install {' '.join(absent)})"
        )


def token_options(settings: Data) -> dict[str, Any]:
    """The flags that decide which tokens a row becomes, as data/tokens.py: collect takes them."""
    return {
        "max_length": settings.max_length,
        "max_prompt_length": settings.max_prompt_length,
        "truncate_prompt": settings.truncate_prompt,
        "columns": settings.columns,
        "allow_control_tokens": settings.allow_control_tokens,
        "allow_template_changes": settings.allow_template_changes,
    }


def with_share(word: str) -> tuple[str, Fraction | None]:
    """(the source that a word of --data names, the share of its rows that an epoch takes, or None).

    A file or folder of the whole word's name goes before.
    """
    found = SHARE.fullmatch(word)
    if found is None or os.path.exists(os.path.expanduser(word)):
        return word, None
    return found[1], Fraction(found[2])


def check_mix(words: list[str] | None):
    """ValueError for a share of --data that no epoch can take."""
    for word in words or ():
        share = with_share(word)[1]
        if share == 0:
            raise ValueError(f"--data {word}: a share lies above 0; leave the source out")
        if share is not None and share > 1:
            raise ValueError(
                f"--data {word}: a share is at most 1; for more of this source give the others smaller "
                "ones, and the run more --epochs"
            )


def refuse_shares(flag_name: str, words: list[str] | None):
    """ValueError for a source with a share where all rows are evaluated on."""
    for word in words or ():
        source, share = with_share(word)
        if share is not None:
            raise ValueError(
                f"--{flag_name} {word}: evaluation takes all rows, and shares are of training's epochs: "
                f"write {source}"
            )


def shares(settings: Data) -> list[Fraction]:
    """Of each source of the data to train on the share of its rows that an epoch takes; all of it
    where none is given.
    """
    return [with_share(word)[1] or Fraction(1) for word in settings.data or ()]


def sources(settings: Data) -> tuple[list[str], list[str] | None]:
    """The data to train on and to evaluate on, without shares; None for the second: none, or a part
    of the first.
    """
    if settings.data:
        # the built-in held-out pairs say nothing about other data
        return [with_share(word)[0] for word in settings.data], settings.eval_data
    train, held_out = (str(ROOT / "train/data/builtin" / name) for name in settings.builtin_data)
    held_out = None if settings.eval_split else [held_out]
    return [train], settings.eval_data or held_out
