"""The commands that a run names when it is done, word by word."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from train.run import commands

ROOT = Path(__file__).resolve().parents[2]


def settings(**given):
    usual = {"trust_remote_code": False, "allow_pickle": False, "max_length": 1024}
    return SimpleNamespace(**usual | {"max_prompt_length": 256} | given)


def test_commands_hold_in_the_folder_where_they_are_printed(monkeypatch, tmp_path):
    flags = {
        "model": Path("my runs/a"),
        "data": ["a b.jsonl", "c"],
        "x": None,
        "y": False,
        "z": True,
    }
    monkeypatch.chdir(ROOT)
    line = commands.deepspeed(commands.EVALUATE, flags)
    assert line == "deepspeed eval/evaluate.py --model 'my runs/a' --data 'a b.jsonl' c --z"
    monkeypatch.chdir(tmp_path)
    assert shlex.split(commands.deepspeed(commands.EVALUATE, {})) == [
        "deepspeed",
        str(ROOT / "eval/evaluate.py"),
    ]
    assert commands.tensorboard(Path("my runs")) == "tensorboard --logdir 'my runs'"
    assert commands.tensorboard(Path("my runs").resolve()) == "tensorboard --logdir 'my runs'"
    assert commands.tensorboard(Path("/")) == "tensorboard --logdir /"  # not from here


@pytest.mark.parametrize(
    "positions, given, words",
    [
        (2048, {}, ""),
        (300, {}, "--max_new_tokens 44"),
        (256, {}, "--prompts 0"),
        (2048, {"max_new_tokens": 500}, "--max_new_tokens 500"),
        (600, {"max_prompt_length": None, "max_length": 590}, "--max_new_tokens 10"),
        (2048, {"trust_remote_code": True, "allow_pickle": True}, "--trust_remote_code --allow_pickle"),
    ],
)  # fmt: skip
def test_an_evaluation_fits_the_model(monkeypatch, positions, given, words):
    monkeypatch.chdir(ROOT)
    config = transformers.LlamaConfig(max_position_embeddings=positions)
    line = commands.evaluation(
        settings(**given), Path("out"), config, model="out/model", reference="b"
    )
    start = "deepspeed eval/evaluate.py --model out/model --reference b --output out/eval"
    assert line == f"{start} {words}".strip()


@pytest.mark.parametrize(
    "lengths, expected",
    [
        ((1024, 256), {}),
        ((512, 256), {"max_length": 512}),
        ((300, 256), {"max_length": 300, "max_prompt_length": 172}),
        ((100, None), {"max_length": 100, "max_prompt_length": 50, "max_new_tokens": 50}),
    ],
)
def test_lengths_of_rollouts_leave_room(lengths, expected):
    given = settings(max_length=lengths[0], max_prompt_length=lengths[1])
    found = commands.lengths_of_rollouts(given)
    assert found == expected
    full = {"max_length": 1024, "max_prompt_length": 256, "max_new_tokens": 128} | found
    assert full["max_prompt_length"] + full["max_new_tokens"] <= full["max_length"]
