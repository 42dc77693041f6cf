"""How many tokens a packed batch may hold on this machine, how many answers are decoded at once, and
what to say when that was too many.
"""

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Callable

import torch

from train.config import fail
from train.engine import dist, footprint
from train.models.cache import ROOM

CPU_TOKENS = 960  # about three pairs: larger batches gain little on a CPU and cost memory
CUDA_TOKENS = 16384  # from about here on the kernels are as busy as they get
CPU_ANSWERS, CUDA_ANSWERS = 128, 512  # more answers at once are decoded hardly faster
# What has no exception of its own says when memory runs out.
OUT_OF_MEMORY_WORDS = (
    "can't allocate memory",  # torch on a CPU
    "could not create a memory",  # oneDNN
    "CUDA out of memory",  # torch's allocator, where another exception passes it on
    "CUDA error: out of memory",  # the driver: contexts, graphs, pinned memory
    "CUBLAS_STATUS_ALLOC_FAILED",  # cuBLAS has no room for its workspace
    "CUDNN_STATUS_ALLOC_FAILED",
    "'out of memory'",  # NCCL, in its last error: "Cuda failure 2 'out of memory'"
)


def default_batch_tokens(
    module, device: torch.device, stage: int, checkpointing: bool, max_length: int
) -> int:
    """The default of --micro_tokens: half of the free memory over what a token's activations take.

    At least `max_length`, at most where larger batches stop being faster; the least of all ranks',
    which must plan alike. module: a PackedModel. Every rank calls this.
    """
    most = CUDA_TOKENS if device.type == "cuda" else CPU_TOKENS
    available = (free(device) - pending(module, stage) - passing(module)) // 2
    layers = module.lm.config.get_text_config().num_hidden_layers

    def fitting(device_type):
        activations = footprint.of_module(module, device_type)
        return available // activations.of_token(layers, checkpointing)

    # A CPU's layers keep hardly more than those of CUDA, which are measured in no time.
    tokens = fitting("cuda")
    if device.type == "cpu" and tokens < 2 * most:
        tokens = fitting("cpu")
    return min(dist.all_gather(int(max(min(most, tokens), min(max_length, most)))))


def default_decode_batch(
    backbone,
    device: torch.device,
    stage: int,
    tokens: int,
    say: Callable[[str], object],
) -> int:
    """The default of --decode_batch: how many answers' keys and values, logits and noise fit into half
    of the free memory.

    tokens: of the longest prompt with its answer. At least one, at most where more of them at once
    stop being faster; the least of all ranks', which must plan alike. say: is told where memory holds
    no more than one. Every rank calls this.
    """
    config = backbone.lm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = 2 if backbone.autocast or next(backbone.parameters()).dtype == torch.bfloat16 else 4
    cached = 2 * config.num_hidden_layers * heads * size * item * (tokens + ROOM)
    # logits, scaled ones, noise and its bits: 4, 4, 8 and 8 bytes of a token of the vocabulary
    answer_bytes = cached + 24 * config.vocab_size
    available, taken = free(device), pending(backbone, stage)
    fitting = int((available - taken) // 2 // answer_bytes)
    most = CUDA_ANSWERS if device.type == "cuda" else CPU_ANSWERS
    fitting, available = min(dist.all_gather((min(most, fitting), available)))
    if fitting <= 1:
        say(
            f"memory: answers are decoded one by one, which takes long: of {available / 1e9:.2f} GB free "
            f"gradients and moments will take {taken / 1e9:.2f}, and half of the rest holds no two "
            f"answers of {answer_bytes / 1e6:.0f} MB; lower --max_new_tokens or --max_prompt_length, take "
            "--lora_rank or ds_configs/zero2.json over more GPUs, or set --decode_batch"
        )
    return max(fitting, 1)


def pending(module, stage: int) -> float:
    """Bytes of gradients and moments on this rank before the first step has made them."""
    trained = sum(_numel(p) for p in module.parameters() if p.requires_grad)
    return sum(footprint.made_by_the_first_step(trained, stage, dist.world_size()).values())


def passing(module) -> int:
    """Bytes that a forward and a backward pass take for a while, however small the batch: autocast's
    copies of the weights, and what the head takes.
    """
    head = module.head.weight
    product = module.autocast or head.dtype
    logits_bytes = getattr(module, "logits_bytes", 0)  # the head of scores has none
    of_head = footprint.head_bytes(_numel(head), product, logits_bytes)
    return footprint.autocast_copies(module) + of_head


def _numel(weight) -> int:
    """Elements of a weight, also where ZeRO-3 holds a shard of it."""
    return getattr(weight, "ds_numel", weight.numel())


def free(device: torch.device) -> int:
    """Bytes that this process could still take on `device`."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def release(device: torch.device):
    """Give back what nobody uses any more, a model that has gone say: torch would keep its memory in
    pieces of that model's sizes.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: on a CPU torch raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in OUT_OF_MEMORY_WORDS
    )


def end_run(error: BaseException, task: str, advice: str):
    """End the run because `task` ran out of memory, with what to try; called inside `except`."""
    logging.getLogger("zeropref").error("out of memory", exc_info=error)
    if not dist.is_main():
        print(f"error: rank {dist.rank()} ran out of memory in {task}", file=sys.stderr)
    fail(f"out of memory in {task} {advice}", code=1)


def describe_batch(batch, batch_tokens: int) -> tuple[str, str]:
    """The task and the advice that `end_run` takes, for a batch made under a budget, in training."""
    tokens = batch.input_ids.shape[0]
    smaller = 256 * (min(tokens, batch_tokens) * 2 // 3 // 256)
    advice = f"try --micro_tokens {smaller}" if smaller else "lower --max_length"
    return f"a batch of {tokens:,} tokens", (
        f"(--micro_tokens is {batch_tokens:,}): {advice}, --gradient_checkpointing true, or "
        "ds_configs/zero2.json or zero3.json over more GPUs"
    )


@contextlib.contextmanager
def room_for(task: str, advice: str):
    """End the run with `advice` where the block, a `task`, runs out of memory."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        end_run(error, task, advice)
