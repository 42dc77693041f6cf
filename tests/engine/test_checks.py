"""What a run makes sure of before its first update, with layers compiled and not."""

import pytest
import tiny
import torch

from tests.models.test_backbone import groups
from train.engine import checks
from train.methods.reference import Live
from train.models import compiled
from train.models.backbone import Backbone

CPU = torch.device("cpu")


class Data(list):
    """Groups as a data set gives them."""

    group = list.__getitem__


class Whole:
    """A policy that stands whole on one rank."""

    def __init__(self, module):
        self.module = module

    def __call__(self, batch, **options):
        return self.module(batch, **options)


@pytest.fixture
def models():
    """A policy and a reference of the same weights, in bf16 as a GPU computes them."""
    policy, frozen = (
        Backbone(tiny.make_model(dtype=torch.float32), autocast=torch.bfloat16) for _ in range(2)
    )
    yield Whole(policy), Live(frozen, {})
    torch._dynamo.reset()


def check(policy, reference, precision="bf16"):
    return checks.check_start(policy, reference, Data(groups()), CPU, precision, same_weights=True)


def rounded_once_more(graph, example_inputs):
    """A compiler whose code rounds what a layer gives to bf16: elsewhere than the layer by itself."""

    def run(*args):
        return tuple(x.bfloat16().to(x.dtype) for x in graph(*args))

    return run


def wrong(graph, example_inputs):
    """A compiler whose code is wrong."""
    return lambda *args: tuple(1.5 * x for x in graph(*args))


def test_policy_and_reference_agree_bit_for_bit(models):
    policy, reference = models
    [batch] = check(policy, reference)
    with torch.no_grad():
        assert torch.equal(policy(batch), reference(batch))
        policy.module.lm.get_input_embeddings().weight[5] *= 1.01
    with pytest.raises(checks.CheckFailed, match="policy and reference have the same weights and"):
        check(policy, reference)


def test_compiled_they_agree_within_rounding(models):
    """And bit for bit as they are uncompiled; afterwards they are compiled as before."""
    policy, reference = models
    compiled.compile_layers(policy.module, rounded_once_more)
    compiled.compile_layers(reference.module, "aot_eager")
    layers = compiled._decoder_layers(policy.module)
    calls = [layer._compiled_call_impl for layer in layers]
    [batch] = check(policy, reference)
    assert [layer._compiled_call_impl for layer in layers] == calls and None not in calls
    assert policy.module.static_shapes and reference.module.static_shapes
    with torch.no_grad():
        assert 0 < (policy(batch) - reference(batch)).abs().mean() < checks.TOLERANCE["bf16"]
        policy.module.lm.get_input_embeddings().weight[5] *= 1.01  # far less than the tolerance
    with pytest.raises(checks.CheckFailed, match="policy and reference have the same weights and"):
        check(policy, reference)


def test_compiled_code_that_is_wrong_is_refused(models):
    policy, reference = models
    compiled.compile_layers(policy.module, "aot_eager")
    compiled.compile_layers(reference.module, wrong)
    with pytest.raises(checks.CheckFailed, match=r"^start check: compiled, .* take --compile off$"):
        check(policy, reference)
    compiled.leave_uncompiled(reference.module)
    compiled.compile_layers(policy.module, wrong)
    with pytest.raises(checks.CheckFailed, match=r"one sequence at a time .* take --compile off$"):
        check(policy, reference)
