"""A run's folder: run.json, dropped.jsonl, a log a rank, and the refusal to write over another run."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import secrets
import time
from collections.abc import Collection
from pathlib import Path

import torch
from tqdm import tqdm

from train.engine import dist
from train.files import VERSION, write_json, write_text
from train.models import builtin

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "accelerate",
    "safetensors",
    "tokenizers",
)
# What a run that was refused leaves, or one that has not come to its first line in run.json.
HARMLESS = ("logs", "status", "run.json.tmp")
VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
# Before a run has its file, nothing that is logged goes to stderr.
logging.getLogger("zeropref").addHandler(logging.NullHandler())


class _Terminal(logging.Handler):
    """Shows on the terminal what the library warns of; what has a traceback is for the log alone."""

    def emit(self, record):
        if not record.exc_info:
            tqdm.write(f"warning: {record.getMessage()}")


class RunFolder:
    """OUTPUT/ and its run.json. Every rank makes one; rank 0 writes, from `start` on."""

    def __init__(
        self, path, flags: dict, may_change: Collection[str] = (), defaults: dict | None = None
    ):
        """flags: all of the run's, for run.json. may_change: the names of those that may be others
        when the run continues. defaults: what a flag was in a run that did not know it. ValueError
        where `path` holds a run with other flags, or cannot be
        written. Every rank calls this.
        """
        self.path = Path(path)
        self.record = {"status": "running", "flags": flags}  # what run.json says
        self.began = time.time()
        self.started = False
        self._may_change = may_change
        self._defaults = defaults or {}
        self._builtin_model = None
        self._dropped_rows = []
        self._lock_file = None
        self._no_lock = ""  # why the folder cannot be locked
        problem, finished = dist.broadcast(self._examine(flags) if dist.is_main() else None)
        if problem:
            raise ValueError(problem)
        self.finished = finished  # this very run is complete
        self._require_one_folder()
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        self._open_log()
        if self._no_lock:
            self.say(
                f"{self.path} cannot be locked ({self._no_lock}): see to it that no second run "
                "writes there"
            )

    def _examine(self, flags) -> tuple[str | None, bool]:
        """What speaks against writing here, or None; and whether this very run is complete."""
        if found := VARIABLE.search(str(self.path)):
            return (
                f"--output {self.path}: {found[0]} is a variable, which a shell replaces and a file does "
                "not: write the folder out, or pass --output on the command line"
            ), False
        run_json = self.path / "run.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".writable").touch()
            (self.path / ".writable").unlink(missing_ok=True)
            names = [path.name for path in self.path.iterdir()]
        except OSError as error:  # FileNotFoundError too: /proc has no room for folders
            reason = error.strerror or error
            return f"cannot write to --output {self.path}: {reason}; choose another --output", False
        try:
            before = json.loads(run_json.read_text(encoding="utf-8"))
            old = self._defaults | dict(before["flags"].items())
        except FileNotFoundError:
            others = sorted(n for n in names if n not in HARMLESS and not n.startswith("."))
            if not others:
                return self._take_lock(), False
            shown = ", ".join(others[:3])
            return f"{self.path} holds other files ({shown}); choose another --output", False
        except OSError as error:
            return f"{run_json} cannot be read: {error.strerror or error}", False
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{run_json} is damaged ({error}); remove it or choose another --output", False
        different = [
            name
            for name in sorted({*old, *flags})
            if old.get(name) != flags.get(name) and name not in self._may_change
        ]
        if not different:
            return self._take_lock(), before.get("status") == "finished"
        shown = "; ".join(
            f"--{name} was {old.get(name)!r}, is {flags.get(name)!r}" for name in different[:4]
        )
        return (
            f"{self.path} holds another run ({shown}); nothing was overwritten, choose another "
            "--output"
        ), False

    def _take_lock(self) -> str | None:
        """What speaks against writing here while another process does, or None.

        A POSIX record lock: it ends with its process, and no forked worker inherits it.
        """
        try:
            (self.path / "logs").mkdir(exist_ok=True)
            self._lock_file = open(self.path / "logs/lock", "a+", encoding="utf-8")
        except OSError as error:
            return f"cannot write to {self.path}: {error}"
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._lock_file.seek(0)
            holder = self._lock_file.read().strip()
            return f"{self.path} is being written by another run ({holder}); nothing was changed"
        except OSError as error:  # a file system without locks
            self._no_lock = error.strerror
        with contextlib.suppress(OSError):  # a full disk: for the next one's message only
            self._lock_file.truncate(0)
            holder = f"process {os.getpid()} on {platform.node()}"
            print(holder, file=self._lock_file, flush=True)
        return None

    def _require_one_folder(self):
        """Raise ValueError where a rank sees another folder under this name.

        Checkpoints and logs need one for all.
        """
        nonce = dist.broadcast(secrets.token_hex(8) if dist.is_main() else None)
        token = self.path / f".shared-{nonce}"
        if dist.is_main():
            token.touch()
        dist.barrier()
        blind = [i for i, sees_it in enumerate(dist.all_gather(token.exists())) if not sees_it]
        if dist.is_main():
            token.unlink()
        if blind:
            raise ValueError(
                f"--output {self.path} is not one folder for all: ranks {blind} do not see rank 0's "
                "files"
            )

    def _open_log(self):
        name = f"rank-{dist.rank()}.log"
        handler = logging.FileHandler(self.path / "logs" / name, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.log = logging.getLogger("zeropref")
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        self.log.handlers = [handler, *([_Terminal(logging.WARNING)] if dist.is_main() else [])]

    def start(self):
        """Take the folder: everything is settled, and what was refused before leaves only a log."""
        self.started = True
        self.note()
        self.status("running")
        if dist.is_main():
            lines = "".join(json.dumps(row) + "\n" for row in self._dropped_rows)
            (self.path / "dropped.jsonl").write_text(lines, encoding="utf-8")

    def note(self, **facts):
        """Add facts to run.json, on rank 0."""
        self.record |= facts
        if dist.is_main() and self.started:
            write_json(self.path / "run.json", self.record)

    def status(self, word: str):
        """Write one word into OUTPUT/status for wrappers: running, preempted, failed or finished."""
        if dist.is_main():
            try:
                write_text(self.path / "status", word + "\n")
            except OSError as error:  # a full disk must not keep a run from ending in order
                self.log.warning("status %s was not written: %s", word, error)

    def note_dropped(self, rows: dict[str, list]):
        """Keep the rows left out of each split, with source, number and reason, for dropped.jsonl."""
        for split, dropped in rows.items():
            self._dropped_rows += [{"split": split, **row._asdict()} for row in dropped]

    def say(self, line: str):
        """Print a line on the terminal and into the log, on rank 0."""
        self.log.info(line)
        if dist.is_main():
            tqdm.write(line)

    def model_path(self, model: str | None) -> str:
        """The model directory or hub name that a flag means; None is the built-in model, fetched
        where it is not there yet. Every rank calls this.
        """
        if model is not None:
            return model
        if self._builtin_model is None:
            with dist.main_process_first():
                self._builtin_model = str(builtin.fetch(say=self.say))
        return self._builtin_model

    def finish(self, **facts):
        """Note that the run is complete."""
        self.note(status="finished", seconds=self.seconds(), **facts)
        self.status("finished")

    def seconds(self) -> float:
        """Wall-clock time since the run began, data and models included."""
        return round(time.time() - self.began, 1)


def describe(data, sources) -> dict:
    """What run.json says of a data set."""
    return {
        "sources": list(map(str, sources)),
        "groups": len(data),
        "dropped": len(data.dropped),
        "truncated": int(data.truncated.any(1).sum()),
        "tokens": int(data.lengths.sum()),
        "fingerprint": data.fingerprint,
        "rows_fingerprint": rows_fingerprint(data),
    }


def rows_fingerprint(data) -> str:
    """A hash of which rows these are and of their texts, the same under any tokenizer, template and
    lengths.
    """
    texts = data.prompts if data.contents is None else data.contents
    return hashlib.sha256(data.rows.tobytes() + texts.tobytes()).hexdigest()


def versions() -> dict[str, str]:
    """The versions of what computes, for run.json."""
    packages = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"zeropref": VERSION, "python": platform.python_version()} | packages


def hardware(device: torch.device) -> dict:
    """What the run computes on, for run.json and the model card."""
    return {
        "device": device.type,
        "kind": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "world": dist.world_size(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The CPU's name as Linux gives it, else its architecture."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if found := re.search(r"model name\s*: (.+)", text):
            return found[1]
    return platform.processor() or platform.machine()
