"""What the benchmarks share: contenders that take turns, a fresh process each, and a report on what they
took.

A benchmark is a script that calls `run` with a Contest; its docstring says what is measured. What the
benchmarks of a training step on pairs share besides is tests/benchmarks/pair_steps.py, those of
rollouts tests/benchmarks/replay.py.

Peak memory is the whole process's: ru_maxrss, nothing deducted, on CPU;
torch.cuda.max_memory_allocated on CUDA.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from train.models import builtin


class Contest(NamedTuple):
    """A benchmark."""

    script: str  # its file
    doc: str  # for --help
    # kind -> (job, n of the name "kind/n" or 0) -> what was measured, with "said", a line about it
    contenders: dict[str, Callable]
    add_arguments: Callable  # to a parser of the shared ones
    check: Callable  # args -> what is wrong with them, or None
    names: Callable  # args -> contenders by name, "kind" or "kind/n"
    report: Callable  # (args, names, runs) -> (the table and what follows, whether all is well)
    first: tuple[str, ...] = ()  # names that every round begins with; the others take turns at it


def run(contest: Contest):
    """The benchmark as its command line has it, or one contender's turn in a process of its own."""
    if not sys.argv[-1].startswith("{"):
        main(contest)
        return
    job = json.loads(sys.argv[-1])
    sys.argv = sys.argv[:1]
    kind, _, number = job["contender"].partition("/")
    found = contest.contenders[kind](job, int(number or 0))
    found["threads"] = torch.get_num_threads()
    Path(job["out"]).write_text(json.dumps(found))


# In a process of its own: what one contender's turn needs.


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def now(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def clock(device):
    """A callback of transformers' Trainer that keeps the seconds of each step and what is logged of it."""

    class Clock(transformers.TrainerCallback):
        seconds, log = [], []

        def on_step_begin(self, *_, **__):
            self.began = now(device)

        def on_step_end(self, *_, **__):
            self.seconds.append(now(device) - self.began)

        def on_log(self, *_, logs, **__):
            self.log += [logs] if "loss" in logs else []

        def logged(self, name) -> list[float]:
            """What was logged as `name` of each step."""
            return [float(logs[name]) for logs in self.log]

    return Clock()


def trainer_options(job, device) -> dict:
    """TRL's arguments that its trainers share: the same work as ours, nothing besides."""
    return dict(
        max_steps=1 + job["steps"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        bf16=job["precision"] == "bf16",
        use_cpu=device.type == "cpu",
        gradient_checkpointing=job["trl_checkpointing"],
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )


def steps_said(seconds, peak_gb) -> str:
    """A line about measured steps."""
    steps = ", ".join(f"{each:.3f} s" for each in seconds)
    return f"{steps} (the first warms up), {peak_gb:.2f} GB"


# In the first process, which loads no model: a child's ru_maxrss begins at its parent's.


def main(contest: Contest):
    args = arguments(contest)
    if args.model is None:
        args.model = str(builtin.fetch(say=lambda line: print(line, file=sys.stderr)))
    names = contest.names(args)
    others = [name for name in names if name not in contest.first]
    runs = []
    with tempfile.TemporaryDirectory(prefix="contest-") as shared:
        for number in range(args.rounds):
            turn = number % max(len(others), 1)
            for precision in args.precision:
                for name in (*contest.first, *others[turn:], *others[:turn]):
                    found = spawn(contest, args, name, precision, shared)
                    runs.append(
                        {"contender": name, "precision": precision, "round": number} | found
                    )
                    said = f"failed: {found['failed']}" if "failed" in found else found["said"]
                    print(
                        f"round {number + 1}: {name} {precision}: {said}, load "
                        f"{found['load_before']:.1f} before",
                        file=sys.stderr,
                        flush=True,
                    )
                    if name in contest.first and "failed" in found:
                        sys.exit(1)
                    if args.json:
                        Path(args.json).write_text(
                            json.dumps({"arguments": vars(args), "runs": runs}, indent=1)
                        )
    lines, is_well = contest.report(args, names, runs)
    print("\n".join(lines))
    sys.exit(0 if is_well and not any("failed" in r for r in runs) else 1)


def arguments(contest):
    parser = argparse.ArgumentParser(
        description=contest.doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a model directory; default: the built-in model")
    add("--rounds", type=int, default=3, help="turns of every contender (default 3)")
    add("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    add("--threads", type=int, help="CPU threads of each process; default: torch's own choice")
    add("--json", help="file for everything measured, written as it comes")
    contest.add_arguments(parser)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("at least one round")
    if wrong := contest.check(args):
        parser.error(wrong)
    return args


def add_steps(parser):
    """The arguments of benchmarks of training steps."""
    add = parser.add_argument
    add(
        "--steps",
        type=int,
        default=1,
        help="measured steps a turn, after one to warm up (default 1)",
    )
    add(
        "--trl-checkpointing", action="store_true", help="TRL: its default activation checkpointing"
    )


def spawn(contest, args, name, precision, shared) -> dict:
    """A contender's turn in a process of its own; {"failed": why} where it did not end well.

    shared: a folder of all turns.
    """
    env = {"CUDA_VISIBLE_DEVICES": "0", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"} | os.environ
    if args.threads:
        env["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory(prefix="contest-") as work:
        job = vars(args) | {
            "contender": name,
            "precision": precision,
            "folder": f"{work}/run",
            "shared": shared,
            "out": f"{work}/out",
        }
        load, command = os.getloadavg()[0], [sys.executable, contest.script, json.dumps(job)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
        if done.returncode:
            why = (
                signal.Signals(-done.returncode).name
                if done.returncode < 0
                else done.stderr.strip()[-2000:]
            )
            return {"failed": why, "load_before": load}
        return json.loads(Path(job["out"]).read_text()) | {"load_before": load}


def sound(runs, name, precision):
    return [
        r
        for r in runs
        if r["contender"] == name and r["precision"] == precision and "failed" not in r
    ]


def threads(runs) -> str:
    return "/".join(str(n) for n in sorted({r["threads"] for r in runs if "threads" in r}))


def markdown(columns, rows) -> list[str]:
    """A Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]
