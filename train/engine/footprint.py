"""What training a model takes of a device's memory, worked out from its configuration alone: no weight
is made and nothing is computed.

Activations are what autograd would keep. They are read off the model's own layers, run on tensors
that have a shape and no values, so that a new family needs no formula of its own.

Legend: L tokens of a packed batch, T those of them that are scored, K gathered keys, H heads, G key
heads, D head size, V vocabulary.
"""

import contextlib
import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from train.data.packing import Group, PackedBatch, pack
from train.engine import ds_config
from train.models.backbone import Backbone

# A group such as are trained on: its prompt stands once, its keys twice, so K = 1.25 L.
GROUP = Group((0,) * 128, ((0,) * 192, (0,) * 192))
KEPT = "zeropref-kept"  # transformers' name for `_kept_attention`

# What autocast on CUDA casts, of what transformers' layers call: torch's lists, in torch's
# documentation under "CUDA Ops that can autocast".
TO_HALF = (
    F.linear,
    torch.addmm,
    torch.bmm,
    torch.matmul,
    torch.mm,
    torch.Tensor.__matmul__,
    torch.Tensor.matmul,
)
TO_FP32 = (
    F.layer_norm,
    F.softmax,
    torch.pow,
    torch.rsqrt,
    torch.softmax,
    torch.Tensor.__pow__,
    torch.Tensor.pow,
    torch.Tensor.rsqrt,
)


class Activations(NamedTuple):
    """Bytes that autograd keeps of a token of a packed batch until its backward pass."""

    layer: float  # of a decoder layer
    layer_input: float  # of what goes into one, all that checkpointing keeps of it
    rest: float  # of what is outside the layers, but the logits

    def of_token(self, num_layers: int, checkpointing: bool) -> float:
        """Bytes of a token. With checkpointing one layer at a time is there as a whole."""
        if checkpointing:
            return num_layers * self.layer_input + self.layer + self.rest
        return num_layers * self.layer + self.rest


def of_module(module, device_type: str) -> Activations:
    """Activations of a PackedModel like `module`, on "cuda" or on a "cpu". Adapters count as if all
    weights were trained, and the padded layout as the packed one.
    """
    lm = module.lm
    dtype = next(lm.parameters()).dtype

    def make(config):
        return type(module)(type(lm)._from_config(config, dtype=dtype), autocast=module.autocast)

    measure = measure_on_cpu if device_type == "cpu" else measure_on_cuda
    try:
        return measure(make, lm.config)
    except Exception:  # layers that ask tensors for their values, as experts' do, raise many types
        logging.getLogger("zeropref").info("activations are those of a dense model", exc_info=True)
        dense = partial(_causal_lm, dtype=dtype, autocast=module.autocast)
        return measure(dense, _dense(lm.config.get_text_config()))


def _causal_lm(config, dtype: torch.dtype, autocast: torch.dtype | None) -> Backbone:
    """A model of a configuration of transformers, wherever new tensors are."""
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Backbone(lm, autocast=autocast)


def of_config(config, precision: str, stage: int, device_type: str = "cuda") -> Activations:
    """Activations of a causal language model in training, from its configuration."""
    dtype = ds_config.weight_dtype(stage, precision)
    make = partial(_causal_lm, dtype=dtype, autocast=ds_config.autocast_dtype(stage, precision))
    return (measure_on_cpu if device_type == "cpu" else measure_on_cuda)(make, config)


def _dense(config) -> transformers.LlamaConfig:
    """A Llama of a configuration's sizes; of experts, as wide as those that a token goes through."""
    experts = getattr(config, "num_experts_per_tok", None) or 1
    inner = getattr(config, "moe_intermediate_size", None) or getattr(
        config, "intermediate_size", 4 * config.hidden_size
    )
    heads = config.num_attention_heads
    return transformers.LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=experts * inner,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
    )


def measure_on_cuda(make: Callable, config) -> Activations:
    """Activations on CUDA of what `make` makes of a configuration, a PackedModel; the GPU need not be
    there.
    """
    transformers.AttentionInterface.register(KEPT, _kept_attention)

    def made(config):
        module = make(config)
        module.lm.set_attn_implementation(KEPT)
        autocast, module.autocast = module.autocast, None
        return module, _CudaAutocast(autocast) if autocast else contextlib.nullcontext()

    batches = [batch.to("meta") for batch in _batches()]
    with torch.device("meta"):
        return _measure(made, config, batches)


def measure_on_cpu(make: Callable, config) -> Activations:
    """The same with the layers that a CPU runs."""
    # Here and not above: it takes two seconds to import, and is seldom needed.
    from torch._subclasses.fake_tensor import FakeTensorMode

    def made(config):
        module = make(config)
        autocast = module.autocast
        context = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
        return module, context

    batches = _batches()
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _measure(made, config, batches)


def _batches() -> list[PackedBatch]:
    """Two, of which the second has twice the tokens."""
    return [pack([GROUP] * count) for count in (1, 2)]


def _measure(made: Callable, config, batches: list[PackedBatch]) -> Activations:
    """made: a configuration -> a PackedModel and the context that it runs in."""
    slopes = []  # bytes a token of models of one layer, of two, and of two with checkpointing
    for num_layers, checkpointing in ((1, False), (2, False), (1, True), (2, True)):
        module, context = made(_with_layers(config, num_layers))
        if checkpointing:
            module.checkpoint_activations()
        kept = []
        for batch in batches:
            with context:
                kept.append(kept_bytes(partial(_body_and_head, module, batch), module))
        more = batches[1].input_ids.shape[0] - batches[0].input_ids.shape[0]
        slopes.append((kept[1] - kept[0]) / more)  # without what does not grow with the tokens
    one, two, one_checkpointed, two_checkpointed = slopes
    return Activations(
        layer=two - one,
        layer_input=two_checkpointed - one_checkpointed,
        rest=2 * one - two,
    )


def _body_and_head(module, batch):
    """The body of a PackedModel, and of its head what grows with the tokens, logits apart: the scored
    tokens' hidden states in the type that they are multiplied in.
    """
    hidden = module.packed_hidden(batch)  # (L, width)
    scored = hidden.index_select(0, batch.hidden_index)  # (T, width)
    dtype = module.head.weight.dtype
    return F.linear(scored, torch.empty(1, scored.shape[1], dtype=dtype, requires_grad=True))


def kept_bytes(forward: Callable, module) -> int:
    """Bytes of all memory that autograd keeps for the backward pass of `forward()`, the weights of
    `module` apart.
    """
    weights = {StorageWeakRef(p.untyped_storage()) for p in module.parameters()}
    found = {}  # a reference -> the memory, held so that its address is not used again

    def note(tensor):
        memory = tensor.untyped_storage()
        reference = StorageWeakRef(memory)
        if reference not in weights:
            found[reference] = memory
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(memory.nbytes() for memory in found.values())


class _CudaAutocast(TorchFunctionMode):
    """torch.autocast("cuda", dtype) for tensors that are on no device, where torch has none."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.copies = {}  # of weights, by id: autocast makes one of each

    def __torch_function__(self, func, types, args=(), kwargs=None):
        cast = None
        if func in TO_HALF:
            cast = self._to_half
        elif func in TO_FP32:
            cast = self._to_fp32
        if cast:
            args = [cast(each) for each in args]
            kwargs = {name: cast(each) for name, each in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _to_half(self, x):
        if not torch.is_tensor(x) or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(self.dtype)
        if id(x) not in self.copies:
            self.copies[id(x)] = x.to(self.dtype)
        return self.copies[id(x)]

    def _to_fp32(self, x):
        return x.float() if torch.is_tensor(x) and x.dtype == self.dtype else x


def _kept_attention(module, query, key, value, attention_mask, segments=None, **options):
    """transformers' attention interface: query (1, H, L, D), key and value (1, G, L, D) -> (1, L, H,
    D), None. What attention.py's flash path keeps, and zeros.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    return _Kept.apply(query, key, value, segments.batch.kv_index)[None], None


class _Kept(torch.autograd.Function):
    """Keeps what flash attention does: queries, gathered keys and values, what comes out, and the
    logarithms of the softmax's sums.
    """

    @staticmethod
    def forward(ctx, query, key, value, kv_index):
        query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        out = torch.empty(*query.shape[:2], value.shape[2], dtype=query.dtype, device=query.device)
        log_sums = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)  # (H, L)
        gathered = [x.index_select(0, kv_index) for x in (key, value)]  # (K, G, D) each
        ctx.save_for_backward(query, *gathered, out, log_sums)
        return out  # (L, H, D)


class States(NamedTuple):
    """Bytes on one GPU of what training holds of a model's weights, beside activations."""

    weights: float  # as the forward pass reads them
    masters: float  # in fp32, where the weights are rounded
    gradients: float
    moments: float  # AdamW's two, in fp32

    @property
    def total(self) -> float:
        return sum(self)


def states(weights: int, stage: int, precision: str, world: int) -> States:
    """States of a model of so many weights, all of them trained, over `world` ranks.

    Rajbhandari et al. 2020 (arXiv 1910.02054), section 5, with this project's types: gradients are
    accumulated in fp32 at every stage, and stage 0 computes under autocast over fp32 weights
    (engine/ds_config.py). Buckets are not counted.
    """
    narrow = stage > 0 and precision == "bf16"
    share = weights / world
    return States(
        weights=(2 if narrow else 4) * (share if stage == 3 else weights),
        masters=4 * share if stage > 0 else 0,
        **made_by_the_first_step(weights, stage, world),
    )


def made_by_the_first_step(weights: int, stage: int, world: int) -> dict[str, float]:
    """Those of `states` that come with the first step: they are fp32 under any precision."""
    share = weights / world
    return {
        "gradients": 4 * (share if stage > 1 else weights),
        "moments": 8 * (share if stage > 0 else weights),
    }


def frozen(weights: int, sharded: bool, precision: str, world: int) -> float:
    """Bytes on one GPU of a model that is only read."""
    return (2 if precision == "bf16" else 4) * weights / (world if sharded else 1)


def autocast_copies(module) -> int:
    """Bytes of the copies that autocast keeps, from a forward pass until its backward pass, of the
    weights that are multiplied with.
    """
    if module.autocast is None:
        return 0
    return module.autocast.itemsize * sum(p.numel() for p in module.parameters() if p.dim() > 1)


def head_bytes(weights: int, dtype: torch.dtype, logits_bytes: int) -> int:
    """Bytes that the head (models/lm_head.py) takes for a moment in its backward pass: two chunks of
    logits, its weight's gradient in fp32, and a chunk's part of that in the product's type.
    """
    return 2 * logits_bytes + (4 + dtype.itemsize) * weights


def _with_layers(config, count: int):
    """A copy of a configuration with that many of its first layers, and no pad token: transformers
    looks for that among the ids, to warn.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    config.pad_token_id = text.pad_token_id = None
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return config
