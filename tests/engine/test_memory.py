"""The default size of a batch, and what is said when a batch was too large."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import tiny
import torch

from train.data.packing import Group, pack
from train.engine import checks, footprint, memory
from train.models import cache
from train.models.backbone import Backbone
from train.models.heads import ScoreModel


def test_default_batches_shrink_with_memory_and_stay_large_enough(monkeypatch):
    backbone = Backbone(tiny.make_model())

    def batch_tokens(free, max_length=1024, checkpointing=False, device="cuda"):
        monkeypatch.setattr(memory, "free", lambda device: free)
        return memory.default_batch_tokens(
            backbone, torch.device(device), 0, checkpointing, max_length
        )

    assert batch_tokens(64 << 30) == memory.CUDA_TOKENS
    assert batch_tokens(64 << 30, device="cpu") == memory.CPU_TOKENS
    # Half of what is free, where gradients and moments have taken 12 bytes a weight, two chunks of
    # logits 1 GB, and the tied head's gradient, with a part of it, 8 bytes a weight of it.
    num_weights = sum(p.numel() for p in backbone.parameters())
    pending = 12 * num_weights + 2 * 2**29 + 8 * 1024 * 64
    assert memory.pending(backbone, 0) + memory.passing(backbone) == pending
    a_token = footprint.of_module(backbone, "cuda").of_token(2, checkpointing=False)
    enough = pending + 2 * a_token * 300.5
    assert batch_tokens(enough, max_length=100) == 300
    assert batch_tokens(0, max_length=100) == 100
    assert batch_tokens(enough, max_length=100, checkpointing=True) > 300


def test_as_many_answers_at_once_as_memory_holds(monkeypatch):
    backbone = Backbone(tiny.make_model())
    config = backbone.lm.config
    cpu, many = torch.device("cpu"), cache.ROOM + 2  # it has just grown
    said = []

    def decode_batch(free, tokens=many):
        monkeypatch.setattr(memory, "free", lambda device: free)
        return memory.default_decode_batch(backbone, cpu, 0, tokens, said.append)

    assert decode_batch(64 << 30) == memory.CPU_ANSWERS
    assert not said
    assert decode_batch(0) == 1
    [line] = said
    said.clear()
    assert (
        "\n" not in line
        and line.startswith("memory: answers are decoded one by one")
        and "--decode_batch" in line
    )
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
    assert decode_batch(free) == 30 and decode_batch(free - 2 * 28 * an_answer) == 2
    assert not said
    assert decode_batch(free - 2 * 29 * an_answer) == 1
    [line] = said
    assert f"of {an_answer / 1e6:.0f} MB" in line
    assert decode_batch(free, 2 * many) < decode_batch(free)


@pytest.mark.slow
def test_a_cpu_s_batches_are_of_its_own_layers(monkeypatch):
    """They keep less than a GPU's: more tokens fit."""
    backbone = Backbone(tiny.make_model())
    a_token = footprint.of_module(backbone, "cpu").of_token(2, checkpointing=False)
    enough = memory.pending(backbone, 0) + memory.passing(backbone) + 2 * a_token * 300.5
    monkeypatch.setattr(memory, "free", lambda device: enough)
    assert a_token < footprint.of_module(backbone, "cuda").of_token(2, checkpointing=False)
    assert memory.default_batch_tokens(backbone, torch.device("cpu"), 0, False, 100) == 300


def test_what_is_pending_at_each_stage(monkeypatch):
    """Of eight ranks: gradients are whole up to stage 1, moments at stage 0; adapters alone have any."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    backbone = Backbone(tiny.make_model(), autocast=torch.bfloat16)
    weights = sum(p.numel() for p in backbone.parameters())
    head = 2 * 2**29 + 6 * 1024 * 64  # bf16 products
    vectors = sum(p.numel() for p in backbone.parameters() if p.dim() == 1)
    copies = 2 * (weights - vectors)
    states = [12 * weights, (4 + 8 / 8) * weights, 12 * weights / 8, 12 * weights / 8]
    for stage, expected in enumerate(states):
        assert memory.pending(backbone, stage) == expected
        assert memory.passing(backbone) == copies + head
    backbone.requires_grad_(False)
    assert memory.pending(backbone, 0) == 0


def test_a_head_of_scores_has_no_logits():
    """Of width 64: its weight's gradient in fp32, and a part of it in the product's fp32."""
    lm = tiny.make_score_model()
    assert memory.passing(ScoreModel(lm)) == (4 + 4) * 64
    vectors = sum(p.numel() for p in lm.parameters() if p.dim() == 1)
    copies = 2 * (sum(p.numel() for p in lm.parameters()) - vectors)
    in_bf16 = ScoreModel(lm, autocast=torch.bfloat16)
    assert memory.passing(in_bf16) == copies + (4 + 2) * 64


def test_memory_that_torch_keeps_unused_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert memory.free(torch.device("cuda")) == 140


def test_a_model_is_gone_before_the_cache_is_emptied(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(alive() is None))
    gc.disable()
    try:
        for device in ("cpu", "cuda"):
            model = torch.nn.Linear(2, 2)
            model.itself = [model]  # a cycle, as modules with hooks have
            alive = weakref.ref(model)
            del model
            memory.release(torch.device(device))
    finally:
        gc.enable()
    assert emptied == [True]


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO for details)"
        "\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
        "Cuda failure 2 'out of memory'",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 80000000000 bytes",
    ],
    ids=lambda words: words[:30],
)
def test_memory_runs_out_in_many_words(words):
    """As torch, its libraries and NCCL (the string in libnccl.so: Cuda failure %d '%s') write them."""
    assert memory.is_out_of_memory(RuntimeError(words))


def test_other_errors_of_cuda_are_something_else():
    for words in (
        "CUDA error: device-side assert triggered",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
        "NCCL error in: x.cpp:1, remote process exited or there was a network error",
    ):
        assert not memory.is_out_of_memory(RuntimeError(words))


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
