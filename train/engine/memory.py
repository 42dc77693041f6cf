"""How many tokens a packed row may hold on this machine, and what to say when that was too many."""

import contextlib
import logging
import os
import sys

import torch

from train.config import fail
from train.engine import dist
from train.models.lm_head import LOGITS_BYTES

CPU_TOKENS = 960  # about three pairs: larger rows gain little on a CPU and cost memory
OUT_OF_MEMORY_WORDS = (
    "can't allocate memory",
    "could not create a memory",
)  # torch's words on a CPU, and oneDNN's
CUDA_TOKENS = 16384  # from about here on the kernels are as busy as they get


def default_batch_tokens(
    backbone, device: torch.device, stage: int, checkpointing: bool, max_length: int
) -> int:
    """The default of --micro_tokens: half of the free memory over what a token's activations take.

    At least `max_length`, at most where larger rows stop being faster; the least of all ranks',
    which must plan alike. Every rank calls this.
    """
    config = backbone.lm.config.get_text_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * width
    item = 2 if backbone.autocast or next(backbone.parameters()).dtype == torch.bfloat16 else 4
    layer = (8 * width + 4 * inner) * item  # bytes a token that autograd keeps
    if backbone.autocast:
        layer += 8 * width  # of the residual stream in fp32
    a_token = width * item * layers + layer if checkpointing else layer * layers
    most = CUDA_TOKENS if device.type == "cuda" else CPU_TOKENS
    # gradients and moments are not there yet: 12 bytes a parameter, shared out from stage 1 on
    pending = 12 * sum(getattr(p, "ds_numel", p.numel()) for p in backbone.parameters())
    left = free(device) - pending // (dist.world_size() if stage else 1)
    fits = (left // 2 - 2 * LOGITS_BYTES) // a_token
    return min(dist.all_gather(int(max(min(most, fits), min(max_length, most)))))


def free(device: torch.device) -> int:
    """Bytes that this process could still take on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def room_for_batch(row, budget: int):
    """`room_for` a `row` that was made under a budget of tokens, in training."""
    tokens = row.input_ids.shape[0]
    smaller = 256 * (min(tokens, budget) * 2 // 3 // 256)
    advice = f"try --micro_tokens {smaller}" if smaller else "lower --max_length"
    return room_for(
        f"a row of {tokens:,} tokens",
        f"(--micro_tokens is {budget:,}): {advice}, "
        "--gradient_checkpointing true, or ds_configs/zero2.json or zero3.json over more GPUs",
    )


@contextlib.contextmanager
def room_for(what: str, advice: str):
    """Ends the run with `advice` where `what` runs out of memory."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
            text in str(error) for text in OUT_OF_MEMORY_WORDS
        )
        if not known:
            raise
        logging.getLogger("zeropref").exception("out of memory")
        if not dist.is_main():
            print(f"error: rank {dist.rank()} ran out of memory in {what}", file=sys.stderr)
        fail(f"out of memory in {what} {advice}", code=1)
