"""A frozen model in main memory between uses, with other memory standing for the device's."""

import copy

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
