"""Fixtures that several rooms share. Nothing here reaches the network."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu" if not os.path.exists("/dev/nvidia0") else "cuda"


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
