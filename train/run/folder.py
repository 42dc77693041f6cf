"""A run's folder: run.json, dropped.jsonl, a log a rank, and the refusal to write over another run."""

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import re
import secrets
import time
from pathlib import Path

import torch
from tqdm import tqdm

from train.engine import dist
from train.files import write_json, write_text
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
# Flags that say where a run writes, what it shows and how it fits the machine, not what it
# computes.
MAY_DIFFER = (
    "output",
    "micro_tokens",
    "gradient_checkpointing",
    "log_every",
    "ds_config",
    "reference_ds_config",
    "save_every",
    "save_minutes",
    "keep",
    "resume",
    "max_skipped",
)
logging.getLogger("zeropref").addHandler(
    logging.NullHandler()
)  # before a run has its file, nothing goes to stderr


class Run:
    """OUTPUT/ and its run.json. Every rank makes one; rank 0 writes, from `start` on."""

    def __init__(self, folder, flags: dict):
        """ValueError where `folder` holds a run with other flags, or cannot be written."""
        self.path = Path(folder)
        self.record = {"status": "running", "flags": flags}
        self.began, self._builtin, self._started, self._dropped, self._no_lock = (
            time.time(),
            None,
            False,
            [],
            "",
        )
        problem, finished = dist.broadcast(self._look(flags) if dist.is_main() else None)
        if problem:
            raise ValueError(problem)
        self.finished = finished
        self._one_folder()
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        self._log()
        if self._no_lock:
            self.say(
                f"{self.path} cannot be locked ({self._no_lock}): see to it that no second run writes there"
            )

    def _one_folder(self):
        """ValueError where a rank sees another folder under this name: checkpoints and logs need
        one for all.
        """
        nonce = dist.broadcast(secrets.token_hex(8) if dist.is_main() else None)
        token = self.path / f".shared-{nonce}"
        if dist.is_main():
            token.touch()
        dist.barrier()
        blind = [i for i, seen in enumerate(dist.all_gather(token.exists())) if not seen]
        if dist.is_main():
            token.unlink()
        if blind:
            raise ValueError(
                f"--output {self.path} is not one folder for all: ranks {blind} do not see rank 0's files"
            )

    def _look(self, flags):
        """What speaks against writing here, or None; and whether this very run is complete."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".writable").touch()
            (self.path / ".writable").unlink(missing_ok=True)
            foreign = [
                p.name
                for p in self.path.iterdir()
                if p.name not in ("logs", "status", "run.json.tmp") and not p.name.startswith(".")
            ]
            before = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            old = before["flags"].items()
        except FileNotFoundError:
            shown = ", ".join(sorted(foreign)[:3])
            used = (
                f"{self.path} holds other files ({shown}); choose another --output"
                if foreign
                else self._lock()
            )
            return used, False
        except OSError as error:
            return f"cannot write to {self.path}: {error}", False
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return (
                f"{self.path / 'run.json'} is damaged ({error}); remove it or choose another --output",
                False,
            )
        old = dict(old)
        other = [
            k for k in sorted({*old, *flags}) if old.get(k) != flags.get(k) and k not in MAY_DIFFER
        ]
        if not other:
            return self._lock(), before.get("status") == "finished"
        shown = "; ".join(f"--{k} was {old.get(k)!r}, is {flags.get(k)!r}" for k in other[:4])
        return (
            f"{self.path} holds another run ({shown}); nothing was overwritten, choose another --output",
            False,
        )

    def _lock(self):
        """What speaks against writing here while another process does, or None; a lock ends with
        its process.
        """
        try:
            (self.path / "logs").mkdir(exist_ok=True)
            self._locked = open(self.path / "logs/lock", "a+", encoding="utf-8")
        except OSError as error:
            return f"cannot write to {self.path}: {error}"
        try:
            fcntl.lockf(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._locked.seek(0)
            return f"{self.path} is being written by another run ({self._locked.read().strip()}); nothing was changed"
        except OSError as error:  # a file system without locks
            self._no_lock = error.strerror
        with contextlib.suppress(OSError):  # a full disk: for the next one's message only
            self._locked.truncate(0)
            print(f"process {os.getpid()} on {platform.node()}", file=self._locked, flush=True)
        return None

    def start(self):
        """All is settled: from here on this folder is this run's. What was refused before leaves
        only a log.
        """
        self._started = True
        self.note()
        self.status("running")
        if dist.is_main():
            lines = "".join(json.dumps(row) + "\n" for row in self._dropped)
            (self.path / "dropped.jsonl").write_text(lines, encoding="utf-8")

    def _log(self):
        handler = logging.FileHandler(
            self.path / "logs" / f"rank-{dist.rank()}.log", encoding="utf-8"
        )
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.log = logging.getLogger("zeropref")
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        self.log.handlers = [handler]

    def note(self, **facts):
        """Add to run.json, on rank 0."""
        self.record |= facts
        if dist.is_main() and self._started:
            write_json(self.path / "run.json", self.record)

    def status(self, word: str):
        """One word in OUTPUT/status for wrappers: running, preempted, failed or finished. Rank 0
        writes it.
        """
        if dist.is_main():
            try:
                write_text(self.path / "status", word + "\n")
            except OSError as error:  # a full disk must not keep a run from ending in order
                self.log.warning("status %s was not written: %s", word, error)

    def dropped(self, rows: dict):
        """The rows left out of each split, with source, number and reason, for dropped.jsonl."""
        self._dropped += [
            {"split": split, **row._asdict()} for split in rows for row in rows[split]
        ]

    def say(self, line: str):
        """A line on the terminal and in the log, on rank 0."""
        self.log.info(line)
        if dist.is_main():
            tqdm.write(line)

    def model_path(self, model) -> str:
        """The model directory or hub name that a flag means; None is the built-in model, fetched
        here if need be.
        """
        if model is not None:
            return model
        if self._builtin is None:
            with dist.main_process_first():
                self._builtin = str(builtin.fetch(say=self.say))
        return self._builtin

    def finish(self, **facts):
        """Say that the run is complete."""
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
    }


def versions() -> dict[str, str]:
    """The versions of what computes, for run.json."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


def hardware(device: torch.device) -> dict:
    """What the run computes on, for run.json and the model card."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": device.type,
        "kind": kind,
        "world": dist.world_size(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The CPU's name as Linux gives it, else its architecture."""
    with contextlib.suppress(OSError):
        if found := re.search(
            r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8")
        ):
            return found[1]
    return platform.processor() or platform.machine()
