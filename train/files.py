"""Files and folders: written whole or not at all, JSON that any reader takes, the user's cache."""

import difflib
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

VERSION = "0.2.0"  # of the project: setup.cfg takes it from here
ROOT = Path(__file__).resolve().parent.parent  # the clone, or zeropref/ of an installed wheel


def write_text(path: Path, text: str):
    """Write a small file under a temporary name, fsync it, and rename it."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    fsync(unfinished)
    os.rename(unfinished, path)


def write_json(path: Path, content):
    """Write JSON, as `write_text` does."""
    text = json.dumps(json_safe(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def json_safe(value):
    """The same value with null for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fsync(path: Path):
    """Fsync a file, or a folder, which brings the names in it to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def follow_umask(*paths: Path):
    """Give files the mode of any new file there: safetensors makes its own for the owner alone."""
    for path in paths:
        probe = path.with_name(f"{path.name}.mode-{os.getpid()}")
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        os.chmod(path, mode)


def sha256(path) -> str:
    """The hex sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def replace_directory(new: Path, old: Path):
    """Put the finished directory `new` where `old` stands or stood.

    `old` is gone only when `new` has its name.
    """
    if not old.exists():
        os.rename(new, old)
        return
    aside = old.with_name(old.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(old, aside)
    os.rename(new, old)
    if aside.is_symlink():  # what a link shows is not ours to remove
        aside.unlink()
    else:
        shutil.rmtree(aside)


def user_cache(name: str, cache_dir=None) -> Path:
    """The subfolder `name` of `cache_dir`, $ZEROPREF_CACHE or ~/.cache/zeropref."""
    root = cache_dir or os.environ.get("ZEROPREF_CACHE") or "~/.cache/zeropref"
    return Path(root).expanduser() / name


def shipped(path) -> Path:
    """`path`, or where nothing stands there the file of that name in the project: a wheel's
    ds_configs/zero3.json and launch/recipes/NAME.yaml are found from any folder.
    """
    path = Path(path)
    ours = ROOT / path
    return ours if not path.exists() and ours.is_file() else path


def near_names(path) -> str:
    """ " (did you mean ...?)" with the nearest names in the path's folder, or nothing."""
    folder, name = os.path.split(os.path.normpath(path))
    try:
        there = set(os.listdir(folder or ".")) - {name}
        near = difflib.get_close_matches(name, sorted(there), 2)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        near = []
    return f" (did you mean {' or '.join(near)}?)" if near else ""
