"""Fixtures that several rooms share. Nothing here reaches the network."""

import os
import sys
from pathlib import Path

import pytest

# The environment's own ninja and launchers, activated or not: another version of ninja compiles
# DeepSpeed's op anew.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# a container may have the machine's third GPU alone
os.environ["DS_ACCELERATOR"] = "cuda" if [*Path("/dev").glob("nvidia[0-9]*")] else "cpu"


def pytest_collection_modifyitems(items):
    """Tests that need CUDA say so where there is none."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny Llama and a real tokenizer, as a user's model directory."""
    import tiny

    return tiny.save_model(tmp_path_factory.mktemp("models") / "llama")
