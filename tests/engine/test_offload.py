"""A frozen model in main memory between uses, with other memory standing for the device's."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from train.engine.offload import Offloaded


class Elsewhere(Offloaded):
    """Its device is memory of its own, in which a CPU can compute."""

    brought = 0

    def __init__(self, module):
        super().__init__(module, torch.device("meta"))

    def _brought(self, host):
        self.brought += 1
        return host.clone()


def tied_module():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 8, bias=False))
    module[2].weight = module[0].weight
    return module.eval()


def addresses(module):
    return [each.data_ptr() for each in (*module.parameters(), *module.buffers())]


def test_it_is_elsewhere_within_and_as_it_was_outside():
    module = tied_module()
    before, ids = copy.deepcopy(module.state_dict()), torch.tensor([1, 5])
    expected = module(ids)
    place = Elsewhere(module)
    at_rest = addresses(module)
    with place:
        within = addresses(module)
        assert not set(within) & set(at_rest)
        assert torch.equal(module(ids), expected)
        with place:  # again within itself
            pass
        assert addresses(module) == within
        assert module[2].weight is module[0].weight
    assert addresses(module) == at_rest
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert place.brought == len(at_rest)  # once each, a tied weight too


def test_an_error_within_leaves_it_in_main_memory():
    module = tied_module()
    place = Elsewhere(module)
    at_rest = addresses(module)
    with pytest.raises(KeyError), place:
        raise KeyError
    assert addresses(module) == at_rest


def test_where_main_memory_computes_nothing_moves():
    module = tied_module()
    at = addresses(module)
    with Offloaded(module, torch.device("cpu")):
        assert addresses(module) == at


STEP = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import tiny
from train.data.packing import Group, pack
from train.engine import dist, ds_config, loading
from train.engine.trained import TrainedModel
device = dist.init()
config = ds_config.read_config("ds_configs/zero3_offload.json")
config = ds_config.resolve(config, "bf16", 1.0)
module = loading.load_backbone(sys.argv[2], config, "bf16", 3, device)
model = TrainedModel(
    module, config, lr=1e-2, weight_decay=0.0, grad_clip=1.0, scheduler="constant",
    warmup_ratio=0.0, total_steps=2)
batch = pack([Group((1, 2, 3), ((4, 5), (6, 7, 8)))])
losses = []
for _ in range(2):
    loss = -model(batch).mean()
    losses.append(float(loss))
    model.backward(loss)
    assert model.step().applied
print(json.dumps([losses, model.adamw.defaults["fused"]]))
dist.shutdown()
"""


@pytest.mark.slow
def test_weights_that_deepspeed_offloads_are_stepped_by_the_fused_adamw(model_dir):
    """One pass over weights and moments in main memory, not ten."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", STEP, root, model_dir],
        cwd=root,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (before, after), fused = json.loads(done.stdout.splitlines()[-1])
    assert fused and after < before
