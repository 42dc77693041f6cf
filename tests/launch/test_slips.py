"""What typical slips come to, on the command line and in YAML, of every script: the exit code and one
line that names the remedy, never a traceback.

A row: the script, its arguments, the exit code, what the line says. In both {name} stands for what
`place` makes.
"""

import json
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import tiny

from tests.launch.commands import ROOT, launched, settings_of, several
from train import config

DPO, REWARD, PPO, VALIDATE, EXPORT, EVALUATE = (
    "launch/train_dpo.py",
    "launch/train_reward.py",
    "launch/train_ppo.py",
    "launch/validate.py",
    "launch/export.py",
    "eval/evaluate.py",
)
FIT = "--max_length 256 --max_prompt_length 128"  # the tiny model has 512 positions
USUAL = {
    DPO: f"--model {{tiny}} --data {{pairs}} --max_steps 1 {FIT}",
    REWARD: f"--model {{tiny}} --data {{pairs}} --max_steps 1 {FIT}",
    PPO: f"--model {{tiny}} --data {{pairs}} --max_steps 1 --max_new_tokens 8 {FIT}",
    VALIDATE: f"--model {{tiny}} --data {{pairs}} {FIT}",
    EVALUATE: f"--model {{tiny}} --data {{pairs}} --prompts 0 --max_rows 4 {FIT}",
}

# Refused by the flags alone, before torch is imported.
AT_THE_DOOR = [
    # spelling
    (DPO, "--betta 1", "there is no flag --betta (did you mean --beta?)"),
    (DPO, "--batch-size 4", "there is no flag --batch-size (did you mean --batch_size?)"),
    (DPO, "-lr 1", "unexpected argument '-lr': flags are written --name value"),
    (DPO, "pairs.jsonl", "unexpected argument 'pairs.jsonl': flags are written --name value"),
    (DPO, "--lora_rnk 4 --lora_alfa 8", "--lora_rnk (did you mean --lora_rank or --lora_targets?); there is no flag --lora_alfa (did you mean --lora_alpha"),
    (REWARD, "--epoch 3", "there is no flag --epoch (did you mean --epochs"),
    (PPO, "--samples 4", "there is no flag --samples (did you mean --samples_per_prompt"),
    (VALIDATE, "--max_legth 9", "there is no flag --max_legth (did you mean --max_length"),
    (EVALUATE, "--promps 9", "there is no flag --promps (did you mean --prompts"),
    # values
    (DPO, "--beta one", "--beta: expected float, got 'one'"),
    (DPO, "--beta", "--beta needs a value"),
    (DPO, "--beta 0", "--beta is a finite number above 0, not 0.0"),
    (DPO, "--beta nan", "--beta: expected float, got 'nan'"),
    (DPO, "--lr -1", "--lr is at least 0, not -1.0"),
    (DPO, "--max_steps 1.5", "--max_steps: expected int or null, got '1.5'"),
    (DPO, "--max_steps 0", "--max_steps is at least 1, not 0"),
    (DPO, "--batch_size 0", "--batch_size is at least 1, not 0"),
    (DPO, "--eval_split 5", "--eval_split is a share from 0 to 1, not 5.0"),
    (DPO, "--precision fp16", "--precision: expected one of auto, bf16, fp32, got 'fp16'"),
    (DPO, "--lr_scheduler zigzag", "--lr_scheduler: expected one of linear, cosine"),
    (DPO, "--gradient_checkpointing maybe", "--gradient_checkpointing: expected true or false"),
    (DPO, "--loss_args 3", "--loss_args: expected {{name: value}}, got '3'"),
    (DPO, "--lr_scheduler polynomial --lr 1e-8", "--min_lr 1e-07, polynomial's default, is not below --lr 1e-08: choose a smaller --min_lr"),
    (DPO, "--lr 1e400", "--lr is a finite number, not inf"),
    (DPO, "--seed 99999999999999999999", "--seed 99999999999999999999 is beyond 64 bits: choose one of at most 18 digits"),
    (DPO, "--max_length 1", "--max_length is at least 2, not 1"),
    (DPO, "--max_prompt_length 0", "--max_prompt_length is at least 1, not 0"),
    (DPO, "--lr_scheduler cosine_with_min_lr", "cosine_with_min_lr needs --min_lr"),
    (DPO, "--lr_scheduler polynomial --min_lr 1", "--min_lr 1.0 is not below --lr 5e-06"),
    (DPO, "--data hf://x?token=hf_aaaaaaaaaaaaaaaaaaaaaaaa", "--data seems to hold a password or a token"),
    (REWARD, "--margin none --margin middle", "--margin: expected one of column, scores, none, got 'middle'"),
    (PPO, "--temperature 0", "--temperature is a finite number above 0, not 0.0"),
    (PPO, "--algorithm reinforce", "--algorithm: expected one of ppo, rloo, reinforce++"),
    (PPO, "--max_length 40 --max_prompt_length 30 --max_new_tokens 16", "has no room for a prompt of 30 and 16 new tokens: --max_prompt_length 24 would fit"),
    (PPO, "--data a.jsonl --max_length 40 --max_prompt_length 20 --max_new_tokens 48 --print_config", "--max_length 68 would fit"),
    (PPO, "--reward_weights 1 2 --reward ended", "--reward_weights: 2 for 1 source: one for each --reward"),
    (PPO, "--reward_weights nan", "--reward_weights: expected list[float] or null, got 'nan'"),
    (PPO, "--samples_per_prompt 0", "--samples_per_prompt is at least 1, not 0"),
    (VALIDATE, "--show -1", "--show is at least 0, not -1"),
    (VALIDATE, "--trainer ppo", "--trainer: expected one of dpo, reward, got 'ppo'"),
    (EVALUATE, "--temperature -1", "--temperature is at least 0, not -1.0"),
    (EVALUATE, "--max_rows 0", "--max_rows is at least 1, not 0"),
    (DPO, "--report_to tensorbord", "--report_to: expected some of tensorboard, wandb, mlflow"),
    (DPO, "--report_to none tensorboard", "--report_to none stands alone"),
    (PPO, "--report_to tensorboard clearml", "--report_to clearml: not installed (pip install clearml)"),
    (EVALUATE, "--report_to clearml", "--report_to clearml: not installed (pip install clearml)"),
    # flags that change nothing; tests/test_settings.py tries each
    (DPO, "--lora_alpha 8", "--lora_alpha changes nothing without --lora_rank"),
    (DPO, "--warmup_ratio 0.1 --lr_scheduler constant", "it counts with another --lr_scheduler"),
    (DPO, "--config {idle}", "--reference_mixup changes nothing without --reference_every"),
    (PPO, "--lam 0.9", "--lam changes nothing with --algorithm grpo: it counts with ppo"),
    (EVALUATE, "--by subset", "--by changes nothing without --reward_model"),
    # names of other trainers
    (DPO, "--learning_rate 1e-6", "there is no flag --learning_rate: write --lr"),
    (DPO, "--model_name_or_path m", "there is no flag --model_name_or_path: write --model"),
    (DPO, "--dataset_name d", "there is no flag --dataset_name: write --data (org/name"),
    (DPO, "--output_dir o", "there is no flag --output_dir: write --output"),
    (DPO, "--per_device_train_batch_size 4", "write --batch_size (a step's, over all ranks"),
    (DPO, "--gradient_accumulation_steps 4", "write --batch_size (a step's, over all ranks"),
    (DPO, "--num_train_epochs 1", "write --epochs"),
    (DPO, "--bf16 true", "write --precision bf16"),
    (DPO, "--loss_type ipo", "write --loss"),
    (DPO, "--logging_steps 1", "write --log_every"),
    (DPO, "--eval_strategy steps", "write --eval_every (a number of steps"),
    (DPO, "--save_steps 9", "write --save_every"),
    (DPO, "--deepspeed ds.json", "write --ds_config"),
    (DPO, "--use_peft", "write --lora_rank"),
    (REWARD, "--center_rewards_coefficient 0.1", "write --loss_args.centering"),
    (PPO, "--num_generations 8", "write --samples_per_prompt"),
    (PPO, "--init_kl_coef 0.1", "write --kl_coef"),
    (PPO, "--advantage_estimator gae", "write --algorithm (gae is ppo, group_norm is grpo)"),
    (EVALUATE, "--model_name_or_path m", "write --model"),
    (VALIDATE, "--cutoff_len 9", "write --max_length"),
    # files
    (DPO, "--config nowhere.yaml", "--config nowhere.yaml: there is no such file"),
    (DPO, "--config {dir}/twic.yaml", "there is no such file (did you mean twice.yaml"),
    (DPO, "--config {dir}", "--config {dir} cannot be read: Is a directory"),
    (DPO, "--config {typos}", "there is no key lose (did you mean loss"),
    (DPO, "--config {typos}", "; epochs: expected float, got 'many'"),
    (DPO, "--config {twice}", "line 2, column 1: the key beta stands twice"),
    (DPO, "--config {broken}", "expected ',' or ']', but got '<stream end>'"),
    (DPO, "--config {pairs}", "{pairs}: rows of data: pass it as --data"),
    (DPO, "--config {list}", "expected lines of `key: value`"),
    (DPO, "--config {latin}", "not UTF-8: "),
    (DPO, "--config ds_configs/zero2.json", "a DeepSpeed configuration: pass it as --ds_config"),
    (DPO, "--config {tiny}/config.json", "a model's configuration: pass its folder as --model"),
    (DPO, "--config {accelerate}", "accelerate's configuration: --ds_config chooses"),
    (REWARD, "--config {foreign}", "there is no key learning_rate: write lr; there is no key output"),
    (PPO, "--config {typos}", "there is no key lose"),
    (EVALUATE, "--config {typos}", "there is no key lose (did you mean loss"),
    (VALIDATE, "--config {twice}", "the key beta stands twice"),
]  # fmt: skip

# Refused once models and data are looked at.
LATER = [
    # where a run writes
    (DPO, "--output /proc/x", 2, "cannot write to --output /proc/x: No such file or directory; choose another --output"),
    (DPO, "--output {pairs}", 2, "cannot write to --output {pairs}"),
    (DPO, "--output {thesis}", 2, "holds other files (thesis.tex); choose another --output"),
    (REWARD, "--output /proc/x", 2, "choose another --output"),
    (PPO, "--output /proc/x", 2, "choose another --output"),
    (EVALUATE, "--output /proc/x", 2, "choose another --output"),
    (VALIDATE, "--output /proc/x/report.json", 2, "cannot write to --output /proc/x/report.json: No such file or directory; choose"),
    # models
    (DPO, "--model {dir}/tinny", 2, "there is no folder {dir}/tinny (did you mean tiny"),
    (DPO, "--model=~/tiny", 2, f"there is no folder {Path.home()}/tiny"),
    (DPO, "--model {tiny}/model.safetensors", 2, "is a file: a model is the directory that it lies in"),
    (DPO, "--model nobody/nothing", 2, "there is no such folder, and the hub's cache on this machine has no model of that name (HF_HUB_OFFLINE is set); name a folder"),
    (DPO, "--model {empty}", 2, "there is no model in {empty}, which has no config.json: name a model's directory"),
    (DPO, "--model {run}", 2, "there is no model in {run}, which has no config.json: it is {run}/model"),
    (EVALUATE, "--model {run}", 2, "it is {run}/model"),
    (DPO, "--model {bare}", 2, "no chat template"),
    (DPO, "--reference_model {dir}/tinny", 2, "there is no folder {dir}/tinny (did you mean tiny"),
    (DPO, "--reference_model {small}", 2, "vocabulary is 1,000: take a tokenizer and a model that came together"),
    (DPO, "--reference cached --reference_model {small}", 2, "the reference {small}'s vocabulary is 1,000"),
    (PPO, "--reward_model {judge}", 2, "and the model has 1,000: they are not of one model"),
    (DPO, "--model {small}", 2, "model's vocabulary is 1,000"),
    (REWARD, "--model {small}", 2, "model's vocabulary is 1,000"),
    (REWARD, "--model {dir}/tinny", 2, "there is no folder"),
    (PPO, "--model {small} --reward ended", 2, "model's vocabulary is 1,000"),
    (PPO, "--reward_model {dir}/tinny", 2, "there is no folder"),
    (PPO, "--reward_model {tiny}", 2, "is no reward model: it has no score.weight; launch/train_reward.py makes one"),
    (PPO, "--algorithm ppo --reward ended --value_model {dir}/tinny", 2, "there is no folder"),
    (EVALUATE, "--model {dir}/tinny", 2, "there is no folder"),
    (EVALUATE, "--model {small}", 2, "model's vocabulary is 1,000"),
    (EVALUATE, "--reference {small}", 2, "model's vocabulary is 1,000"),
    (EVALUATE, "--reward_model {tiny}", 2, "is no reward model"),
    (VALIDATE, "--model {small}", 2, "model's vocabulary is 1,000"),
    (VALIDATE, "--model {dir}/tinny", 2, "there is no folder"),
    (DPO, "--max_length 1024", 2, "--max_length 1024 is more than the model's 512 positions: lower it"),
    # losses, rewards
    (DPO, "--loss dpo", 2, "loss 'dpo', here called sigmoid, is none of: sigmoid"),
    (DPO, "--loss sigmiod", 2, "loss 'sigmiod' (did you mean sigmoid?) is none of"),
    (DPO, "--loss_args.tau 1", 2, "takes no tau; its parameters are: label_smoothing"),
    (DPO, "--reference none", 2, "--loss sigmoid needs a reference: --reference live or cached"),
    (DPO, "--loss_args.label_smoothing 2", 2, "label_smoothing"),
    (DPO, "--loss_args.use_weighting 3", 2, "use_weighting is true or false, not 3"),
    (REWARD, "--loss bt", 2, "loss 'bt', here called bradley_terry, is none of"),
    (REWARD, "--loss squared", 2, "and the data has pairs: --loss bradley_terry takes those"),
    (PPO, "--reward_weights null", 2, "--reward or --reward_model: something has to say what is good"),
    (PPO, "--reward nonsense", 2, "nonsense"),
    (PPO, "--reward number:answer", 2, "answer"),
    (PPO, "--reward nomodule:f", 2, "nomodule"),
    (EVALUATE, "--loss dpo", 2, "here called sigmoid"),
    # data
    (DPO, "--data {dir}/pair.jsonl", 4, "no such file or folder (did you mean pairs.jsonl"),
    (DPO, "--data {cut}", 4, "cut.jsonl, line 2"),
    (DPO, "--data {columns}", 4, "--columns prompt=question rejected=rejecte"),
    (DPO, "--data {dir}/pairs.txt", 4, "no such file or folder (did you mean pairs.jsonl"),
    (DPO, "--data {thesis}/thesis.tex", 4, "files of type '.tex' are not read"),
    (DPO, "--data {thesis}", 4, "a folder that save_to_disk did not write"),
    (DPO, "--data nobody/nothing", 4, "nobody/nothing: neither a file here nor in the hub's cache (HF_HUB_OFFLINE is set)"),
    (DPO, "--columns promt=q", 2, "--columns promt=q: expected WANTED=FOUND"),
    (DPO, "--eval_data {dir}/pair.jsonl", 4, "no such file or folder"),
    (REWARD, "--data {dir}/pair.jsonl", 4, "no such file or folder"),
    (PPO, "--data {dir}/pair.jsonl --reward ended", 4, "no such file or folder"),
    (EVALUATE, "--data {dir}/pair.jsonl", 4, "no such file or folder"),
    (EVALUATE, "--ood {dir}/none.txt", 4, "none.txt"),
    (VALIDATE, "--data {cut}", 4, "cut.jsonl, line 2"),
    # memory, resuming
    (DPO, "--ds_config {dir}/bf15.json", 2, "does not exist (did you mean bf16.json"),
    (DPO, "--ds_config {dir}", 2, "{dir} cannot be read: Is a directory"),
    (DPO, "--ds_config {typos}", 2, "is not JSON"),
    (DPO, "--ds_config {bf16}", 2, "'bf16' belongs to --precision; remove it from the JSON"),
    (DPO, "--warmup_steps 500", 2, "--warmup_steps 500 of a run of 1 steps"),
    (DPO, "--lora_rank 2 --lora_targets nothing", 2, "adapters go beside linear layers"),
    (DPO, "--push_to_hub me", 2, "--push_to_hub me: write ORG/NAME, where ORG may be your own name on the hub"),
    (REWARD, "--push_to_hub me/it--again", 2, "--push_to_hub me/it--again: Cannot have -- or .. in repo_id"),
    (DPO, "--resume {dir}/none", 3, "none has no manifest.json; checkpoints lie in OUTPUT/checkpoints"),
    # exports
    (EXPORT, "", 2, "the following arguments are required: checkpoint, folder"),
    (EXPORT, "{dir}/none {dir}/out", 3, "there is no folder {dir}/none; they lie in OUTPUT/checkpoints"),
    (EXPORT, "{tiny} {dir}/out", 3, "is no checkpoint: it has no manifest.json"),
    (EXPORT, "{tiny} {dir}/out --export_dtyp bf16", 2, "unrecognized arguments: --export_dtyp bf16 (did you mean --export_dtype?)"),
    (EXPORT, "{tiny} {dir}/out --export_dtype fp16", 2, "invalid choice: 'fp16'"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(model_dir, tmp_path_factory):
    """Names of rows -> what they stand for: good and bad files, and a folder of them all."""
    folder = tmp_path_factory.mktemp("slips")
    names = {"dir": folder, "tiny": folder / "tiny"}
    shutil.copytree(model_dir, folder / "tiny")
    rows = (ROOT / "train/data/builtin/train.jsonl").read_text().splitlines()[:8]
    files = {
        "pairs": ("pairs.jsonl", "\n".join(rows)),
        "cut": ("cut.jsonl", f"{rows[0]}\n{{"),
        "columns": ("columns.jsonl", json.dumps({"question": "a", "chosen": "b", "rejecte": "c"})),
        "idle": ("idle.yaml", "reference_mixup: 0.5"),
        "typos": ("typos.yaml", "lose: sigmoid\nepochs: many\n"),
        "twice": ("twice.yaml", "beta: 1\nbeta: 2\n"),
        "broken": ("broken.yaml", "data: [a"),
        "list": ("list.yaml", "- beta"),
        "foreign": ("foreign.yaml", "learning_rate: 1\noutput_dir: x\n"),
        "accelerate": ("accelerate.yaml", "compute_environment: LOCAL_MACHINE\n"),
        "bf16": ("bf16.json", '{"bf16": {"enabled": true}}'),
    }
    for name, (file, text) in files.items():
        names[name] = folder / file
        names[name].write_text(text)
    names["latin"] = folder / "latin.yaml"
    names["latin"].write_bytes(b"output: \xe9\n")
    for name in ("empty", "thesis"):
        names[name] = folder / name
        names[name].mkdir()
    (folder / "thesis/thesis.tex").write_text("years")
    names["run"] = folder / "run"
    shutil.copytree(model_dir, folder / "run/model")
    names["bare"] = folder / "bare"
    shutil.copytree(model_dir, folder / "bare")
    (folder / "bare/chat_template.jinja").unlink()
    # 1,000 embeddings under a tokenizer of 1,024 tokens
    names["small"] = tiny.save_model(folder / "small", vocab_size=1000)
    names["judge"] = folder / "judge"
    tiny.make_score_model(vocab_size=1000).save_pretrained(folder / "judge")
    tiny.save_tokenizer(folder / "judge")
    return {name: str(path) for name, path in names.items()}


@pytest.mark.parametrize("script, line, said", AT_THE_DOOR, ids=lambda value: str(value)[:60])
def test_slips_in_flags(script, line, said, place, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        config.parse(settings_of(script), line.format(**place).split())
    out, err = capsys.readouterr()
    assert stop.value.code == config.Exit.FLAGS and not out
    assert err.startswith("error: ") and err.endswith("; see --help\n") and err.count("\n") == 1
    assert said.format(**place) in err


def lines_of(script, place):
    """(arguments, exit code, what is said) of the table's rows for one script."""
    door = [(line, 2, said) for each, line, said in AT_THE_DOOR if each == script]
    rows = door + [row[1:] for row in LATER if row[0] == script]
    for i, (line, code, said) in enumerate(rows):
        usual = USUAL.get(script, "")
        if script in (DPO, REWARD, PPO, EVALUATE):
            usual += f" --output {{dir}}/out{i}"
        yield f"{usual} {line}".format(**place).split(), code, said.format(**place)


@pytest.mark.slow
@pytest.mark.parametrize("script", (DPO, REWARD, PPO, VALIDATE, EXPORT, EVALUATE))
def test_slips_through_the_script(script, place, tmp_path):
    """The whole table, as the user's commands from the root of the clone."""
    cases = list(lines_of(script, place))
    ended = several(script, [arguments for arguments, *_ in cases], tmp_path / "cache")
    wrong = []
    for (arguments, code, said), (found, out, err) in zip(cases, ended, strict=True):
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        is_right = found == str(code) and len(lines) == 1 and said in lines[0]
        if not is_right or "Traceback" in out + err:
            wrong.append((" ".join(arguments[-6:]), found, err[-500:]))
    assert not wrong, "\n\n".join(map(str, wrong))


def test_the_table_is_as_long_as_promised():
    assert len(AT_THE_DOOR) + len(LATER) >= 80
    for rows in (AT_THE_DOOR, LATER):
        assert len({row[:2] for row in rows} | {row[-1] for row in rows}) > len(rows)


@pytest.mark.slow
def test_a_hub_that_never_answers(place, tmp_path, monkeypatch):
    """One line within ten seconds of what the same command takes offline; no retries shown."""
    seconds = []
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and says nothing
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        for offline in ("1", "0"):
            monkeypatch.setenv("HF_HUB_OFFLINE", offline)
            line = [sys.executable, VALIDATE, "--model", "nobody/nothing", "--show", 1]
            began = time.monotonic()
            done = launched(line, tmp_path / "cache")
            seconds.append(time.monotonic() - began)
            assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "127.0.0.1" in done.stderr and " does not answer (" in done.stderr
    assert seconds[1] - seconds[0] < 10


@pytest.mark.slow
def test_a_port_that_is_taken(place, tmp_path):
    """By the launcher's flag; the port is free for nobody else while the test holds it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line = f"{USUAL[DPO]} --output {{dir}}/taken".format(**place).split()
        done = launched(
            ["deepspeed", "--num_accelerators", 2, "--master_port", port, DPO, *line], tmp_path
        )
    said = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert said == [
        f"error: port {port} is taken on this machine, by another run it may be: start with deepspeed "
        f"--master_port {port + 1} ... (torchrun's flag has the same name)"
    ]
    assert "Traceback" not in done.stdout + done.stderr and done.returncode != 0


@pytest.mark.slow
def test_the_libraries_are_quiet(place, tmp_path, monkeypatch):
    """Nothing but the run's own words; ZEROPREF_VERBOSE=1 lets theirs through."""
    line = f"{USUAL[DPO]} --output {{dir}}/quiet".format(**place).split()
    done = launched([sys.executable, DPO, *line], tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-2000:]
    words = ("accelerator", "built successfully", "Warning", "WARNING", "INFO", "it/s")
    assert [word for word in words if word in done.stdout + done.stderr] == []
    monkeypatch.setenv("ZEROPREF_VERBOSE", "1")
    line = f"{USUAL[DPO]} --output {{dir}}/loud".format(**place).split()
    done = launched([sys.executable, DPO, *line], tmp_path / "cache")
    assert done.returncode == 0 and "built successfully" in done.stdout
