"""Runs of launch/train_ppo.py that kill themselves at an exact point, against one left alone: what the
same command makes of them is the same, bit for bit.
"""

import re
import signal

import pytest
from safetensors import safe_open

from tests.launch.compare import moments, same_bits, scalars, weights
from tests.launch.test_train_ppo import PPO, SCRIPT, flags, record
from tests.launch.warm import Warm

GENERATED = "train.models.generate:draw"
FOLLOWED = "train.methods.rollout:Sampler.follow"
STEPPED = "train.engine.trained:TrainedModel.step"
UPDATED = "train.run.loop:RolloutStep.updated"
WRITTEN = "train.run.checkpoint_files:write_tensors"
LISTED = "train.run.checkpoint_files:write_json"
COMMITTED = "train.run.checkpoint_files:commit"

# After which calls a rank kills itself. There are four updates to a rollout, of both models, and all
# these are in the second rollout or the save behind it. The weights were taken over for the held-out
# prompts first.
POINTS = {
    "inside generation": [(FOLLOWED, 3), (GENERATED, 5)],
    "between two updates": [(UPDATED, 6)],
    "between policy and critic": [(STEPPED, 13)],
    "behind the last update": [(UPDATED, 8)],
    "inside a save": [(WRITTEN, 2)],
    "before a save has its name": [(LISTED, 2)],
    "behind the save": [(COMMITTED, 2)],
}
# stage and ranks; the first takes seconds
COMBINATIONS = [pytest.param(0, 1, marks=pytest.mark.slow), (2, 2), (3, 2)]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Ranks of launch/train_ppo.py without their imports."""
    with Warm(tmp_path_factory.mktemp("cache"), SCRIPT) as process:
        yield process


@pytest.fixture(scope="module")
def command(model_dir, prompts):
    """What makes a command line. Every rank decodes: two answers at once."""

    def line(out, stage):
        often = ("--save_every", 1, "--decode_batch", 2)
        return flags(model_dir, prompts, out, *PPO, *often, stage=stage)

    return line


@pytest.fixture(scope="module")
def straight(warm, command, tmp_path_factory):
    """The folder of a run left alone, by stage and ranks."""
    made = {}

    def of(stage, ranks):
        if (stage, ranks) not in made:
            out = tmp_path_factory.mktemp("straight") / "out"
            codes, text = warm.run(command(out, stage), ranks)
            assert codes == [0] * ranks, text[-3000:]
            made[stage, ranks] = out
        return made[stage, ranks]

    return of


def killed(warm, line, ranks, calls):
    """Run into the kill; a rank that another's death meets first ends by that."""
    codes, text = warm.run(line, ranks, signal_after=(signal.SIGKILL, calls))
    assert -signal.SIGKILL in codes and not {0, 85} & set(codes), (codes, text[-3000:])


def same_run(out, other):
    """Both models, both optimisers, every scalar, evaluations and answers."""
    same_bits(weights(out), weights(other))
    critics = []
    for folder in (out, other):
        with safe_open(folder / "value_model/model.safetensors", "pt") as file:
            critics.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    same_bits(*critics)
    mine, theirs = moments(out, step=3), moments(other, step=3)
    same_bits(mine, theirs)
    assert {name.partition("/")[0] for name in mine} == {"policy", "value"}
    assert scalars(out, ("objective/scores", "loss/value_avg")) == scalars(other, ())
    one, two = record(out), record(other)
    for name in ("evaluations", "answers", "results"):
        assert one[name] == two[name], name


def continued(warm, command, straight, out, stage, ranks, point):
    """Killed there, and run to its end."""
    other = straight(stage, ranks)
    line = command(out, stage)
    killed(warm, line, ranks, POINTS[point])
    codes, text = warm.run(line, ranks)
    assert codes == [0] * ranks, text[-3000:]
    [place] = re.findall(r"continues after (.+) from", text)
    assert place == f"step {1 + (point == 'behind the save')}"
    same_run(out, other)


@pytest.mark.slow
def test_killed_between_the_two_models_steps(warm, command, straight, tmp_path):
    continued(warm, command, straight, tmp_path / "out", 2, 2, "between policy and critic")


@pytest.mark.matrix
@pytest.mark.parametrize("stage, ranks", COMBINATIONS)
@pytest.mark.parametrize("point", POINTS)
def test_killed_at(warm, command, straight, tmp_path, stage, ranks, point):
    continued(warm, command, straight, tmp_path / "out", stage, ranks, point)


@pytest.mark.matrix
@pytest.mark.parametrize("stage, ranks", COMBINATIONS)
def test_killed_in_a_rollout_that_a_checkpoint_has_kept(
    warm, command, straight, tmp_path, stage, ranks
):
    """Told to stop behind the second rollout's first update; killed between the two steps of what is
    its second, then inside the third's generation.
    """
    other, out = straight(stage, ranks), tmp_path / "out"
    line = command(out, stage)
    codes, text = warm.run(line, ranks, signal_after=(signal.SIGUSR1, [(UPDATED, 5)]))
    assert codes == [85] * ranks, text[-3000:]
    assert [path.name for path in (out / "checkpoints").glob("step-1-*")] == ["step-1-1"]
    killed(warm, line, ranks, [(STEPPED, 1)])
    # its updates need no weights for sampling: the third rollout is the first that takes them over
    killed(warm, line, ranks, [(FOLLOWED, 1), (GENERATED, 5)])
    codes, text = warm.run(line, ranks)
    assert codes == [0] * ranks and "continues after step 2" in text, text[-3000:]
    same_run(out, other)
