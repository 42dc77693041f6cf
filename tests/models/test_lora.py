"""What is drawn at random of adapters: the same for the same seed, and nothing else is touched;
what an adapter's file says.
"""

import json

import pytest
import tiny
import torch

from tests.models.test_backbone import groups
from train.data.packing import pack
from train.engine import sharded_state
from train.models import lora
from train.models.backbone import Backbone
from train.models.flops import FlopCounter
from train.run import export

pytest.importorskip("peft")


def adapters(seed):
    lm = tiny.make_model("llama")
    state = torch.get_rng_state()
    lora.add(lm, rank=4, alpha=8.0, targets=None, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    return {name: p.detach() for name, p in lm.named_parameters() if p.requires_grad}


def test_a_seed_makes_the_same_adapters():
    torch.manual_seed(5)
    first = adapters(seed=1)
    torch.manual_seed(6)  # what the generator holds beside does not matter
    again, other = adapters(seed=1), adapters(seed=2)
    assert first.keys() == again.keys() and len(first) > 10
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if "lora_A" in name]
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)
    assert all(not first[name].any() for name in first if "lora_B" in name)


def test_flops_of_a_backward_pass():
    """Two forward passes; of frozen weights no gradient is computed."""
    batch = pack(groups())
    lm = tiny.make_model("llama")
    counter = FlopCounter(Backbone(lm))
    forward, tokens = counter.forward(batch), len(batch.input_ids)
    assert counter.backward(batch) == 2 * forward
    matrices = [p for name, p in lm.named_parameters() if name.endswith("proj.weight")]
    frozen = sum(p.numel() for p in matrices)
    lora.add(lm, rank=4, alpha=8.0, targets=None)
    adapters = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    counter = FlopCounter(Backbone(lm))
    assert counter.forward(batch) == forward + 2 * tokens * adapters
    head = 2 * lm.lm_head.weight.numel() * len(batch.target)
    attention = forward - head - 2 * tokens * frozen
    of_weights = 2 * tokens * (frozen + 2 * adapters)
    assert counter.backward(batch) == of_weights + head + 2 * attention


@pytest.mark.parametrize("base, named", [("org/tiny", "org/tiny"), ("{}/models/tiny", None)])
def test_an_adapter_names_its_base_where_others_can_find_it(tmp_path, base, named):
    """A repository on the hub, for peft's AutoPeftModel and for servers; never a path of this machine."""
    lm = tiny.make_model()
    lm.name_or_path = base.format(tmp_path)
    lora.add(lm, rank=2, alpha=4, targets=None)
    export.write_weights(tmp_path / "model", lm, sharded_state.gather_state_dict(lm))
    config = json.loads((tmp_path / "model/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == named
    assert str(tmp_path) not in json.dumps(config)
