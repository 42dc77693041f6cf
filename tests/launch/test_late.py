"""What a step came to is read when the next one has been launched, as on CUDA, and what an update of a
rollout came to before the next: the run is the one that reads it at once, bit for bit, wherever it is
stopped.
"""

import json
import signal

import pytest

from tests.launch import test_ppo_killed, test_train_ppo
from tests.launch.compare import flags, moments, same_bits, same_run, scalars, straight
from tests.launch.warm import Warm

pytestmark = pytest.mark.slow
LATE = {"train.run.loop.READS_LATE": ["cpu", "cuda"]}
# nothing is saved before the last step, so that nothing settles a step early; an interval is two steps
QUIET = ["--save_every", 8, "--eval_every", 5, "--log_every", 2]


@pytest.fixture(scope="module")
def at_once(warm, model_dir, few, tmp_path_factory):
    """The folder of a run that reads at once."""
    out = tmp_path_factory.mktemp("runs") / "at_once"
    straight(warm, model_dir, few, out, 0, 1, *QUIET)
    return out


def test_the_same_run(warm, model_dir, few, at_once, tmp_path):
    line = flags(model_dir, few, tmp_path / "late", 0, *QUIET)
    codes, text = warm.run(line, patch=LATE)
    assert codes == [0], text[-3000:]
    same_run(tmp_path / "late", at_once)
    assert [step for step, _ in scalars(tmp_path / "late")["train/loss"]] == [2, 4, 6, 8]


# batches after which the run is told to stop; a step has two or three of them
@pytest.mark.parametrize("batches", [1, 3, 4, 5, 9, 14])
def test_told_to_stop_between_two_steps(warm, model_dir, few, at_once, tmp_path, batches):
    out = tmp_path / "told"
    line = flags(model_dir, few, out, 0, *QUIET)
    told = (signal.SIGUSR1, [("train.run.report:Report.add", batches)])
    codes, text = warm.run(line, patch=LATE, signal_after=told)
    assert codes == [85], text[-3000:]
    codes, text = warm.run(line, patch=LATE)
    assert codes == [0] and "Traceback" not in text, text[-3000:]
    same_run(out, at_once)


def test_gradients_that_are_not_finite(warm, model_dir, few, tmp_path):
    """The second step's and all that follow: the same words, and the state after the first is kept."""
    said = {}
    breaking = ("--lr", "1e30", "--warmup_ratio", 0, *QUIET)
    first = tmp_path / "first"
    # AdamW's moments are the same at any rate, and with this one the model can be written
    small = ("--lr", "1e-3", "--warmup_ratio", 0, *QUIET)
    straight(warm, model_dir, few, first, 0, 1, *small, "--max_steps", 1, "--save_every", 1)
    for name, patch in (("at_once", {}), ("late", LATE)):
        out = tmp_path / name
        line = flags(model_dir, few, out, 0, *breaking, "--max_skipped", 1)
        codes, text = warm.run(line, patch=patch)
        assert codes == [5] and "Traceback" not in text, text[-3000:]
        lines = [part for part in text.splitlines() if "finite" in part]
        said[name] = [part.replace(str(out), "OUT") for part in lines]
        kept = [path.name for path in (out / "checkpoints").glob("step-*")]
        manifest = json.loads((out / "checkpoints" / kept[0] / "manifest.json").read_text())
        policy = manifest["parts"]["policy"]
        assert kept == ["step-1"] and (policy["updates"], policy["skipped"]) == (1, 0)
        same_bits(of_adamw(moments(out, 1)), of_adamw(moments(first, 1)))
    same_bits(moments(tmp_path / "late", 1), moments(tmp_path / "at_once", 1))
    assert said["late"] == said["at_once"] and len(said["late"]) == 3


def of_adamw(tensors):
    """AdamW's moments alone."""
    return {name: each for name, each in tensors.items() if not name.endswith("/weight")}


@pytest.fixture(scope="module")
def warm_ppo(tmp_path_factory):
    """Ranks of launch/train_ppo.py without their imports."""
    with Warm(tmp_path_factory.mktemp("cache"), test_train_ppo.SCRIPT) as process:
        yield process


def rollouts_of(model_dir, prompts, out, *extra):
    """Three rollouts of four updates each, of a policy and a value model, an update of two batches."""
    often = ("--save_every", 3, "--decode_batch", 2, "--micro_tokens", 1, *test_train_ppo.PPO)
    return test_train_ppo.flags(model_dir, prompts, out, *often, *extra)


@pytest.fixture(scope="module")
def rollouts_at_once(warm_ppo, model_dir, prompts, tmp_path_factory):
    """The folder of a run of PPO that reads at once."""
    out = tmp_path_factory.mktemp("runs") / "at_once"
    codes, text = warm_ppo.run(rollouts_of(model_dir, prompts, out))
    assert codes == [0], text[-3000:]
    return out


# after which calls the run is told to stop: in the second rollout, an update of which ends in UPDATED
TOLD = {
    "never": None,
    "behind an update": [(test_ppo_killed.UPDATED, 6)],
    "between policy and value model": [(test_ppo_killed.STEPPED, 13)],
    "inside an update's batches": [(test_ppo_killed.UPDATED, 6), ("train.losses.policy:sums", 1)],
    "behind the last update": [(test_ppo_killed.UPDATED, 8)],
}


@pytest.mark.parametrize("point", TOLD)
def test_the_same_rollouts(warm_ppo, model_dir, prompts, rollouts_at_once, tmp_path, point):
    out, calls = tmp_path / "out", TOLD[point]
    line = rollouts_of(model_dir, prompts, out)
    if calls:
        codes, text = warm_ppo.run(line, patch=LATE, signal_after=(signal.SIGUSR1, calls))
        assert codes == [85], text[-3000:]
        [path] = (out / "checkpoints").glob("step-*")
        # of an update that was done when the signal came
        done = {"between policy and value model": "step-1-3", "behind the last update": "step-2"}
        assert path.name == done.get(point, "step-1-2")
    codes, text = warm_ppo.run(line, patch=LATE)
    assert codes == [0] and "Traceback" not in text, text[-3000:]
    test_ppo_killed.same_run(out, rollouts_at_once)


def test_updates_that_are_not_finite(warm_ppo, model_dir, prompts, tmp_path):
    """The same words, counters and bits of what is kept."""
    breaking = ("--lr", "1e30", "--warmup_ratio", 0, "--max_skipped", 1)
    said, kept = [], []
    for name, patch in (("at_once", {}), ("late", LATE)):
        out = tmp_path / name
        codes, text = warm_ppo.run(rollouts_of(model_dir, prompts, out, *breaking), patch=patch)
        assert codes == [5] and "Traceback" not in text, text[-3000:]
        said.append([part.replace(str(out), "") for part in text.splitlines() if "finite" in part])
        [path] = (out / "checkpoints").glob("step-*")
        parts = json.loads((path / "manifest.json").read_text())["parts"]
        kept.append((path.name, parts["policy"], parts["value"], parts["rollout"]))
    assert said[0] == said[1] and said[0] and kept[0] == kept[1]
