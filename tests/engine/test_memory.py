"""The default size of a batch, and what is said when a batch was too large."""

from types import SimpleNamespace

import pytest
import tiny
import torch

from train.data.packing import Group, pack
from train.engine import checks, memory
from train.models import cache
from train.models.backbone import Backbone


def test_default_batches_shrink_with_memory_and_stay_large_enough(monkeypatch):
    backbone = Backbone(tiny.make_model())
    cpu = torch.device("cpu")

    def batch_tokens(free, max_length=1024, checkpointing=False):
        monkeypatch.setattr(memory, "free", lambda device: free)
        return memory.default_batch_tokens(backbone, cpu, 0, checkpointing, max_length)

    assert batch_tokens(64 << 30) == memory.CPU_TOKENS
    # 2 layers of (8 x 64 + 4 x 96) floats a token: 7,168 bytes; half of the free memory less two
    # chunks of logits, where gradients and moments have taken their 12 bytes a parameter
    num_parameters = sum(p.numel() for p in backbone.parameters())
    enough = 2 * (2 * memory.LOGITS_BYTES + 7168 * 300) + 12 * num_parameters
    assert batch_tokens(enough, max_length=100) == 300
    assert batch_tokens(0, max_length=100) == 100
    assert batch_tokens(enough, max_length=100, checkpointing=True) > 300


def test_as_many_answers_at_once_as_memory_holds(monkeypatch):
    backbone = Backbone(tiny.make_model())
    config = backbone.lm.config
    cpu, many = torch.device("cpu"), cache.ROOM + 2  # it has just grown

    def decode_batch(free, tokens=many):
        monkeypatch.setattr(memory, "free", lambda device: free)
        return memory.default_decode_batch(backbone, cpu, 0, tokens)

    assert decode_batch(64 << 30) == memory.CPU_ANSWERS and decode_batch(0) == 1
    # what a cache really takes of an answer, after its memory has grown
    cached = cache.make_cache(backbone.lm)
    heads, size = config.num_key_value_heads, config.head_dim
    for layer in range(config.num_hidden_layers):
        for _ in range(many):
            cached.update(*torch.zeros(2, 1, heads, 1, size), layer)
    held = sum(x.nbytes for layer in cached.layers for x in layer._memory)
    num_parameters = sum(p.numel() for p in backbone.parameters())
    an_answer = held + 24 * config.vocab_size
    free = 12 * num_parameters + 2 * 30 * an_answer
    assert decode_batch(free) == 30
    assert decode_batch(free, 2 * many) < decode_batch(free)


def room_for_batch(batch, batch_tokens):
    return memory.room_for(*memory.describe_batch(batch, batch_tokens))


def test_out_of_memory_names_the_batch_and_a_smaller_budget(capsys):
    batch = pack([Group(tuple(range(500)), ((1,) * 500, (2,) * 500))])
    with pytest.raises(SystemExit) as ended, room_for_batch(batch, 2048):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "a batch of 1,500 tokens (--micro_tokens is 2,048): try --micro_tokens 768" in said
    assert "Traceback" not in said


def test_the_check_at_the_start_has_advice_too(capsys):
    def full(batch):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"
        )

    full.module = SimpleNamespace(compared_with=({},))  # what a TrainedModel has
    data = [Group((1, 2), ((3, 4), (5,)))]
    data = type("Data", (list,), {"group": list.__getitem__})(data)
    with pytest.raises(SystemExit):
        checks.check_start(full, None, data, torch.device("cpu"), "fp32", True)
    said = capsys.readouterr().err
    assert "out of memory in the check at the start (two groups of the data): lower" in said


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="shape"), room_for_batch(pack([]), 2048):
        raise RuntimeError("shape mismatch")
