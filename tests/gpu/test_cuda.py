"""What needs CUDA: `pytest -m gpu` on a GPU machine. The oracle is the CPU's fp64 path, itself
checked in tests/models.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from train.data.packing import Group, pack
from train.models.backbone import Backbone
from train.models.lm_head import token_logps

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
WIDTH = {"gpt2": "n_embd"}  # a configuration's field, where it is not hidden_size


def groups():
    random = torch.Generator().manual_seed(0)

    def ids(n):
        return tuple(torch.randint(3, 1000, (n,), generator=random).tolist())

    sizes = [(7, 5, 9), (60, 1, 3), (3, 12), (0, 9), (1, 1), (11, 4, 1, 30, 2, 8), (16, 2, 1)]
    return [Group(ids(p), tuple(ids(n) for n in r), row=i) for i, (p, *r) in enumerate(sizes)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "gpt2"])
@pytest.mark.parametrize("mode", ["weights", "autocast", "fp32"])  # the last without flash
def test_batches_are_near_fp64(family, mode):
    # head sizes of 16 and more that flash kernels take, which these two have as they are
    width = {} if family in ("gemma3", "qwen3") else {WIDTH.get(family, "hidden_size"): 128}

    def make(dtype):
        # small weights keep bf16's rounding below the bound
        return tiny.make_model(family, dtype=dtype, initializer_range=0.02, **width)

    batch = pack(groups())
    exact = Backbone(make(torch.float64))(batch)
    backbone = Backbone(
        make(torch.bfloat16 if mode == "weights" else torch.float32).cuda(),
        autocast=torch.bfloat16 if mode == "autocast" else None,
    )
    logps = backbone(batch.to("cuda"))
    assert logps.dtype == torch.float32
    assert (logps.double().cpu() - exact).abs().mean() < 0.02
    logps.sum().backward()
    exact_backbone = Backbone(make(torch.float64))
    exact_backbone(batch).sum().backward()
    for (name, p), q in zip(backbone.named_parameters(), exact_backbone.parameters(), strict=True):
        gap = (p.grad.double().cpu() - q.grad).norm() / q.grad.norm()
        # a key bias has no gradient but rounding
        assert gap < 0.1 or q.grad.norm() < 1e-6, (name, float(gap))


# Prompt and responses: below one block of keys of the flash kernel's backward pass, which is 128 or
# so, and many of them, whose order counts where it is not kept.
LONG = [(300, 400, 500), (10, 300, 1000), (700, 50), (1, 900)]


@pytest.mark.parametrize("sizes", [None, LONG], ids=["short", "long"])
@pytest.mark.parametrize("autocast", [torch.bfloat16, None], ids=["bf16", "fp32"])
def test_gradients_repeat_bit_for_bit(sizes, autocast):
    """With --deterministic; without it for short segments too, which is not promised."""
    random = torch.Generator().manual_seed(1)

    def ids(n):
        return tuple(torch.randint(3, 1000, (n,), generator=random).tolist())

    long = [Group(ids(p), tuple(map(ids, r)), row=i) for i, (p, *r) in enumerate(sizes or ())]
    batch = pack(long or groups()).to("cuda")
    lm = tiny.make_model("llama", hidden_size=128, max_position_embeddings=2048)
    backbone = Backbone(lm.cuda(), autocast=autocast)
    backbone.deterministic = True

    def gradients():
        backbone.zero_grad()
        backbone(batch).sum().backward()
        return [p.grad.clone() for p in backbone.parameters()]

    first = gradients()
    assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, gradients(), strict=True))


def test_half_precision_logits_are_never_rounded_to_half():
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=random).bfloat16() for n in (50, 5000))
    target = torch.randint(5000, (50,), generator=random)
    exact = torch.log_softmax(hidden.double() @ weight.double().T, 1)
    exact = exact.gather(1, target[:, None]).squeeze(1)
    logps = token_logps(hidden.cuda(), weight.cuda(), target.cuda()).double().cpu()
    assert (logps - exact).abs().max() < 1e-3  # bf16 logits of this size would be off by up to 0.1


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_default_precision_trains_exports_and_reloads(model_dir, tmp_path, precision):
    flags = {
        "--model": model_dir,
        "--output": tmp_path / "out",
        "--max_length": 512,
        "--max_steps": 3,
        "--precision": precision,
    }
    command = [sys.executable, ROOT / "launch/train_dpo.py"]
    for flag, value in flags.items():
        command += [flag, value]
    command = list(map(str, command))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["hardware"]["device"] == "cuda"
    assert run["perf"]["perf/mfu"] > 0 and run["perf"]["perf/memory_gb"] > 0
