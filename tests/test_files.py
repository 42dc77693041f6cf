"""Files that a run leaves have the mode that the user's umask gives to any other."""

import os
import stat

import pytest
import tiny
import torch
from safetensors.torch import save_file

from train.files import follow_umask
from train.run import export


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path, umask):
    lm = tiny.make_model()
    export.write_weights(tmp_path, lm, lm.state_dict())
    modes = {path.name: mode(path) for path in tmp_path.iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~umask}, modes
    alone = tmp_path / "alone.safetensors"
    save_file({"a": torch.zeros(2)}, alone)
    follow_umask(alone)
    assert mode(alone) == 0o666 & ~umask and not list(tmp_path.glob("*.mode-*"))
