"""Token log-probabilities of a frozen model on disk: a record a sequence, found by its token ids.

There is a folder for each model in each way of computing. A job that lacks records adds one
safetensors file under a name of its own, so two jobs can write at once. Records hold for any order,
epoch, batch or truncation that leads to the same token ids. What names a sequence is its digest
(data/packing.py).
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from train.data.packing import DIGEST
from train.files import follow_umask, fsync, user_cache

FORMAT = 1
MOST_BYTES = 20 << 30  # of all folders together; the least recently used ones go first
IN_USE = 3600.0  # seconds for which a folder that was touched stays


def directory(name: str) -> Path:
    """The folder of this name in the user's cache."""
    return user_cache("reference") / name


def read_records(folder: Path, wanted: set[bytes]) -> dict[bytes, np.ndarray]:
    """The records of `wanted` sequences: digest -> (tokens,) fp32 nats.

    A file that is damaged is logged and removed, not read.
    """
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            digests, lengths, values = _read_one(path)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            logging.getLogger("zeropref").warning(
                "%s is damaged (%s): removed, its records are made again", path, error
            )
            path.unlink(missing_ok=True)
            continue
        ends = np.cumsum(lengths)
        for number, start in enumerate(range(0, digests.size, DIGEST)):
            digest = digests[start : start + DIGEST].tobytes()
            if digest in wanted:
                found[digest] = values[ends[number] - lengths[number] : ends[number]]
    if folder.exists():
        os.utime(folder)
    return found


def _read_one(path):
    with safe_open(path, framework="np") as file:
        metadata = json.loads(file.metadata()["zeropref"])
        arrays = [file.get_tensor(name) for name in ("digests", "lengths", "values")]
    if metadata != {"format": FORMAT, "sha256": _checksum(arrays)}:
        raise ValueError("its checksum differs")
    return arrays


def write_records(folder: Path, records: dict[bytes, np.ndarray]):
    """Add a file with these records."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = [
        np.frombuffer(b"".join(records), dtype=np.uint8).copy(),
        np.array([len(values) for values in records.values()], dtype=np.int64),
        np.concatenate([np.asarray(values, dtype=np.float32) for values in records.values()]),
    ]
    metadata = json.dumps({"format": FORMAT, "sha256": _checksum(arrays)})
    unfinished = folder / f"{secrets.token_hex(8)}.tmp"
    save_file(
        dict(zip(("digests", "lengths", "values"), arrays, strict=True)),
        unfinished,
        metadata={"zeropref": metadata},
    )
    follow_umask(unfinished)
    fsync(unfinished)
    unfinished.rename(unfinished.with_suffix(".safetensors"))


def _checksum(arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()


def size(path: Path) -> int:
    """Bytes in a directory."""
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another job has just removed it
            total += file.stat().st_size if file.is_file() else 0
    return total


def evict(folder: Path, most: int = MOST_BYTES):
    """Remove the least recently used other folders until all together take at most `most` bytes."""
    others = [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]
    others.sort(key=lambda path: path.stat().st_mtime)
    total = size(folder.parent)
    for path in others:
        if total <= most or time.time() - path.stat().st_mtime < IN_USE:
            return
        total -= size(path)
        shutil.rmtree(path, ignore_errors=True)
