"""Decoder layers compiled by torch (--compile auto), each as one graph for each bucket of shapes.

Only calls with a packed batch in the shape of its bucket (train/models/buckets.py) are compiled,
those that score held-out rows too; generation and the check against transformers' own attention run
a layer as it is. Embedding and head stay as they are.
Compiled layers round in other places than the same layers uncompiled, which stay what they are
measured against (tests/models/test_compiled.py).
"""

import contextlib
from collections.abc import Callable

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from train.data.packing import Group, pack
from train.models import attention
from train.models.buckets import StaticSegments

# Shapes that one layer may be compiled for: buckets, with and without gradients. torch's own bounds
# (8 and 256) are there to find what should not be compiled; here the buckets bound it.
MOST_SHAPES = 256


def why_not(module, stage: int) -> str | None:
    """Why the layers of a PackedModel stay uncompiled, in words; None where they can be compiled.

    stage: its ZeRO stage.
    """
    if module.layout != "packed":
        return "--layout padded has no packed batches"
    if stage == 3:
        return "ZeRO stage 3 gathers weights between operations"
    if module.deterministic:
        return "--deterministic sets a flag of torch around single kernels"
    if not _decoder_layers(module):
        return f"the layers of {type(module.lm).__name__} are not transformers' usual ones"
    device = next(module.parameters()).device
    dtype = module.autocast or next(module.parameters()).dtype
    config = module.lm.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    if device.type == "cuda" and not (
        attention.has_flash(device) and attention.flash_takes(head_size, dtype)
    ):
        return "attention without the flash kernel has shapes of its own for each batch"
    return None


def compile_layers(module, backend: str | Callable = "inductor"):
    """Compile a PackedModel's decoder layers when they are called next, and give its body static
    shapes from now on. backend: torch.compile's.
    """
    bounds = torch._dynamo.config
    bounds.recompile_limit = max(bounds.recompile_limit, MOST_SHAPES)
    # of all layers and models together
    bounds.accumulated_recompile_limit = max(bounds.accumulated_recompile_limit, 16 * MOST_SHAPES)
    for layer in _decoder_layers(module):
        layer._compiled_call_impl = _call(layer, backend)
    module.static_shapes = True


def try_out(module):
    """Run a small batch forward and backward, of which nothing is left. What the compiler raises, it
    raises here.
    """
    device = next(module.parameters()).device
    batch = pack([Group((0, 1, 2), ((3, 4), (5,)))]).to(device)
    trained = [p for p in module.parameters() if p.requires_grad]
    with torch.set_grad_enabled(bool(trained)):
        out = module(batch)
    if trained:
        torch.autograd.grad(out.sum(), trained, allow_unused=True)


def leave_uncompiled(module):
    """Undo `compile_layers`."""
    for layer in _decoder_layers(module):
        layer._compiled_call_impl = None
    module.static_shapes = False


@contextlib.contextmanager
def uncompiled(*modules):
    """Inside, layers of PackedModels run as they are, also those that are compiled."""
    layers = [layer for module in modules for layer in _decoder_layers(module)]
    calls = [layer._compiled_call_impl for layer in layers]
    shapes = [module.static_shapes for module in modules]
    for module in modules:
        leave_uncompiled(module)
    try:
        yield
    finally:
        for layer, call in zip(layers, calls, strict=True):
            layer._compiled_call_impl = call
        for module, is_static in zip(modules, shapes, strict=True):
            module.static_shapes = is_static


def _decoder_layers(module):
    return [each for each in module.lm.modules() if isinstance(each, GradientCheckpointingLayer)]


def _call(layer, backend):
    """What a layer's call runs: compiled code for static shapes, the layer itself for others."""
    compiled = torch.compile(layer._call_impl, backend=backend, fullgraph=True, dynamic=False)

    def call(*args, **kwargs):
        if isinstance(kwargs.get("segments"), StaticSegments):
            return compiled(*args, **kwargs)
        return layer._call_impl(*args, **kwargs)

    return call
