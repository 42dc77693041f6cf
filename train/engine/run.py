"""A run's folder: run.json, dropped.jsonl, a log a rank, and the refusal to write over another run."""

import contextlib
import importlib.metadata
import json
import logging
import platform
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from train.config import Exit, fail
from train.data.rows import DataError
from train.engine import dist
from train.engine.export import write_json
from train.models import builtin

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "accelerate", "safetensors", "tokenizers")
# Flags that say where a run stops or what it shows, not what it computes: a run may be taken up with others.
MAY_DIFFER = ("output", "resume", "keep", "save_every", "save_minutes")


class Run:
    """OUTPUT/ and its run.json. Every rank makes one; rank 0 writes."""

    def __init__(self, folder, flags: dict):
        """ValueError where `folder` holds a run with other flags, or cannot be written."""
        self.path = Path(folder)
        self.record = {"status": "running", "flags": flags}
        self.began, self._builtin = time.time(), None
        problem = None
        if dist.first():
            problem = self._problem(flags)
        problem = dist.share(problem)
        if problem:
            raise ValueError(problem)
        self.finished = dist.share(self.previous().get("status") == "finished")
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        self._log()

    def _problem(self, flags):
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".writable").touch()
            (self.path / ".writable").unlink()
        except OSError as error:
            return f"cannot write to {self.path}: {error}"
        before = self.previous().get("flags")
        if before is None:
            foreign = [p.name for p in self.path.iterdir() if p.name != "logs"]
            return (
                f"{self.path} holds other files ({', '.join(sorted(foreign)[:3])}); choose another --output"
                if foreign
                else None
            )
        other = [k for k in sorted({*before, *flags}) if before.get(k) != flags.get(k) and k not in MAY_DIFFER]
        if not other:
            return None
        shown = "; ".join(f"--{k} was {before.get(k)!r}, is {flags.get(k)!r}" for k in other[:4])
        return f"{self.path} holds another run ({shown}); nothing was overwritten, choose another --output"

    def previous(self) -> dict:
        """What run.json says, {} where there is none."""
        try:
            return json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(f"{self.path / 'run.json'} is damaged: {error}") from error

    def _log(self):
        handler = logging.FileHandler(self.path / "logs" / f"rank-{dist.rank()}.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.log = logging.getLogger("zeropref")
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        self.log.handlers = [handler]

    def note(self, **facts):
        """Add to run.json, on rank 0."""
        self.record |= facts
        if dist.first():
            write_json(self.path / "run.json", self.record)

    def dropped(self, rows: dict):
        """Write dropped.jsonl: the rows left out of each split, with source, number and reason. On rank 0."""
        if dist.first():
            lines = [json.dumps({"split": split, **row._asdict()}) for split in rows for row in rows[split]]
            (self.path / "dropped.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def say(self, line: str):
        """A line on the terminal and in the log, on rank 0."""
        self.log.info(line)
        if dist.first():
            tqdm.write(line)

    def model_path(self, model) -> str:
        """The model directory or hub name that a flag means; None is the built-in model, fetched here if need be."""
        if model is not None:
            return model
        if self._builtin is None:
            with dist.one_at_a_time():
                self._builtin = str(builtin.fetch(say=self.say))
        return self._builtin

    def finish(self, **facts):
        """Say that the run is complete."""
        self.note(status="finished", seconds=self.seconds(), **facts)

    def seconds(self) -> float:
        """Wall-clock time since the run began, data and models included."""
        return round(time.time() - self.began, 1)


@contextlib.contextmanager
def at_the_door():
    """What is wrong with flags, data or models is said in one line before the first step, with its exit code."""
    try:
        yield
    except DataError as error:
        fail(str(error), Exit.DATA)
    except (ValueError, builtin.ModelUnavailable) as error:
        logging.getLogger("zeropref").exception("refused")
        fail(str(error), Exit.FLAGS)


def load_tokenizer(path, trust_remote_code=False):
    """The tokenizer of a model directory or hub name; ValueError that names it."""
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load a tokenizer from {path}: {error}") from error


def check_vocabulary(backbone, tokenizer):
    """ValueError where the tokenizer has ids that the model has no embedding for."""
    rows = backbone.lm.config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model's vocabulary {rows:,}: they do not belong together"
        )


def describe(data, sources) -> dict:
    """What run.json says of a data set."""
    return {"sources": list(map(str, sources)), "groups": len(data), "dropped": len(data.dropped),
            "truncated": int(data.truncated.any(1).sum()), "tokens": int(data.lengths.sum()),
            "fingerprint": data.fingerprint}  # fmt: skip


def versions() -> dict[str, str]:
    """The versions of what computes, for run.json."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


def hardware(device: torch.device) -> dict:
    """What the run computes on, for run.json and the model card."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "kind": kind, "world": dist.world(), "threads": torch.get_num_threads()}
