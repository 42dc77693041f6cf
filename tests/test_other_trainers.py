"""Names of other trainers: each leads to a flag that exists, and a whole recipe to one that runs."""

import dataclasses

import pytest

from tests.launch.commands import settings_of
from train import config, other_trainers

DPO, REWARD, PPO = (settings_of(f"launch/train_{name}.py") for name in ("dpo", "reward", "ppo"))
FLAGS = {kind: {f.name for f in dataclasses.fields(kind)} for kind in (DPO, REWARD, PPO)}

TRL_DPO = """
model_name_or_path: Qwen/Qwen2-0.5B-Instruct
dataset_name: trl-lib/ultrafeedback_binarized
dataset_train_split: train
learning_rate: 5.0e-7
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
max_steps: -1
lr_scheduler_type: cosine
warmup_steps: 100
logging_steps: 25
eval_strategy: steps
save_strategy: epoch
save_total_limit: 3
output_dir: Qwen2-0.5B-DPO
use_peft: true
lora_r: 32
lora_target_modules: all-linear
lora_alpha: 16
bf16: true
fp16: false
beta: 0.2
loss_type: [sigmoid, sft]
label_smoothing: 0.1
precompute_ref_log_probs: true
max_length: 1024
report_to: tensorboard
use_wandb: true
push_to_hub: true
hub_model_id: me/it
hub_private_repo: true
zzz: 1
"""


def said_of(capsys, kind, tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        config.parse(kind, ["--config", str(path)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_whole_recipe_becomes_one_that_runs_here(capsys, tmp_path):
    first, *lines = said_of(capsys, DPO, tmp_path, TRL_DPO).splitlines()
    assert first == f"error: {tmp_path}/recipe.yaml: written for another trainer; here it reads"
    ours = tmp_path / "ours.yaml"
    ours.write_text("\n".join(lines))
    settings = config.parse(DPO, ["--config", str(ours)])
    expected = {
        "model": "Qwen/Qwen2-0.5B-Instruct",
        "data": ["trl-lib/ultrafeedback_binarized"],
        "lr": 5e-7,
        "epochs": 1,
        "batch_size": 16,  # 2 x 8
        "gradient_checkpointing": True,
        "max_steps": None,
        "lr_scheduler": "cosine",
        "warmup_steps": 100,
        "log_every": 25,
        "keep": 3,
        "output": "Qwen2-0.5B-DPO",
        "lora_rank": 32,
        "lora_targets": None,
        "lora_alpha": 16,
        "precision": "bf16",
        "beta": 0.2,
        "loss": "sigmoid,sft",
        "loss_args": {"label_smoothing": 0.1},
        "reference": "cached",
        "max_length": 1024,
        "report_to": ["tensorboard"],
        "push_to_hub": "me/it",
        "hub_public": False,
    }
    assert {name: getattr(settings, name) for name in expected} == expected
    comments = [line for line in lines if line.startswith("#")]
    assert "# zzz: there is no such flag" in comments and "# fp16: leave it out" in comments
    assert any(line.startswith("# eval_strategy: steps goes into eval_every") for line in comments)
    assert "# use_wandb: True goes into report_to (tensorboard wandb: both)" in comments
    assert any(line.startswith("# hub_private_repo: leave it out (a rep") for line in comments)
    named = {line.split(":")[0].removeprefix("# ") for line in comments}
    assert named == {
        "dataset_train_split",
        "eval_strategy",
        "save_strategy",
        "use_peft",
        "fp16",
        "use_wandb",
        "hub_private_repo",
        "zzz",
    }


@pytest.mark.parametrize(
    "kind, line, said",
    [
        (DPO, "--learning_rate 1", "there is no flag --learning_rate: write --lr"),
        (DPO, "--bf16", "there is no flag --bf16: write --precision bf16"),
        (
            DPO,
            "--per-device-train-batch-size 4",
            "there is no flag --per-device-train-batch-size: write --batch_size (a step's, over all "
            "ranks: theirs times accumulation times ranks)",
        ),
        (PPO, "--num_generations 4", "there is no flag --num_generations: write --samples_per_prompt"),
        (PPO, "--loss_type grpo", "there is no flag --loss_type: write --algorithm"),
        (REWARD, "--loss_type x", "there is no flag --loss_type: write --loss"),
        (
            REWARD,
            "--num_generations 4",
            "there is no flag --num_generations: leave it out (this script has no "
            "--samples_per_prompt)",
        ),
        (DPO, "--pref_beta 4", "there is no flag --pref_beta: write --beta"),  # LLaMA-Factory
        (DPO, "--pretrain m", "there is no flag --pretrain: write --model"),  # OpenRLHF
        (DPO, "--use_wandb true", "there is no flag --use_wandb: write --report_to wandb (tensorboard wandb: both)"),
        (PPO, "--hub_model_id me/it", "there is no flag --hub_model_id: write --push_to_hub"),
        (DPO, "--adam_beta1 1", "there is no flag --adam_beta1: leave it out (the optimiser is AdamW with betas 0.9, 0.999 and eps 1e-8)"),
    ],
)  # fmt: skip
def test_one_name_on_the_command_line(capsys, kind, line, said):
    with pytest.raises(SystemExit):
        config.parse(kind, line.split())
    assert capsys.readouterr().err == f"error: {said}; see --help\n"


def test_two_names_in_a_file(capsys, tmp_path):
    text = "learning_rate: 1\nlora_target_modules: [q_proj]\nbeta: 1\n"
    assert said_of(capsys, DPO, tmp_path, text) == (
        f"error: {tmp_path}/recipe.yaml: there is no key learning_rate: write lr; there is no key "
        "lora_target_modules: write lora_targets; see --help\n"
    )


def test_every_name_leads_to_a_flag_of_some_script():
    every = set().union(*FLAGS.values())
    for name, here in other_trainers.NAMES.items():
        assert here.flags or here.note, name
        assert name not in FLAGS[DPO] & FLAGS[REWARD] & FLAGS[PPO], f"{name} is called so here"
        for flag in here.flags:
            assert flag.partition("=")[0].partition(".")[0] in every, (name, flag)
    assert set(other_trainers.VALUES) <= every


def test_the_field_is_covered():
    """Names that its users have in their fingers, and transformers' and TRL's own where installed."""
    common = """learning_rate model_name_or_path dataset_name output_dir per_device_train_batch_size
        gradient_accumulation_steps num_train_epochs bf16 loss_type logging_steps eval_strategy
        save_steps report_to deepspeed""".split()
    assert set(common) <= set(other_trainers.NAMES) | FLAGS[DPO]
