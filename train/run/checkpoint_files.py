"""A checkpoint on disk: written beside its place, sealed by a manifest with hashes, renamed when it
is complete.

What stands in one is told in run/checkpoint.py. Only JSON and safetensors, so reading one runs
nobody's code.
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
from typing import NamedTuple

import torch
from safetensors import safe_open

from train.files import VERSION, fsync, json_safe, sha256, write_json, write_text

FORMAT = 2
WRITERS = {1: "zeropref 0.1"}  # of formats whose manifests do not name their writer
MANIFEST = "manifest.json"
LATEST = "latest"
QUEUED = 8  # tensors that may wait for the disk


class Damaged(ValueError):
    """A checkpoint that is not what its manifest says."""


class OtherFormat(Damaged):
    """A checkpoint that another version wrote."""


class Place(NamedTuple):
    """Where in a run something is: so many whole steps, and so many updates of the next one."""

    step: int
    updates: int = 0

    def __str__(self) -> str:
        within = f" and {self.updates} updates of the next" if self.updates else ""
        return f"step {self.step}{within}"


def directory_name(place: Place) -> str:
    """The directory of the checkpoint there: step-STEP, or step-STEP-UPDATES within a step."""
    return f"step-{place.step}" + (f"-{place.updates}" if place.updates else "")


def place_of(path: Path) -> Place | None:
    """The place that a checkpoint's directory names; None for another name."""
    match = re.fullmatch(r"step-(\d+)(?:-(\d+))?", path.name)
    return Place(int(match[1]), int(match[2] or 0)) if match else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`: the one that `latest` names first, then from the newest down."""
    places = {place_of(path): path for path in folder.glob("step-*")}
    places.pop(None, None)
    newest_first = [places[place] for place in sorted(places, reverse=True)]
    try:
        latest = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return newest_first
    return sorted(newest_first, key=lambda path: path != latest)


def read_manifest(checkpoint: Path) -> dict:
    """What a checkpoint says of itself, without its own hash.

    Damaged where it has no manifest or one that was changed, OtherFormat for another version's.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest.pop("sha256") != _digest(manifest):
            raise Damaged(f"{path} is not what was written (sha256)")
        if (number := manifest["format"]) != FORMAT:
            writer = manifest.get("version") or WRITERS.get(number, "another version of zeropref")
            raise OtherFormat(
                f"{checkpoint} was written by {writer} (checkpoint format {number}); zeropref "
                f"{VERSION} reads format {FORMAT}: finish the run with the version that began it"
            )
    except FileNotFoundError as error:
        raise Damaged(f"{checkpoint} has no {MANIFEST}") from error
    except Damaged:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path}: {error}") from error
    return manifest


def verify(checkpoint: Path, names: Iterable[str], manifest: dict):
    """Compare the files `names` with the manifest. Damaged says which one differs, and how."""
    for name in names:
        path, expected = checkpoint / name, manifest["files"][name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise Damaged(f"{path} has {size:,} bytes instead of {expected['bytes']:,}")
            if sha256(path) != expected["sha256"]:
                raise Damaged(f"{path} is not what was written (sha256)")
        except OSError as error:
            raise Damaged(f"{path}: {error.strerror}") from error


def manifest_entry(path: Path) -> dict:
    """Fsync a file; its entry in the manifest."""
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_tensors(
    path: Path, shapes: dict[str, tuple], tensors: Iterable[torch.Tensor | None]
) -> dict:
    """Stream fp32 tensors into a safetensors file; its entry for the manifest.

    shapes: key -> shape of what goes into this file. tensors: as many, in that order, and Nones in
    between, which are for other ranks' files. Goes through `tensors` to the end, whatever happens to
    the disk, because making them takes all ranks; OSError comes after that. Hashing and writing go on
    while the next tensor is made.
    """
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    header_bytes = json.dumps(header).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    digest, pending = hashlib.sha256(), []
    with (
        concurrent.futures.ThreadPoolExecutor(1) as disk,
        concurrent.futures.ThreadPoolExecutor(1) as hasher,
    ):

        def put(block):
            # `file` is looked up when the disk's thread gets there: by then it is open
            writing = disk.submit(lambda: file.write(block))
            pending.append((writing, hasher.submit(digest.update, block)))
            if len(pending) > QUEUED:
                concurrent.futures.wait(pending[-QUEUED])

        try:
            file = open(path, "wb")  # closed below, when the disk's thread has ended
        except OSError:
            for _ in tensors:
                pass
            raise
        try:
            put(struct.pack("<Q", len(header_bytes)) + header_bytes)
            for tensor in tensors:
                if tensor is not None:
                    values = tensor.detach().to("cpu", torch.float32).reshape(-1).numpy()
                    put(memoryview(values).cast("B"))
            for writing, hashing in pending:
                writing.result()
                hashing.result()
            file.flush()
            os.fsync(file.fileno())
        finally:
            disk.shutdown()
            file.close()
    return {"bytes": 8 + len(header_bytes) + end, "sha256": digest.hexdigest()}


def commit(unfinished: Path, final: Path, content: dict):
    """Finish a checkpoint: the manifest, everything on disk, the name, and `latest`, in that order."""
    manifest = {"format": FORMAT, "version": f"zeropref {VERSION}"} | content
    manifest = json.loads(json.dumps(json_safe(manifest)))  # as it is read again
    write_json(unfinished / MANIFEST, manifest | {"sha256": _digest(manifest)})
    fsync(unfinished)
    if final.exists():
        shutil.rmtree(final)
    os.rename(unfinished, final)
    fsync(final.parent)
    write_text(final.parent / LATEST, final.name + "\n")
    fsync(final.parent)


def prune(folder: Path, keep: int, after: Place | None = None):
    """Remove all but the newest `keep` checkpoints, and what unfinished ones left.

    after: those of later places than this go first, whatever their number.
    """
    for path in list_checkpoints(folder):
        if after is not None and place_of(path) > after:
            shutil.rmtree(path, ignore_errors=True)
    for path in [*list_checkpoints(folder)[keep:], *folder.glob("step-*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def remove_all(folder: Path):
    """Remove every checkpoint in `folder`, which may be a link to another disk and stays."""
    (folder / LATEST).unlink(missing_ok=True)
    for path in folder.glob("step-*"):
        shutil.rmtree(path, ignore_errors=True)


def flag_of(checkpoint: Path, flag: str):
    """The value of a run's flag when it wrote this checkpoint; None where it cannot be told."""
    try:
        return read_manifest(checkpoint)["flags"].get(flag)
    except Damaged:
        return None


class Reader:
    """The whole tensors of a checkpoint by key, whichever rank's file holds them."""

    def __init__(self, checkpoint: Path, manifest: dict):
        self._files = {}
        for name in manifest["files"]:
            if name.startswith("state-"):
                file = safe_open(checkpoint / name, framework="pt")
                self._files |= dict.fromkeys(file.keys(), file)

    def __call__(self, key: str) -> torch.Tensor:
        """The tensor of `key`, fp32 on the CPU. Damaged where there is none."""
        if key not in self._files:
            raise Damaged(f"the checkpoint has no {key}: it is another model's")
        return self._files[key].get_tensor(key)

    def shapes(self) -> dict[str, tuple]:
        """All keys, and the shapes of their tensors."""
        return {key: tuple(file.get_slice(key).get_shape()) for key, file in self._files.items()}


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of `tensors` whose keys begin with `prefix`, by the rest of the key."""
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def _digest(manifest):
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
