"""What flags and keys of other trainers are called here: TRL's, transformers' TrainingArguments',
OpenRLHF's and LLaMA-Factory's.

    hint("learning_rate", {"lr", ...})      # "write lr"
    recipe({"learning_rate": 1e-6}, ...)    # the lines of YAML that say it here

Used where a flag or a key does not exist; a flag that a script has is never translated.
Imports the standard library only: scripts read their flags before torch.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple


class Here(NamedTuple):
    """What another trainer's flag is here."""

    # Flags, of which the first that a script has is meant; "reference=cached": with this value.
    flags: tuple[str, ...] = ()
    note: str = ""  # where the meaning differs, or why there is no such flag
    whole: bool = True  # their value is ours; else it becomes a part of ours, by hand


def _to(*flags: str, note: str = "") -> Here:
    return Here(flags, note)


def _part(*flags: str, note: str) -> Here:
    return Here(flags, note, whole=False)


def _none(note: str) -> Here:
    return Here((), note)


A_STEP = "a step's, over all ranks: theirs times accumulation times ranks"
AT_THE_END = "the model of the last step is uploaded, when the run is done"
PACKED = "batches are packed by tokens: --micro_tokens is their size"
ADAMW = "the optimiser is AdamW with betas 0.9, 0.999 and eps 1e-8"
NO_QUANTISED = "models are not quantised"
CHAT = "prompts and answers go through the model's chat template by themselves"
WHOLE = "every step counts its own rows exactly; nothing to set"
BY_LAUNCHER = "the launcher says it: deepspeed --num_gpus N"
DRAWN = "answers are drawn from the policy as it is, at --temperature"
SHARES = "a share of each source's rows an epoch: a.jsonl:0.3 b.jsonl"
LAST = "the last step's model is OUTPUT/model"

# Trainers' names, by what they are about. Those that are called the same here are not in it.
NAMES: dict[str, Here] = {
    # models
    "model_name_or_path": _to("model"),
    "pretrain": _to("model"),
    "actor_model_name_or_path": _to("model"),
    "model_name": _to("model"),
    "tokenizer": _none("a model's own tokenizer is used"),
    "tokenizer_name": _none("a model's own tokenizer is used"),
    "tokenizer_name_or_path": _none("a model's own tokenizer is used"),
    "model_revision": _none("fetch the revision with `hf download` and name its folder"),
    "ref_model": _to("reference_model"),
    "ref_model_name_or_path": _to("reference_model"),
    "ref_pretrain": _to("reference_model"),
    "ref_model_init_kwargs": _none("the reference is loaded like the model"),
    "model_init_kwargs": _none("--precision and --layout say how a model is loaded"),
    "reward_model_path": _to("reward_model"),
    "reward_model_name_or_path": _to("reward_model"),
    "reward_pretrain": _to("reward_model"),
    "remote_rm_url": _part("reward", note="MODULE:FUNCTION, a function that asks the server"),
    "critic_pretrain": _to("value_model"),
    "value_model_path": _to("value_model"),
    "adapter_name_or_path": _none("merge the adapter into its base first"),
    "attn_implementation": _none("attention is chosen for packed batches; see --layout"),
    "flash_attn": _none("attention is chosen for packed batches; see --layout"),
    "torch_dtype": _to("precision", note="auto, bf16 or fp32"),
    "dtype": _to("precision", note="auto, bf16 or fp32"),
    "bf16": _to("precision=bf16"),
    "fp16": _to("precision=bf16", note="there is no fp16"),
    "tf32": _none("torch's own setting holds"),
    "load_in_4bit": _none(NO_QUANTISED),
    "load_in_8bit": _none(NO_QUANTISED),
    "quantization_bit": _none(NO_QUANTISED),
    # data
    "dataset_name": _to("data", note="org/name, org/name:config, org/name@split"),
    "dataset": _to("data"),
    "datasets": _to("data"),
    "train_file": _to("data"),
    "train_data": _to("data"),
    "prompt_data": _to("data"),
    "dataset_config": _part("data", note="as org/name:config"),
    "dataset_config_name": _part("data", note="as org/name:config"),
    "dataset_train_split": _part("data", note="as org/name@split"),
    "dataset_test_split": _part("eval_data", note="as org/name@split"),
    "train_split": _part("data", note="as org/name@split"),
    "eval_split_name": _part("eval_data", note="as org/name@split"),
    "prompt_data_probs": _part("data", note=SHARES),
    "dataset_probs": _part("data", note=SHARES),
    "interleave_probs": _part("data", note=SHARES),
    "dataset_dir": _part("data", note="files are named whole"),
    "eval_dataset": _to("eval_data"),
    "validation_file": _to("eval_data"),
    "val_size": _to("eval_split", note="a share of the prompts, from 0 to 1"),
    "max_samples": _none("split the hub's data: org/name@train[:1000]"),
    "prompt_key": _part("columns", note="prompt=NAME"),
    "input_key": _part("columns", note="prompt=NAME"),
    "chosen_key": _part("columns", note="chosen=NAME"),
    "rejected_key": _part("columns", note="rejected=NAME"),
    "label_key": _part("columns", note="label=NAME"),
    "max_len": _to("max_length"),
    "max_seq_length": _to("max_length"),
    "cutoff_len": _to("max_length"),
    "prompt_max_len": _to("max_prompt_length"),
    "max_completion_length": _to("max_new_tokens", "max_length", note="prompt and answer together"),
    "max_target_length": _to("max_new_tokens", "max_length", note="prompt and answer together"),
    "response_length": _to("max_new_tokens", "max_length", note="prompt and answer together"),
    "generate_max_len": _to("max_new_tokens"),
    "truncation_mode": _to("truncate_prompt", note="keep_end, or keep_system_and_end"),
    "template": _part("chat_template", note="a file; without it the tokenizer's own"),
    "chat_template_path": _to("chat_template", note="a file"),
    "apply_chat_template": _none(CHAT),
    "dataset_num_proc": _none("tokens are made once and kept"),
    "preprocessing_num_workers": _none("tokens are made once and kept"),
    "dataloader_num_workers": _none("batches are made beside the step"),
    "dataloader_drop_last": _none(WHOLE),
    "dataloader_prefetch_factor": _none("batches are made beside the step"),
    "dataloader_persistent_workers": _none("batches are made beside the step"),
    "dataset_streaming": _none("tokens are made once and kept"),
    "dataloader_pin_memory": _none("batches are made beside the step"),
    "remove_unused_columns": _none("columns that are not read stay unread"),
    "overwrite_cache": _none("tokens are found by content; nothing goes stale"),
    "group_by_length": _none(PACKED),
    "length_column_name": _none(PACKED),
    "padding_free": _to("layout=packed", note="the default"),
    "packing": _to("layout=packed", note="the default"),
    "packing_samples": _to("layout=packed", note="the default"),
    # the loss
    "loss_type": _to("loss", "algorithm"),
    "pref_loss": _to("loss"),
    "pref_beta": _to("beta"),
    "dpo_beta": _to("beta"),
    "pref_ftx": _part("loss", note="a weighted sum: sigmoid:1.0,sft:0.1"),
    "rpo_alpha": _part("loss", note="a weighted sum: sigmoid:1.0,sft:0.1"),
    "nll_loss_coef": _part("loss", note="a weighted sum: sigmoid:1.0,sft:0.1"),
    "loss_weights": _part("loss", note="a weighted sum: sigmoid:0.8,sft:0.2"),
    "label_smoothing": _to("loss_args.label_smoothing"),
    "dpo_label_smoothing": _to("loss_args.label_smoothing"),
    "label_smoothing_factor": _to("loss_args.label_smoothing"),
    "simpo_gamma": _to("loss_args.gamma"),
    "cpo_alpha": _to("loss_args.nll_weight"),
    "desirable_weight": _to("loss_args.desirable_weight"),
    "undesirable_weight": _to("loss_args.undesirable_weight"),
    "discopop_tau": _to("loss_args.tau"),
    "f_divergence_type": _to("loss_args.f_divergence_type"),
    "f_alpha_divergence_coef": _to("loss_args.f_alpha_divergence_coef"),
    "ld_alpha": _to("loss_args.ld_alpha"),
    "use_weighting": _to("loss_args.use_weighting"),
    "center_rewards_coefficient": _to("loss_args.centering"),
    "reference_free": _part("loss=simpo", note="or cpo, orpo, with --reference none"),
    "precompute_ref_log_probs": _to("reference=cached"),
    "precompute_ref_batch_size": _none("their batches are sized by memory"),
    "sync_ref_model": _part("reference_every", note="a number of steps"),
    "ref_model_sync_steps": _to("reference_every"),
    "ref_model_mixup_alpha": _to("reference_mixup"),
    "ref_offload": _part("reference_ds_config", note="a DeepSpeed JSON"),
    "ipo": _to("loss=ipo"),
    # reinforcement learning
    "num_generations": _to("samples_per_prompt"),
    "rloo_k": _to("samples_per_prompt"),
    "n_samples_per_prompt": _to("samples_per_prompt"),
    "num_ppo_epochs": _to("epochs_per_rollout"),
    "num_iterations": _to("epochs_per_rollout"),
    "ppo_epochs": _to("epochs_per_rollout"),
    "num_mini_batches": _to("minibatches"),
    "rollout_batch_size": _to("batch_size", note="prompts a rollout, over all ranks"),
    "local_rollout_forward_batch_size": _part("decode_batch", note="answers decoded at once"),
    "generation_batch_size": _part("decode_batch", note="answers decoded at once"),
    "kl_coefficient": _to("kl_coef"),
    "init_kl_coef": _to("kl_coef"),
    "kl_estimator": _part("algorithm", note="each has its own estimator"),
    "use_kl_loss": _part("algorithm", note="each has its own place of the KL"),
    "advantage_estimator": _to("algorithm", note="gae is ppo, group_norm is grpo"),
    "cliprange": _to("clip_low", note="and --clip_high"),
    "eps_clip": _to("clip_low", note="and --clip_high"),
    "epsilon": _to("clip_low", note="and --clip_high"),
    "eps_clip_low_high": _part("clip_low", note="and --clip_high"),
    "epsilon_high": _to("clip_high"),
    "delta": _to("dual_clip"),
    "cliprange_value": _to("value_clip"),
    "value_clip_range": _to("value_clip"),
    "vf_coef": _none("the value model is one of its own, with --value_lr"),
    "lambd": _to("lam"),
    "critic_learning_rate": _to("value_lr"),
    "missing_eos_penalty": _to("missing_end_penalty"),
    "reward_funcs": _to("reward"),
    "reward_clip_range": _part("reward_clip", note="one number, the largest size"),
    "scale_rewards": _part("scale_advantages", note="group, batch or none"),
    "whiten_rewards": _part("algorithm", note="each has its own scale"),
    "mask_truncated_completions": _part("missing_end_penalty", note="a penalty for cut answers"),
    "sapo_temperature_neg": _to("clip_low"),
    "sapo_temperature_pos": _to("clip_high"),
    "importance_sampling_level": _part("algorithm", note="each has its own ratio"),
    "normalize_advantages": _part("scale_advantages", note="group, batch or none"),
    "steps_per_generation": _to("minibatches"),
    "top_p": _none(DRAWN),
    "top_k": _none(DRAWN),
    "min_p": _none(DRAWN),
    "repetition_penalty": _none(DRAWN),
    "vllm_mode": _none("answers are decoded by the policy itself"),
    "use_vllm": _none("answers are decoded by the policy itself"),
    "vllm_num_engines": _none("answers are decoded by the policy itself"),
    "freezing_critic_steps": _to("value_warmup", note="rollouts"),
    # training
    "learning_rate": _to("lr"),
    "actor_learning_rate": _to("lr"),
    "per_device_train_batch_size": _to("batch_size", note=A_STEP),
    "gradient_accumulation_steps": _to("batch_size", note=A_STEP),
    "train_batch_size": _to("batch_size", note="over all ranks"),
    "micro_train_batch_size": _part("micro_tokens", note="tokens, not rows"),
    "micro_rollout_batch_size": _part("decode_batch", note="answers decoded at once"),
    "micro_batch_size": _part("micro_tokens", note="tokens, not rows"),
    "per_device_eval_batch_size": _none(PACKED),
    "eval_accumulation_steps": _none(PACKED),
    "auto_find_batch_size": _none(PACKED),
    "num_train_epochs": _to("epochs"),
    "max_epochs": _to("epochs"),
    "num_epochs": _to("epochs"),
    "num_episodes": _to("epochs"),
    "total_episodes": _part("epochs", note="passes over the prompts"),
    "lr_scheduler_type": _to("lr_scheduler"),
    "lr_scheduler_kwargs": _part("num_cycles", note="and --min_lr"),
    "lr_warmup_ratio": _to("warmup_ratio"),
    "num_warmup_steps": _to("warmup_steps"),
    "min_learning_rate": _to("min_lr"),
    "l2": _to("weight_decay"),
    "max_grad_norm": _to("grad_clip"),
    "max_norm": _to("grad_clip"),
    "optim": _none(ADAMW),
    "optimizer": _none(ADAMW),
    "neftune_noise_alpha": _none("embeddings get no noise"),
    "ddp_find_unused_parameters": _none("DeepSpeed sums gradients up"),
    "adam_beta1": _none(ADAMW),
    "adam_beta2": _none(ADAMW),
    "adam_betas": _none(ADAMW),
    "adam_epsilon": _none(ADAMW),
    "data_seed": _to("seed"),
    "full_determinism": _to("deterministic"),
    "average_tokens_across_devices": _none(WHOLE),
    "do_train": _none("a training script trains"),
    "do_eval": _part("eval_every", note="held-out rows are evaluated at the start and the end"),
    "stage": _none("each method is a script: launch/train_dpo.py, train_reward.py, train_ppo.py"),
    # memory
    "deepspeed": _to("ds_config", note="of ZeRO alone: flags say the rest"),
    "deepspeed_config": _to("ds_config", note="of ZeRO alone: flags say the rest"),
    "zero_stage": _to("ds_config", note="ds_configs/zero0.json to zero3.json"),
    "adam_offload": _part("ds_config", note="ds_configs/zero3_offload.json"),
    "fsdp": _part("ds_config", note="ds_configs/zero3.json shards weights, too"),
    "fsdp_config": _part("ds_config", note="ds_configs/zero3.json shards weights, too"),
    "activation_checkpointing": _to("gradient_checkpointing"),
    "activation_offloading": _to("gradient_checkpointing"),
    "use_cpu": _none("without a GPU a run computes on the CPU"),
    "use_rslora": _none("adapters count --lora_alpha / --lora_rank times"),
    "gradient_checkpointing_kwargs": _none("nothing to choose: --gradient_checkpointing alone"),
    "use_liger_kernel": _none("the loss never holds all logits"),
    "torch_compile": _to("compile=auto"),
    "use_peft": _to("lora_rank"),
    "finetuning_type": _to("lora_rank", note="0: all weights"),
    "lora_r": _to("lora_rank"),
    "peft_lora_r": _to("lora_rank"),
    "peft_lora_alpha": _to("lora_alpha"),
    "lora_target": _to("lora_targets"),
    "lora_target_modules": _to("lora_targets"),
    "target_modules": _to("lora_targets"),
    "lora_dropout": _none("adapters have no dropout"),
    "lora_modules_to_save": _none("adapters alone are trained"),
    "lora_task_type": _none("nothing to choose"),
    "local_rank": _none(BY_LAUNCHER),
    "nproc_per_node": _none(BY_LAUNCHER),
    "num_gpus": _none(BY_LAUNCHER),
    "num_processes": _none(BY_LAUNCHER),
    # saving and evaluating
    "output_dir": _to("output"),
    "save_path": _to("output"),
    "ckpt_path": _part("output", note="checkpoints lie in OUTPUT/checkpoints"),
    "logging_dir": _part("output", note="TensorBoard lies in OUTPUT/tensorboard"),
    "run_name": _part("output", note="the folder is the run's name"),
    "overwrite_output_dir": _none("the same command continues; --resume never starts over"),
    "resume_from_checkpoint": _to("resume", note="auto, the default, or a checkpoint's path"),
    "load_checkpoint": _to("resume", note="auto, the default, or a checkpoint's path"),
    "save_steps": _to("save_every"),
    "save_strategy": _part("save_every", note="a number of steps, and --save_minutes"),
    "save_total_limit": _to("keep"),
    "max_ckpt_num": _to("keep"),
    "save_only_model": _none("a checkpoint is whole; launch/export.py makes a model of one"),
    "save_safetensors": _none("weights are always safetensors"),
    "load_best_model_at_end": _none(LAST),
    "metric_for_best_model": _none(LAST),
    "greater_is_better": _none(LAST),
    "hub_model_id": _to("push_to_hub"),
    "hub_private_repo": _none("a repository is private without --hub_public"),
    "hub_strategy": _none(AT_THE_END),
    "hub_always_push": _none(AT_THE_END),
    "hub_token": _none("`hf auth login`, or HF_TOKEN"),
    "eval_steps": _to("eval_every"),
    "eval_strategy": _part("eval_every", note="a number of steps; 0: at the start and the end"),
    "evaluation_strategy": _part(
        "eval_every", note="a number of steps; 0: at the start and the end"
    ),
    "eval_on_start": _none("held-out rows are always evaluated at the start"),
    # logging
    "logging_steps": _to("log_every"),
    "logging_strategy": _part("log_every", note="a number of steps"),
    "logging_first_step": _none("--log_every is 1 by default: every step is logged"),
    "log_completions": _none("answers stand in TensorBoard's texts"),
    "generate_during_eval": _none("eval/evaluate.py writes answers"),
    "use_tensorboard": _to("report_to=tensorboard", note="the default"),
    "use_wandb": _to("report_to=wandb", note="tensorboard wandb: both"),
    "use_mlflow": _to("report_to=mlflow", note="tensorboard mlflow: both"),
    "wandb_project": _none("the environment's WANDB_PROJECT says it"),
    "wandb_run_name": _none("OUTPUT is the run's name, or the environment's WANDB_NAME"),
    "project": _none("the environment says it: WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME"),
    "plot_loss": _none("TensorBoard shows it, from OUTPUT/tensorboard"),
    "log_level": _none("ZEROPREF_VERBOSE=1 lets the libraries speak"),
    "disable_tqdm": _none("the bar shows itself on a terminal alone"),
    "ddp_timeout": _none("a silent rank ends the run after two minutes"),
}
# What values of theirs are called here, by our flag.
VALUES: dict[str, dict[Any, Any]] = {
    "precision": {"bfloat16": "bf16", "float32": "fp32", "float16": "bf16"},
    "loss": {"dpo": "sigmoid"},
    "lora_rank": {True: 16, "lora": 16, "full": 0},
    "lora_targets": {"all": None, "all-linear": None},
    "resume": {True: "auto"},
    "ds_config": {stage: f"ds_configs/zero{stage}.json" for stage in range(4)},
}
# A configuration of something else, by a key that only it has: what to do with the file.
OTHER_FILES = {
    "zero_optimization": "a DeepSpeed configuration: pass it as --ds_config",
    "train_micro_batch_size_per_gpu": "a DeepSpeed configuration: pass it as --ds_config",
    "compute_environment": "accelerate's configuration: --ds_config chooses how a model is sharded, "
    "deepspeed --num_gpus the ranks",
    "vocab_size": "a model's configuration: pass its folder as --model",
}


class Found(NamedTuple):
    """What one name of another trainer comes to in a script."""

    flag: str | None  # None: there is none
    value: str | None  # where it is fixed
    note: str
    whole: bool


def find(name: str, known: Collection[str]) -> Found | None:
    """What another trainer's `name` is among the script's own flags; None where nobody calls
    anything so.
    """
    here = NAMES.get(name.replace("-", "_"))
    if here is None:
        return None
    for each in here.flags:
        flag, _, value = each.partition("=")
        if flag.partition(".")[0] in known:
            return Found(flag, value or None, here.note, here.whole)
    flags = " or ".join(f"--{each.partition('=')[0]}" for each in here.flags)
    return Found(None, None, f"this script has no {flags}" if flags else here.note, here.whole)


def hint(name: str, known: Collection[str], dashes: str = "") -> str:
    """What to write in place of another trainer's flag, in words; "" where nobody calls one so."""
    found = find(name, known)
    if found is None:
        return ""
    if found.flag is None:
        return f"leave it out ({found.note})"
    separator = " " if dashes else ": "
    value = f"{separator}{found.value}" if found.value else ""
    note = f" ({found.note})" if found.note else ""
    return f"write {dashes}{found.flag}{value}{note}"


def is_recipe(values: Mapping[str, Any], known: Collection[str]) -> bool:
    """Whether a file is written for another trainer: several keys are another's."""
    return sum(name not in known and name in NAMES for name in values) >= 3


def recipe(values: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """The lines of YAML that say here what another trainer's recipe says there, with comments for
    what needs a hand and for what there is no flag for.
    """
    written: dict[str, tuple[Any, str]] = {}  # our flag: its value, and where that is from
    comments = []
    # switches last: `use_peft: true` says less than `lora_r: 8`
    for name, value in sorted(values.items(), key=lambda item: isinstance(item[1], bool)):
        found = find(name, known)
        if name in known:
            if name == "push_to_hub" and isinstance(value, bool):  # hub_model_id says where
                comments += ["# push_to_hub: ORG/NAME"] if "hub_model_id" not in values else []
            elif (name, value) != ("max_steps", -1):  # transformers' word for no bound
                written[name] = (value, "")
        elif found is None:
            comments.append(f"# {name}: there is no such flag")
        elif found.flag is None:
            comments.append(f"# {name}: leave it out ({found.note})")
        elif value is False:
            comments.append(f"# {name}: leave it out")
        elif (
            found.flag == "batch_size"
            and found.flag in written
            and found.note == A_STEP
            and isinstance(value, int)
        ):
            product, origin = written[found.flag]
            written[found.flag] = (product * value, f"{name} x {origin}")
        elif found.flag in written or not found.whole:
            note = f" ({found.note})" if found.note else ""
            comments.append(f"# {name}: {value} goes into {found.flag}{note}")
        else:
            origin = f"{name}; {found.note}" if found.note else name
            written[found.flag] = (found.value or _value(found.flag, value), origin)
    lines = []
    for flag, (value, origin) in written.items():
        text = value if isinstance(value, str) and value.isidentifier() else json.dumps(value)
        lines.append(f"{flag}: {text}" + (f"  # {origin}" if origin else ""))
    return lines + comments


def _value(flag: str, value):
    """A value of theirs as it is written here."""
    if isinstance(value, list) and flag in ("loss", "algorithm"):
        return ",".join(map(str, value))
    try:
        return VALUES.get(flag, {}).get(value, value)
    except TypeError:  # a list is no key
        return value
