"""Flags that scripts share: their bounds, in each class that adds some, what a run may do with them,
and the data where none is named.
"""

import dataclasses
import re
import types
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from tests.launch.commands import settings_of
from train import config, settings
from train.losses.algorithms import ALGORITHMS
from train.losses.composition import LOSSES as PREFERENCE_LOSSES
from train.losses.reward import LOSSES
from train.methods import ppo

ROOT = Path(__file__).resolve().parent.parent
BUILTIN = [[str(ROOT / f"train/data/builtin/{name}.jsonl")] for name in ("train", "held_out")]


SCRIPTS = {
    name: settings_of(name)
    for name in (
        "launch/validate.py",
        "launch/train_dpo.py",
        "launch/train_reward.py",
        "launch/train_ppo.py",
        "eval/evaluate.py",
    )
}


@pytest.mark.parametrize(
    "script, name, least, most, wrong, words",
    [
        ("launch/validate.py", "eval_split", 0, 1, 1.5, "is a share from 0 to 1, not 1.5"),
        (
            "launch/train_dpo.py",
            "max_dropped",
            0,
            1,
            float("nan"),
            "is a share from 0 to 1, not nan",
        ),
        ("launch/train_dpo.py", "warmup_ratio", 0, 1, -0.1, "is a share from 0 to 1, not -0.1"),
        ("launch/train_dpo.py", "batch_size", 1, 64, 0, "is at least 1, not 0"),
        ("launch/train_dpo.py", "max_steps", None, 1, 0, "is at least 1, not 0"),
        ("launch/train_dpo.py", "save_minutes", 0, 0.5, -1, "is at least 0, not -1"),
        ("launch/train_dpo.py", "epochs", 1e-3, 3, 0, "is a finite number above 0, not 0"),
        ("launch/train_dpo.py", "lora_rank", 0, 8, -1, "is at least 0, not -1"),
        ("launch/train_reward.py", "batch_size", 1, 64, 0, "is at least 1, not 0"),
        ("launch/train_dpo.py", "beta", 1e-3, 5, 0, "is a finite number above 0, not 0"),
        ("launch/train_dpo.py", "lr", 0, 1, float("nan"), "is at least 0, not nan"),
        (
            "launch/train_dpo.py",
            "epochs",
            0.5,
            9,
            float("inf"),
            "is a finite number above 0, not inf",
        ),
    ],
)
def test_bounds_hold_in_every_class(script, name, least, most, wrong, words):
    for value in (least, most):
        assert getattr(SCRIPTS[script](**{name: value}), name) == value
    with pytest.raises(ValueError, match=f"^--{name} {words}$"):
        SCRIPTS[script](**{name: wrong})


def test_flags_that_may_differ_on_resume():
    # where a run writes, what it shows and how it fits the machine, not what it computes
    train_dpo = SCRIPTS["launch/train_dpo.py"]
    expected = {
        "output",
        "micro_tokens",
        "compile",
        "gradient_checkpointing",
        "deterministic",
        "log_every",
        "ds_config",
        "reference_ds_config",
        "save_every",
        "save_minutes",
        "keep",
        "resume",
        "max_skipped",
        "report_to",
        "push_to_hub",
        "hub_public",
    }
    assert settings.names_that_may_change(train_dpo) == expected
    assert settings.names_that_may_change(train_dpo()) == expected  # of an instance too
    evaluate = SCRIPTS["eval/evaluate.py"]
    assert settings.names_that_may_change(evaluate) == {
        "output",
        "micro_tokens",
        "ds_config",
        "report_to",
    }


def test_flags_that_tell_runs_apart():
    """Those used most that change what is computed, and whatever else is not at its default."""
    given = settings.Preference(lr=1e-4, grad_clip=1.0, seed=7, keep=9, output="runs/x")
    told = settings.telling(given)
    assert told["lr"] == 1e-4 and told["beta"] == 0.1 and told["seed"] == 7
    # at its default; where a run writes and what it keeps
    assert not {"grad_clip", "keep", "output", "ds_config"} & set(told)
    assert set(told) == {*"model data loss beta lr batch_size epochs max_length seed".split()}


def test_flags_that_evaluation_inherits():
    assert settings.inherited_defaults(settings.Preference) == {
        "beta": 0.1,
        "loss": "sigmoid",
        "loss_args": {},
        "max_length": 1024,
        "max_prompt_length": 256,
        "truncate_prompt": "keep_end",
        "layout": "packed",
        "precision": "auto",
        "allow_control_tokens": False,
        "allow_template_changes": False,
        "max_implausible": 0.5,
    }
    # each is a flag of evaluation too, which overrides what is inherited where it is given
    own = SCRIPTS["eval/evaluate.py"]()
    for name in settings.inherited_defaults(settings.Preference):
        assert getattr(own, name) is None, name


def test_flags_in_the_model_card_have_places_of_their_own():
    fields = dataclasses.fields(SCRIPTS["launch/train_dpo.py"])
    places = [f.metadata["card"][0] for f in fields if f.metadata.get("card")]
    assert sorted(places) == list(range(1, len(places) + 1))
    assert list(settings.card_titles(settings.Preference))[:4] == [
        "loss",
        "beta",
        "loss_args",
        "lr",
    ]


def test_a_flag_makes_a_fresh_default_for_each_instance():
    first, second = settings.Preference(), settings.Preference()
    first.loss_args["label_smoothing"] = 0.1
    assert second.loss_args == {} and settings.Preference().loss_args == {}


ALL = ("dpo", "reward", "ppo")
VALUE_MODEL = "with --algorithm grpo: it counts with ppo"
ALONE = "where --reward_model stands alone: pass --model, too"
ONE_UPDATE = (
    "with one update a rollout, in which the ratio is 1: it counts with --minibatches or "
    "--epochs_per_rollout above 1"
)
# (scripts, the flag with a value that asks for something, flags under which that changes nothing,
#  flags under which it counts, what is said behind "changes nothing")
IDLE = [
    (("validate", *ALL), "--eval_split 0.5", "--eval_data b", "", "beside --eval_data: leave one of them out"),
    (("validate", *ALL), "--data_split_seed 7", "", "--eval_split 0.5", "without --eval_split"),
    (ALL, "--warmup_ratio 0.5", "--lr_scheduler constant", "--lr_scheduler cosine", "with --lr_scheduler constant: it counts with another --lr_scheduler"),
    (ALL, "--warmup_steps 7", "--lr_scheduler constant", "--lr_scheduler cosine", "with --lr_scheduler constant: it counts with another --lr_scheduler"),
    (ALL, "--warmup_steps 7", "--lr_scheduler linear --warmup_ratio 0.5", "--lr_scheduler linear", "beside --warmup_ratio: leave one of them out"),
    (ALL, "--num_cycles 2", "--lr_scheduler linear", "--lr_scheduler cosine", "with --lr_scheduler linear: it counts with cosine, cosine_with_restarts or cosine_with_min_lr"),
    (ALL, "--min_lr 1e-8", "--lr_scheduler cosine", "--lr_scheduler polynomial", "with --lr_scheduler cosine: it counts with cosine_with_min_lr or polynomial"),
    (ALL, "--eval_every 7", "--data a", "--data a --eval_split 0.5", "without held-out rows: pass --eval_data or --eval_split"),
    (ALL, "--eval_every 7", "--data a", "--data a --eval_data b", "without held-out rows: pass --eval_data or --eval_split"),
    (ALL, "--eval_every 7", "--data a", "", "without held-out rows: pass --eval_data or --eval_split"),
    (ALL, "--lora_alpha 16", "", "--lora_rank 4", "without --lora_rank"),
    (ALL, "--lora_targets q_proj", "--lora_rank 0", "--lora_rank 4", "without --lora_rank"),
    (ALL, "--hub_public", "", "--push_to_hub org/name", "without --push_to_hub"),
    ("dpo", "--reference_model m", "--reference none", "--reference cached", "with --reference none: it counts with live or cached"),
    ("dpo", "--reference_every 7", "--reference cached", "", "with --reference cached: it counts with live"),
    ("dpo", "--reference_mixup 0.6", "", "--reference_every 7", "without --reference_every"),
    ("dpo", "--reference_ds_config j", "--reference none", "", "with --reference none: it counts with live or cached"),
    ("dpo", "--reference_ds_config j", "--lora_rank 4", "--lora_rank 4 --reference_model m", "with --lora_rank: the reference is the policy without its adapters, unless --reference_model names another"),
    ("dpo", "--reference_ds_config j", "--lora_rank 4", "--lora_rank 4 --reference cached", "with --lora_rank: the reference is the policy without its adapters, unless --reference_model names another"),
    ("reward", "--margin scores", "--loss squared", "", "with --loss squared: it counts with bradley_terry"),
    ("validate", "--margin scores", "", "--trainer reward", "with --trainer dpo: it counts with reward"),
    ("validate", "--json", "", "--show 0", "without --show"),
    ("ppo", "--kl_coef 0.5", "--algorithm dapo", "", "with --algorithm dapo: it counts with ppo, rloo, reinforce++, reinforce++_baseline or grpo"),
    ("ppo", "--clip_low 0.1", "--algorithm cispo", "--algorithm dapo", "with --algorithm cispo: it counts with another --algorithm"),
    ("ppo", "--clip_low 0.1", "", "--minibatches 2", ONE_UPDATE),
    ("ppo", "--clip_high 0.1", "--minibatches 1", "--epochs_per_rollout 2", ONE_UPDATE),
    ("ppo", "--dual_clip 3", "", "--algorithm gspo", ONE_UPDATE),
    ("ppo", "--target_kl 0.1", "", "--algorithm gspo", ONE_UPDATE),
    ("ppo", "--offload_frozen", "--algorithm dapo", "", "without a frozen model: it counts with --reward_model, or with an algorithm that has a KL"),
    ("ppo", "--offload_frozen", "--algorithm dapo", "--algorithm dapo --reward_model r", "without a frozen model: it counts with --reward_model, or with an algorithm that has a KL"),
    ("ppo", "--dual_clip 3", "--algorithm sapo", "--algorithm ppo", "with --algorithm sapo: it counts with another --algorithm"),
    ("ppo", "--scale_advantages batch", "--algorithm ppo", "", "with --algorithm ppo: it counts with another --algorithm"),
    ("ppo", "--max_resamples 2", "--algorithm reinforce++", "", "with --algorithm reinforce++: it counts with another --algorithm"),
    ("ppo", "--gamma 0.5", "", "--algorithm reinforce++", "with --algorithm grpo: it counts with ppo or reinforce++"),
    ("ppo", "--lam 0.5", "", "--algorithm ppo", VALUE_MODEL),
    ("ppo", "--value_lam 0.5", "", "--algorithm ppo", VALUE_MODEL),
    ("ppo", "--value_model m", "", "--algorithm ppo", VALUE_MODEL),
    ("ppo", "--value_lr 0.5", "", "--algorithm ppo", VALUE_MODEL),
    ("ppo", "--value_clip 0.5", "", "--algorithm ppo", VALUE_MODEL),
    ("ppo", "--value_warmup 7", "", "--algorithm ppo", VALUE_MODEL),
    ("ppo", "--value_ds_config j", "", "--algorithm ppo", VALUE_MODEL),
    ("ppo", "--reward_ds_config j", "", "--reward_model r", "without --reward_model"),
    ("ppo", "--reference_ds_config j", "--algorithm dapo", "", "with --algorithm dapo: it counts with ppo, rloo, reinforce++, reinforce++_baseline or grpo"),
    ("ppo", "--reference_ds_config j", "--kl_coef 0", "", "with --kl_coef 0.0: it counts with another --kl_coef"),
    ("ppo", "--reference_ds_config j", "--lora_rank 4", "", "beside --lora_rank: leave one of them out"),
    ("evaluate", "--reference m", "--reward_model r", "", ALONE),
    ("evaluate", "--ood t", "--reward_model r", "--reward_model r --model m", ALONE),
    ("evaluate", "--ood_tokens 7", "--reward_model r", "", ALONE),
    ("evaluate", "--prompts 7", "--reward_model r", "", ALONE),
    ("evaluate", "--prompts 32", "--reward_model r", "--model m", ALONE),
    ("evaluate", "--beta 1", "--reward_model r", "", ALONE),
    ("evaluate", "--loss ipo", "--reward_model r", "", ALONE),
    ("evaluate", "--loss_args.tau 7", "--reward_model r", "", ALONE),
    ("evaluate", "--by s", "", "--reward_model r", "without --reward_model"),
    ("evaluate", "--max_new_tokens 7", "--prompts 0", "", "without --prompts"),
    ("evaluate", "--max_new_tokens 7", "--reward_model r", "", ALONE),
    ("evaluate", "--temperature 1", "--prompts 0", "", "without --prompts"),
    ("evaluate", "--temperature 1", "--reward_model r", "", ALONE),
    ("evaluate", "--batch_size 7", "--prompts 0", "", "without --prompts"),
    ("evaluate", "--batch_size 7", "--reward_model r", "", ALONE),
    ("evaluate", "--seed 7", "--temperature 0", "", "without --temperature"),
    ("evaluate", "--seed 7", "--prompts 0", "", "without --prompts"),
    ("evaluate", "--seed 7", "--reward_model r", "", ALONE),
]  # fmt: skip
BY_NAME = {Path(script).stem.removeprefix("train_"): kind for script, kind in SCRIPTS.items()}
TRIED = [
    pytest.param(kind, *row, id=f"{kind} {row[0]} {row[1]}")
    for kinds, *row in IDLE
    for kind in ([kinds] if isinstance(kinds, str) else kinds)
]


@pytest.mark.parametrize("kind, given, idle, counts, said", TRIED)
def test_a_flag_that_changes_nothing_is_refused(capsys, tmp_path, kind, given, idle, counts, said):
    """On the command line and in a file; and accepted where it counts."""
    name = given.split()[0].partition(".")[0]
    with pytest.raises(SystemExit):
        config.parse(BY_NAME[kind], [*given.split(), *idle.split()])
    assert capsys.readouterr().err == f"error: {name} changes nothing {said}; see --help\n"
    accepted = config.parse(BY_NAME[kind], [*given.split(), *counts.split()])
    config.parse(BY_NAME[kind], idle.split())
    recipe = tmp_path / "recipe.yaml"
    value = given.partition(" ")[2] or "true"
    recipe.write_text(f"{given.split()[0][2:]}: {value}")
    line = ["--config", str(recipe), *idle.split()]
    if getattr(accepted, name[2:]) == settings.defaults(BY_NAME[kind])[name[2:]]:
        config.parse(BY_NAME[kind], line)  # --print_config writes defaults, too
        return
    with pytest.raises(SystemExit):
        config.parse(BY_NAME[kind], line)
    assert f"{name} changes nothing {said}" in capsys.readouterr().err


def test_every_flag_with_needs_is_tried():
    tried = {(kind, row.values[1].split()[0].partition(".")[0]) for kind in BY_NAME for row in TRIED if row.values[0] == kind}  # fmt: skip
    declared = {
        (kind, f"--{field.name}")
        for kind, settings_class in BY_NAME.items()
        for field in dataclasses.fields(settings_class)
        if field.metadata.get("needs")
    }
    assert tried == declared


@pytest.mark.parametrize("kind", BY_NAME.values(), ids=BY_NAME)
def test_help_is_in_groups(capsys, monkeypatch, kind):
    """The ten flags that people use first, then groups; each flag stands once, choices listed."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        config.parse(kind, ["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, shown.splitlines()[:-5])) <= 140
    titles = re.findall(r"^([a-z ]+):$", shown, re.MULTILINE)
    assert titles[0] == "used most" and titles[-1] == "help" and "flags" not in titles
    assert titles[1:-1] == [title for title in settings.HELP_GROUPS if title in titles]
    flags = re.findall(r"^  --(\w+)", shown, re.MULTILINE)
    assert flags[:10] == kind.used_most.split()
    names = {f.name for f in dataclasses.fields(kind)}
    assert sorted(flags) == sorted(names | {"config", "print_config"})
    if "precision" in names:
        assert "--precision {auto,bf16,fp32}" in shown and "--layout {packed,padded}" in shown
    assert str(settings.ROOT) not in shown
    if kind is BY_NAME["dpo"]:
        assert "(default: ds_configs/zero0.json)" in " ".join(shown.split())
        assert all(re.search(rf"\b{loss}\b", shown) for loss in PREFERENCE_LOSSES)


def test_no_group_names_a_flag_that_no_script_has():
    names = {f.name for kind in SCRIPTS.values() for f in dataclasses.fields(kind)}
    grouped = [name for group in settings.HELP_GROUPS.values() for name in group.split()]
    assert sorted(grouped) == sorted(names)


def test_what_asks_for_nothing_is_never_refused():
    for line in ("--warmup_ratio 0 --lr_scheduler constant", "--eval_split 0 --eval_data b"):
        config.parse(BY_NAME["dpo"], line.split())
    config.parse(BY_NAME["ppo"], ["--kl_coef", "0", "--algorithm", "dapo"])
    config.parse(BY_NAME["evaluate"], ["--prompts", "0", "--reward_model", "r"])


def test_a_margin_needs_a_loss_of_pairs():
    """train/settings.py imports no torch, and writes the name down."""
    assert {name for name, row in LOSSES.items() if row.takes_pairs} == {"bradley_terry"}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("data", [[], ["--data", "d.jsonl", "--reward_model", "r"]], ids=len)
def test_print_config_shows_what_the_algorithm_decides(capsys, tmp_path, name, data):
    """Its row of the table, under the flags' names; the file asks for the same run."""
    row, kind, argv = ALGORITHMS[name], BY_NAME["ppo"], [*data, "--algorithm", name]
    with pytest.raises(SystemExit) as stop:
        config.parse(kind, [*argv, "--print_config"])
    assert stop.value.code == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(capsys.readouterr().out)
    shown = yaml.safe_load(recipe.read_text())
    assert set(shown) == {f.name for f in dataclasses.fields(kind)}
    read = config.parse(kind, ["--config", str(recipe)])
    for settings_of_run in (types.SimpleNamespace(**shown), read):
        assert ppo.choose_algorithm(settings_of_run) == row
    assert shown["samples_per_prompt"] == row.samples and shown["minibatches"] == row.minibatches
    assert shown["kl_coef"] == (row.kl.coef if row.kl.place != "none" else None)
    assert shown["value_lr"] == (10 * shown["lr"] if name == "ppo" else None)
    assert shown["value_lam"] == (0.95 if name == "ppo" else None)
    assert shown["clip_low"] == (None if name == "cispo" else row.clip_low)
    assert shown["reward"] == (None if data else ["regex:[?]"])
    # what was given goes before the row
    with pytest.raises(SystemExit):
        config.parse(kind, [*argv, "--samples_per_prompt", "3", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["samples_per_prompt"] == 3


def test_what_is_given_stays_beside_a_demonstration():
    """With built-in prompts defaults make way, and values that were given do not."""
    kind = BY_NAME["ppo"]
    assert config.parse(kind, []).lr == kind.demonstration["lr"]
    given = config.parse(kind, ["--lr", "1e-6", "--lr_scheduler", "linear"])
    assert (given.lr, given.lr_scheduler) == (1e-6, "linear") and given.max_new_tokens == 48
    assert "--lr " not in given.adapted and "--max_new_tokens 48" in given.adapted
    short = ["--max_length", "256"]
    assert config.parse(BY_NAME["dpo"], short).max_prompt_length == 128
    line = [*short, "--max_prompt_length", "256"]
    assert config.parse(BY_NAME["dpo"], line).max_prompt_length == 256


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, BUILTIN),
        ({"eval_split": 0.1}, [BUILTIN[0], None]),
        ({"eval_data": ["b"]}, [BUILTIN[0], ["b"]]),
        ({"data": ["a"]}, [["a"], None]),  # what is built in says nothing about other data
        ({"data": ["a"], "eval_data": ["b"], "eval_split": 0.1}, [["a"], ["b"]]),
    ],
)
def test_data_where_none_is_named(given, expected):
    assert list(settings.sources(settings.Data(**given))) == expected


def test_a_share_is_what_follows_a_name_that_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl:0.3").touch()
    (tmp_path / "saved:1").mkdir()
    expected = {
        "b.jsonl:0.3": ("b.jsonl", "0.3"),
        "b.jsonl:.5": ("b.jsonl", "0.5"),
        "b.jsonl:1": ("b.jsonl", "1"),
        "b.jsonl:2.0": ("b.jsonl", "2"),
        "C:b.jsonl:1.0": ("C:b.jsonl", "1"),
        "org/name:config@train:0.25": ("org/name:config@train", "0.25"),
        "org/name:1.0:1": ("org/name:1.0", "1"),  # a configuration that reads like a share
        "a.jsonl:0.3:0.5": ("a.jsonl:0.3", "0.5"),
        "a.jsonl:0.3": ("a.jsonl:0.3", None),  # it is there
        "saved:1": ("saved:1", None),
        "b.jsonl": ("b.jsonl", None),
        "org/name:2022": ("org/name:2022", None),
        "org/name:3.0.0": ("org/name:3.0.0", None),
        "org/name@train[:0.5]": ("org/name@train[:0.5]", None),
        "b.jsonl:-0.5": ("b.jsonl:-0.5", None),
        ":0.5": (":0.5", None),
    }
    for word, (source, share) in expected.items():
        assert settings.with_share(word) == (source, share and Fraction(share)), word
    mixed = settings.Data(data=["b.jsonl:0.3", "c.jsonl"])
    assert settings.sources(mixed)[0] == ["b.jsonl", "c.jsonl"]
    assert settings.shares(mixed) == [Fraction(3, 10), 1]
    assert settings.shares(settings.Data()) == []


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "line, words",
    [
        ("--data a.jsonl b.jsonl:0.0", "--data b.jsonl:0.0: a share lies above 0; leave the source out"),
        ("--data a.jsonl:1.5", "--data a.jsonl:1.5: a share is at most 1; for more of this source give the others smaller ones, and the run more --epochs"),
        ("--data a.jsonl --eval_data b.jsonl:0.5", "--eval_data b.jsonl:0.5: evaluation takes all rows, and shares are of training's epochs: write b.jsonl"),
    ],
)  # fmt: skip
def test_shares_that_no_run_can_take(capsys, tmp_path, script, line, words):
    """On the command line and in a recipe; an evaluation takes none."""
    if "evaluate" in script:
        line, words = "--data b.jsonl:0.5", "--data b.jsonl:0.5: evaluation takes all rows, and shares are of training's epochs: write b.jsonl"  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    flags = [part.split() for part in line.split("--")[1:]]
    recipe.write_text("".join(f"{name}: [{', '.join(given)}]\n" for name, *given in flags))
    for arguments in (line.split(), ["--config", str(recipe)]):
        with pytest.raises(SystemExit):
            config.parse(SCRIPTS[script], arguments)
        assert capsys.readouterr().err == f"error: {words}; see --help\n"
