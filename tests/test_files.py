"""Files that a run leaves have the mode that the user's umask gives to any other; folders that are
links to another disk.
"""

import os
import stat

import pytest
import tiny
import torch
from safetensors.torch import save_file

from train.files import follow_umask, replace_directory
from train.run import checkpoint_files, export


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


def test_a_directory_takes_the_place_of_a_link_and_not_of_what_it_shows(tmp_path):
    new, elsewhere, old = (tmp_path / name for name in ("new", "elsewhere", "old"))
    for folder in (new, elsewhere):
        folder.mkdir()
        (folder / folder.name).touch()
    old.symlink_to(elsewhere)
    replace_directory(new, old)
    assert [path.name for path in old.iterdir()] == ["new"] and not old.is_symlink()
    assert (elsewhere / "elsewhere").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "old"]


def test_no_checkpoint_stays_behind_a_link(tmp_path):
    """What --resume never starts over from: another disk's folder stays, and is empty."""
    (tmp_path / "elsewhere/step-3").mkdir(parents=True)
    (tmp_path / "elsewhere/latest").write_text("step-3\n")
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    checkpoint_files.remove_all(tmp_path / "checkpoints")
    assert (tmp_path / "checkpoints").is_symlink() and not [*(tmp_path / "elsewhere").iterdir()]
    checkpoint_files.remove_all(tmp_path / "nothing")
