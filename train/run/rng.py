"""A rank's random states, out of the generators and back: as tensors, so that no pickle is needed."""

import json
import random

import numpy as np
import torch


def capture() -> tuple:
    """This rank's random states: torch's, numpy's and Python's, and CUDA's where there is one."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def to_tensors(cpu, cuda, numpy, python) -> dict[str, torch.Tensor]:
    """`states` as a checkpoint holds them."""
    others = json.dumps([python, [numpy[0], numpy[1].tolist(), *numpy[2:]]]).encode()
    kept = {"random/torch": cpu, "random/others": torch.tensor(list(others), dtype=torch.uint8)}
    return kept if cuda is None else kept | {"random/cuda": cuda}


def restore(mine: dict[str, torch.Tensor]):
    """Put back what `tensors` gave."""
    torch.set_rng_state(mine["random/torch"])
    python, numpy = json.loads(bytes(mine["random/others"].tolist()))
    random.setstate((python[0], tuple(python[1]), python[2]))
    np.random.set_state(tuple(numpy))
    if "random/cuda" in mine and torch.cuda.is_available():
        torch.cuda.set_rng_state(mine["random/cuda"])
