"""Whether the algorithms learn: a tiny random model and a reward of which everybody can say what is
attainable.

The reward is 1 for an answer whose first letter is a vowel, else 0; a policy gets 1 by shifting the
distribution of one token, and a random one about a quarter. What else an answer says is free: the
policy stays varied where nothing pulls at it.
"""

import pytest

from tests.launch.compare import scalars
from tests.launch.test_train_ppo import SCRIPT, flags, record
from tests.launch.warm import Warm
from train.losses.algorithms import ALGORITHMS

REWARDS = "tests.launch.ppo_rewards"
ROLLOUTS = 60  # of 6 prompts by 16 answers; 5 prompts in an epoch's last
ATTAINABLE = 1.0


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Ranks of launch/train_ppo.py without their imports."""
    with Warm(tmp_path_factory.mktemp("cache"), SCRIPT) as process:
        yield process


def learnt(warm, model_dir, prompts, out, algorithm, seed):
    """Train, and look at what the last rollouts' answers were rewarded."""
    line = flags(model_dir, prompts, out, "--algorithm", algorithm, "--seed", seed)
    line += ["--batch_size", 6, "--samples_per_prompt", 16, "--max_new_tokens", 4]
    line += ["--max_steps", ROLLOUTS, "--epochs", 99, "--micro_tokens", 4000]
    line += ["--lr", "3e-3", "--lr_scheduler", "constant"]
    sources, weights = [f"{REWARDS}:begins_with_a_vowel"], [10]  # well above the KL's part
    if algorithm == "ppo":
        sources.append(f"{REWARDS}:of_the_prompt")
        weights.append(10)
        line += ["--value_lam", 1, "--value_lr", "3e-3"]
    at = line.index("--reward")
    line[at : at + 2] = ["--reward", *sources, "--reward_weights", *weights]
    codes, text = warm.run(line)
    assert codes == [0], text[-3000:]
    found = scalars(out, ())
    reward = [value for _, value in found["rewards/begins_with_a_vowel/mean"]]
    assert reward[0] < 0.5 and sum(reward[-5:]) / 5 > 0.9 * ATTAINABLE, reward
    assert [value for _, value in found["episode"][:4]] == [96, 192, 272, 368]
    assert record(out)["evaluations"][str(ROLLOUTS)]["pairs"] == 24 - 17
    if algorithm == "ppo":
        predicts(found)


def predicts(found):
    """PPO's value model has learnt what its prompts are worth.

    A second reward, 0, 1 or 2, is a column of the prompt's row that no text shows: it is predicted by
    knowing the prompt, of which the value model has read 17 twenty times, and no policy can change it.
    What makes the number honest: with --value_lam 1 a return is the sum of rewards as they came, and
    holds no value of the model's own; the answers that it is measured on are new, drawn and scored
    before the value model learns from them; answers differ, as the entropy says, so no state behind
    the prompt is one that it has seen. A constant would have 0.
    """
    explained = [value for _, value in found["val/explained_variance"]]
    assert explained[0] < 0.1 and sum(explained[-5:]) / 5 > 0.5, explained
    assert found["policy/entropy_avg"][-1][1] > 1


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "reinforce++", "grpo"])
def test_one_of_each_kind_learns(warm, model_dir, prompts, tmp_path, algorithm):
    """Over a value model, of rewards to come, and over groups."""
    learnt(warm, model_dir, prompts, tmp_path / "out", algorithm, seed=0)


@pytest.mark.matrix
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_learns(warm, model_dir, prompts, tmp_path, algorithm, seed):
    learnt(warm, model_dir, prompts, tmp_path / "out", algorithm, seed)
