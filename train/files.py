"""Files and folders: written whole or not at all, JSON that any reader takes, the user's cache."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path


def user_cache(name: str, cache_dir=None) -> Path:
    """The subfolder `name` of `cache_dir`, $ZEROPREF_CACHE or ~/.cache/zeropref."""
    return (
        Path(cache_dir or os.environ.get("ZEROPREF_CACHE") or "~/.cache/zeropref").expanduser()
        / name
    )


def replace_directory(new: Path, old: Path):
    """Put the finished directory `new` where `old` stands or stood; `old` is gone only when `new`
    has its name.
    """
    if old.exists():
        aside = old.with_name(old.name + ".old")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(old, aside)
        os.rename(new, old)
        shutil.rmtree(aside)
    else:
        os.rename(new, old)


def write_json(path: Path, content):
    """Write JSON, as `write_text` does."""
    write_text(
        path, json.dumps(json_safe(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def write_text(path: Path, text: str):
    """Write a small file under a temporary name, flushed to disk, and rename it."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    fsync(beside)
    os.rename(beside, path)


def fsync(path: Path):
    """Come back when what was written to a file, or the names in a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def json_safe(value):
    """The same with null for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256(path):
    """The hex sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
