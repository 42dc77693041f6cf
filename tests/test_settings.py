"""Flags that scripts share: their bounds, in each class that adds some, what a run may do with them,
and the data where none is named.
"""

import dataclasses
import runpy
from pathlib import Path

import pytest

from train import settings

ROOT = Path(__file__).resolve().parent.parent
BUILTIN = [[str(ROOT / f"train/data/builtin/{name}.jsonl")] for name in ("train", "held_out")]
SCRIPTS = {
    name: runpy.run_path(str(ROOT / name))["Settings"]
    for name in (
        "launch/validate.py",
        "launch/train_dpo.py",
        "launch/train_reward.py",
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
        "gradient_checkpointing",
        "log_every",
        "ds_config",
        "reference_ds_config",
        "save_every",
        "save_minutes",
        "keep",
        "resume",
        "max_skipped",
    }
    assert settings.names_that_may_change(train_dpo) == expected
    assert settings.names_that_may_change(train_dpo()) == expected  # of an instance too
    evaluate = SCRIPTS["eval/evaluate.py"]
    assert settings.names_that_may_change(evaluate) == {"output", "micro_tokens", "ds_config"}


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
