"""A run that is killed, told to stop, or moved to other ranks and ZeRO stages, against the run that
was left alone.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch
import transformers
from safetensors import safe_open

from tests.launch.compare import (
    ROOT,
    STEPS,
    at_checkpoint,
    flags,
    moments,
    same_bits,
    same_run,
    says,
    scalars,
    straight,
    weights,
)


def inside_a_save(out, seconds=15):
    """Come back while a checkpoint is being written."""
    end = time.monotonic() + seconds
    while not any(
        name.endswith(".tmp") for name in os.listdir(out / "checkpoints")
    ):  # it is there for milliseconds
        assert time.monotonic() < end, "no checkpoint was being written"


def killed_and_continued(warm, model_dir, few, out, stage, ranks, kills, seed, *extra):
    """Kill `kills` times, every second time inside a save, then let it end; where each kill met it."""
    draw, met, done = random.Random(seed), [], 0
    for number in range(kills):
        job = warm.start(flags(model_dir, few, out, stage, *extra), ranks)
        if number % 2 == 0:
            at_checkpoint(out, done + 1)
            inside_a_save(out)
            time.sleep(draw.random() * 0.01)
        else:  # while it loads, or in a step
            if number % 4 == 3:
                at_checkpoint(out, done + 1)
            time.sleep(draw.uniform(0, 0.1))
        job.kill()
        codes, text = job.wait()
        assert codes == [-signal.SIGKILL] * ranks, text[-2000:]  # it had not ended before
        left = [path.name for path in (out / "checkpoints").glob("step-*")]
        done = max((int(name[5:]) for name in left if name[5:].isdigit()), default=0)
        met.append(f"{done}{' and a half' * any(name.endswith('.tmp') for name in left)}")
    codes, text = warm.run(flags(model_dir, few, out, stage, *extra), ranks)
    assert codes == [0] * ranks, text[-3000:]
    return met, text


@pytest.mark.parametrize("stage, ranks", [(0, 1), (2, 2)])
def test_killed_once_and_continued_is_bit_for_bit_the_same(
    warm, model_dir, few, tmp_path, stage, ranks
):
    straight(warm, model_dir, few, tmp_path / "straight", stage, ranks)
    _, text = killed_and_continued(
        warm, model_dir, few, tmp_path / "killed", stage, ranks, 1, seed=stage
    )
    assert "continues after step" in text
    same_run(tmp_path / "killed", tmp_path / "straight")
    codes, text = warm.run(flags(model_dir, few, tmp_path / "killed", stage), ranks)
    assert codes == [0] * ranks and "finished" in text


@pytest.mark.matrix
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler (c++)")
def test_compiled_layers_are_bit_for_bit_the_same_after_a_kill(warm, model_dir, few, tmp_path):
    """And near the same run without --compile."""
    alone, out, plain = (tmp_path / name for name in ("alone", "killed", "plain"))
    straight(warm, model_dir, few, alone, 0, 1, "--compile", "auto")
    _, text = killed_and_continued(warm, model_dir, few, out, 0, 1, 1, 0, "--compile", "auto")
    assert "continues after step" in text and "stay uncompiled" not in text
    same_run(out, alone)
    straight(warm, model_dir, few, plain, 0, 1)
    losses = [scalars(each)["train/loss"] for each in (alone, plain)]
    assert losses[0] != losses[1]  # compiled code rounds elsewhere
    for (step, value), (other_step, other) in zip(*losses, strict=True):
        assert step == other_step and value == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_in_bf16_too(warm, model_dir, few, tmp_path, stage):
    """Under autocast, and with bf16 weights beside fp32 masters, which are what a checkpoint holds."""
    bf16 = ["--precision", "bf16"]
    straight(warm, model_dir, few, tmp_path / "straight", stage, 1, *bf16)
    _, text = killed_and_continued(
        warm, model_dir, few, tmp_path / "killed", stage, 1, 1, stage, *bf16
    )
    assert "continues after step" in text
    same_run(tmp_path / "killed", tmp_path / "straight")


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_killed_five_times(warm, model_dir, few, tmp_path, stage, ranks, capsys):
    straight(warm, model_dir, few, tmp_path / "straight", stage, ranks)
    met, _ = killed_and_continued(
        warm, model_dir, few, tmp_path / "killed", stage, ranks, 5, seed=10 * stage + ranks
    )
    same_run(tmp_path / "killed", tmp_path / "straight")
    with capsys.disabled():
        print(
            f"\nZeRO {stage}, {ranks} ranks: killed when these checkpoints stood: {', '.join(met)}"
        )


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1]
)
def test_told_to_stop(warm, model_dir, few, tmp_path, number):
    """One of two ranks is told; both stop with 85, and the same command continues without a trace
    of it.
    """
    straight(warm, model_dir, few, tmp_path / "straight", 0, 2)
    out = tmp_path / "told"
    # no periodic saves: what there is was saved on being told
    job = warm.start(flags(model_dir, few, out, 0, "--save_every", 0), 2)
    says(job, r"train: .* [1-7]/8 \[")
    os.kill(job.pids[0], signal.SIGSTOP)  # rank 1 waits for it while the signal is on its way
    os.kill(job.pids[1], number)
    os.kill(job.pids[0], signal.SIGCONT)
    codes, text = job.wait()
    assert codes == [85, 85], text[-3000:]
    assert (out / "status").read_text() == "preempted\n" and "told to stop" in text
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    saved = (
        [path.name for path in (out / "checkpoints").glob("step-*")]
        if (out / "checkpoints").exists()
        else []
    )
    assert len(saved) == ("no step was done" not in text)
    codes, text = warm.run(flags(model_dir, few, out), 2)
    assert codes == [0, 0], text[-3000:]
    assert (out / "status").read_text() == "finished\n"
    same_run(out, tmp_path / "straight")


@pytest.mark.slow
def test_ctrl_c(warm, model_dir, few, tmp_path):
    """It ends both ranks at once, in one line, and the same command goes on from what was saved."""
    many = ["--max_steps", 40, "--epochs", 20]  # so that it is under way yet
    straight(warm, model_dir, few, tmp_path / "straight", 0, 2, *many)
    out = tmp_path / "out"
    line = flags(model_dir, few, out, 0, *many)
    job = warm.start(line, 2)
    at_checkpoint(out, 2)
    os.kill(job.pids[0], signal.SIGINT)
    time.sleep(0.2)  # the other one is left in the middle of a sum
    os.kill(job.pids[1], signal.SIGINT)
    codes, text = job.wait()
    assert codes == [130, 130] and "Traceback" not in text, text[-3000:]
    assert text.count("interrupted: the same command continues from the newest checkpoint") == 1
    assert (out / "status").read_text() == "failed\n"
    codes, text = warm.run(line, 2)
    assert codes == [0, 0] and "continues after step" in text, text[-3000:]
    for name, value in weights(tmp_path / "straight").items():
        assert value.equal(weights(out)[name])
    nothing = flags(model_dir, few, tmp_path / "nothing", 0, "--save_every", 0, *many)
    job = warm.start(nothing)
    says(job, r"train: .* [1-9]/40 \[")
    job.kill(signal.SIGINT)
    codes, text = job.wait()
    assert codes == [130] and "Traceback" not in text, text[-3000:]
    assert "interrupted: nothing was saved; SIGTERM saves first" in text


@pytest.mark.slow
def test_stopped_inside_evaluations(warm, model_dir, few, tmp_path):
    """Told to stop and killed where evaluations take most of the time: nothing is told twice,
    nothing is missing.
    """
    many = tmp_path / "held_out.jsonl"
    many.write_text(few.read_text() * 6)
    extra = ["--eval_every", 1, "--eval_data", many, "--save_every", 2]
    straight(warm, model_dir, few, tmp_path / "straight", 0, 2, *extra)
    out, draw = tmp_path / "stopped", random.Random(0)
    for number, step in (
        (signal.SIGUSR1, 1),
        (signal.SIGKILL, 3),
        (signal.SIGTERM, 4),
        (signal.SIGKILL, 6),
    ):
        job = warm.start(flags(model_dir, few, out, 0, *extra), 2)
        says(job, f"evaluate at step [{step}-7]: ")
        time.sleep(draw.uniform(0, 0.1))
        job.kill(number)
        codes, text = job.wait()
        assert codes == [85 if number != signal.SIGKILL else -signal.SIGKILL] * 2, text[-3000:]
    codes, text = warm.run(flags(model_dir, few, out, 0, *extra), 2)
    assert codes == [0, 0], text[-3000:]
    same_run(out, tmp_path / "straight")


def moved(warm, model_dir, few, out, legs):
    """Run in legs of (stage, ranks), each killed once the checkpoint at its end stands; the last
    runs to the end.
    """
    for number, (stage, ranks) in enumerate(legs, 1):
        job = warm.start(flags(model_dir, few, out, stage), ranks)
        if number < len(legs):
            at_checkpoint(out, number * STEPS // len(legs))
            job.kill()
            job.wait()
        else:
            codes, text = job.wait()
            assert codes == [0] * ranks and "continues after step" in text, text[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "legs",
    [
        [(0, 2), (0, 1), (0, 2)],
        [(2, 2), (2, 1), (2, 2)],
        [(3, 2), (3, 1), (3, 2)],
        [(0, 1), (2, 2), (3, 2), (0, 1)],
        [(1, 2), (3, 1), (1, 1)],
        [("3_offload", 2), (2, 1), ("3_offload", 1)],
    ],
)
def test_other_ranks_and_stages(warm, model_dir, few, tmp_path, legs):
    straight(warm, model_dir, few, tmp_path / "straight", 0, 1)
    moved(warm, model_dir, few, tmp_path / "moved", legs)
    expected, found = scalars(tmp_path / "straight"), scalars(tmp_path / "moved")
    for tag in ("train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "val/loss"):
        assert [step for step, _ in found[tag]] == [step for step, _ in expected[tag]], tag
        assert [value for _, value in found[tag]] == pytest.approx(
            [value for _, value in expected[tag]], rel=2e-4
        ), tag
    told = json.loads((tmp_path / f"moved/checkpoints/step-{STEPS}/manifest.json").read_text())
    assert (
        told["consumed_groups"] == 44 + 2 * 8
    )  # the first epoch's six steps, and two of the second
    one, other = moments(tmp_path / "straight"), moments(tmp_path / "moved")
    assert one.keys() == other.keys()
    for name in one:
        scale = one[name].abs().max()
        assert (one[name] - other[name]).abs().max() <= 0.02 * scale + 1e-12, name


@pytest.mark.slow
def test_damaged_checkpoints_and_export(warm, model_dir, few, tmp_path):
    """The newest one that is sound is used and the others named; none sound, or another run's: exit
    code 3.
    """
    out = tmp_path / "out"
    codes, text = warm.run(flags(model_dir, few, out, 0, "--keep", 3))
    assert codes == [0], text[-3000:]
    kept = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    assert (
        kept == ["step-6", "step-7", "step-8"]
        and (out / "checkpoints/latest").read_text() == "step-8\n"
    )
    exported(out, tmp_path / "exported")
    complete = {path.name: path.read_bytes() for path in out.glob("*") if path.is_file()}
    unfinished = json.loads(complete["run.json"]) | {"status": "running"}
    (out / "run.json").write_text(json.dumps(unfinished))
    state = out / "checkpoints/step-8/state-00000.safetensors"
    content = bytearray(state.read_bytes())
    content[-5] ^= 1
    state.write_bytes(content)
    (out / "checkpoints/step-7/rank-00000.safetensors").write_bytes(b"")
    before = weights(out)
    codes, text = warm.run(flags(model_dir, few, out, 0, "--keep", 3))
    assert codes == [0] and "continues after step 6" in text, text[-3000:]
    assert "step-8/state-00000.safetensors is not what was written (sha256)" in text
    assert "step-7/rank-00000.safetensors has 0 bytes instead of" in text
    same_bits(weights(out), before)

    (out / "run.json").write_text(json.dumps(unfinished))
    for path in (out / "checkpoints").glob("step-*"):
        (path / "manifest.json").write_text("{")
    codes, text = warm.run(flags(model_dir, few, out))
    assert (
        codes == [3]
        and "error: no sound checkpoint" in text
        and "--resume never" in text
        and "Traceback" not in text
    )
    codes, text = warm.run(flags(model_dir, few, out, 0, "--resume", tmp_path / "nowhere"))
    assert codes == [3] and "nowhere has no manifest.json" in text
    codes, text = warm.run(flags(model_dir, few, out, 0, "--resume", "never", "--keep", 1))
    assert codes == [0] and "continues" not in text
    same_bits(weights(out), before)
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-8"]
    told = json.loads((out / "run.json").read_text()) | {"status": "running"}
    (out / "run.json").write_text(json.dumps(told))
    requeued = {
        "train.run.checkpoint.RESTARTS": 1
    }  # the job that was told never to resume, requeued by SLURM
    codes, text = warm.run(
        flags(model_dir, few, out, 0, "--resume", "never", "--keep", 1), patch=requeued
    )
    assert codes == [0] and "continues after step 8" in text


def exported(out, folder):
    """launch/export.py makes of a checkpoint what the run made of its weights; a damaged one is
    refused.
    """

    def run(*args):
        return subprocess.run(
            [sys.executable, "launch/export.py", *map(str, args)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    done = run(out / "checkpoints/step-8", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    with safe_open(folder / "model.safetensors", "pt") as file:
        same_bits({name: file.get_tensor(name) for name in file.keys()}, weights(out))  # noqa: SIM118
    for made in sorted(
        (out / "model").glob("*.json")
    ):  # configuration, tokenizer, settings for generation
        assert json.loads((folder / made.name).read_text()) == json.loads(made.read_text()), (
            made.name
        )
    assert {p.name for p in folder.iterdir()} >= {p.name for p in (out / "model").iterdir()} - {
        "README.md"
    }
    done = run(out / "checkpoints/step-8", folder)
    assert done.returncode == 2 and "not empty" in done.stderr
    broken = folder.with_name("broken")
    shutil.copytree(out / "checkpoints/step-7", broken)
    (broken / "policy/config.json").write_text("{}")
    done = run(broken, folder.with_name("other"))
    assert (
        done.returncode == 3
        and "config.json has 2 bytes" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.slow
def test_other_data_are_another_order(warm, model_dir, few, tmp_path):
    """A checkpoint named by its path continues in another folder; not over other data, not with
    another model.
    """
    codes, text = warm.run(flags(model_dir, few, tmp_path / "one"))
    assert codes == [0], text[-3000:]
    path = tmp_path / "one/checkpoints/step-7"
    codes, text = warm.run(flags(model_dir, few, tmp_path / "two", 0, "--resume", path))
    assert codes == [0] and "continues after step 7" in text
    same_bits(weights(tmp_path / "two"), weights(tmp_path / "one"))
    told = json.loads((tmp_path / "two/run.json").read_text())
    (tmp_path / "two/run.json").write_text(json.dumps(told | {"status": "running"}))
    codes, text = warm.run(flags(model_dir, few, tmp_path / "two", 0, "--resume", path))
    assert codes == [0] and "continues after step 8" in text  # by now it has one of its own
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(few.read_text().splitlines(keepends=True)[:-1]))
    codes, text = warm.run(flags(model_dir, fewer, tmp_path / "three", 0, "--resume", path))
    assert (
        codes == [3] and "another order of the data (data was" in text and "Traceback" not in text
    )
    assert "put back what has changed since, or begin anew: --resume never" in text
    other = tmp_path / "qwen"
    shutil.copytree(model_dir, other)
    for name, change in (
        ("deeper", {"num_hidden_layers": 3}),
        ("wider", {"intermediate_size": 104}),
    ):
        tiny.make_model("llama", **change).save_pretrained(other)
        codes, text = warm.run(flags(other, few, tmp_path / name, 0, "--resume", path))
        assert codes == [3] and "another model's; name that one, or begin anew" in text, text[
            -2000:
        ]
        assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, ranks, extra", [(0, 1, ()), (3, 2, ()), (0, 2, ("--lora_rank", 2))]
)
def test_a_model_that_has_changed_is_not_gone_on_with(
    warm, model_dir, few, tmp_path, stage, ranks, extra
):
    """The weights under --model are others by now, of the same shapes: the reference would be another."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model_dir, model)
    line = flags(model, few, out, stage, *extra)
    job = warm.start(line, ranks)
    at_checkpoint(out, 2)
    job.kill()
    job.wait()
    lm = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        lm.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    lm.save_pretrained(model)
    before = {path: path.read_bytes() for path in (out / "checkpoints").rglob("*.json")}
    codes, text = warm.run(line, ranks)
    assert codes == [2] * ranks and "Traceback" not in text, text[-2000:]
    said = "the model is not the one that this run began with (model.layers.1.mlp.down_proj"
    assert (
        text.count(f"error: {said}") == 1 and "put it back, or begin anew: --resume never" in text
    )
    assert before == {path: path.read_bytes() for path in before}
    shutil.rmtree(model)
    shutil.copytree(model_dir, model)
    codes, text = warm.run(line, ranks)
    assert codes == [0] * ranks and "continues after step" in text, text[-2000:]


@pytest.mark.slow
def test_going_back_and_on(warm, model_dir, few, tmp_path):
    """--resume PATH of one's own: what came after is gone, and once told to stop the same command
    gets on.
    """
    out = tmp_path / "out"
    line = flags(model_dir, few, out, 0, "--keep", 9)
    assert warm.run(line)[0] == [0]
    unfinished = json.loads((out / "run.json").read_text()) | {"status": "running"}
    (out / "run.json").write_text(json.dumps(unfinished))
    back = [*line, "--resume", out / "checkpoints/step-4", "--micro_tokens", 256]
    job = warm.start(back)
    says(job, "continues after step 4")  # and by then the later ones are gone
    at_checkpoint(out, 5)
    job.kill(signal.SIGTERM)
    codes, text = job.wait()
    assert (
        codes == [85] and "continues after step 4" in text and "the same command continues" in text
    ), text[-2000:]
    told = json.loads(
        next(iter((out / "checkpoints").glob("step-[5678]/manifest.json"))).read_text()
    )
    assert (
        told["batch_tokens"] == 256
    )  # asked for, so it goes before what the checkpoint was made with
    codes, text = warm.run(back)
    assert (
        codes == [0] and "continues after step 4" not in text and "continues after step" in text
    ), text[-2000:]
    fewer = flags(
        model_dir,
        few,
        tmp_path / "fewer",
        0,
        "--max_steps",
        4,
        "--resume",
        out / "checkpoints/step-8",
    )
    codes, text = warm.run(fewer)
    assert codes == [3] and "further than this run goes: 4 steps; raise --max_steps" in text
    manifest = out / "checkpoints/step-8/manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 8', '"step": 6'))
    codes, text = warm.run(
        flags(model_dir, few, tmp_path / "edited", 0, "--resume", out / "checkpoints/step-8")
    )
    assert codes == [3] and "manifest.json is not what was written" in text


@pytest.mark.slow
def test_repeated_held_out_pairs_under_a_sharded_reference(warm, model_dir, few, tmp_path):
    """Rows of the same pairs on one rank only: every rank asks its part of the reference for every
    row.
    """
    first, second = few.read_text().splitlines(keepends=True)[:2]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(second + 3 * first)
    configs = []
    for name in ("zero3", "frozen_zero3"):
        config = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        configs.append(tmp_path / f"{name}.json")
        configs[-1].write_text(json.dumps(config))
    line = flags(
        model_dir,
        few,
        tmp_path / "out",
        3,
        "--eval_data",
        held_out,
        "--ds_config",
        configs[0],
        "--reference_ds_config",
        configs[1],
        "--micro_tokens",
        64,
        "--max_steps",
        2,
    )
    codes, text = warm.start(line, 2).wait(120)
    assert codes == [0, 0], text[-2000:]
