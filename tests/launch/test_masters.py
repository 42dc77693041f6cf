"""Under bf16 at ZeRO stages 1 to 3 the fp32 masters are the weights as their files have them: a run
at rate 0 gives them back, bit for bit.
"""

import json

import pytest
import safetensors.torch
import torch
import transformers

from tests.launch.warm import Warm
from train.models import heads, pretrained


def flags(model_dir, data, output, *more):
    line = ["--model", model_dir, "--data", data, "--output", output, "--max_length", 400]
    line += ["--max_steps", 1, "--batch_size", 4, "--lr", 0, "--precision", "bf16"]
    return [*line, "--export_dtype", "fp32", *more]


def weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def is_narrow(values):
    return torch.equal(values, values.bfloat16().float())


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_a_run_at_rate_0_gives_the_weights_back(warm, model_dir, few, tmp_path, config):
    before = weights(model_dir)
    matrices = [values for values in before.values() if values.ndim > 1]  # norms are ones
    assert not any(map(is_narrow, matrices))  # else the test could not fail
    out = tmp_path / "out"
    extra = ["--ds_config", f"ds_configs/{config}.json"]
    codes, text = warm.run(flags(model_dir, few, out, *extra), 2)
    assert codes == [0, 0], text[-3000:]
    after = weights(out / "model")
    assert after.keys() == before.keys()
    for name in before:
        assert after[name].dtype == torch.float32 and torch.equal(after[name], before[name]), name


@pytest.mark.slow
def test_a_head_that_is_drawn_has_all_its_digits(model_dir, few, tmp_path):
    before = weights(model_dir)
    with Warm(tmp_path / "cache", "launch/train_reward.py") as warm:
        extra = ["--ds_config", "ds_configs/zero2.json", "--seed", 5]
        codes, text = warm.run(flags(model_dir, few, tmp_path / "out", *extra), 1)
    assert codes == [0], text[-3000:]
    after = weights(tmp_path / "out/model")
    head = torch.empty_like(after["score.weight"])
    heads.draw_head(head, 5)
    assert torch.equal(after["score.weight"], head) and not is_narrow(head)
    body = [name for name in before if name in after]
    assert body and all(torch.equal(after[name], before[name]) for name in body)


def test_which_files_have_more_digits_than_bf16(model_dir, tmp_path):
    assert pretrained.is_wider(model_dir, torch.bfloat16)
    lm = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    lm.save_pretrained(tmp_path)
    assert not pretrained.is_wider(tmp_path, torch.bfloat16)
    # what lies in the files counts, and not what the configuration says
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    assert not pretrained.is_wider(tmp_path, torch.bfloat16)
    (tmp_path / "model.safetensors").unlink()
    assert pretrained.is_wider(tmp_path, torch.bfloat16)
