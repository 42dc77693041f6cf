"""A checkpoint on disk: written beside its place, sealed by a manifest with hashes, renamed when it
is complete.

Only JSON and safetensors, so reading one runs nobody's code.
"""

import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from train.files import fsync, json_safe, sha256, write_json, write_text

FORMAT, MANIFEST, LATEST = 1, "manifest.json", "latest"
QUEUED = 8  # tensors that may wait for the disk


class Damaged(ValueError):
    """A checkpoint that is not what its manifest says."""


def directory_name(step: int) -> str:
    """The directory of the checkpoint after `step` steps."""
    return f"step-{step}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the one that `latest` names first, then from the newest down."""
    steps = {
        int(m[1]): p for p in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))
    }
    newest = [steps[number] for number in sorted(steps, reverse=True)]
    try:
        named = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return newest
    return sorted(newest, key=lambda path: path != named)


def read_manifest(checkpoint: Path) -> dict:
    """What a checkpoint says of itself. Damaged where it has no manifest, or not one of this
    format.
    """
    try:
        told = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise Damaged(f"{checkpoint} has format {told['format']}, this version reads {FORMAT}")
        if told.pop("sha256") != _digest(told):
            raise Damaged(f"{checkpoint / MANIFEST} is not what was written (sha256)")
    except FileNotFoundError as error:
        raise Damaged(f"{checkpoint} has no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise (
            error if isinstance(error, Damaged) else Damaged(f"{checkpoint / MANIFEST}: {error}")
        ) from error
    return told


def verify(checkpoint: Path, names: Iterable[str], told: dict):
    """Compare the files `names` with the manifest `told`. Damaged says which one differs, and how."""
    for name in names:
        path, manifest_entry = checkpoint / name, told["files"][name]
        try:
            size = path.stat().st_size
            if size != manifest_entry["bytes"]:
                raise Damaged(f"{path} has {size:,} bytes instead of {manifest_entry['bytes']:,}")
            if sha256(path) != manifest_entry["sha256"]:
                raise Damaged(f"{path} is not what was written (sha256)")
        except OSError as error:
            raise Damaged(f"{path}: {error.strerror}") from error


def manifest_entry(path: Path) -> dict:
    """A file's line in the manifest, after it has reached the disk."""
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _digest(told):
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def write_tensors(
    path: Path, shapes: dict[str, tuple], tensors: Iterable[torch.Tensor | None]
) -> dict:
    """Stream fp32 tensors into a safetensors file; its entry for the manifest.

    shapes: key -> shape of what goes into this file. tensors: as many, in that order, and Nones in
    between, which are for other ranks' files. Goes through `tensors` to the end, whatever happens
    to the disk, because making them takes all ranks; OSError comes after that. Hashing and writing
    go on while the next tensor is made.
    """
    header, at = {}, 0
    for key, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest, pending = hashlib.sha256(), []
    with (
        concurrent.futures.ThreadPoolExecutor(1) as disk,
        concurrent.futures.ThreadPoolExecutor(1) as hasher,
    ):

        def put(block):
            pending.append(
                (disk.submit(lambda: file.write(block)), hasher.submit(digest.update, block))
            )
            if len(pending) > QUEUED:
                concurrent.futures.wait(pending[-QUEUED])

        try:
            file = open(path, "wb")  # closed below, when the disk's thread has ended
        except OSError:
            for _ in tensors:
                pass
            raise
        try:
            put(struct.pack("<Q", len(head)) + head)
            for tensor in tensors:
                if tensor is not None:
                    put(
                        memoryview(
                            tensor.detach().to("cpu", torch.float32).reshape(-1).numpy()
                        ).cast("B")
                    )
            for written, hashed in pending:
                written.result(), hashed.result()
            file.flush()
            os.fsync(file.fileno())
        finally:
            disk.shutdown()
            file.close()
    return {"bytes": 8 + len(head) + at, "sha256": digest.hexdigest()}


def commit(beside: Path, place: Path, told: dict):
    """The last act: the manifest, everything on disk, the name, and `latest`."""
    told = json.loads(json.dumps(json_safe({"format": FORMAT} | told)))  # as it is read again
    write_json(beside / MANIFEST, told | {"sha256": _digest(told)})
    fsync(beside)
    if place.exists():
        shutil.rmtree(place)
    os.rename(beside, place)
    fsync(place.parent)
    write_text(place.parent / LATEST, place.name + "\n")
    fsync(place.parent)


def prune(folder: Path, keep: int, after: int | None = None):
    """Remove all but the newest `keep` checkpoints, those of steps `after` one, and what unfinished
    ones left.
    """
    for path in [
        p
        for p in list_checkpoints(folder)
        if after is not None and int(p.name.removeprefix("step-")) > after
    ]:
        shutil.rmtree(path, ignore_errors=True)
    for path in [*list_checkpoints(folder)[keep:], *folder.glob("step-*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def flag_of(checkpoint: Path, flag: str):
    """The value of a run's flag when it wrote this checkpoint; None where it cannot be told."""
    try:
        return read_manifest(checkpoint)["flags"].get(flag)
    except Damaged:
        return None


class Reader:
    """The tensors of a checkpoint by key, whichever rank's file holds them."""

    def __init__(self, checkpoint: Path, told: dict):
        self._where = {}
        for name in told["files"]:
            if name.startswith("state-"):
                file = safe_open(checkpoint / name, framework="pt")
                self._where |= dict.fromkeys(file.keys(), file)

    def __call__(self, key: str) -> torch.Tensor:
        """The tensor of `key`, fp32 on the CPU. Damaged where there is none."""
        if key not in self._where:
            raise Damaged(f"the checkpoint has no {key}: it is another model's")
        return self._where[key].get_tensor(key)

    def shapes(self) -> dict[str, tuple]:
        """All keys, and the shapes of their tensors."""
        return {key: tuple(file.get_slice(key).get_shape()) for key, file in self._where.items()}
