"""What a killed run leaves on its machine does not stop the next one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train.engine import leftovers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """A lock that nobody holds, where torch up to 2.13 would make it, and no second's wait."""
    monkeypatch.setattr(leftovers, "_kernel_releases_locks", lambda: False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(leftovers.time, "sleep", lambda seconds: None)
    path = tmp_path / "py311_cpu/deepspeed_shm_comm/lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_a_lock_that_nobody_holds_goes_and_is_said(lock, capsys):
    leftovers.remove_dead_build_locks()
    assert not lock.exists() and lock.parent.exists()
    assert capsys.readouterr().err == f"removed the lock of a build that was killed: {lock}\n"


def test_a_lock_that_is_held_stays(lock):
    """As torch's FileBaton holds it: open in another process."""
    hold = "import os, sys; os.open(sys.argv[1], os.O_RDONLY); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    leftovers.remove_dead_build_locks()
    assert lock.exists()
    holder.communicate(b"\n")
    leftovers.remove_dead_build_locks()
    assert not lock.exists()


def test_a_lock_made_anew_while_looking_stays(lock, monkeypatch):
    def another_process(seconds):
        lock.rename(lock.with_name("old"))  # so that its inode is not used again
        lock.touch()

    monkeypatch.setattr(leftovers.time, "sleep", another_process)
    leftovers.remove_dead_build_locks()
    assert lock.exists()


def test_other_machines_get_time_to_finish(lock, monkeypatch):
    """On a network file system the holder may run elsewhere: only a long silence tells."""
    monkeypatch.setattr(leftovers, "_others_see", lambda path: True)
    leftovers.remove_dead_build_locks()
    assert lock.exists()
    old = lock.stat().st_mtime - leftovers.LONGEST_BUILD - 60
    os.utime(lock, (old, old))
    leftovers.remove_dead_build_locks()
    assert not lock.exists()


def test_a_lock_of_the_kernel_s_stays(lock, monkeypatch, capsys):
    """torch from 2.14 on leaves the file behind after each build, and waits for nobody who is gone."""
    monkeypatch.setattr(leftovers, "_kernel_releases_locks", lambda: True)
    leftovers.remove_dead_build_locks()
    assert lock.exists() and not capsys.readouterr().err


def test_a_rank_starts_where_a_build_was_killed(tmp_path):
    """torch up to 2.13 alone waits for such a lock without end."""
    built = next(leftovers._build_folder().glob("**/deepspeed_shm_comm"), None)
    folder = tmp_path / "deepspeed_shm_comm"
    if built is None:
        folder.mkdir()  # it is compiled
    else:
        shutil.copytree(built, folder)
    (folder / "lock").touch()
    done = subprocess.run(
        [sys.executable, "-c", "from train.engine import dist; dist.init(); dist.shutdown()"],
        cwd=ROOT,
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    removed = not leftovers._kernel_releases_locks()
    assert ("removed the lock" in done.stderr) == removed
    assert (folder / "lock").exists() != removed
