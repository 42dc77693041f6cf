"""Which stage, reference and batch fit a model on GPUs, and what a step would cost there: the table of
README ("Which flags for which model").

    python -m train.engine.advice

Memory is counted (engine/footprint.py). Speed is estimated, from operations and bytes and the rates
below: nothing of it was measured on a GPU.
"""

import json
from typing import NamedTuple

import torch
import transformers

from train.data.packing import pack
from train.engine import footprint, memory
from train.engine.ds_config import zero_stage
from train.files import shipped
from train.models.backbone import Backbone
from train.models.flops import FlopCounter
from train.models.lm_head import chunk_bytes

# The GPU that is assumed: an A100 of 80 GB, by its data sheet, and what is left of that in practice.
MEMORY = 80e9
RESERVE = 4e9  # bytes of CUDA's context, NCCL's buffers and what lies between pieces
PEAK = 312e12  # FLOP/s of dense bf16 products
MFU = 0.4  # the share of it that products, attention and all between them reach together
LAUNCH = 10e-6  # seconds that Python takes for an operation of an eager step
# of a layer and batch: reference, policy forward and backward, as tests/cuda_pretend counts a Llama's
OPERATIONS = 202
WITHIN_NODE = 200e9  # bytes/s of a collective, a GPU; NVLink
BETWEEN_NODES = 20e9  # 200 Gbit/s a GPU, of which 80 % arrive
TO_HOST = 20e9  # bytes/s a GPU; PCIe 4
GPUS_OF_NODE = 8

LEAST_TOKENS = 4096  # a batch that holds a pair of answers of 2,048 tokens
LORA_RANK = 16

MODELS = {
    "135M": transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),
    "1.5B": transformers.Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True),
    "7B": transformers.Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False),
    "70B": transformers.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False),
}  # fmt: skip
GPUS = (1, 8, 64)


class Way(NamedTuple):
    """One way to train: what flags say."""

    ds_config: str
    reference: str = "live"
    checkpointing: bool = False
    lora: bool = False

    @property
    def flags(self) -> str:
        """The flags of it that are no defaults."""
        words = [f"`{self.ds_config}`"] if self.ds_config != "zero0" else []
        words += [f"`--reference {self.reference}`"] if self.reference != "live" else []
        words += ["`--gradient_checkpointing true`"] if self.checkpointing else []
        words += [f"`--lora_rank {LORA_RANK}`"] if self.lora else []
        return ", ".join(words) or "none"


# From the simplest to the one that takes the least memory; the first that fits is advised.
WAYS = (
    Way("zero0"),
    Way("zero2"),
    Way("zero0", checkpointing=True),
    Way("zero2", checkpointing=True),
    Way("zero2", "cached", checkpointing=True),
    Way("zero3", checkpointing=True),
    Way("zero3", "cached", checkpointing=True),
    Way("zero0", checkpointing=True, lora=True),
    Way("zero3", checkpointing=True, lora=True),
    Way("zero3_offload", "cached", checkpointing=True),
)


class Advice(NamedTuple):
    """What a way comes to on one GPU."""

    way: Way
    tokens: int  # of a packed batch
    fixed: float  # bytes that do not depend on the batch
    activations: float  # bytes of such a batch
    host: float  # bytes in main memory, of all GPUs of a node
    tokens_per_second: float  # of all GPUs together, estimated


class Model:
    """A model's sizes, read off a module without weights."""

    def __init__(self, config):
        self.config = config
        with torch.device("meta"):
            lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            self.module = Backbone(lm)
        self.weights = sum(p.numel() for p in self.module.parameters())
        self.head = self.module.head.weight.numel()
        # r (inputs + outputs) of each linear layer but the head
        self.adapters = LORA_RANK * sum(
            sum(layer.weight.shape)
            for layer in lm.modules()
            if isinstance(layer, torch.nn.Linear) and layer is not self.module.head
        )
        batch = pack([footprint.GROUP])
        self.forward = FlopCounter(self.module).forward(batch) / len(batch.input_ids)  # a token
        self._activations = {}

    def activations(self, stage: int, checkpointing: bool) -> float:
        """Bytes of a token."""
        narrow = stage > 0
        if narrow not in self._activations:
            self._activations[narrow] = footprint.of_config(self.config, "bf16", stage)
        layers = self.config.num_hidden_layers
        return self._activations[narrow].of_token(layers, checkpointing)


def advise(model: Model, world: int) -> Advice | None:
    """The first of WAYS that fits `model` on `world` GPUs; None where none does."""
    for way in WAYS:
        if world == 1 and way.ds_config in ("zero2", "zero3"):
            continue  # which shard over GPUs
        found = _try(model, world, way)
        if found.tokens >= LEAST_TOKENS:
            return found
    return None


def _try(model: Model, world: int, way: Way) -> Advice:
    """What a way comes to; with fewer tokens than LEAST_TOKENS where it does not fit."""
    zero = json.loads(shipped(f"ds_configs/{way.ds_config}.json").read_text())
    stage, options = zero_stage(zero), zero["zero_optimization"]
    offload = "offload_param" in options
    trained = model.adapters if way.lora else model.weights
    states = footprint.states(trained, stage, "bf16", world)
    fixed, host = 0.0, 0.0
    if way.lora:  # weights that stand still, in the type that the stage holds weights in
        narrow = "bf16" if stage else "fp32"
        fixed += footprint.frozen(model.weights, stage == 3, narrow, world)
    if offload:
        host = states.total * min(world, GPUS_OF_NODE)
    else:
        fixed += states.total
    has_reference = way.reference == "live"
    if has_reference and not way.lora:
        fixed += footprint.frozen(model.weights, stage == 3, "bf16", world)
    if stage == 0:
        fixed += 2 * model.weights  # autocast's copies
    if stage == 3:  # layers that are gathered at one time
        fixed += 2 * min(model.weights, options.get("stage3_max_live_parameters", 1e9))
    # gradients on their way, two such buckets in turn, and gathered weights
    buckets = ("reduce_bucket_size", "reduce_bucket_size", "allgather_bucket_size")
    fixed += sum(2 * min(model.weights, options.get(name, 0)) for name in buckets)
    trained_head = 0 if way.lora else model.head
    fixed += footprint.head_bytes(trained_head, torch.bfloat16, chunk_bytes(MEMORY))
    a_token = model.activations(stage, way.checkpointing)
    left = MEMORY - RESERVE - fixed
    tokens = int(min(memory.CUDA_TOKENS, left // 2 // a_token)) // 256 * 256
    seconds = _seconds(model, world, way, stage, offload, max(tokens, 1))
    return Advice(way, tokens, fixed, tokens * a_token, host, world * tokens / seconds)


def _seconds(model: Model, world: int, way: Way, stage: int, offload: bool, tokens: int) -> float:
    """Of a step of one batch on each GPU: the longest of what runs side by side."""
    references = way.reference == "live"
    # a backward pass is two forwards, of which weights that stand still need one; checkpointing adds one
    passes = (2 if way.lora else 3) + way.checkpointing + references
    computing = passes * model.forward * tokens / (PEAK * MFU)
    launching = LAUNCH * OPERATIONS * model.config.num_hidden_layers
    working = max(computing, launching)
    trained = model.adapters if way.lora else model.weights
    sending = 0.0
    if world > 1:
        rate = WITHIN_NODE if world <= GPUS_OF_NODE else BETWEEN_NODES
        if stage == 0:  # fp32 gradients, once all is computed
            return working + 4 * trained / rate
        sent = 2 * trained  # bf16 gradients
        if stage == 3:  # and weights, gathered for each pass
            sent += 2 * model.weights * (2 + references)
        sending = sent / rate
    # this GPU's share of the weights, for two passes, and of the gradients in fp32
    moved = (2 * 2 + 4) * model.weights / world if offload else 0
    return max(working, sending, moved / TO_HOST)


def table() -> str:
    """The table, Markdown."""
    lines = [
        "| model | GPUs | flags | tokens a batch | GB a GPU: fixed + activations | GB of main memory a node "
        "| tokens/s, all GPUs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, config in MODELS.items():
        model = Model(config)
        for world in GPUS:
            found = advise(model, world)
            if found is None:
                lines.append(f"| {name} | {world} | does not fit | | | | |")
                continue
            host = f"{found.host / 1e9:,.0f}" if found.host else ""
            lines.append(
                f"| {name} | {world} | {found.way.flags} | {found.tokens:,} "
                f"| {found.fixed / 1e9:.1f} + {found.activations / 1e9:.1f} | {host} "
                f"| {_rounded(found.tokens_per_second)} |"
            )
    return "\n".join(lines)


def _rounded(number: float) -> str:
    """Two digits: more would not be known."""
    return f"{float(f'{number:.2g}'):,.0f}"


if __name__ == "__main__":
    print(table())
