"""A run from its first line to its exit code: ranks, OUTPUT, and every way to end.

    with session.start(settings) as run:
        ...                                 # what is wrong in here is one line and exit code 2 or 4
        for step in loop.steps(run, ...):   # from the first step on: 0, 1, 3, 5 or 85
            ...

A Run is what the parts of a script share: the folder, the device, and what is settled before the
first step.
"""

import contextlib
import logging
import os
import signal
import sys
import time
from typing import NamedTuple

from train import config, quiet, settings
from train.config import Exit, fail
from train.data.errors import DataError
from train.engine import dist, memory, preemption
from train.models import builtin
from train.run import trackers, upload
from train.run.checkpoint_files import Place
from train.run.folder import RunFolder

# Ctrl-C may take a peer first: a rank that is left by it waits so long for its own.
CTRL_C_SECONDS = 0.5


class NotFinite(Exception):
    """Too many steps in a row had gradients that are not finite. Holds the last one's data rows."""


class Overflowed(Exception):
    """What was trained is no model any more. Says what of it is not finite."""


class NotWritten(RuntimeError):
    """What was trained could not be written as a model directory. Says why."""


class Plan(NamedTuple):
    """What is settled before the first step."""

    precision: str  # "bf16" or "fp32"
    batch_tokens: int  # the budget of a packed batch
    steps: int  # optimiser steps of the whole run
    same_weights: bool = False  # there is a reference, and it is the policy as it starts
    begun: int = 0  # steps that an interrupted run has done already
    decode_batch: int = 0  # answers decoded at once, where a run writes some


class Run:
    """One run, as its script's parts see it."""

    def __init__(self, folder: RunFolder, device):
        self.folder, self.device = folder, device
        self.plan: Plan | None = None  # by methods/setup.py
        self.sample = ""  # the first rows as training sees them, Markdown for TensorBoard
        self.first_batches = []  # what the start was checked on, and the export is compared on
        # By the loop, once there is something to lose:
        self.checkpointer = None
        self.report = None
        self.batch = None  # being computed: named where memory runs out

    def say(self, line: str):
        """Print a line on the terminal and into the log, on rank 0."""
        self.folder.say(line)

    def note(self, **facts):
        """Add facts to run.json."""
        self.folder.note(**facts)

    def set_plan(self, plan: Plan, **facts):
        """Keep the plan, and note it in run.json with other facts."""
        self.plan = plan
        noted = plan._asdict()
        noted["row_tokens"] = noted.pop("batch_tokens")  # as run.json has always called it
        self.note(**facts, **noted)

    @property
    def under_way(self) -> bool:
        """Whether the folder is this run's own: refusals end before that."""
        return self.folder.started


@contextlib.contextmanager
def start(flags, kind: str = "run", interruptible: bool = True):
    """Join the job, take OUTPUT, run the block, and end in order, whatever happens in it.

    flags: the script's Settings. kind: what the folder holds, for messages. interruptible: SIGTERM
    and SIGUSR1 were noted since the script began (engine/preemption.py), and save. Yields a Run; exits
    with code 0 at once where OUTPUT holds this very run, finished. Every rank enters this.
    """
    quiet.outlive_terminal()
    with refusals():
        device = dist.init()
    if interruptible:
        preemption.start_watch()
    with refusals():
        folder = RunFolder(
            flags.output,
            config.as_dict(flags),
            may_change=settings.names_that_may_change(flags),
            defaults=settings.defaults(flags),
        )
    run = Run(folder, device)
    if folder.finished:
        folder.say(f"{folder.path} holds this {kind}, finished; another --output repeats it")
        with refusals():
            upload.check(run, flags)
        end_in_order()
        upload.push(run, flags)  # where that has not been done yet
        raise SystemExit(Exit.DONE)
    try:
        with _ending(run, flags), refusals(run):
            with dist.main_process_first():
                if dist.is_main():
                    trackers.check(flags.report_to)
            upload.check(run, flags)
            yield run
    except KeyboardInterrupt:  # also one that comes while something else is being handled
        _end_interrupted(run)
    end_in_order()
    upload.push(run, flags)  # the other ranks do not wait for it


@contextlib.contextmanager
def _ending(run, flags):
    """End a run by what was raised in it."""
    try:
        yield
    except preemption.Preempted:
        _end_preempted(run, flags)
    except NotFinite as error:
        _end_not_finite(run, error)
    except Overflowed as error:
        _end_overflowed(run, error)
    except NotWritten as error:
        _end_not_written(run, error)
    except DataError as error:
        if not run.under_way:
            raise
        _end_bad_data(run, error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if not run.under_way:
            raise
        time.sleep(CTRL_C_SECONDS)
        logging.getLogger("zeropref").exception("the run ends")
        run.folder.status("failed")
        if run.batch is not None and memory.is_out_of_memory(error):
            memory.end_run(error, *memory.describe_batch(run.batch, run.plan.batch_tokens))
        raise


@contextlib.contextmanager
def refusals(run: Run | None = None):
    """Say in one line what is wrong with flags, data or models, and exit with its code.

    Only until the run is under way: what goes wrong later is no refusal and passes through.
    """
    try:
        yield
    except (ValueError, OSError, builtin.ModelUnavailable) as error:
        if run is not None and run.under_way:
            raise
        if isinstance(error, DataError):
            fail(str(error), Exit.DATA)
        logging.getLogger("zeropref").exception("refused")
        fail(str(error), Exit.FLAGS)


def end_in_order():
    """Leave the job, so that the interpreter ends without complaint. Every rank calls this."""
    preemption.stop_watch()
    dist.shutdown()


def _end_preempted(run, flags):
    """Save the last finished step, and exit with code 85: whoever waits for it starts again."""
    saver = run.checkpointer
    try:
        nothing_done = saver is None or saver.place == Place(0)
    except NotFinite as error:  # that is what the last step came to
        _end_not_finite(run, error)
    if nothing_done:
        done = "no step was done"
    elif saver.save():
        done = f"saved after {saver.place}"
    else:
        _exit_now(run, "failed", Exit.CHECKPOINT)
    how = "--resume auto" if flags.resume == "never" else "the same command"
    run.say(f"told to stop: {done}; {how} continues")
    _exit_now(run, "preempted", Exit.PREEMPTED)


def _end_not_finite(run, error):
    saver = run.checkpointer
    saved = saver.place > Place(0) and saver.save()
    where = f"; the state of before is in {saver.directory()}" if saved else ""
    count, rows = error.args
    run.say(
        f"error: {count} steps in a row had gradients that are not finite, the last with the "
        f"data's rows {rows}{where}"
    )
    _exit_now(run, "failed", Exit.NONFINITE)


def _end_overflowed(run, error):
    run.say(
        f"error: {error} after training: no model was written; train again with a smaller --lr or "
        "--weight_decay into another --output"
    )
    _exit_now(run, "failed", Exit.NONFINITE)


def _end_not_written(run, error):
    """All steps are done: a checkpoint keeps what they came to, where there is room for one."""
    saver = run.checkpointer
    saved = saver.place > Place(0) and saver.save()
    where = f"; what was trained is in {saver.directory()}" if saved else ""
    run.say(f"error: {error}{where}; once that is mended, the same command goes on")
    _exit_now(run, "failed", 1)


def _end_bad_data(run, error):
    """What the data, or a reward for it, came to in the middle of a run; every rank raises it."""
    saver = run.checkpointer  # an evaluation has none
    saved = saver is not None and saver.place > Place(0) and saver.save()
    where = f"; the state of before is in {saver.directory()}" if saved else ""
    run.say(f"error: {error}{where}")
    _exit_now(run, "failed", Exit.DATA)


def _end_interrupted(run):
    """Ctrl-C, which each rank gets by itself, so that none can wait for another: nothing is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # launchers pass it on, a second time
    done = ""
    if run.checkpointer is not None:
        saved = any(run.checkpointer.path.glob("step-*"))
        done = (
            "the same command continues from the newest checkpoint"
            if saved
            else "nothing was saved"
        )
        done = f": {done}; SIGTERM saves first"
    if run.under_way:
        run.folder.status("failed")
    run.say(f"interrupted{done}")
    _leave(Exit.INTERRUPTED)


def _exit_now(run, status, code):
    """Exit without taking the interpreter down in order.

    That costs 5 s of the 30 that a launcher leaves after TERM.
    """
    run.folder.status(status)
    if run.report is not None:
        run.report.close()
    dist.barrier()
    end_in_order()
    _leave(code)


def _leave(code):
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
