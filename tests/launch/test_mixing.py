"""Runs on a share of some of their data, through the user's commands: killed and continued, by source,
and checked beforehand.
"""

import json
import sys

import pytest

from tests.launch.commands import launched, several
from tests.launch.compare import ROOT, flags, same_bits, same_run, scalars, until, weights
from tests.launch.test_resume import killed_and_continued
from tests.launch.warm import Warm

pytestmark = pytest.mark.slow
SCRIPTS = ("dpo", "reward", "ppo")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Sources of 20 and 9 pairs, and two of 5 and 3 to evaluate on."""
    folder = tmp_path_factory.mktemp("sources")
    lines = (ROOT / "train/data/builtin/train.jsonl").read_text().splitlines(keepends=True)
    sizes = {"many": (0, 20), "few": (20, 29), "easy": (40, 45), "hard": (50, 53)}
    for name, (first, end) in sizes.items():
        (folder / f"{name}.jsonl").write_text("".join(lines[first:end]))
    return folder


def of_run(script, model_dir, files, out, *extra, mix=("many.jsonl:0.3", "few.jsonl"), eval_on=("easy", "hard")):  # fmt: skip
    """6 of 20 and all 9 of 9 pairs an epoch: four steps of 4, the last of 3."""
    own = {
        "dpo": ("--lr", "1e-3"),
        "reward": ("--lr", "1e-3"),
        "ppo": (
            *("--lr", "1e-3", "--reward", "tests.launch.ppo_rewards:vowels", "--max_new_tokens", 8),
            *("--algorithm", "grpo", "--samples_per_prompt", 2, "--max_prompt_length", 96),
        ),
    }
    return [
        *("--model", model_dir, "--output", out, "--max_length", 512, "--batch_size", 4),
        *("--data", *(files / name for name in mix)),
        *("--eval_data", *(files / f"{name}.jsonl" for name in eval_on)),
        *(
            "--epochs",
            2,
            "--micro_tokens",
            512,
            "--seed",
            5,
            "--save_every",
            1,
            "--keep",
            9,
            *own[script],
        ),
        *extra,
    ]


def record(out):
    return json.loads((out / "run.json").read_text())


@pytest.fixture(scope="module")
def warms(tmp_path_factory):
    """Ranks of each script without their imports."""
    with (
        Warm(tmp_path_factory.mktemp("cache"), "launch/train_dpo.py") as dpo,
        Warm(tmp_path_factory.mktemp("cache"), "launch/train_reward.py") as reward,
        Warm(tmp_path_factory.mktemp("cache"), "launch/train_ppo.py") as ppo,
    ):
        yield {"dpo": dpo, "reward": reward, "ppo": ppo}


@pytest.fixture(scope="module")
def finished(warms, model_dir, files, tmp_path_factory):
    """A run of each script, left alone: {script: (OUTPUT, what it printed)}."""
    found = {}
    for script in SCRIPTS:
        out = tmp_path_factory.mktemp(script) / "out"
        codes, text = warms[script].run(of_run(script, model_dir, files, out))
        assert codes == [0], text[-3000:]
        found[script] = out, text
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_counts_are_said_and_kept(finished, script, files):
    out, text = finished[script]
    assert "data: many: 6 of 20 rows an epoch (share 0.3)\n" in text
    assert "data: few: 9 of 9 rows an epoch\n" in text
    run = record(out)
    assert run["steps"] == 8 and run["data"]["groups"] == 29
    assert run["data"]["sources"] == [str(files / "many.jsonl"), str(files / "few.jsonl")]
    many = {"source": str(files / "many.jsonl"), "share": 0.3, "groups": 20, "groups_an_epoch": 6}
    assert run["data"]["by_source"]["many"] == many
    assert (
        "| training | many.jsonl (0.3 an epoch), few.jsonl |"
        in (out / "model/README.md").read_text()
    )
    assert run["eval_data"]["by_source"]["hard"]["groups"] == 3
    manifest = json.loads((out / "checkpoints/step-5/manifest.json").read_text())
    assert manifest["order"]["groups_an_epoch"] == [[6, 20], [9, 9]]
    assert manifest["consumed_groups"] == 15 + 4


def numbers(values):
    """What an evaluation says, without its intervals and its sources."""
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_source_s_measures_are_those_of_evaluating_it_alone(
    finished, warms, model_dir, files, tmp_path, script
):
    """Nothing that is evaluated changes what is trained: the same weights, scored on one source."""
    out, _ = finished[script]
    last = record(out)["evaluations"]["8"]
    assert [last["by_source"][name]["pairs"] for name in ("easy", "hard")] == [5, 3]
    # of answers the noise is that of their place: the second source would be answered otherwise
    for name in ("easy",) if script == "ppo" else ("easy", "hard"):
        alone = tmp_path / name
        codes, text = warms[script].run(of_run(script, model_dir, files, alone, eval_on=[name]))
        assert codes == [0], text[-3000:]
        same_bits(weights(alone), weights(out))
        expected = record(alone)["evaluations"]["8"]
        assert "by_source" not in expected
        found = numbers(last["by_source"][name])
        assert found == pytest.approx(numbers(expected), rel=1e-5, abs=1e-6)
        assert len(found) >= 7 and found != pytest.approx(numbers(last), rel=1e-3)
        shown = scalars(out, expected=())
        tags = {tag.removeprefix(f"eval/{name}/"): v for tag, v in shown.items() if tag.startswith(f"eval/{name}/")}  # fmt: skip
        assert {*tags} == {*found} - {"pairs"}
        for tag, values in tags.items():
            assert values[-1] == (8, pytest.approx(found[tag], rel=1e-6))
    # and the whole is made of them
    measure = "reward" if script == "ppo" else "rewards/accuracies"
    parts = last["by_source"].values()
    mean = sum(own[measure] * own["pairs"] for own in parts) / 8
    assert last[measure] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_by_source(finished, script):
    """A step's measure is the mean of its sources', by their rows."""
    out, _ = finished[script]
    shown = {tag: dict(values) for tag, values in scalars(out, expected=()).items()}
    whole, own = ("objective/scores", "reward") if script == "ppo" else ("train/loss", "loss")
    many, few = (shown.get(f"train/{name}/{own}", {}) for name in ("many", "few"))
    assert {*many} | {*few} == set(range(1, 9)) and {*many} & {*few}
    mixed = 0
    for step, value in shown[whole].items():
        if step in many and step in few:
            low, high = sorted((many[step], few[step]))
            if high == low:  # DPO's first step, at log 2
                continue
            share = (value - low) / (high - low)  # of 4 rows, or of 3
            size = 3 if step in (4, 8) else 4
            assert share * size == pytest.approx(round(share * size), abs=0.02), step
            assert 0 < round(share * size) < size
            mixed += 1
        else:
            assert value == pytest.approx((many | few)[step], rel=1e-5)
    assert mixed


@pytest.mark.parametrize("script", ["dpo", "reward"])
def test_killed_once_and_continued_is_bit_for_bit_the_same(
    warms, model_dir, files, tmp_path, script
):
    """Shares of both sources, 12 pairs an epoch in two steps, over four epochs; every scalar of every source among what is compared."""
    few = files / "few.jsonl"
    extra = ["--data", files / "many.jsonl:0.3", f"{few}:0.7", "--eval_data", few, files / "hard.jsonl"]  # fmt: skip
    extra += ["--epochs", 4]
    codes, text = warms[script].run(flags(model_dir, few, tmp_path / "straight", 0, *extra))
    assert codes == [0], text[-3000:]
    _, text = killed_and_continued(
        warms[script], model_dir, few, tmp_path / "killed", 0, 1, 1, 3, *extra
    )
    assert "continues after step" in text
    same_run(tmp_path / "killed", tmp_path / "straight")
    tags = {*scalars(tmp_path / "killed")}
    assert {"eval/few/loss", "eval/hard/loss", "train/many/loss", "train/few/loss"} <= tags


def test_stopped_in_an_epoch_of_rollouts(warms, finished, model_dir, files, tmp_path):
    out = tmp_path / "out"
    job = warms["ppo"].start(of_run("ppo", model_dir, files, out))
    until(lambda: (out / "checkpoints/step-2").exists(), "second checkpoint")
    job.kill()
    job.wait()
    codes, text = warms["ppo"].run(of_run("ppo", model_dir, files, out))
    assert codes == [0] and "continues after step" in text, text[-3000:]
    same_bits(weights(out), weights(finished["ppo"][0]))
    assert scalars(out, expected=()) == scalars(finished["ppo"][0], expected=())


def test_two_ranks_take_the_same_rows(finished, warms, model_dir, files, tmp_path):
    codes, text = warms["dpo"].run(of_run("dpo", model_dir, files, tmp_path / "two"), 2)
    assert codes == [0, 0], text[-3000:]
    one, two = (scalars(out)["train/loss"] for out in (finished["dpo"][0], tmp_path / "two"))
    assert [v for _, v in two] == pytest.approx([v for _, v in one], rel=1e-3)


def test_a_changed_share_is_another_run(finished, warms, model_dir, files, tmp_path):
    out, _ = finished["dpo"]
    changed = ("many.jsonl:0.5", "few.jsonl")
    codes, text = warms["dpo"].run(of_run("dpo", model_dir, files, out, mix=changed))
    assert codes == [2] and "many.jsonl:0.5" in text and "choose another --output" in text
    begun = ("--resume", out / "checkpoints/step-8")
    for mix in (changed, ("many.jsonl", "few.jsonl")):
        other = tmp_path / f"other-{len(mix[0])}"
        codes, text = warms["dpo"].run(of_run("dpo", model_dir, files, other, *begun, mix=mix))
        assert codes == [3] and text.count("belongs to another order of the data") == 1, text
        assert "groups_an_epoch was [[6, 20], [9, 9]], is " in text
    # a share of 1 is no share
    codes, text = warms["dpo"].run(
        of_run("dpo", model_dir, files, tmp_path / "whole", mix=("many.jsonl:1", "few.jsonl:1.0"))
    )
    assert codes == [0], text[-3000:]
    codes, text = warms["dpo"].run(
        of_run("dpo", model_dir, files, tmp_path / "plain", mix=("many.jsonl", "few.jsonl"))
    )
    assert codes == [0], text[-3000:]
    same_bits(weights(tmp_path / "whole"), weights(tmp_path / "plain"))
    assert record(tmp_path / "whole")["steps"] == 2 * 8 and "(share" not in text


def test_validation_and_evaluation(finished, model_dir, files, tmp_path):
    mix = [files / "many.jsonl:0.3", files / "few.jsonl"]
    lengths = ["--model", model_dir, "--max_length", 512]
    lines = [[*lengths, "--data", *mix], [*lengths, "--data", *mix, "--eval_split", 0.4]]
    (code, text, err), (_, split, _) = several("launch/validate.py", lines, tmp_path / "cache")
    assert code == "0" and "data: many: 6 of 20 rows an epoch (share 0.3)\n" in err
    found = json.loads(text)["data"]
    assert found["rows"] == 29 and found["sources"] == [str(files / f"{n}.jsonl") for n in ("many", "few")]  # fmt: skip
    assert found["by_source"] == record(finished["dpo"][0])["data"]["by_source"]
    report = json.loads(split)
    held_out, left = report["held_out_by_source"], report["data"]["by_source"]
    assert held_out["many"]["groups"] + left["many"]["groups"] == 20 and held_out["many"]["groups"]
    # an evaluation of what such a run has made takes what the run held out
    out = finished["dpo"][0]
    line = ["--model", out / "model", "--prompts", 0, "--output", tmp_path / "eval"]
    done = launched([sys.executable, "eval/evaluate.py", *line], tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "eval/report.json").read_text())
    assert report["data"]["groups"] == 8 and "training held out" in report["data"]["which"]
