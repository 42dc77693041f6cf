"""How many tokens a packed batch may hold on this machine, and what to say when that was too many."""

import contextlib
import logging
import os
import sys

import torch

from train.config import fail
from train.engine import dist
from train.models.cache import ROOM
from train.models.lm_head import LOGITS_BYTES

CPU_TOKENS = 960  # about three pairs: larger batches gain little on a CPU and cost memory
CUDA_TOKENS = 16384  # from about here on the kernels are as busy as they get
CPU_ANSWERS, CUDA_ANSWERS = 128, 512  # decoded at once: the same of answers
# torch's words on a CPU, and oneDNN's, for what has no exception of its own
OUT_OF_MEMORY_WORDS = ("can't allocate memory", "could not create a memory")


def default_batch_tokens(
    backbone, device: torch.device, stage: int, checkpointing: bool, max_length: int
) -> int:
    """The default of --micro_tokens: half of the free memory over what a token's activations take.

    At least `max_length`, at most where larger batches stop being faster; the least of all ranks',
    which must plan alike. Every rank calls this.
    """
    config = backbone.lm.config.get_text_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * width
    item = 2 if backbone.autocast or next(backbone.parameters()).dtype == torch.bfloat16 else 4
    layer_bytes = (8 * width + 4 * inner) * item  # that autograd keeps of a token
    if backbone.autocast:
        layer_bytes += 8 * width  # of the residual stream in fp32
    if checkpointing:  # each layer's input, and one layer's activations at a time
        token_bytes = width * item * layers + layer_bytes
    else:
        token_bytes = layer_bytes * layers
    most = CUDA_TOKENS if device.type == "cuda" else CPU_TOKENS
    available = free(device) - pending(backbone, stage)
    fitting = (available // 2 - 2 * LOGITS_BYTES) // token_bytes
    return min(dist.all_gather(int(max(min(most, fitting), min(max_length, most)))))


def default_decode_batch(backbone, device: torch.device, stage: int, tokens: int) -> int:
    """The default of --decode_batch: how many answers' keys and values, logits and noise fit into half
    of the free memory.

    tokens: of the longest prompt with its answer. At least one, at most where more of them at once
    stop being faster; the least of all ranks', which must plan alike. Every rank calls this.
    """
    config = backbone.lm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = 2 if backbone.autocast or next(backbone.parameters()).dtype == torch.bfloat16 else 4
    cached = 2 * config.num_hidden_layers * heads * size * item * (tokens + ROOM)
    # logits, scaled ones, noise and its bits: 4, 4, 8 and 8 bytes of a token of the vocabulary
    answer_bytes = cached + 24 * config.vocab_size
    fitting = (free(device) - pending(backbone, stage)) // 2 // answer_bytes
    most = CUDA_ANSWERS if device.type == "cuda" else CPU_ANSWERS
    return min(dist.all_gather(int(max(min(most, fitting), 1))))


def pending(backbone, stage: int) -> int:
    """Bytes of gradients and moments on this rank before the first step has made them: 12 a parameter,
    sharded from stage 1 on.
    """
    total = 12 * sum(getattr(p, "ds_numel", p.numel()) for p in backbone.parameters())
    return total // (dist.world_size() if stage else 1)


def free(device: torch.device) -> int:
    """Bytes that this process could still take on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
