"""Where weights go as they are read."""

import pytest
import torch

from train.engine import loading
from train.models.pretrained import load_causal_lm


def test_a_gpu_s_weights_never_lie_in_main_memory_as_a_whole(model_dir):
    """With "meta" for the GPU, on which they take no memory."""
    lm = load_causal_lm(model_dir, torch.bfloat16, device=torch.device("meta"))
    assert {p.device.type for p in lm.parameters()} == {"meta"}
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}


def test_the_same_weights_come_either_way(model_dir):
    whole = load_causal_lm(model_dir).state_dict()
    one_by_one = load_causal_lm(model_dir, device=torch.device("cpu")).state_dict()
    assert whole.keys() == one_by_one.keys()
    assert all(torch.equal(whole[name], one_by_one[name]) for name in whole)


@pytest.mark.parametrize("stage", range(4))
def test_weights_go_straight_to_a_gpu_but_for_shards(stage):
    config = {"zero_optimization": {"stage": stage}}
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert loading._straight_to(gpu, config) == (gpu if stage < 3 else None)
    assert loading._straight_to(cpu, config) is None
