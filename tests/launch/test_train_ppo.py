"""Whole runs of launch/train_ppo.py on a tiny model with a real tokenizer."""

import json
import re
import signal
import time

import pytest
import tiny
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launch.commands import ROOT, free_port, launched, several
from tests.launch.compare import charts, same_bits, scalars, until, weights
from tests.launch.warm import Warm
from train.engine import memory
from train.models.pretrained import load_score_model
from train.run import checkpoint_files

SCRIPT = "launch/train_ppo.py"
VOWELS = "tests.launch.ppo_rewards:vowels"


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Ranks of launch/train_ppo.py without their imports."""
    with Warm(tmp_path_factory.mktemp("cache"), SCRIPT) as process:
        yield process


def flags(model_dir, prompts, out, *extra, stage=0):
    return [
        *("--model", model_dir, "--data", prompts, "--eval_split", 0.25, "--output", out),
        *("--max_length", 256, "--max_prompt_length", 96, "--max_new_tokens", 12),
        *("--batch_size", 4, "--max_steps", 3, "--epochs", 9, "--micro_tokens", 300),
        *("--ds_config", ROOT / f"ds_configs/zero{stage}.json", "--lr", "1e-3", "--seed", 3),
        *("--reward", VOWELS, *extra),
    ]


def record(out):
    return json.loads((out / "run.json").read_text())


PPO = ("--algorithm", "ppo", "--epochs_per_rollout", 2, "--minibatches", 2)


@pytest.fixture(scope="module")
def finished(warm, model_dir, prompts, tmp_path_factory):
    """PPO with a value model, one rank, ZeRO 0, left alone."""
    out = tmp_path_factory.mktemp("ppo") / "out"
    codes, text = warm.run(flags(model_dir, prompts, out, *PPO))
    assert codes == [0], text[-3000:]
    return out, text


def test_what_a_run_leaves(finished):
    out, text = finished
    found = scalars(out, expected=())
    for name in (
        *("objective/scores", "objective/kl", "objective/entropy", "objective/rlhf_reward"),
        *("policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg"),
        *("val/ratio", "val/explained_variance", "completions/mean_length", "train/grad_norm"),
        *(f"rewards/vowels/{each}" for each in ("mean", "std")),
        *("reward_std", "sampling/importance_sampling_ratio/max"),
    ):
        assert [step for step, _ in found[name]] == [1, 2, 3], name
    # decoding and training compute the same, but for rounding
    assert all(0 < gap < 1e-4 for _, gap in found["sampling/sampling_logp_difference/max"])
    assert [step for step, _ in found["eval/reward"]] == [0, 3]
    assert found["episode"] == [(1, 4), (2, 8), (3, 12)]
    assert found["objective/kl"][0][1] == 0  # the policy is the reference as it begins
    events = EventAccumulator(str(out / "tensorboard"), {"histograms": 0}).Reload()
    for name in ("rewards", "lengths", "advantages", "kl", "ratios"):
        assert len(events.Histograms(f"train/histogram/{name}")) == 3, name
    drawn = charts(out / "tensorboard")
    assert set(drawn["reward"]) == {"objective/scores", "eval/reward"} and all(drawn.values())
    run = record(out)
    assert run["algorithm"]["epochs"] == 2 and run["rewards"] == ["vowels"]
    assert set(run["evaluations"]) == {"0", "3"} and run["results"]["kl"] > 0
    first, last = run["evaluations"]["0"], run["evaluations"]["3"]
    compared = run["comparison"]
    for name in ("reward", "length", "ended", "repetition"):
        change = compared["change"][name]
        assert change["value"] == pytest.approx(last[name] - first[name], abs=1e-12)
        assert change["n"] == last["pairs"]
    assert 0 <= compared["win_rate"]["value"] <= 1 and found["eval/win_rate"][0][0] == 3
    assert 0 < last["distinct_1"] < last["distinct_2"] <= 1
    lm = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    assert torch.isfinite(lm.get_input_embeddings().weight).all()
    critic, has_head = load_score_model(out / "value_model")
    assert has_head and critic.score.weight.abs().sum() > 0  # it began with zeros
    card = (out / "model/README.md").read_text()
    assert "`ppo` algorithm" in card and "Before (reward" in card
    assert "earn more after than before in" in card and "better than before" in text
    assert "held-out prompts" in text and f"value model  {out / 'value_model'}" in text


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2, 3])
def test_two_ranks_draw_the_same_and_learn_the_same(
    warm, finished, model_dir, prompts, tmp_path, stage
):
    """The same answers and rewards to the last digit while the weights are the same; then within
    rounding.
    """
    alone, out = finished[0], tmp_path / "out"
    codes, text = warm.run(flags(model_dir, prompts, out, *PPO, stage=stage), 2)
    assert codes == [0, 0], text[-3000:]
    mine, theirs = scalars(out, ()), scalars(alone, ())
    for name in ("objective/scores", "completions/mean_length", "objective/entropy", "eval/reward"):
        assert mine[name][0][1] == pytest.approx(theirs[name][0][1], rel=1e-6), name
    assert mine["objective/scores"][0] == theirs["objective/scores"][0]
    one, two = weights(out), weights(alone)
    # AdamW turns a gradient's rounding into a part of a step where the gradient is near 0
    moved = [(one[name] - two[name]).abs().mean() for name in two]
    assert (
        max(moved) < 2e-5 and record(out)["answers"]["before"] == record(alone)["answers"]["before"]
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_exactly_one(warm, model_dir, prompts, tmp_path, temperature):
    """One update a rollout: no token has moved when it is trained on, to the last bit."""
    out = tmp_path / "out"
    line = flags(model_dir, prompts, out, "--algorithm", "grpo", "--samples_per_prompt", 4)
    without_kl = ("--kl_coef", 0) if temperature == 1 else ()
    codes, text = warm.run([*line, "--temperature", temperature, "--max_steps", 2, *without_kl])
    assert codes == [0], text[-3000:]
    found = scalars(out, ())
    for name, exact in (("val/ratio", 1), ("val/ratio_var", 0), ("policy/approxkl_avg", 0)):
        assert [value for _, value in found[name]] == [exact] * 2
    assert all(value > 0 for _, value in found["train/grad_norm"])


@pytest.mark.slow
@pytest.mark.parametrize("stage, ranks", [(0, 1), (2, 2)])
def test_told_to_stop_within_a_rollout(
    model_dir, prompts, tmp_path, monkeypatch, tmp_path_factory, stage, ranks
):
    """Between two updates of the second rollout: it goes on with the very samples, bit for bit."""
    calls = tmp_path / "calls"
    monkeypatch.setenv("PPO_TEST_CALLS", str(calls))
    many = ("--algorithm", "ppo", "--epochs_per_rollout", 12, "--minibatches", 4)
    with Warm(tmp_path_factory.mktemp("cache"), SCRIPT) as warm:

        def line(name):
            return flags(model_dir, prompts, tmp_path / name, *many, "--max_steps", 2, stage=stage)

        codes, text = warm.run(line("straight"), ranks)
        assert codes == [0] * ranks, text[-3000:]
        calls.unlink()
        job = warm.start(line("stopped"), ranks)
        held_out = record(tmp_path / "straight")["evaluations"]["0"]["pairs"]
        until(
            lambda: calls.exists() and len(calls.read_text().splitlines()) >= held_out + 8,
            "second rollout",
        )
        time.sleep(0.3)  # into its updates
        job.kill(signal.SIGUSR1)
        codes, text = job.wait()
        assert codes == [85] * ranks, text[-3000:]
        [name] = [path.name for path in (tmp_path / "stopped/checkpoints").glob("step-*")]
        assert re.fullmatch(r"step-1-\d+", name), name
        codes, text = warm.run(line("stopped"), ranks)
        assert codes == [0] * ranks and "updates of the next" in text, text[-3000:]
    same_bits(weights(tmp_path / "stopped"), weights(tmp_path / "straight"))
    mine, theirs = (scalars(tmp_path / name, ()) for name in ("stopped", "straight"))
    assert mine == theirs
    both = [record(tmp_path / name) for name in ("stopped", "straight")]
    assert both[0]["evaluations"] == both[1]["evaluations"]
    assert both[0]["answers"] == both[1]["answers"]


@pytest.mark.slow
@pytest.mark.parametrize(("extra", "updates"), [((), 2), (("--target_kl", "1e-6"), 1)])
def test_told_to_stop_within_the_first_rollout(warm, model_dir, prompts, tmp_path, extra, updates):
    """What was shown of it, and before it, stays in TensorBoard; where its last update was done, since
    the policy had moved far enough, the run that goes on shows its norms and rates.
    """

    def shown(name):
        found = scalars(tmp_path / name, ())
        events = EventAccumulator(str(tmp_path / name / "tensorboard"), {"histograms": 0}).Reload()
        histograms = {
            tag: [(each.step, each.histogram_value) for each in events.Histograms(tag)]
            for tag in events.Tags()["histograms"]
            if not (extra and tag.endswith("ratios"))  # of an update that is computed again
        }
        return found, histograms

    def line(name):
        return flags(model_dir, prompts, tmp_path / name, *PPO, "--max_steps", 2, *extra)

    codes, text = warm.run(line("straight"))
    assert codes == [0], text[-3000:]
    told = (signal.SIGUSR1, [["train.methods.ppo:Collector.update", updates]])
    codes, text = warm.run(line("stopped"), signal_after=told)
    assert codes == [85] and (tmp_path / f"stopped/checkpoints/step-0-{updates}").exists(), text[
        -3000:
    ]
    codes, text = warm.run(line("stopped"))
    assert codes == [0] and "continues after step 0 and" in text, text[-3000:]
    assert "may show some steps twice" not in text
    mine, theirs = shown("stopped"), shown("straight")
    assert mine == theirs and [step for step, _ in mine[0]["eval/reward"]] == [0, 2]
    assert [step for step, _ in mine[0]["train/value_grad_norm"]] == [1, 2]
    same_bits(weights(tmp_path / "stopped"), weights(tmp_path / "straight"))


def test_rewards_of_several_kinds(warm, model_dir, prompts, tmp_path):
    """TRL's signature with columns, one that does not always apply, built-in ones, weights; on two ranks,
    each of which has all answers to its prompts.
    """
    out = tmp_path / "out"
    line = flags(model_dir, prompts, out, "--algorithm", "rloo", "--max_steps", 1)
    place = line.index(VOWELS)
    module = "tests.launch.ppo_rewards"
    line[place : place + 1] = [
        *(f"{module}:as_trl_calls_it", f"{module}:sometimes_nothing"),
        *(f"{module}:of_the_group", "number:answer", "length:3-5", "ended"),
        *("--reward_weights", "0.1", "1", "0", "2", "3", "4"),
    ]
    codes, text = warm.run(line, 2)
    assert codes == [0, 0], text[-3000:]
    found = scalars(out, ())
    assert found["rewards/of_the_group/mean"] == [(1, 4)] and "rewards/of_the_group/std" in found
    for name in ("as_trl_calls_it", "number:answer", "length:3-5", "ended"):
        assert f"rewards/{name}/mean" in found
    assert record(out)["rewards"][-1] == "ended"


def test_a_reward_that_applies_to_some_answers_alone(warm, model_dir, prompts, tmp_path):
    """The others teach nothing, and stand in no mean."""
    out = tmp_path / "out"
    line = flags(model_dir, prompts, out, *PPO, "--max_steps", 1)
    line[line.index(VOWELS)] = "tests.launch.ppo_rewards:of_even_length"
    codes, text = warm.run(line, 2)
    assert codes == [0, 0], text[-3000:]
    found = scalars(out, ())
    assert found["rewards/of_even_length/mean"][0][1] == found["objective/scores"][0][1] == 1


@pytest.fixture(scope="module")
def reward_dir(model_dir, tmp_path_factory):
    """A reward model of the policy's vocabulary, with scores of mean 0.5 and deviation 2."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    lm = transformers.AutoModelForSequenceClassification.from_pretrained(
        model_dir, num_labels=1, pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>")
    )
    torch.manual_seed(0)
    torch.nn.init.normal_(lm.score.weight)
    lm.config.score_mean, lm.config.score_std = 0.5, 2.0
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_reward_model(reward_dir, line):
    at = line.index("--reward")
    return [*line[:at], "--reward_model", reward_dir, *line[at + 2 :]]


def test_a_reward_model(warm, model_dir, reward_dir, prompts, tmp_path):
    """A directory for sequence classification: its scores are the reward, in its own deviations, and
    the value model begins as it.
    """
    out = tmp_path / "out"
    line = flags(model_dir, prompts, out, "--algorithm", "ppo", "--max_steps", 1, "--value_lr", 0)
    codes, text = warm.run(with_reward_model(reward_dir, line))
    assert codes == [0], text[-3000:]
    assert "scores are taken less 0.5000 and over 2.0000" in text
    critic, _ = load_score_model(out / "value_model")
    lm, _ = load_score_model(reward_dir)
    assert torch.allclose(critic.score.weight, lm.score.weight / 2, atol=1e-7)
    assert (critic.config.score_mean, critic.config.score_std) == (0.25, 1.0)


@pytest.mark.slow
def test_a_reward_model_that_is_no_value_model(warm, model_dir, prompts, tmp_path):
    """An encoder of the policy's tokens judges, and values begin at 0; while they warm up alone, torch's
    complaint about the policy's schedule is nobody's business.
    """
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = transformers.BertConfig(vocab_size=1024, num_labels=1, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "bert")
    out = tmp_path / "out"
    line = flags(model_dir, prompts, out, "--algorithm", "ppo", "--max_steps", 2)
    line = with_reward_model(tmp_path / "bert", [*line, "--value_warmup", 1, "--value_lr", 0])
    codes, text = warm.run(line)
    assert codes == [0], text[-3000:]
    said = "the value model begins as the policy with a head of zeros: BertForSequence"
    assert said in text and "lr_scheduler" not in text
    critic, _ = load_score_model(out / "value_model")
    assert not critic.score.weight.any()
    assert all(value == 0 for _, value in scalars(out, ())["val/explained_variance"])


@pytest.mark.slow
def test_a_sharded_reward_model(warm, model_dir, reward_dir, prompts, tmp_path):
    """Its scores are those of a whole one; a rank without texts takes part in gathering."""
    frozen = ("--reward_ds_config", ROOT / "ds_configs/frozen_zero3.json")
    short = ("--algorithm", "rloo", "--max_steps", 1)

    def scores(name, *extra, stage, ranks):
        line = flags(model_dir, prompts, tmp_path / name, *short, *extra, stage=stage)
        codes, text = warm.run(with_reward_model(reward_dir, line), ranks)
        assert codes == [0] * ranks, text[-3000:]
        of_reward = record(tmp_path / name)["reward_deepspeed"].get("zero_optimization", {})
        found = scalars(tmp_path / name, ())
        return (
            of_reward.get("stage", 0),
            found["objective/scores"][0][1],
            found["eval/reward"][0][1],
        )

    whole = scores("whole", stage=0, ranks=1)
    sharded = scores("sharded", *frozen, stage=2, ranks=2)
    assert (whole[0], sharded[0]) == (0, 3)
    for mine, theirs in zip(sharded[1:], whole[1:], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    # beside a stage-3 policy by itself, its shards bf16 as the policy's
    default = scores("default", "--precision", "bf16", stage=3, ranks=2)
    unsharded = ("--reward_ds_config", ROOT / "ds_configs/zero0.json")
    near = scores("near", "--precision", "bf16", *unsharded, stage=3, ranks=2)
    assert default[0] == 3 and near[0] == 0
    assert default[1:] == pytest.approx(near[1:], abs=0.05)  # means of scores of about 4


@pytest.mark.slow
def test_decode_batch_is_found_and_kept(warm, model_dir, prompts, tmp_path):
    """From the free memory, and by a run that goes on from the checkpoint, as it was."""

    def decode_batch(name, *extra):
        rloo = ("--algorithm", "rloo", *extra)
        codes, text = warm.run(flags(model_dir, prompts, tmp_path / name, *rloo))
        assert codes == [0], text[-3000:]
        return record(tmp_path / name)["decode_batch"]

    assert decode_batch("first", "--max_steps", 1, "--save_every", 1) == memory.CPU_ANSWERS
    path = tmp_path / "first/checkpoints/step-1"
    manifest = checkpoint_files.read_manifest(path)
    manifest["decode_batch"] = 6  # as if there had been less memory
    manifest["sha256"] = checkpoint_files._digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert decode_batch("second", "--max_steps", 2, "--resume", path) == 6
    assert decode_batch("third", "--max_steps", 2, "--resume", path, "--decode_batch", 5) == 5


def without_split(line):
    at = line.index("--eval_split")
    return line[:at] + line[at + 2 :]


def test_bad_input_is_answered_in_one_line(model_dir, prompts, tmp_path):
    two_labels, other_words = tmp_path / "two", tmp_path / "other"
    make = transformers.AutoModelForSequenceClassification.from_pretrained
    for folder, labels in ((two_labels, 2), (other_words, 1)):
        make(model_dir, num_labels=labels, pad_token_id=0).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(two_labels)
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]  # two letters change places
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    for file in ("tokenizer_config.json", "chat_template.jinja"):
        (other_words / file).write_text((model_dir / file).read_text())
    (other_words / "tokenizer.json").write_text(json.dumps(tokenizer))
    short = tmp_path / "short"
    tiny.make_score_model(max_position_embeddings=128).save_pretrained(short)
    alone = tmp_path / "alone.jsonl"
    alone.write_text('{"prompt": "Hi there"}\n')
    good = flags(model_dir, prompts, tmp_path / "out")
    sharded = with_reward_model(two_labels, good)

    def changed(flag, *values):
        line = list(good)
        at = line.index(flag) if flag in line else len(line)
        end = at + 2 if flag in line else at
        line[at:end] = [flag, *values] if values else []
        return line

    module = "tests.launch.ppo_rewards"
    ppo = [*good, "--algorithm", "ppo"]
    cases = [
        (changed("--reward"), 2, "--reward or --reward_model: something has to say"),
        (changed("--reward", "no.such:thing"), 2, "cannot be imported: ModuleNotFoundError"),
        (changed("--reward", f"{module}:nothing"), 2, "cannot be imported: AttributeError"),
        (changed("--reward", f"{module}:takes_too_much"), 2, "takes question: expected any of"),
        (
            changed("--reward", f"{module}:of_solutions"),
            2,
            "takes solution, and the data has no such",
        ),
        (
            [*without_split(changed("--reward", "exact:answer")), "--eval_data", alone],
            2,
            "--reward exact:answer: --eval_data has no column 'answer'; found prompt",
        ),
        (changed("--reward", "ended", "ended"), 2, "--reward names ended 2 times: name it once"),
        (changed("--reward", "exact:solution"), 2, "the data has no column 'solution'; found"),
        (changed("--reward", "regex:("), 2, "--reward regex:(: "),
        (changed("--samples_per_prompt", 1), 2, "compares samples of a prompt"),
        ([*good, "--algorithm", "dapo", "--kl_coef", 0.1], 2, "--kl_coef changes nothing with"),
        ([*good, "--value_lr", 0.1], 2, "--value_lr changes nothing with"),
        ([*good, "--algorithm", "cispo", "--clip_low", 0.1], 2, "--clip_low changes nothing"),
        ([*good, "--algorithm", "sapo", "--clip_low", 0], 2, "the gate's temperatures"),
        (changed("--max_new_tokens", 200), 2, "has no room for a prompt of 96"),
        (changed("--reward_model", model_dir), 2, "is no reward model: it has no score.weight"),
        ([*good, "--reward_weights", "1", "2"], 2, "--reward_weights: 2 for 1 source:"),
        (changed("--reward_model", two_labels), 2, "has 2 outputs"),
        ([*ppo, "--value_model", two_labels], 2, "has 2 outputs"),
        ([*ppo, "--value_model", other_words], 2, "--value_model"),
        ([*good, "--max_new_tokens", 1000, "--max_length", 1200], 2, "positions"),
        ([*good, "--offload_frozen", "--kl_coef", 0], 2, "there is no frozen model"),
        (
            [*sharded, "--reward_ds_config", ROOT / "ds_configs/zero2.json"],
            2,
            "stages 1 and 2 shard gradients, which a reward model has not",
        ),
        (
            [
                *sharded,
                *("--offload_frozen", "--reward_ds_config", ROOT / "ds_configs/frozen_zero3.json"),
            ],
            2,
            "offload_param in its --reward_ds_config",
        ),
        ([*good, "--target_kl", -1], 2, "--target_kl is at least 0"),
        (
            [*ppo, "--value_model", short],
            2,
            f"--value_model {short}'s 128 positions",
        ),
        ([*ppo, "--dual_clip", 1], 2, "--dual_clip is above 1, not 1.0"),
        ([*good, "--reward_weights", ".inf"], 2, "--reward_weights are finite numbers, not inf"),
        (changed("--reward", "overlong:13"), 2, "the buffer is more than --max_new_tokens 12"),
    ]
    results = several(SCRIPT, [line for line, _, _ in cases], tmp_path / "cache")
    for (_, code, text), (found, _, said) in zip(cases, results, strict=True):
        assert (int(found), text in said) == (code, True), (text, found, said[-600:])
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("function", "said"),
    [("broken", "RuntimeError: no such answer"), ("words", "gave 'good' for row ")],
)
def test_a_reward_that_fails_ends_the_run(warm, model_dir, prompts, tmp_path, function, said):
    line = flags(model_dir, prompts, tmp_path / "out")
    line[line.index(VOWELS)] = f"tests.launch.ppo_rewards:{function}"
    codes, text = warm.run(line, 2)
    assert codes == [4, 4], text[-3000:]
    assert said in text and "prompt '" in text and "answer '" in text
    assert (tmp_path / "out/status").read_text() == "failed\n"


@pytest.mark.slow
def test_a_policy_that_is_lost_beside_a_value_model(
    warm, model_dir, prompts, tmp_path, monkeypatch
):
    """Its gradients are not finite while the value model's are: those do not count for it."""
    monkeypatch.setenv("PPO_TEST_POLICY_IS_LOST", "1")
    with Warm(warm.cache, SCRIPT) as lost:
        line = flags(model_dir, prompts, tmp_path / "out", *PPO, "--max_skipped", 3)
        codes, text = lost.run(line)
    assert codes == [5], text[-3000:]
    assert "4 steps in a row had gradients that are not finite" in text


@pytest.mark.slow
def test_rollouts_that_tensorboard_shows(warm, model_dir, prompts, tmp_path):
    """Every second one and the last; deviations are of one kind; no reward for any answer is said."""
    out = tmp_path / "out"
    line = flags(model_dir, prompts, out, "--algorithm", "rloo", "--log_every", 2)
    codes, text = warm.run(line)
    assert codes == [0] and "no reward applies" not in text, text[-3000:]
    found = scalars(out, ())
    for name in ("objective/scores", "loss/policy_avg", "train/epoch", "train/grad_norm"):
        assert [step for step, _ in found[name]] == [2, 3], name
    assert found["rewards/vowels/std"] == found["reward_std"]
    events = EventAccumulator(str(out / "tensorboard"), {"histograms": 0}).Reload()
    for name in ("rewards", "ratios"):
        assert [each.step for each in events.Histograms(f"train/histogram/{name}")] == [2, 3]
    line = flags(model_dir, prompts, tmp_path / "none", *PPO, "--max_steps", 1)
    line[line.index(VOWELS)] = "tests.launch.ppo_rewards:never"
    codes, text = warm.run(line)
    assert codes == [0] and "RuntimeWarning" not in text, text[-3000:]
    assert "warning: rollout 1: no reward applies to any answer: for all of them None came" in text


@pytest.mark.slow
def test_the_user_s_command(model_dir, prompts, tmp_path):
    """deepspeed, two ranks, ZeRO 3."""
    command = ["deepspeed", "--num_accelerators", 2, "--master_port", free_port(), SCRIPT]
    done = launched(
        [*command, *flags(model_dir, prompts, tmp_path / "out", *PPO, stage=3)], tmp_path / "cache"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/model/model.safetensors").exists()
