"""Compiled decoder layers against the same layers uncompiled, and how often they are compiled.

Without `inductor`, backends trace the layers and run them operation by operation: all but the code
that is generated.
"""

import shutil

import pytest
import tiny
import torch
from torch._dynamo.utils import counters

from tests.models.test_backbone import groups, relative, value_and_gradients
from tests.models.test_heads import ScoreModel
from train.data.packing import pack
from train.models import compiled
from train.models.backbone import Backbone, outputs_to_compare, plain_forward
from train.models.generate import generate

TRACED = "aot_eager"


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def pair(family="llama", dtype=torch.float64, change=None, autocast=None):
    """The same model twice, the second to be compiled."""
    models = []
    for _ in range(2):
        lm = tiny.make_model(family, dtype=dtype)
        if change is not None:
            change(lm)
        models.append(Backbone(lm, autocast=autocast))
    return models


def assert_same(plain, other, batch, near=1e-12):
    expected, gradients = of_trained(plain, batch)
    found, found_gradients = of_trained(other, batch)
    assert ((found - expected).abs() / expected.abs()).max() < near
    for name, gradient in gradients.items():
        assert relative(found_gradients[name], gradient.double()) < near, name


def of_trained(model, batch):
    model.zero_grad()
    logps = model(batch)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return logps.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_are_one_graph_each_and_compute_the_same(family):
    """One graph for all layers of a kind, and none anew for another batch of the bucket."""
    plain, other = pair(family)
    compiled.compile_layers(other, TRACED)
    compiled.try_out(other)
    assert all(p.grad is None for p in other.parameters())
    kinds = 2 if family == "gemma3" else 1  # of layers: with a window and without
    assert counters["stats"]["unique_graphs"] == kinds
    near = 1e-6 if family == "gemma3" else 1e-12  # gemma3's norms are in fp32 for any weights
    for seed in (0, 3):
        assert_same(plain, other, pack(groups(seed)), near)
    assert counters["stats"]["unique_graphs"] == kinds
    with torch.no_grad():  # a reference's
        other(pack(groups()))
    assert counters["stats"]["unique_graphs"] == 2 * kinds
    if family == "llama":
        assert_same(plain, other, pack([*groups(), *groups(1), *groups(2)]), near)  # 558 tokens
        assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


@pytest.mark.slow
def test_scores_are_compiled_too():
    models = [ScoreModel(tiny.make_score_model("llama", torch.float64)) for _ in range(2)]
    compiled.compile_layers(models[1], TRACED)
    batch = pack(groups())
    for at in ("last", "before"):
        expected, gradients = value_and_gradients(models[0].lm, models[0](batch, at=at))
        found, found_gradients = value_and_gradients(models[1].lm, models[1](batch, at=at))
        assert torch.allclose(found, expected, rtol=1e-11)
        for name, gradient in gradients.items():
            assert relative(found_gradients[name], gradient) < 1e-11, name


@pytest.mark.slow
def test_checkpointed_activations_are_compiled_too():
    plain, other = pair()
    compiled.compile_layers(other, TRACED)
    other.checkpoint_activations()
    assert_same(plain, other, pack(groups()))


@pytest.mark.slow
def test_adapters_are_compiled_too():
    pytest.importorskip("peft")
    from train.models import lora

    def adapt(lm):
        lora.add(lm, 4, 8.0, None)
        random = torch.Generator().manual_seed(0)
        for name, p in lm.named_parameters():
            if "lora_B" in name:  # begins at 0, and nothing would reach A
                p.data.normal_(generator=random)

    plain, other = pair(change=adapt)
    compiled.compile_layers(other, TRACED)
    assert_same(plain, other, pack(groups()))
    assert not counters["graph_break"]


@pytest.mark.slow
def test_bf16_weights_and_autocast_are_compiled_too():
    batch = pack(groups())
    for dtype, autocast in ((torch.float32, torch.bfloat16), (torch.bfloat16, None)):
        plain, other = pair(dtype=dtype, autocast=autocast)
        exact = Backbone(tiny.make_model())(batch)
        compiled.compile_layers(other, TRACED)
        gap = (plain(batch) - exact).abs().mean()
        assert 0 < (other(batch) - exact).abs().mean() < 1.5 * gap


@pytest.mark.slow
def test_what_is_not_packed_runs_as_it_is():
    """Generation and the padded check; and all of it again once layers are left uncompiled."""
    plain, other = pair()
    compiled.compile_layers(other, TRACED)
    batch = pack(groups())
    before = counters["stats"]["unique_graphs"]
    options = dict(eos_token_ids=[2], max_new_tokens=8)
    asked = [(5, 6, 7), (8, 9)]
    assert generate(other.lm, asked, **options) == generate(plain.lm, asked, **options)
    with torch.no_grad(), plain_forward(other), plain_forward(plain):
        found, expected = (outputs_to_compare(each, each, batch) for each in (other, plain))
    assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] == before
    compiled.leave_uncompiled(other)
    assert torch.equal(other(batch), plain(batch))
    assert counters["stats"]["unique_graphs"] == before


def test_where_layers_stay_uncompiled():
    model = Backbone(tiny.make_model())
    assert compiled.why_not(model, stage=0) is None and compiled.why_not(model, stage=2) is None
    assert "stage 3" in compiled.why_not(model, stage=3)
    padded = Backbone(tiny.make_model(), layout="padded")
    assert "--layout padded" in compiled.why_not(padded, stage=0)
    model.deterministic = True
    assert "--deterministic" in compiled.why_not(model, stage=0)


def test_a_compiler_that_fails_leaves_the_model_as_it_was():
    plain, other = pair()

    def broken(graph, example_inputs):
        raise RuntimeError("no such compiler")

    compiled.compile_layers(other, broken)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no such compiler"):
        compiled.try_out(other)
    compiled.leave_uncompiled(other)
    batch = pack(groups())
    assert torch.equal(other(batch), plain(batch))
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.matrix
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler (c++)")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generated_code_computes_the_same(family):
    """Inductor's C++, in fp32, against the uncompiled layers in fp64."""
    exact = Backbone(tiny.make_model(family, dtype=torch.float64))
    batch = pack(groups())
    plain, other = pair(family, torch.float32)
    compiled.compile_layers(other)
    expected, gradients = of_trained(exact, batch)
    for model in (plain, other):
        found, found_gradients = of_trained(model, batch)
        assert ((found - expected).abs() / expected.abs()).max() < 1e-5
        for name, gradient in gradients.items():
            assert relative(found_gradients[name], gradient) < 1e-5, name
    again, again_gradients = of_trained(other, batch)  # the same bits each time
    assert torch.equal(again, found)
    assert all(torch.equal(again_gradients[name], found_gradients[name]) for name in gradients)
