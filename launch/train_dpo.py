"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) of a causal language
model.

    deepspeed launch/train_dpo.py                                        # the built-in model on the
    built-in pairs deepspeed launch/train_dpo.py --config launch/recipes/smollm_human_like.yaml
    deepspeed --num_accelerators 2 launch/train_dpo.py --model DIR --data pairs.jsonl --ds_config
    ds_configs/zero3.json

For a prompt x with a chosen answer y_w and a rejected answer y_l, minimises

    -log sigmoid(beta * ((log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x))))

averaged over all pairs of a step, whatever the ranks and rows they are spread over. It departs from
the paper in the optimiser (AdamW for RMSprop, with decoupled weight decay on matrices), and in how
pairs are computed, not in what: the prompt's tokens stand once for both answers, packed rows
without padding (train/data/packing.py).
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train import (
    config,
    settings,  # noqa: E402
)
from train.engine import preemption  # noqa: E402

CPU_STEPS = 6  # of the default run on a CPU: about 4 minutes on two cores


@dataclasses.dataclass
class Settings(settings.Preference):
    """Train a causal language model on preference pairs with DPO."""

    reference: Literal["live", "cached", "none"] = "live"
    """Where log pi_ref comes from. live: a frozen model, scored beside the policy. cached: the
    same, scored once and kept on disk. none: nowhere, for losses that need none.
    """
    reference_model: str | None = None
    """The reference: a model directory or hub name. None: --model as it is at the start."""
    reference_every: int = 0
    """Steps after which a live reference moves towards the policy (TR-DPO); 0: it stands still."""
    reference_mixup: float = 0.6
    """The policy's share in a reference that moves; 1 replaces it."""
    reference_ds_config: str | None = settings.flag(None, may_change=True)
    """DeepSpeed JSON for the reference. None: ds_configs/frozen_zero3.json beside a stage-3 policy,
    else whole on each rank.
    """
    lora_rank: int = 0
    """Rank of LoRA adapters, which are trained in place of the weights; 0: the weights are. Needs
    peft.
    """
    lora_alpha: float = 16.0
    """LoRA's scale: adapters count alpha / rank times."""
    lora_targets: list[str] | None = None
    """Layers that get adapters, by the end of their names. None: all linear ones but the head."""

    def __post_init__(self):
        super().__post_init__()
        settings.check_bounds(self, {"reference_every": 0, "lora_rank": 0})


def main():
    preemption.install_handlers()  # before anything that takes its time
    settings = config.parse(Settings)
    from train import quiet

    quiet.now()  # before the libraries that it quiets
    from train.data import steps
    from train.engine import checks, dist, ds_config, memory, prefetch
    from train.losses import composition
    from train.methods import preference, preference_report
    from train.run import checkpoint, export, folder, session

    device = dist.init()
    preemption.start_watch()
    with session.at_the_door():
        folder = folder.Run(settings.output, config.as_dict(settings))
        if folder.finished:
            folder.say(f"{folder.path} holds this run, finished; another --output repeats it")
            return dist.shutdown()
        loss_of = composition.choose(settings.loss, settings.beta, settings.loss_args)
        refuse(settings, loss_of)
        ds = ds_config.read_config(settings.ds_config)
        tokenizer, data, held_out = open_data(settings, folder, loss_of)
        policy, reference, plan = open_models(
            settings, ds, folder, tokenizer, data, held_out, device
        )
        first_rows = checks.start(
            policy, reference, data, device, plan.precision, plan.same_weights
        )
        moving = reference if settings.reference_every else None
        saves = checkpoint.Saves(folder, settings, policy, tokenizer, data, moving)
        plan = saves.resume(plan)
    folder.start()
    running = composition.RunningMean()  # statistics that some losses keep
    evaluation = (
        preference.HeldOut(held_out, plan.row_tokens, device, loss_of, settings.max_length)
        if held_out
        else None
    )
    board = preference_report.Training(folder, settings, policy, device, plan, reference.forwards)
    saves.attach(board, running=running)
    evaluate = lambda number: board.evaluate(number, evaluation, policy, reference, running)
    with saves.guard():
        if due(settings, plan.begun) or saves.foreign:
            evaluate(plan.begun)
        steps = steps.plan_steps(
            data.lengths.sum(1),
            settings.batch_size,
            plan.row_tokens,
            seed=settings.seed,
            start=plan.begun,
            total=plan.steps,
            rank=dist.rank(),
            world=dist.world_size(),
        )
        for step, rows in prefetch.ahead(steps, data, device):
            shares, before = [None] * len(rows), running.state_dict()
            if (
                loss_of.couples
            ):  # an example's loss depends on the others of its step: score them all first
                with memory.room_for_batch(rows[0], plan.row_tokens):
                    shares = preference.whole_step(
                        policy,
                        reference,
                        data,
                        step,
                        loss_of,
                        running,
                        plan.row_tokens,
                        settings.max_length,
                        device,
                    )
            for row, share in zip(
                rows, shares, strict=True
            ):  # as many on every rank; the last ones may be empty
                with memory.room_for_batch(row, plan.row_tokens):
                    examples, losses, total = preference.of_row(
                        policy, reference, row, loss_of, share
                    )
                    # the engine averages over ranks; the mean wanted is over all examples of the
                    # step
                    policy.backward(total * dist.world_size() / len(step.groups))
                board.add(row, examples, losses)
            update = policy.step()
            if not update.applied:
                running.load_state_dict(before)
            if moving and update.applied and (step.number + 1) % settings.reference_every == 0:
                moving.follow(policy, settings.reference_mixup)
            board.stepped(step, update)
            saves.count(step, update)
            if due(settings, step.number + 1):
                evaluate(step.number + 1)
            saves.settle(step)
        evaluate(plan.steps)
        preemption.raise_if_preempted()
        gap = export.model_directory(
            policy.module,
            tokenizer,
            folder.path / "model",
            first_rows,
            export_dtype=settings.export_dtype,
            write_card=board.card(),
            trust_remote_code=settings.trust_remote_code,
        )
    board.finish(gap)
    preemption.stop_watch()
    dist.shutdown()


def due(settings, number: int) -> bool:
    """Whether the held-out pairs are scored after `number` steps: at the start, then every
    --eval_every.
    """
    return number % settings.eval_every == 0 if settings.eval_every else number == 0


def refuse(settings, loss_of):
    """ValueError where the loss and the reference do not go together."""
    if settings.reference == "none" and loss_of.needs_reference:
        raise ValueError(f"--loss {settings.loss} needs a reference: --reference live or cached")
    if settings.reference == "cached" and loss_of.needs_mismatched:
        raise ValueError(
            f"--loss {settings.loss} scores responses to other prompts, drawn anew at each step: --reference live"
        )
    if settings.reference_every and settings.reference != "live":
        raise ValueError(f"a reference that moves is --reference live, not {settings.reference}")
    if settings.reference_every and settings.lora_rank:
        raise ValueError(
            "--reference_every moves weights towards the policy's, and with --lora_rank those stand still"
        )
    if not 0 < settings.reference_mixup <= 1:
        raise ValueError(f"--reference_mixup lies in (0, 1], not at {settings.reference_mixup}")
    if settings.reference == "none" and settings.reference_model:
        raise ValueError("--reference none and --reference_model contradict each other")


class Plan(NamedTuple):
    """What is settled before the first step."""

    precision: str  # "bf16" or "fp32"
    row_tokens: int  # the budget of a packed row
    steps: int  # optimiser steps of the whole run
    same_weights: bool  # the reference is the policy as it starts
    begun: int = 0  # steps that an interrupted run has done already


def open_data(settings, folder, loss_of):
    """The tokenizer, the training pairs and the held-out pairs (None where there are none),
    tokenised.
    """
    from train.data import dataset, tokens
    from train.engine import dist
    from train.models import pretrained
    from train.run import folder

    sources, eval_sources = settings.sources(settings)
    tokenizer = pretrained.load_tokenizer(
        folder.model_path(settings.model), settings.trust_remote_code
    )
    options = dict(
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
        allow_control_tokens=settings.allow_control_tokens,
        max_dropped=settings.max_dropped,
    )
    with dist.main_process_first():  # rank 0 tokenises, the others find it in the cache
        options |= {"kind": tokens.kind_of(sources)}  # the held-out data are of the same kind
        data = tokens.prepare(sources, tokenizer, **options)
        held_out = tokens.prepare(eval_sources, tokenizer, **options) if eval_sources else None
    if data.labels is not None and not loss_of.takes_labelled:
        raise ValueError(
            f"--loss {settings.loss} compares pairs, and the data has single answers with labels: kto, "
            "bco_pair and aot_unpaired take those"
        )
    folder.dropped({"train": data.dropped, "eval": held_out.dropped if held_out else []})
    if not eval_sources and settings.eval_split:
        data, held_out = dataset.split_by_prompt(
            data, settings.eval_split, settings.data_split_seed
        )
    folder.note(
        data=folder.describe(data, sources),
        eval_data=held_out and folder.describe(held_out, eval_sources or sources),
    )
    return tokenizer, data, held_out


def open_models(settings, ds, folder, tokenizer, data, held_out, device):
    """The policy under DeepSpeed, the reference, and the Plan."""
    from train.data import chat, steps
    from train.engine import ds_config, loading, memory, trained
    from train.methods.reference import AdaptersOff
    from train.models import lora
    from train.run import folder

    precision = ds_config.resolve_precision(settings.precision, device)
    ds = ds_config.resolve(ds, precision, settings.grad_clip)
    stage = ds_config.zero_stage(ds)
    most = settings.max_steps or (CPU_STEPS if not settings.data and device.type == "cpu" else 0)
    steps = steps.num_steps(len(data), settings.batch_size, settings.epochs, most)
    path, ref_path = (
        folder.model_path(settings.model),
        folder.model_path(settings.reference_model or settings.model),
    )
    load = lambda source, mode, change=None: loading.load_backbone(
        source,
        mode,
        precision,
        stage,
        device,
        settings.layout,
        settings.trust_remote_code,
        settings.allow_pickle,
        change,
    )
    adapt = lambda lm: lora.add(lm, settings.lora_rank, settings.lora_alpha, settings.lora_targets)
    budget = lambda module: (
        settings.micro_tokens
        or memory.default_batch_tokens(
            module, device, stage, settings.gradient_checkpointing, settings.max_length
        )
    )
    sets = [each for each in (data, held_out) if each is not None]
    looked_up = (
        settings.reference != "live"
    )  # then no second model is in memory when the policy is there
    ref_ds, reference = (
        open_reference(settings, ds, ref_path, load, budget, sets, folder)
        if looked_up
        else (None, None)
    )
    module = load(path, ds, adapt if settings.lora_rank else None)
    chat.check_fit(module.lm.config, tokenizer, settings.max_length)
    if settings.gradient_checkpointing:
        module.checkpoint_activations()
    policy = trained.TrainedModel(
        module,
        ds,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        grad_clip=settings.grad_clip,
        scheduler=settings.lr_scheduler,
        warmup_ratio=settings.warmup_ratio,
        total_steps=steps,
    )
    if settings.lora_rank and settings.reference == "live" and path == ref_path:
        ref_ds, reference = None, AdaptersOff(policy)
    elif not looked_up:
        ref_ds, reference = open_reference(settings, ds, ref_path, load, budget, sets, folder)
    plan = Plan(precision, budget(module), steps, path == ref_path and settings.reference != "none")
    folder.note(
        model=path,
        reference_model=ref_path,
        deepspeed=ds,
        reference_deepspeed=ref_ds,
        **plan._asdict(),
        hardware=folder.hardware(device),
        versions=folder.versions(),
    )
    return policy, reference, plan


def open_reference(settings, ds, path, load, budget, sets, folder):
    """The DeepSpeed configuration of the reference, and who gives its log-probabilities."""
    from train.engine import ds_config
    from train.methods.reference import Cached, Live, NoReference

    if settings.reference == "none":
        return None, NoReference()
    frozen = settings.reference_ds_config
    if frozen is None and ds_config.zero_stage(ds) == 3:
        frozen = str(ROOT / "ds_configs/frozen_zero3.json")
    config = ds_config.resolve_frozen(ds_config.read_config(frozen) if frozen else {}, ds)
    if ds_config.zero_stage(config) in (1, 2):
        raise ValueError(
            f"{frozen}: stages 1 and 2 shard gradients, which a reference has not; take stage 0 or 3"
        )
    live = Live(load(path, config), config, bool(settings.reference_every))
    if settings.reference == "live":
        return config, live
    return config, Cached(
        live,
        sets,
        2 * budget(live.module),
        ds_config.resolve_precision(settings.precision, live.device),
        folder.say,
    )


if __name__ == "__main__":
    main()
