"""What a trainer starts from, out of its flags: data, policy and reference, checked.

The library below takes values; this file and the launch scripts translate flags into them.
"""

from functools import partial
from pathlib import Path

from train import settings as shared_flags
from train.data import chat, dataset, tokens
from train.data.steps import num_steps
from train.engine import checks, dist, ds_config, loading, memory
from train.engine.trained import TrainedModel
from train.methods.reference import AdaptersOff, Cached, Live, NoReference, Reference
from train.models import lora
from train.models.pretrained import load_tokenizer
from train.run import export
from train.run.folder import describe, hardware, versions
from train.run.session import Plan, Run

ROOT = Path(__file__).resolve().parents[2]
CPU_STEPS = 6  # of the default run on a CPU: about 4 minutes on two cores


def open_data(settings, run: Run, takes_labelled: bool):
    """The tokenizer, the training groups and the held-out groups (None where there are none).

    takes_labelled: the loss takes single answers with labels. Every rank calls this.
    """
    ds_config.read_config(settings.ds_config)  # refused before the data are tokenised
    sources, eval_sources = shared_flags.sources(settings)
    path = run.folder.model_path(settings.model)
    tokenizer = load_tokenizer(path, settings.trust_remote_code)
    with dist.main_process_first():  # rank 0 tokenises, the others find it in the cache
        prepare = partial(
            tokens.prepare,
            tokenizer=tokenizer,
            max_length=settings.max_length,
            max_prompt_length=settings.max_prompt_length,
            allow_control_tokens=settings.allow_control_tokens,
            max_dropped=settings.max_dropped,
            kind=tokens.kind_of(sources),  # the held-out data are of the same kind
        )
        data = prepare(sources)
        held_out = prepare(eval_sources) if eval_sources else None
    if data.labels is not None and not takes_labelled:
        raise ValueError(
            f"--loss {settings.loss} compares pairs, and the data has single answers with labels: kto, "
            "bco_pair and aot_unpaired take those"
        )
    dropped_held_out = held_out.dropped if held_out else []
    run.folder.note_dropped({"train": data.dropped, "eval": dropped_held_out})
    if not eval_sources and settings.eval_split:
        data, held_out = dataset.split_by_prompt(
            data, settings.eval_split, settings.data_split_seed
        )
    run.note(
        data=describe(data, sources),
        eval_data=held_out and describe(held_out, eval_sources or sources),
    )
    return tokenizer, data, held_out


def open_models(settings, run: Run, tokenizer, data, held_out) -> tuple[TrainedModel, Reference]:
    """The policy under DeepSpeed and its reference, checked on the first groups; settles the run's plan.

    Every rank calls this.
    """
    device = run.device
    precision = ds_config.resolve_precision(settings.precision, device)
    config = ds_config.resolve(
        ds_config.read_config(settings.ds_config), precision, settings.grad_clip
    )
    stage = ds_config.zero_stage(config)
    by_default = CPU_STEPS if not settings.data and device.type == "cpu" else 0
    steps = num_steps(
        len(data), settings.batch_size, settings.epochs, settings.max_steps or by_default
    )
    path = run.folder.model_path(settings.model)
    reference_path = run.folder.model_path(settings.reference_model or settings.model)
    load = partial(
        loading.load_backbone,
        precision=precision,
        policy_stage=stage,
        device=device,
        layout=settings.layout,
        trust_remote_code=settings.trust_remote_code,
        allow_pickle=settings.allow_pickle,
    )

    def batch_tokens(module):
        return settings.micro_tokens or memory.default_batch_tokens(
            module, device, stage, settings.gradient_checkpointing, settings.max_length
        )

    def live_reference():
        reference_config = _reference_config(settings, config)
        module = load(reference_path, reference_config)
        return Live(module, reference_config, moves=bool(settings.reference_every))

    # One that is looked up is done with before the policy comes: never two models in memory.
    reference = reference_config = None
    if settings.reference == "none":
        reference = NoReference()
    elif settings.reference == "cached":
        reference_config = _reference_config(settings, config)
        live = live_reference()
        datasets = [each for each in (data, held_out) if each is not None]
        reference = Cached(live, datasets, 2 * batch_tokens(live.module), precision, run.say)
        del live

    module = load(path, config, change=_adapters(settings))
    chat.check_fit(module.lm.config, tokenizer, settings.max_length)
    if settings.gradient_checkpointing:
        module.checkpoint_activations()
    policy = TrainedModel(
        module,
        config,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        grad_clip=settings.grad_clip,
        scheduler=settings.lr_scheduler,
        warmup_ratio=settings.warmup_ratio,
        total_steps=steps,
        tokenizer=tokenizer,
    )
    if settings.reference == "live" and settings.lora_rank and path == reference_path:
        reference = AdaptersOff(policy)
    elif settings.reference == "live":
        reference_config = _reference_config(settings, config)
        reference = live_reference()

    same_weights = path == reference_path and settings.reference != "none"
    run.settle(
        Plan(precision, batch_tokens(module), steps, same_weights),
        model=path,
        reference_model=reference_path,
        deepspeed=config,
        reference_deepspeed=reference_config,
        hardware=hardware(device),
        versions=versions(),
    )
    run.first_batches = checks.start(
        policy, reference, data, device, precision, same_weights=same_weights
    )
    return policy, reference


def _adapters(settings):
    """What puts LoRA adapters into a causal LM; None without --lora_rank."""
    if not settings.lora_rank:
        return None
    return partial(
        lora.add,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        targets=settings.lora_targets,
    )


def _reference_config(settings, policy_config: dict) -> dict:
    """The resolved DeepSpeed configuration of the frozen reference. ValueError for stages 1 and 2."""
    path = settings.reference_ds_config
    if path is None and ds_config.zero_stage(policy_config) == 3:
        path = str(ROOT / "ds_configs/frozen_zero3.json")
    config = ds_config.resolve_frozen(ds_config.read_config(path) if path else {}, policy_config)
    if ds_config.zero_stage(config) in (1, 2):
        raise ValueError(
            f"{path}: stages 1 and 2 shard gradients, which a reference has not; take stage 0 or 3"
        )
    return config


def export_policy(settings, run: Run, policy: TrainedModel, report) -> float:
    """Write OUTPUT/model with its card; how far it is from the policy, nats a token.

    Every rank calls this.
    """
    return export.model_directory(
        policy.module,
        policy.tokenizer,
        run.folder.path / "model",
        run.first_batches,
        export_dtype=settings.export_dtype,
        write_card=report.card(),
        trust_remote_code=settings.trust_remote_code,
    )
