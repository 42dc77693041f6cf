"""The user's commands, end to end, with a tiny model and a real tokenizer."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launch.commands import ROOT, free_port, launched, several
from tests.launch.compare import charts
from train.run.tensorboard import CHARTS

SCRIPT = "launch/train_dpo.py"
COMMON = ["--max_length", 512]  # the tiny model's positions
PAIRS = ROOT / "train/data/builtin/train.jsonl"


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events, {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_two_ranks_zero3_train_export_reload(model_dir, tmp_path):
    out, port = tmp_path / "out", free_port()
    done = launched(
        [
            "deepspeed",
            "--num_accelerators",
            2,
            "--master_port",
            port,
            "launch/train_dpo.py",
            "--ds_config",
            "ds_configs/zero3.json",
            *COMMON,
            "--model",
            model_dir,
            "--output",
            out,
            "--max_steps",
            3,
            "--batch_size",
            8,
            "--micro_tokens",
            512,
            "--lr",
            "1e-3",
            "--eval_every",
            2,
            "--warmup_ratio",
            0.3,
        ],
        tmp_path / "cache",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # DeepSpeed takes 69 MB of main memory a rank there, and would leave them for good
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    for line in (
        "64 held-out pairs",
        "reward accuracy",
        "deepspeed eval/evaluate.py --model",
        "tensorboard --logdir",
    ):
        assert line in done.stdout + done.stderr
    run = json.loads((out / "run.json").read_text())
    assert (
        run["status"] == "finished"
        and run["hardware"]["world"] == 2
        and run["deepspeed"]["zero_optimization"]["stage"] == 3
    )
    assert (
        run["flags"]["lr"] == 1e-3
        and run["eval_data"]["groups"] == 64
        and run["versions"]["deepspeed"]
    )
    _check_boards(out, run)
    _check_model(out / "model", model_dir)


def _check_boards(out, run):
    events, found = scalars(out / "tensorboard")
    names = [
        "loss",
        *(f"rewards/{n}" for n in ("chosen", "rejected", "margins", "accuracies")),
        "logps/chosen",
        "logps/rejected",
    ]
    for name in names:
        assert [step for step, _ in found[f"train/{name}"]] == [1, 2, 3]
        assert [step for step, _ in found[f"val/{name}"]] == [0, 2, 3]
    assert found["train/loss"][0][1] == pytest.approx(math.log(2), abs=1e-6)
    assert (
        found["val/rewards/margins"][0][1] == 0.0 and found["val/rewards/accuracies"][0][1] == 0.5
    )
    # warm-up of ceil(0.3 x 3) = 1 step from 0, then linear to 0 over the other 2
    assert [value for _, value in found["train/learning_rate"]] == pytest.approx([0, 1e-3, 5e-4])
    assert (
        found["val/loss"][1][1] != found["val/loss"][2][1]
    )  # something was learnt after the warm-up's first step
    for tag in (
        "perf/pairs_per_second",
        "perf/tokens_per_second",
        "perf/mfu",
        "perf/memory_gb",
        "train/grad_norm",
    ):
        assert all(value > 0 for _, value in found[tag]), tag
    assert (
        found["health/bf16_weights_moved"][0][1]
        == 0
        < found["health/bf16_weights_moved"][-1][1]
        <= 1
    )
    assert {
        "val/histogram/margins",
        "val/histogram/logps_chosen",
        "train/histogram/margins",
    } <= set(events.Tags()["histograms"])
    # not before the first step, where policy and reference are one
    assert [event.step for event in events.Histograms("val/histogram/margins")] == [2, 3]
    assert [event.step for event in events.Histograms("val/histogram/logps_chosen")][0] == 0
    drawn = charts(out / "tensorboard")
    assert set(drawn["margin"]) == {"train/rewards/margins", "val/rewards/margins"}
    assert set(drawn) == set(CHARTS) and all(drawn.values())
    assert run["evaluations"]["3"]["loss"] == pytest.approx(found["val/loss"][-1][1], rel=1e-6)


def _check_model(folder, start):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer.chat_template == transformers.AutoTokenizer.from_pretrained(start).chat_template
    )
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert (
            "lm_head.weight" not in names and "model.embed_tokens.weight" in names
        )  # the tied head stands once
        assert {file.get_tensor(name).dtype for name in names} == {torch.float32}
    before = transformers.AutoModelForCausalLM.from_pretrained(start)
    moved = [
        not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)
    ]
    assert all(moved) and not list(folder.parent.glob("model.*"))


def test_ways_to_train_in_one_process(model_dir, tmp_path):
    """bf16, padded, checkpointed, another stage, a moved token budget: each trains, and what must
    agree agrees.
    """
    common = [
        *COMMON,
        "--model",
        model_dir,
        "--max_steps",
        2,
        "--batch_size",
        4,
        "--lr",
        "1e-3",
        "--beta",
        1.0,
        "--eval_data",
        _head(PAIRS, tmp_path / "eval.jsonl", 6),
    ]
    lines = {
        "plain": [],
        "budget": ["--micro_tokens", 128],
        "padded": ["--layout", "padded"],
        "checkpointed": ["--gradient_checkpointing", "true"],
        "zero2": ["--ds_config", "ds_configs/zero2.json"],
        "bf16": ["--precision", "bf16"],
        "bf16_zero1": ["--precision", "bf16", "--ds_config", "ds_configs/zero1.json"],
        "bf16_zero3": ["--precision", "bf16", "--ds_config", "ds_configs/zero3.json"],
        "offload": ["--ds_config", "ds_configs/zero3_offload.json"],
        "export_bf16": ["--export_dtype", "bf16"],
    }
    results = several(
        SCRIPT,
        [[*common, *extra, "--output", tmp_path / name] for name, extra in lines.items()],
        tmp_path / "cache",
    )
    for name, (code, _, err) in zip(lines, results, strict=True):
        assert code == "0", (name, err[-3000:])
    end = {
        name: json.loads((tmp_path / name / "run.json").read_text())["evaluations"]["2"]
        for name in lines
    }
    for name in ("budget", "padded", "checkpointed", "zero2", "offload", "export_bf16"):
        assert end[name]["loss"] == pytest.approx(end["plain"]["loss"], rel=1e-3), name
        assert end[name]["logps/chosen"] == pytest.approx(end["plain"]["logps/chosen"], rel=1e-5), (
            name
        )
    for name in ("bf16", "bf16_zero1", "bf16_zero3"):
        assert end[name]["logps/chosen"] == pytest.approx(end["plain"]["logps/chosen"], rel=0.05), (
            name
        )
        assert end[name]["rewards/margins"] != 0

    def dtype(name):
        return transformers.AutoConfig.from_pretrained(tmp_path / name / "model").dtype

    assert [dtype(name) for name in ("plain", "bf16", "bf16_zero3", "export_bf16")] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    ]


@pytest.mark.slow
def test_torchrun_and_other_ranks_train_the_same(model_dir, tmp_path):
    """The same run on one rank and on three, one short of pairs in every step: held-out numbers
    agree to fp32 rounding.
    """
    common = [
        SCRIPT,
        *COMMON,
        "--model",
        model_dir,
        "--max_steps",
        3,
        "--batch_size",
        4,
        "--lr",
        "1e-3",
    ]
    common += ["--micro_tokens", 200]
    for ranks in (1, 3):
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            ranks,
        ]
        done = launched([*launcher, *common, "--output", tmp_path / str(ranks)], tmp_path / "cache")
        assert done.returncode == 0, done.stderr[-3000:]
    one, three = (
        json.loads((tmp_path / n / "run.json").read_text())["evaluations"]["3"] for n in ("1", "3")
    )
    sums = [one["logps/chosen"], one["logps/rejected"]]
    assert [three["logps/chosen"], three["logps/rejected"]] == pytest.approx(sums, rel=1e-6)
    # beta (0.1) times the difference of two sums of about -600 nats: half a unit in the last fp32
    # place of each
    rounding = 0.1 * sum(map(abs, sums)) * 2**-24
    assert three["rewards/margins"] == pytest.approx(one["rewards/margins"], abs=rounding)
    assert three["loss"] == pytest.approx(one["loss"], abs=rounding)
    assert abs(one["rewards/margins"]) > 100 * rounding


def _head(source, target, count):
    target.write_text("".join(source.read_text().splitlines(keepends=True)[:count]))
    return target


def test_a_learnable_rule_is_learnt(model_dir, tmp_path):
    """Answers of warm words against answers of cold ones: held-out accuracy starts at a tie, its
    interval ends above one half.
    """
    import random

    draw = random.Random(0)
    warm, cold = (
        "kitchen soup rain garden laugh".split(),
        "policy form report procedure item".split(),
    )

    def say(words):
        return " ".join(draw.choices(words, k=draw.randint(3, 8)))

    rows = [
        json.dumps(
            {"prompt": f"{i} {say(warm + cold)}?", "chosen": say(warm), "rejected": say(cold)}
        )
        for i in range(128)
    ]
    data = _write(tmp_path / "rule.jsonl", "\n".join(rows))
    out = tmp_path / "out"
    done = launched(
        [
            sys.executable,
            SCRIPT,
            *COMMON,
            "--model",
            model_dir,
            "--data",
            data,
            "--eval_split",
            0.5,
            "--output",
            out,
            "--lr",
            "3e-3",
            "--batch_size",
            8,
            "--epochs",
            2,
        ],
        tmp_path / "cache",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    evaluations = json.loads((out / "run.json").read_text())["evaluations"]
    first, last = evaluations["0"], evaluations[max(evaluations, key=int)]
    assert first["rewards/accuracies"] == 0.5 and first["rewards/margins"] == 0
    assert last["rewards/accuracies_interval"][0] > 0.5 and last["rewards/margins_interval"][0] > 0


def test_bad_input_is_answered_in_one_line(model_dir, tmp_path):
    """Each row: arguments, exit code, what the line says. No traceback anywhere."""
    row = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})

    def file(name, text):
        return _write(tmp_path / name, text)

    bare = _model_without_template(model_dir, tmp_path / "bare")
    large = _model_with_tokens(model_dir, tmp_path / "large")
    cases = [
        (["--betta", "1"], 2, "did you mean --beta"),
        (["--beta", "one"], 2, "--beta: expected float"),
        (["--loss", "sigmiod"], 2, "none of: sigmoid"),
        (["--loss_args", "{tau: 1}"], 2, "its parameters are: label_smoothing"),
        (["--batch_size", "0"], 2, "batch_size"),
        (["--eval_split", "1.5"], 2, "eval_split"),
        (["--config", tmp_path / "none.yaml"], 2, "no such file"),
        (["--config", file("bad.yaml", "lose: sigmoid\n")], 2, "did you mean loss"),
        (["--data", tmp_path / "none.jsonl"], 4, "none.jsonl"),
        (["--data", file("broken.jsonl", row + "\n{\n")], 4, "line 2"),
        (
            [
                "--data",
                _write(tmp_path / "latin.jsonl", (row + "\n").encode() + b'{"prompt": "\xe9"}\n'),
            ],
            4,
            "line 2",
        ),
        (
            [
                "--data",
                file("columns.jsonl", '{"topic": "a", "chosen": "b", "rejected": "c"}\n'),
            ],
            4,
            "prompt",
        ),
        (
            ["--data", file("half.jsonl", row + "\n" + row.replace('"c"', '"b"') + "\n")],
            4,
            "chosen",
        ),
        (["--model", bare], 2, "chat template"),
        (["--model", large], 2, "vocabulary"),
        (["--reference_model", large], 2, "the two cannot be compared"),
        (["--model", tmp_path], 2, str(tmp_path)),
        (
            ["--ds_config", file("typo.json", '{"zero_optimisation": {"stage": 2}}')],
            2,
            "did you mean 'zero_optimization'",
        ),
        (
            ["--ds_config", file("nested.json", '{"zero_optimization": {"stagee": 2}}')],
            2,
            "did you mean 'stage'",
        ),
        (
            ["--ds_config", file("flag.json", '{"bf16": {"enabled": "auto"}}')],
            2,
            "belongs to --precision",
        ),
        (["--ds_config", tmp_path / "none.json"], 2, "does not exist"),
        (["--max_prompt_length", "2000"], 2, "no room"),
        (["--lr_scheduler", "zigzag"], 2, "zigzag"),
        (
            [
                "--model",
                _model_without(model_dir, tmp_path / "holes", "model.layers.0.mlp.up_proj.weight"),
            ],
            2,
            "no weights for",
        ),
        (
            ["--model", _truncated(model_dir, tmp_path / "short")],
            2,
            "cannot load a causal language model",
        ),
        (["--max_length", "1024"], 2, "512 positions"),
        (
            ["--output", _other_run(tmp_path / "other")],
            2,
            "holds another run (--beta was 0.5, is 0.1;",
        ),
        (["--output", file("afile", "x")], 2, "cannot write"),
        (["--output", _foreign(tmp_path / "foreign")], 2, "holds other files"),
    ]
    cases.sort(
        key=lambda case: "--output" not in case[0]
    )  # those first that end before a run has its log
    fixed = [*COMMON, "--model", model_dir]
    lines = [
        [*fixed, "--output", tmp_path / f"out{i}", *extra] for i, (extra, *_) in enumerate(cases)
    ]
    for (extra, code, words), (found, out, err) in zip(
        cases, several(SCRIPT, lines, tmp_path / "cache"), strict=True
    ):
        assert found == str(code), (extra, found, err[-2000:])
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and words in said[0], (extra, err[-2000:])
        assert "Traceback" not in out + err
    assert not any(tmp_path.glob("out*/run.json"))  # refused before the folder was taken
    assert json.loads((tmp_path / "other" / "run.json").read_text())["flags"]["beta"] == 0.5
    assert (tmp_path / "foreign" / "thesis.tex").read_text() == "years"


def _model_without(start, folder, name):
    from safetensors.torch import load_file, save_file

    shutil.copytree(start, folder)
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _truncated(start, folder):
    shutil.copytree(start, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return folder


def _write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _other_run(folder):
    import dataclasses
    import runpy

    settings = runpy.run_path(str(ROOT / SCRIPT))["Settings"]
    folder.mkdir()
    flags = {**dataclasses.asdict(settings()), "beta": 0.5}
    _write(folder / "run.json", json.dumps({"status": "running", "flags": flags | {"model": "x"}}))
    return folder


def _foreign(folder):
    folder.mkdir()
    _write(folder / "thesis.tex", "years")
    return folder


def _model_without_template(start, folder):
    tiny.make_model().save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def _model_with_tokens(start, folder):
    tiny.make_model().save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    tokenizer.add_tokens(["the"])  # a token that the data uses, and the model has no row for
    tokenizer.save_pretrained(folder)
    return folder


def test_dropped_rows_are_listed_and_a_finished_run_says_so(model_dir, tmp_path):
    rows = PAIRS.read_text().splitlines()[:40]
    rows[7] = json.dumps({"prompt": "Say <|im_end|> twice", "chosen": "b", "rejected": "c"})
    data = _write(tmp_path / "pairs.jsonl", "\n".join(rows).encode())
    common = [
        *COMMON,
        "--model",
        model_dir,
        "--data",
        data,
        "--output",
        tmp_path / "out",
        "--max_steps",
        1,
    ]
    common += ["--eval_split", 0.2]
    refused = [
        *common,
        "--loss",
        "sigmiod",
    ]  # leaves nothing behind that the corrected command would stumble over
    (zeroth, *_), (first, _, err), (second, out, _), (third, _, told) = several(
        SCRIPT, [refused, common, common, [*common, "--lr", "1e-4"]], tmp_path / "cache"
    )
    assert zeroth == "2"
    assert first == "0", err[-3000:]
    (dropped,) = map(json.loads, (tmp_path / "out/dropped.jsonl").read_text().splitlines())
    assert dropped["row"] == 7 and "<|im_end|>" in dropped["reason"] and dropped["split"] == "train"
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert (
        run["data"]["groups"] + run["eval_data"]["groups"] == 39
        and 2 <= run["eval_data"]["groups"] <= 16
    )
    assert second == "0" and "finished" in out
    assert third == "2" and "--lr was 5e-06, is 0.0001" in told
