"""What a trainer starts from, out of its flags: data and models, checked.

losses, data, models and engine take values; this file translates flags into them.
"""

import functools
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from train import settings as shared_flags
from train.config import named
from train.data import chat, dataset, mixing, padding, same_tokens, show, tokens
from train.data.steps import num_steps
from train.engine import checks, dist, ds_config, loading, memory
from train.engine.trained import TrainedModel
from train.losses.composition import LOSSES
from train.losses.reward import Loss
from train.methods import reward
from train.methods.reference import AdaptersOff, Cached, Live, NoReference, Reference
from train.models import compiled, lora
from train.models.attention import without_flash
from train.models.pretrained import load_tokenizer
from train.run import export
from train.run.folder import describe, hardware, versions
from train.run.session import Plan, Run

ROOT = Path(__file__).resolve().parents[2]
SCALE = ("score_mean", "score_std")  # in the configuration of a model that gives scores
CPU_STEPS = 6  # of the default run on a CPU: about 4 minutes on two cores


def open_data(settings, run: Run, takes_labelled: bool):
    """The tokenizer, the training groups and the held-out groups (None where there are none).

    takes_labelled: the loss takes single answers with labels. Every rank calls this.
    """
    tokenizer, data, held_out = _open_data(settings, run, tokens.kind_of)
    if data.labels is not None and not takes_labelled:
        *others, last = [name for name, row in LOSSES.items() if row.of_labelled]
        raise ValueError(
            f"--loss {settings.loss} compares pairs, and the data has single answers with labels: "
            f"{', '.join(others)} and {last} take those"
        )
    return tokenizer, data, held_out


def open_scored_data(settings, run: Run, loss: Loss):
    """What `open_data` gives, for a reward model: texts to the end of what the template renders, with
    margins or targets. Every rank calls this.
    """
    kind_of = partial(tokens.kind_of_scores, margin=settings.margin)
    tokenizer, data, held_out = _open_data(settings, run, kind_of, keep_tail=True)
    reward.check_targets(loss, "the data", data)
    if held_out is not None:
        reward.check_targets(loss, "--eval_data", held_out)
    if note := reward.describe_targets(data):
        run.say(note)
    return tokenizer, data, held_out


def _open_data(settings, run: Run, kind_of: Callable, keep_tail: bool = False):
    """The tokenizer, the training groups and the held-out groups. kind_of: sources -> a kind of
    tokens.py.
    """

    def choose(sources):
        kind = kind_of(sources, columns=settings.columns)
        return partial(tokens.prepare, kind=kind, keep_tail=keep_tail)

    tokenizer, data, held_out = read_sources(settings, run, choose, dataset.split_by_prompt)
    end_id = chat.Chat(tokenizer, settings.allow_control_tokens).end_id
    run.sample = show.as_markdown(tokenizer, data, end_id)
    return tokenizer, data, held_out


def read_sources(
    settings, run: Run, choose: Callable, split: Callable, tokens_of: Callable = lambda data: data
):
    """The tokenizer, what is trained on and what is held out (None where nothing is), said and noted.
    Every rank calls this.

    choose: the training sources -> what prepares a data set of sources, as tokens.prepare does; the
    held-out one is of the same kind. split: as dataset.split_by_prompt. tokens_of: the Tokenised of
    such a data set.
    """
    ds_config.read_config(settings.ds_config)  # refused before the data are tokenised
    if settings.adapted:
        run.say(settings.adapted)
    sources, eval_sources = shared_flags.sources(settings)
    path = run.folder.model_path(settings.model)
    tokenizer = load_tokenizer(path, settings.trust_remote_code)
    chat.use_template(tokenizer, settings.chat_template)
    with dist.main_process_first():  # rank 0 tokenises, the others find it in the cache
        prepare = partial(
            choose(sources),
            tokenizer=tokenizer,
            **shared_flags.token_options(settings),
            max_dropped=settings.max_dropped,
            max_implausible=settings.max_implausible,
        )
        data = prepare(sources, shares=shared_flags.shares(settings))
        held_out = prepare(eval_sources) if eval_sources else None
    for name, each in (("data", data), ("eval_data", held_out)):
        for note in tokens_of(each).notes() if each else ():
            run.say(f"{name}: {note}")
    dropped_held_out = tokens_of(held_out).dropped if held_out else []
    run.folder.note_dropped({"train": tokens_of(data).dropped, "eval": dropped_held_out})
    if not eval_sources and settings.eval_split:
        data, held_out = split(data, settings.eval_split, settings.data_split_seed)
    mix = mixing.mix_of(tokens_of(data))
    for line in mix.lines():
        run.say(f"data: {line}")
    described = describe(tokens_of(data), sources) | {"by_source": mix.described()}
    of_held_out = None
    if held_out:
        of_held_out = describe(tokens_of(held_out), eval_sources or sources)
        of_held_out["by_source"] = mixing.by_source(tokens_of(held_out))
    run.note(data=described, eval_data=of_held_out)
    return tokenizer, data, held_out


def check_same_tokens(
    tokenizer, path: str, datasets: list, flag: str, trust_remote_code: bool, say: Callable
):
    """ValueError where the model at `path` reads other token ids than `tokenizer` of what is in use.

    Their log-probabilities would be of other texts, and no difference of them means anything. flag:
    where the path comes from. A directory of weights alone says nothing of its tokens: it is taken,
    and that is said.
    """
    if Path(path).is_dir() and not any(Path(path).glob("*token*")):
        say(f"{flag} {path} has no tokenizer: whether its tokens are --model's cannot be checked")
        return
    other = load_tokenizer(path, trust_remote_code)
    try:
        for data in datasets:
            texts, ids = same_tokens.in_use(tokenizer, data)
            same_tokens.same_tokens(tokenizer, other, texts, ids)
    except ValueError as error:
        raise ValueError(
            f"the tokenizer of {flag} {path} is not --model's ({error}): the two cannot be compared"
        ) from error


class Mode(NamedTuple):
    """How the run's models compute and are sharded: what policy and reference must share."""

    precision: str  # "bf16" or "fp32"
    config: dict  # the trained model's resolved DeepSpeed configuration
    stage: int  # its ZeRO stage, which decides between autocast and bf16 weights


def open_models(settings, run: Run, tokenizer, data, held_out) -> tuple[TrainedModel, Reference]:
    """The policy under DeepSpeed and its reference, checked on the first groups; settles the plan.

    Every rank calls this.
    """
    mode = resolve_mode(settings, run.device)
    path = run.folder.model_path(settings.model)
    reference_path = run.folder.model_path(settings.reference_model or settings.model)
    same_model = path == reference_path
    datasets = [each for each in (data, held_out) if each is not None]
    if settings.reference_model and settings.reference != "none":
        check_same_tokens(
            tokenizer,
            settings.reference_model,
            datasets,
            "--reference_model",
            settings.trust_remote_code,
            run.say,
        )
    steps = total_steps(settings, run.device, data)

    def check_reference(live: Live):
        chat.check_fit(
            live.module.lm.config,
            tokenizer,
            settings.max_length,
            datasets,
            of=f"the reference {reference_path}",
        )

    reference = reference_config = None
    if settings.reference == "none":
        reference = NoReference()
    elif settings.reference == "cached":
        # done with before the policy comes: there are never two models in memory
        reference_config = resolve_reference_config(settings, mode.config)
        live = live_reference(
            settings,
            run,
            mode,
            reference_path,
            reference_config,
            moves=bool(settings.reference_every),
        )
        check_reference(live)
        tokens_a_batch = 2 * batch_tokens(settings, run.device, mode, live.module)
        reference = Cached(live, datasets, tokens_a_batch, mode.precision, run.say)
        del live
        memory.release(run.device)

    module = load(settings, run.device, mode, path, mode.config, change=adapters(settings))
    say_attention(settings, run, mode, module)
    chat.check_fit(module.lm.config, tokenizer, settings.max_length, datasets)
    stop_at_end(run, module.lm, tokenizer)
    policy = wrap_for_training(settings, mode, module, tokenizer, steps)
    if settings.reference == "live" and settings.lora_rank and same_model:
        reference = AdaptersOff(policy)
    elif settings.reference == "live":
        reference_config = resolve_reference_config(settings, mode.config)
        reference = live_reference(
            settings,
            run,
            mode,
            reference_path,
            reference_config,
            moves=bool(settings.reference_every),
        )
        check_reference(reference)

    same_weights = same_model and settings.reference != "none"
    run.set_plan(
        Plan(
            mode.precision,
            batch_tokens(settings, run.device, mode, module),
            steps,
            same_weights,
        ),
        model=path,
        reference_model=reference_path,
        deepspeed=mode.config,
        reference_deepspeed=reference_config,
        hardware=hardware(run.device),
        versions=versions(),
    )
    run.first_batches = checks.check_start(
        policy, reference, data, run.device, mode.precision, same_weights=same_weights
    )
    return policy, reference


def open_reward_model(settings, run: Run, tokenizer, data, held_out) -> TrainedModel:
    """A ScoreModel under DeepSpeed, checked on the first groups; settles the plan.

    Tokenizer and configuration get a pad token that no text ends in. Every rank calls this.
    """
    datasets = [each for each in (data, held_out) if each is not None]
    mode = resolve_mode(settings, run.device)
    path = run.folder.model_path(settings.model)
    steps = total_steps(settings, run.device, data)
    module = load(
        settings,
        run.device,
        mode,
        path,
        mode.config,
        change=adapters(settings),
        loader=partial(loading.load_score_model, seed=settings.seed),
    )
    config = module.lm.config
    chat.check_fit(config, tokenizer, settings.max_length, datasets)
    pad = padding.use(tokenizer, config, datasets)
    run.say(f"padding: token {pad}, {tokenizer.pad_token!r}, which no text ends in")
    for name in SCALE:  # of the model that training goes on from
        if hasattr(config, name):
            delattr(config, name)
    say_attention(settings, run, mode, module)
    model = wrap_for_training(settings, mode, module, tokenizer, steps)
    run.set_plan(
        Plan(mode.precision, batch_tokens(settings, run.device, mode, module), steps),
        task="reward",
        model=path,
        deepspeed=mode.config,
        hardware=hardware(run.device),
        versions=versions(),
    )
    run.first_batches = checks.check_start(
        model, None, data, run.device, mode.precision, same_weights=False
    )
    return model


def resolve_mode(settings, device) -> Mode:
    """What --precision and --ds_config come to on this device."""
    precision = ds_config.resolve_precision(settings.precision, device)
    config = ds_config.read_config(settings.ds_config)
    config = ds_config.resolve(config, precision, settings.grad_clip)
    return Mode(precision, config, ds_config.zero_stage(config))


def total_steps(settings, device, data) -> int:
    """Optimiser steps of the whole run; the built-in data on a CPU are a demonstration."""
    by_default = CPU_STEPS if not settings.data and device.type == "cpu" else 0
    most = settings.max_steps or by_default
    return num_steps(mixing.mix_of(data).count, settings.batch_size, settings.epochs, most)


def stop_at_end(run: Run, lm, tokenizer):
    """Have a policy's settings for generation, which are saved with it, stop at the end token that it
    learns to write, too. Every rank calls this.

    A base model's, and those of a model that is given another template, stop elsewhere: nobody who
    loads the result would see its answers end.
    """
    end = chat.Chat(tokenizer, allow_control_tokens=True).end_id
    own = lm.generation_config.eos_token_id
    own = set(own if isinstance(own, list) else [own]) - {None}
    if end not in own:
        lm.generation_config.eos_token_id = [*sorted(own), end]
        run.say(
            f"generation_config.json will stop at {tokenizer.convert_ids_to_tokens(end)!r}, too, which "
            "the chat template ends answers with"
        )


def load(
    settings,
    device,
    mode: Mode,
    path: str,
    config: dict,
    change=None,
    loader=loading.load_backbone,
):
    """A Backbone, or what else `loader` makes, in the run's mode, sharded as `config` says. Every rank
    calls this.
    """
    module = loader(
        path,
        config,
        mode.precision,
        mode.stage,
        device,
        layout=settings.layout,
        trust_remote_code=settings.trust_remote_code,
        allow_pickle=settings.allow_pickle,
        change=change,
    )
    module.deterministic = settings.deterministic
    if settings.compile == "auto":
        _compile(settings, module, config)
    return module


def _compile(settings, module, config: dict):
    """Compile the module's layers where every rank can, else say why not, once in a run. Every rank
    calls this.

    Policy and reference, whose difference is trained on, are compiled alike: none where one is at
    stage 3.
    """
    names = ("ds_config", "reference_ds_config", "value_ds_config")
    paths = [path for name in names if (path := getattr(settings, name, None))]
    stages = [ds_config.zero_stage(ds_config.read_config(path)) for path in paths]
    reason = compiled.why_not(module, max(ds_config.zero_stage(config), *stages))
    if reason is None:
        try:
            compiled.compile_layers(module)
            compiled.try_out(module)
        except Exception as error:  # of the compiler, whose exceptions are of every kind
            logging.getLogger("zeropref").info("--compile auto", exc_info=error)
            reason = named(error)
    reasons = [each for each in dist.all_gather(reason) if each is not None]
    if reasons:
        compiled.leave_uncompiled(module)
        _say_uncompiled(reasons[0])


@functools.cache
def _say_uncompiled(reason: str):
    logging.getLogger("zeropref").warning("--compile auto: layers stay uncompiled: %s", reason)


def say_attention(settings, run: Run, mode: Mode, module):
    """Say where a GPU computes attention without its fastest kernel, and why."""
    dtype = torch.bfloat16 if mode.precision == "bf16" else torch.float32
    why = without_flash(module.lm.config, dtype, run.device)
    if why and settings.layout == "packed":
        run.say(f"attention goes without the flash kernel, which takes longer: {why}")


def batch_tokens(settings, device, mode: Mode, module) -> int:
    """The token budget of a packed batch: --micro_tokens, or what fits. Every rank calls this."""
    return settings.micro_tokens or memory.default_batch_tokens(
        module, device, mode.stage, settings.gradient_checkpointing, settings.max_length
    )


def wrap_for_training(
    settings, mode: Mode, module, tokenizer, steps: int, lr: float | None = None
) -> TrainedModel:
    """`module` under DeepSpeed with AdamW and a schedule over `steps`. lr: in place of --lr. Every rank
    calls this.
    """
    if settings.gradient_checkpointing:
        module.checkpoint_activations()
    min_lr = settings.min_lr
    if min_lr is not None and lr is not None:
        min_lr *= lr / settings.lr  # the same share of another peak
    return TrainedModel(
        module,
        mode.config,
        lr=settings.lr if lr is None else lr,
        weight_decay=settings.weight_decay,
        grad_clip=settings.grad_clip,
        scheduler=settings.lr_scheduler,
        warmup_ratio=settings.warmup_ratio,
        warmup_steps=settings.warmup_steps,
        num_cycles=settings.num_cycles,
        min_lr=min_lr,
        total_steps=steps,
        tokenizer=tokenizer,
    )


def live_reference(
    settings, run, mode, path, config, moves: bool = False, offload: bool = False
) -> Live:
    """The frozen model at `path`, in the run's mode. moves: it will follow the policy. offload: it lies
    in main memory between uses.
    """
    module = load(settings, run.device, mode, path, config)
    return Live(module, config, moves=moves, offload=offload)


def adapters(settings):
    """What puts LoRA adapters into a model; None without --lora_rank."""
    if not settings.lora_rank:
        return None
    return partial(
        lora.add,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        targets=settings.lora_targets,
        seed=settings.seed,
    )


def resolve_reference_config(settings, policy_config: dict) -> dict:
    """The resolved DeepSpeed configuration of the frozen reference. ValueError for stages 1 and 2."""
    return resolve_frozen_config(settings.reference_ds_config, policy_config, "reference")


def resolve_frozen_config(path: str | None, policy_config: dict, what: str) -> dict:
    """The resolved DeepSpeed configuration of a frozen model: of the JSON at `path`, or sharded beside
    a stage-3 policy and else whole. ValueError for stages 1 and 2 names `what` it is.
    """
    if path is None and ds_config.zero_stage(policy_config) == 3:
        path = str(ROOT / "ds_configs/frozen_zero3.json")
    config = ds_config.resolve_frozen(ds_config.read_config(path) if path else {}, policy_config)
    if ds_config.zero_stage(config) in (1, 2):
        raise ValueError(
            f"{path}: stages 1 and 2 shard gradients, which a {what} has not; take stage 0 or 3"
        )
    return config


def note_scale(run: Run, model: TrainedModel, scale: reward.Scale):
    """Write what scores are like into run.json and the model's configuration, as score_mean and
    score_std (null where one answer has none); transformers keeps what it does not know.
    """
    run.note(scores=scale._asdict())
    for name, value in zip(SCALE, (scale.mean, scale.std), strict=True):
        setattr(model.module.lm.config, name, value if math.isfinite(value) else None)
    run.say(
        f"scores: {scale.mean:.4f} with a deviation of {scale.std:.4f} over {scale.answers} answers "
        f"({scale.data})"
    )


def export_model(settings, run: Run, model: TrainedModel, report) -> float:
    """Write OUTPUT/model with its card; how far what it gives is from what the model gives.

    Every rank calls this.
    """
    return export.model_directory(
        model.module,
        model.tokenizer,
        run.folder.path / "model",
        run.first_batches,
        export_dtype=settings.export_dtype,
        write_card=report.card(),
        trust_remote_code=settings.trust_remote_code,
    )
