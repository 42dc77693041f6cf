"""How many tokens a packed batch may hold on this machine, and what to say when that was too many."""

import contextlib
import logging
import os
import sys

import torch

from train.config import fail
from train.engine import dist
from train.models.lm_head import LOGITS_BYTES

CPU_TOKENS = 960  # about three pairs: larger batches gain little on a CPU and cost memory
CUDA_TOKENS = 16384  # from about here on the kernels are as busy as they get
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
    # gradients and moments are not there yet: 12 bytes a parameter, sharded from stage 1 on
    pending = 12 * sum(getattr(p, "ds_numel", p.numel()) for p in backbone.parameters())
    available = free(device) - pending // (dist.world_size() if stage else 1)
    fitting = (available // 2 - 2 * LOGITS_BYTES) // token_bytes
    return min(dist.all_gather(int(max(min(most, fitting), min(max_length, most)))))


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
