"""Which updates a rollout of launch/train_ppo.py is used for: early stop, groups without a gradient,
rates; and adapters at ZeRO stage 3.
"""

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.launch.compare import same_bits, scalars, weights
from tests.launch.test_train_ppo import SCRIPT, VOWELS, flags, record
from tests.launch.warm import Warm


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Ranks of launch/train_ppo.py without their imports."""
    with Warm(tmp_path_factory.mktemp("cache"), SCRIPT) as process:
        yield process


def trained(warm, line, ranks=1):
    codes, text = warm.run(line, ranks)
    assert codes == [0] * ranks, text[-3000:]
    return text


def mean_gap(one, two):
    """The largest mean difference of a weight."""
    return max(float((one[name] - two[name]).abs().mean()) for name in two)


STOPPING = ("--algorithm", "ppo", "--minibatches", 2, "--target_kl", 1e-9)


@pytest.fixture(scope="module")
def stopped(warm, model_dir, prompts, tmp_path_factory):
    """One rank, ZeRO 0: the second update of each rollout meets a policy that has moved."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    text = trained(warm, flags(model_dir, prompts, out, *STOPPING, "--epochs_per_rollout", 3))
    return out, text


@pytest.mark.slow
def test_updates_end_where_the_policy_has_moved_too_far(
    warm, stopped, model_dir, prompts, tmp_path
):
    """A dropped update leaves no trace: one epoch ends where three do."""
    out, text = stopped
    assert "over 1.5 times --target_kl 1e-09" in text
    found = scalars(out, ())
    assert [value for _, value in found["policy/stopped_at_update"]] == [1, 1, 1]
    # the schedule counts rollouts, whatever becomes of their updates
    rates = [value for _, value in found["train/learning_rate"]]
    assert rates == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3], rel=1e-6)
    assert record(out)["skipped_steps"] == 0
    trained(warm, flags(model_dir, prompts, tmp_path / "one", *STOPPING, "--epochs_per_rollout", 1))
    same_bits(weights(tmp_path / "one"), weights(out))
    never = ("--target_kl", 10)
    trained(warm, flags(model_dir, prompts, tmp_path / "all", *STOPPING[:-2], *never))
    assert "policy/stopped_at_update" not in scalars(tmp_path / "all", ())
    assert mean_gap(weights(tmp_path / "all"), weights(out)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_and_stages_end_at_the_same_update(
    warm, stopped, model_dir, prompts, tmp_path, stage
):
    line = flags(model_dir, prompts, tmp_path / "out", *STOPPING, stage=stage)
    text = trained(warm, [*line, "--epochs_per_rollout", 3], 2)
    assert "the gradient is not finite" not in text
    found = scalars(tmp_path / "out", ())
    assert [value for _, value in found["policy/stopped_at_update"]] == [1, 1, 1]
    assert record(tmp_path / "out")["skipped_steps"] == 0
    assert [value for _, value in found["health/skipped_steps"]] == [0, 0, 0]
    assert mean_gap(weights(tmp_path / "out"), weights(stopped[0])) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dr_grpo", "gspo"])
def test_groups_without_a_gradient_cost_no_training_and_change_nothing(
    warm, model_dir, prompts, tmp_path, tmp_path_factory, monkeypatch, algorithm
):
    """Against a run that trains on all groups: the same denominators, the same gradients."""
    some = "tests.launch.ppo_rewards:vowels_of_some"
    flat = ("--reward", some, "--algorithm", algorithm, "--samples_per_prompt", 4)
    line = flags(model_dir, prompts, tmp_path / "skipped", *flat)
    at = line.index(VOWELS)
    del line[at - 1 : at + 1]
    trained(warm, [*line, "--minibatches", 2])
    monkeypatch.setenv("PPO_TEST_NO_GROUP_IS_IDLE", "1")
    with Warm(tmp_path_factory.mktemp("cache"), SCRIPT) as other:
        line[line.index("--output") + 1] = tmp_path / "all"
        trained(other, [*line, "--minibatches", 2])
    mine, theirs = (scalars(tmp_path / name, ()) for name in ("skipped", "all"))
    assert max(value for _, value in mine["frac_reward_zero_std"]) > 0
    for name in ("train/grad_norm", "loss/policy_avg"):
        assert np.allclose(
            [value for _, value in mine[name]],
            [value for _, value in theirs[name]],
            rtol=1e-4,
            atol=1e-7,
        ), name
    assert mean_gap(weights(tmp_path / "skipped"), weights(tmp_path / "all")) < 2e-5


@pytest.mark.slow
def test_a_rollout_whose_answers_are_all_worth_the_same(warm, model_dir, prompts, tmp_path):
    """It teaches nothing, and is said to."""
    line = flags(model_dir, prompts, tmp_path / "out", "--algorithm", "dapo")
    line[line.index(VOWELS)] = "tests.launch.ppo_rewards:same"
    text = trained(warm, [*line, "--max_steps", 1, "--samples_per_prompt", 2], 2)
    assert "all samples of 100% of the prompts have the same reward" in text
    found = scalars(tmp_path / "out", ())
    assert found["train/grad_norm"][0][1] == 0
    same_bits(weights(tmp_path / "out"), load_file(model_dir / "model.safetensors"))


@pytest.mark.slow
def test_adapters_at_stage_3_are_decoded_with(warm, model_dir, prompts, tmp_path):
    """Stage 3 decodes with a copy, stage 0 with the policy itself: the same answers, then the same
    policy within rounding.
    """
    lora = ("--algorithm", "grpo", "--samples_per_prompt", 4, "--lora_rank", 4, "--lr", "1e-2")
    for stage in (0, 3):
        line = flags(model_dir, prompts, tmp_path / f"{stage}", *lora, stage=stage)
        del line[line.index("--lr") : line.index("--lr") + 2]  # the first of two
        trained(warm, line, 1 + (stage == 3))
    mine, theirs = (record(tmp_path / name) for name in ("0", "3"))
    assert mine["answers"]["before"] == theirs["answers"]["before"]
    found = [scalars(tmp_path / name, ())["objective/scores"] for name in ("0", "3")]
    assert found[0][0] == found[1][0]
    gap = mean_gap(weights(tmp_path / "0"), weights(tmp_path / "3"))
    assert gap < 2e-5
    start = load_file(model_dir / "model.safetensors")
    assert mean_gap(weights(tmp_path / "0"), start) > 10 * gap  # it did move


@pytest.mark.slow
def test_prompts_over_the_budget_and_a_reward_that_prints(warm, model_dir, prompts, tmp_path):
    """A group of more tokens than --micro_tokens has a batch of its own; frozen models may rest in
    main memory.
    """
    line = flags(model_dir, prompts, tmp_path / "out", "--algorithm", "rloo", "--offload_frozen")
    line[line.index(VOWELS)] = "tests.launch.ppo_rewards:slow_and_chatty"
    line[line.index("--micro_tokens") + 1] = 20
    text = trained(warm, [*line, "--max_steps", 1], 2)
    assert "looking at" in text
    assert scalars(tmp_path / "out", ())["train/grad_norm"][0][1] > 0


@pytest.mark.slow
def test_a_reward_that_one_rank_cannot_import(
    model_dir, prompts, tmp_path, tmp_path_factory, monkeypatch
):
    monkeypatch.setenv("PPO_TEST_ONE_RANK_FAILS", "1")
    with Warm(tmp_path_factory.mktemp("cache"), SCRIPT) as warm:
        codes, text = warm.run(flags(model_dir, prompts, tmp_path / "out"), 2)
    assert codes == [2, 2] and "cannot be imported: ImportError: not on this rank" in text


@pytest.mark.slow
def test_a_value_model_that_a_run_left_goes_on(warm, stopped, model_dir, prompts, tmp_path):
    given = stopped[0] / "value_model"
    ppo = ("--algorithm", "ppo", "--max_steps", 1, "--value_model", given, "--value_lr", 0)
    trained(warm, flags(model_dir, prompts, tmp_path / "out", *ppo))
    mine, theirs = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out/value_model", given)
    )
    same_bits(mine, theirs)
    assert mine["score.weight"].abs().sum() > 0
