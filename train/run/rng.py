"""A rank's random states, out of the generators and back: as tensors, so that no pickle is needed."""

import json
import random
from collections.abc import Callable

import numpy as np
import torch


def capture() -> Callable[[], dict[str, torch.Tensor]]:
    """Take down this rank's random states; what makes the tensors `restore` takes of them.

    torch's, numpy's and Python's, and CUDA's where there is one. Taking them down is cheap, turning
    them into tensors is left to whoever needs those.
    """
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    numpy, python = np.random.get_state(), random.getstate()

    def to_tensors():
        others = json.dumps([python, [numpy[0], numpy[1].tolist(), *numpy[2:]]]).encode()
        states = {"torch": cpu, "others": torch.tensor(list(others), dtype=torch.uint8)}
        return states if cuda is None else states | {"cuda": cuda}

    return to_tensors


def restore(states: dict[str, torch.Tensor]):
    """Put the states back into the generators."""
    torch.set_rng_state(states["torch"])
    python, numpy = json.loads(bytes(states["others"].tolist()))
    random.setstate((python[0], tuple(python[1]), python[2]))
    np.random.set_state(tuple(numpy))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
