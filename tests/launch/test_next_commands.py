"""What a run names as next is typed as it stands, by a user who has trained on data of their own: DPO,
a reward model, PPO, and what those name in turn.
"""

import json
import re
import shlex
import sys

import pytest

from tests.launch.commands import ROOT, free_port, launched

ROWS = (ROOT / "train/data/builtin/train.jsonl").read_text(encoding="utf-8").splitlines()
MARGIN = "rewards/margins"


def train(script, model_dir, data, output, cache, *more):
    """Train for a step or two, a part of `data` held out; what was printed."""
    command = [sys.executable, f"launch/{script}", "--model", model_dir, "--data", data]
    command += ["--eval_split", 0.3, "--max_length", 400, "--max_prompt_length", 200]
    return printed([*command, "--output", output, "--max_steps", 2, "--lr", "1e-3", *more], cache)


def printed(command, cache):
    done = launched(command, cache)
    assert done.returncode == 0, (command, done.stderr[-3000:])
    return done.stdout + done.stderr


def next_commands(text):
    """The lines below "next", words as a shell reads them."""
    lines = text[text.index("\nnext\n") :].splitlines()[2:]
    return [shlex.split(line) for line in lines if re.match("  (deepspeed|tensorboard) ", line)]


def run(words, cache):
    """Type a printed command; with a port that no other job on this machine has."""
    assert words[0] == "deepspeed"
    return printed(["deepspeed", "--master_port", free_port(), *words[1:]], cache)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def mine(tmp_path):
    """Pairs of the user's own, under a name with a space, in columns that have other names."""
    path = tmp_path / "my pairs.jsonl"
    rows = [json.loads(row) for row in ROWS[:40]]
    rows = [{("ask" if key == "prompt" else key): row[key] for key in row} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_dpo(model_dir, mine, tmp_path, loss):
    out, cache = tmp_path / "my run", tmp_path / "cache"
    more = ["--columns", "prompt=ask", "--loss", loss, "--beta", 0.5]
    text = train("train_dpo.py", model_dir, mine, out, cache, *more)
    assert "(a reward is beta x log-" in text
    evaluate, tensorboard = next_commands(text)
    assert tensorboard == ["tensorboard", "--logdir", str(out)]
    text = run(evaluate, cache)
    record, report = read(out / "run.json"), read(out / "eval/report.json")
    split = "the rows that training held out, the same split: 0.3 of the prompts by seed 0"
    assert f"data: {split}: {mine}" in text and report["data"]["which"] == split
    assert report["data"]["rows_fingerprint"] == record["eval_data"]["rows_fingerprint"]
    # the very figures of training's closing table
    last, model = record["evaluations"]["2"], report["preferences"]["model"]
    assert model["rewards/accuracies"]["n"] == last["pairs"] == report["data"]["groups"]
    for name in ("loss", MARGIN, "rewards/accuracies", "rewards/chosen", "logps/chosen"):
        assert model[name]["value"] == pytest.approx(last[name], abs=1e-4), name
    assert last[MARGIN] != 0 and record["rewards"].endswith(report["preferences"]["reward"])
    card = (out / "model/README.md").read_text(encoding="utf-8")
    assert f"## Evaluation on my pairs.jsonl, {split}" in card
    assert card.count(report["preferences"]["reward"]) == 2  # training's table and evaluation's


@pytest.mark.slow
def test_reward_model_then_ppo_then_its_evaluation(model_dir, mine, tmp_path):
    out, cache = tmp_path / "judge", tmp_path / "cache"
    text = train("train_reward.py", model_dir, mine, out, cache, "--columns", "prompt=ask")
    evaluate, ppo, _ = next_commands(text)
    run(evaluate, cache)
    record, chapter = read(out / "run.json"), read(out / "eval/report.json")["rewards"]
    assert chapter["data"]["rows_fingerprint"] == record["eval_data"]["rows_fingerprint"]
    last, model = record["evaluations"]["2"], chapter["preferences"]["model"]
    for name in (MARGIN, "rewards/accuracies", "rewards/chosen"):
        assert model[name]["value"] == pytest.approx(last[name], abs=1e-4), name
    text = run(ppo, cache)
    evaluate, _ = next_commands(text)
    text = run(evaluate, cache)
    trained, report = read(out / "ppo/run.json"), read(out / "ppo/eval/report.json")
    assert trained["status"] == "finished" and trained["flags"]["data"] == [str(mine)]
    # its held-out prompts are rows of pairs, and are evaluated as such
    assert report["data"]["which"].startswith("the rows that training held out, the same split")
    assert report["data"]["groups"] == trained["eval_data"]["groups"]
    assert report["trained"]["algorithm"] == "grpo" and report["reference"] == "llama"
    assert "reward" in report["generations"]["sampled"]["model"]
    earned, last = report["trained"]["earned"], trained["evaluations"]["2"]
    assert earned["before"] == trained["evaluations"]["0"]["reward"]
    assert earned["after"]["value"] == last["reward"] and earned["prompts"] == last["pairs"]
    page = (out / "ppo/eval/report.md").read_text(encoding="utf-8")
    assert f"reward in training (reward_model) on {last['pairs']} held-out prompts" in page
    card = (out / "ppo/model/README.md").read_text(encoding="utf-8")
    assert "## Evaluation on my pairs.jsonl" in card and "## Results of training" in card


@pytest.mark.slow
def test_ppo_on_prompts_alone(model_dir, mine, tmp_path):
    out, cache = tmp_path / "ppo", tmp_path / "cache"
    path = tmp_path / "prompts.jsonl"
    rows = [json.loads(row) for row in mine.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps({"prompt": row["ask"]}) + "\n" for row in rows))
    more = ["--reward", "ended", "--max_new_tokens", 16, "--batch_size", 8]
    text = train("train_ppo.py", model_dir, path, out, cache, *more)
    evaluate, _ = next_commands(text)
    text = run(evaluate, cache)
    record, report = read(out / "run.json"), read(out / "eval/report.json")
    assert "data: the built-in held-out pairs: what training held out are no pairs" in text
    assert report["generations"]["max_new_tokens"] == 16
    count = min(32, record["eval_data"]["groups"])
    assert report["prompts"]["groups"] == count == report["generations"]["prompts"]
    page = (out / "eval/report.md").read_text(encoding="utf-8")
    assert f"{count} prompts of prompts.jsonl (the rows that training held out" in page
