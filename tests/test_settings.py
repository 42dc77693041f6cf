"""Bounds of the flags that scripts share, in each class that adds some, and the data where none is
named.
"""

import runpy
from pathlib import Path

import pytest

from train import settings

ROOT = Path(__file__).resolve().parent.parent
BUILTIN = [[str(ROOT / f"train/data/builtin/{name}.jsonl")] for name in ("train", "held_out")]
SCRIPTS = {
    name: runpy.run_path(str(ROOT / name))["Settings"]
    for name in ("launch/validate.py", "launch/train_dpo.py")
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
