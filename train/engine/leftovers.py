"""What a run would leave on its machine for the next one to trip over.

torch compiles DeepSpeed's C++ operations into one folder a user, under a lock that up to torch 2.13
is a plain file. A process killed while it holds the lock leaves it behind, and every later process
waits for it without end and without a word. DeepSpeed's collectives on CPU share 69 MB a rank through
a file of /dev/shm, which DeepSpeed never removes: it stays in main memory until the machine is
restarted.
"""

import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path

import torch

SHARED_MEMORY = Path("/dev/shm")
# On a file system that other machines see, a lock's holder may be there. No operation takes so long.
LONGEST_BUILD = 30 * 60  # seconds
NETWORK_FILE_SYSTEMS = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse",
    "cifs",
    "smb",
    "9p",
    "afs",
)


def remove_dead_build_locks():
    """Remove the locks of builds that nobody makes any more. Any rank may call this, at any time."""
    if _kernel_releases_locks():
        return
    root = _build_folder()
    if not list(_locks(root)):
        return
    with contextlib.suppress(OSError), open(root / "zeropref.lock", "w") as gate:
        # One at a time: a lock seen dead must not be another process's new one when it is removed.
        fcntl.flock(gate, fcntl.LOCK_EX)
        suspects = {lock: _identity(lock) for lock in _locks(root) if _is_dead(lock)}
        if not suspects:
            return
        time.sleep(1)  # a builder closes the file just before it removes it
        for lock, identity in suspects.items():
            if identity is not None and _identity(lock) == identity and _is_dead(lock):
                lock.unlink(missing_ok=True)
                print(f"removed the lock of a build that was killed: {lock}", file=sys.stderr)


def unlink_shared_memory(rank: int):
    """Take this rank's buffer out of /dev/shm, so that it goes when its processes do.

    To be called once every rank has opened it: who has it open keeps it.
    """
    name = "deepspeed_allreduce_buffer_{}_{}_{}_{}".format(
        os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], rank
    )
    with contextlib.suppress(OSError):
        (SHARED_MEMORY / name).unlink(missing_ok=True)


def _build_folder() -> Path:
    """Where torch compiles extensions, as torch.utils.cpp_extension finds it."""
    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "torch_extensions"


def _kernel_releases_locks() -> bool:
    """Whether torch's locks end with the process that holds them, and their files mean nothing and
    stay: from 2.14 on.
    """
    return torch.__version__ >= (2, 14)


def _locks(root: Path):
    """torch's lock files: ROOT/NAME/lock, and ROOT/py311_cu126/NAME/lock in the default folder."""
    yield from root.glob("*/lock")
    yield from root.glob("*/*/lock")


def _identity(path: Path):
    """What tells one file of this name from a later one; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _is_dead(lock: Path) -> bool:
    """Whether no process holds `lock`: its holder keeps it open for as long as the build takes."""
    if _is_open(lock):
        return False
    try:
        age = time.time() - lock.stat().st_mtime
    except OSError:
        return False
    return age > LONGEST_BUILD or not _others_see(lock)


def _is_open(path: Path) -> bool:
    """Whether a process of this user on this machine has the file open."""
    target = str(path.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) == target:
                return True
    return False


def _others_see(path: Path) -> bool:
    """Whether `path` is on a file system that other machines may have mounted too."""
    path, longest, kind = path.resolve(), -1, ""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return True
    for mount in mounts:
        _, place, this_kind, *_ = mount.split(" ")
        place = place.replace("\\040", " ")
        if path.is_relative_to(place) and len(place) >= longest:
            longest, kind = len(place), this_kind
    return kind.startswith(NETWORK_FILE_SYSTEMS)
