"""A run that can be interrupted anywhere: when it saves, what it saves, how it goes on, how it ends
when it must.

What a script does with it stands in launch/train_dpo.py: `resume`, `attach`, then inside `guard`
for each step `count` and `settle`. A resumed run is bit for bit the uninterrupted one on the same
number of ranks; on another number, or under another ZeRO stage, it takes the same groups in the
same order and differs in rounding.
"""

import contextlib
import itertools
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from train.config import Exit, fail
from train.engine import dist, preemption, sharded_state
from train.run import checkpoint_files, rng

RESTARTS = int(
    os.environ.get("SLURM_RESTART_COUNT") or 0
)  # a requeued job goes on, also where it began anew
SCHEDULE = ("last_epoch", "_step_count", "_last_lr")


class NotFinite(Exception):
    """Too many steps in a row had gradients that are not finite."""


class Mark(NamedTuple):
    """What of a finished step is overwritten while the next one is under way; weights and moments
    are not.
    """

    step: int
    told: dict  # counters, schedule, the board's record: for the manifest
    mine: Callable[[], dict]  # makes this rank's tensors: random states, unread sums


class Saves:
    """The checkpoints of one run."""

    def __init__(self, folder, settings, policy, tokenizer, data, moving=None):
        """`policy`: an engine's Policy; `data`: what its steps are drawn from; `moving`: a
        reference that follows it.

        Every rank makes one.
        """
        self.folder, self.settings, self.policy, self.tokenizer, self.data = (
            folder,
            settings,
            policy,
            tokenizer,
            data,
        )
        self.moving = moving
        self.path = folder.path / "checkpoints"
        self.board, self.mark, self.plan, self._restored, self.parts = None, None, None, None, {}
        self.streak, self.saved, self.at = 0, 0, time.monotonic()
        self.foreign = False  # begun from another run's checkpoint

    # Before the first step.

    def resume(self, plan):
        """`plan` with the steps already done and the rows' budget of before; the policy as it was
        then.

        Ends the run with exit code 3 where there are checkpoints and none is sound. Every rank
        calls this.
        """
        self.plan = plan
        told, path = self._find()
        if told is None:
            return plan
        self._same_order(told, path)
        self._load(told, path)
        # the same rows give the same bits; a budget that was asked for goes before that
        same = told["world"] == dist.world_size() and not self.settings.micro_tokens
        self.plan = plan._replace(
            begun=told["step"], row_tokens=told["row_tokens"] if same else plan.row_tokens
        )
        self.foreign = path.parent.resolve() != self.path.resolve()
        self.saved = 0 if self.foreign else told["step"]
        if dist.is_main() and not self.foreign:  # those after it are another future
            checkpoint_files.prune(self.path, self.settings.keep, after=told["step"])
        self.folder.note(**self.plan._asdict())
        self.folder.say(f"continues after step {told['step']} from {path}")
        return self.plan

    def _find(self):
        """The manifest and the path of the checkpoint to continue from, or (None, None)."""
        choice = dist.broadcast(
            "auto" if self.settings.resume == "never" and RESTARTS else self.settings.resume
        )
        if dist.is_main():  # what a run left that was killed while it saved
            for path in self.path.glob("step-*.tmp"):
                shutil.rmtree(path, ignore_errors=True)
        if choice == "never":
            if dist.is_main():
                shutil.rmtree(self.path, ignore_errors=True)
            return None, None
        named, own = (
            [] if choice == "auto" else [Path(choice)],
            checkpoint_files.list_checkpoints(self.path) if dist.is_main() else [],
        )
        if named and dist.broadcast(
            any(checkpoint_files.flag_of(path, "resume") == choice for path in own)
        ):
            named = []  # where this run began; by now it has come further
        problems = []
        for path in dist.broadcast(named or own):
            told, problem = self._look(path)
            if problem is None:
                return told, path
            problems.append(problem)
            self.folder.say(f"damaged checkpoint: {problem}")
        if problems:
            advice = "" if named else "; --resume never starts over"
            fail(f"no sound checkpoint: {problems[0]}{advice}", Exit.CHECKPOINT)
        return None, None

    def _look(self, path):
        """The manifest, and what is wrong with the checkpoint (None: nothing). The ranks share the
        hashing.
        """
        told = problem = None
        try:
            told = checkpoint_files.read_manifest(path)
            checkpoint_files.verify(
                path, sorted(told["files"])[dist.rank() :: dist.world_size()], told
            )
        except checkpoint_files.Damaged as error:
            problem = str(error)
        found = [other for other in dist.all_gather(problem) if other]
        return told, found[0] if found else None

    def _same_order(self, told, path):
        """Refuse to continue where the consumed groups would mean others than the checkpoint's."""
        if told["step"] > self.plan.steps:
            fail(f"{path} is further than this run goes: {self.plan.steps} steps", Exit.CHECKPOINT)
        mine, theirs = self._order(), told["order"]
        if other := [name for name in mine if mine[name] != theirs.get(name)]:
            shown = "; ".join(
                f"{name} was {theirs.get(name)!r}, is {mine[name]!r}" for name in other
            )
            fail(f"{path} belongs to another order of the data ({shown})", Exit.CHECKPOINT)

    def _order(self):
        return {
            "data": self.data.fingerprint,
            "groups": len(self.data),
            "batch_size": self.settings.batch_size,
            "seed": self.settings.seed,
        }

    def _load(self, told, path):
        policy = self.policy
        reader = checkpoint_files.Reader(path, told)
        kept, wanted = reader.shapes(), self._shapes(told["updates"])
        if strange := sorted(key for key in wanted if kept.get(key) != wanted[key]):
            fail(
                f"{path} has no {strange[0]} of shape {wanted[strange[0]]}: it is another model's",
                Exit.CHECKPOINT,
            )
        sharded_state.restore(policy, reader, told["updates"])
        if self.moving:
            self.moving.restore(reader)
        policy.skipped = told["skipped"]
        for name, value in told["schedule"].items():  # its functions are made anew from the flags
            setattr(policy.schedule, name, value)
        for group, lr in zip(policy.adamw.param_groups, told["schedule"]["_last_lr"], strict=True):
            group["lr"] = lr
        policy.engine.global_steps, policy.engine.skipped_steps = told["step"], told["skipped"]
        ranks = range(told["world"]) if told["world"] != dist.world_size() else [dist.rank()]
        parts = [load_file(path / rank_file(rank)) for rank in ranks]
        if told["world"] == dist.world_size():
            rng.restore(parts[0])
        elif not dist.is_main():
            parts = []  # sums of all ranks continue on the first
        self._restored = told["board"], parts, told["parts"]
        self.folder.began = time.time() - told["seconds"]

    def attach(self, board, **parts):
        """The run's reporter, and what else has a `state_dict` for JSON, go on. Every rank calls
        this.
        """
        self.board, self.parts = board, parts
        if self._restored:
            record, tensors, states = self._restored
            if self.foreign:  # measured on other data, perhaps
                record = record | {"looked": -1, "evaluated": {}}
            board.load(record, tensors)
            for name, part in parts.items():
                part.load_state_dict(states[name])
        self._set_mark(self.plan.begun)

    # At every step.

    def count(self, step, update):
        """A step is done. NotFinite where more than --max_skipped in a row were skipped."""
        self.streak = 0 if update.applied else self.streak + 1
        if update.applied:
            self._set_mark(step.number + 1)
            return
        self.folder.say(
            f"step {step.number + 1}: the gradient is not finite; skipped ({self.streak} in a row)"
        )
        if self.streak > self.settings.max_skipped:
            raise NotFinite(sorted(int(self.data.rows[group]) for group in step.groups))

    def settle(self, step):
        """Nothing of this step is left to do; save where it is time. Every rank calls this."""
        number, every, minutes = (
            step.number + 1,
            self.settings.save_every,
            self.settings.save_minutes,
        )
        if (
            self.board.looked == number and not self.streak
        ):  # an evaluation came after the step's own mark
            self._set_mark(number)
        late = minutes > 0 and dist.is_main() and time.monotonic() - self.at >= 60 * minutes
        if (every and number % every == 0) or (minutes > 0 and preemption.any_rank(late)):
            with self.board.meter.pause():
                self.save()

    def _set_mark(self, number):
        schedule = self.policy.schedule.state_dict()
        record, tensors = self.board.state()
        states = rng.capture()
        told = {
            "step": number,
            "updates": self.policy.updates,
            "skipped": self.policy.skipped,
            "schedule": {name: schedule[name] for name in SCHEDULE},
            "board": record,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        self.mark = Mark(number, told, lambda: rng.to_tensors(*states) | tensors())

    # Saving.

    def save(self) -> bool:
        """Write the checkpoint of the last mark; whether that went well. Every rank calls this."""
        mark, began = self.mark, time.monotonic()
        if mark.step == self.saved:
            return True
        place = self.path / checkpoint_files.directory_name(mark.step)
        beside = place.with_name(place.name + ".tmp")
        problem, entries = self._made(beside), {}
        if problem is None:
            try:
                entries = self._write(beside, mark)
            except (
                Exception
            ) as error:  # a full disk has many names: safetensors and tokenizers have their own
                problem = str(error)
        told = dist.all_gather((problem, entries))
        problem = next((other for other, _ in told if other), None)
        if dist.is_main() and problem is None:
            try:
                self.board.sync()
                listed = {name: line for _, mine in told for name, line in mine.items()}
                checkpoint_files.commit(beside, place, self._told(mark) | {"files": listed})
                checkpoint_files.prune(self.path, self.settings.keep)
            except Exception as error:
                problem = str(error)
        if problem := dist.broadcast(problem):
            self._failed(problem, beside)
            return False
        self.saved, self.at = mark.step, time.monotonic()
        self.folder.log.info("saved %s in %.2f s", place, time.monotonic() - began)
        return True

    def _made(self, beside):
        problem = None
        if dist.is_main():
            try:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
            except OSError as error:
                problem = str(error)
        return dist.broadcast(problem)

    def _write(self, beside, mark):
        """This rank's files: its share of the weights and moments, what is its own, on rank 0 the
        model's outline.
        """
        rank, shapes, loads, owner = dist.rank(), self._shapes(), [0] * dist.world_size(), {}
        for key, shape in shapes.items():
            owner[key] = loads.index(min(loads))
            loads[owner[key]] += torch.Size(shape).numel()
        mine = {key: shape for key, shape in shapes.items() if owner[key] == rank}
        whole = itertools.chain(sharded_state.tensors(self.policy), self._moved().values())
        name = f"state-{rank:05d}.safetensors"
        given = (tensor if key in mine else None for key, tensor in zip(shapes, whole, strict=True))
        entries = {name: checkpoint_files.write_tensors(beside / name, mine, given)}
        others = [rank_file(rank)]
        save_file(
            mark.mine()
            | (sharded_state.unchanged_state(self.policy.module.lm) if dist.is_main() else {}),
            beside / others[0],
        )
        if dist.is_main():
            lm = self.policy.module.lm
            lm.config.save_pretrained(beside / "model")
            if lm.can_generate() and lm.generation_config is not None:
                lm.generation_config.save_pretrained(beside / "model")
            self.tokenizer.save_pretrained(beside / "model")
            others += [f"model/{path.name}" for path in sorted((beside / "model").iterdir())]
        return entries | {
            other: checkpoint_files.manifest_entry(beside / other) for other in others
        }

    def _shapes(self, updates=None):
        return sharded_state.shapes(self.policy, updates) | {
            key: tuple(value.shape) for key, value in self._moved().items()
        }

    def _moved(self):
        return self.moving.moved() if self.moving else {}

    def _told(self, mark):
        return mark.told | {
            "world": dist.world_size(),
            "stage": self.policy.stage,
            "row_tokens": self.plan.row_tokens,
            "precision": self.plan.precision,
            "order": self._order(),
            "consumed_groups": self._consumed(mark.step),
            "seconds": self.folder.seconds(),
            "flags": self.folder.record["flags"],
        }

    def _consumed(self, steps):
        """Groups drawn in `steps` steps, over all epochs and ranks."""
        per_epoch = -(-len(self.data) // self.settings.batch_size)
        epochs, within = divmod(steps, per_epoch)
        return epochs * len(self.data) + min(within * self.settings.batch_size, len(self.data))

    def _failed(self, problem, beside):
        free = (
            shutil.disk_usage(self.path if self.path.exists() else self.folder.path).free
            if dist.is_main()
            else 0
        )
        need = 4 * sum(torch.Size(shape).numel() for shape in self._shapes().values())
        if dist.is_main():
            shutil.rmtree(beside, ignore_errors=True)
        self.at = time.monotonic()  # the next try by the clock is as far away as after a success
        last = f"the last good one is step-{self.saved}" if self.saved else "there is none yet"
        self.folder.say(
            f"no checkpoint after step {self.mark.step}: {problem}; it needs {need / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB were free; {last}"
        )

    # Leaving.

    @contextlib.contextmanager
    def guard(self):
        """Ends the run in order where it is told to stop (exit code 85) or cannot go on (5). Every
        rank enters this.
        """
        try:
            yield
        except preemption.Preempted:
            if self.mark.step and not self.save():
                self._leave("failed", Exit.CHECKPOINT)
            done = f"saved after step {self.mark.step}" if self.mark.step else "no step was done"
            how = "--resume auto" if self.settings.resume == "never" else "the same command"
            self.folder.say(f"told to stop: {done}; {how} continues")
            self._leave("preempted", Exit.PREEMPTED)
        except NotFinite as error:
            kept = self.mark.step > 0 and self.save()
            where = (
                f"; the state of before is in {self.path / checkpoint_files.directory_name(self.mark.step)}"
                if kept
                else ""
            )
            self.folder.say(
                f"error: {self.streak} steps in a row had gradients that are not finite, the last with the "
                f"data's rows {error.args[0]}{where}"
            )
            self._leave("failed", Exit.NONFINITE)
        except BaseException:
            logging.getLogger("zeropref").exception("the run ends")
            self.folder.status("failed")
            raise

    def _leave(self, status, code):
        self.folder.status(status)
        self.board.close()
        dist.barrier()
        preemption.stop_watch()
        dist.shutdown()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(
            code
        )  # taking the interpreter down in order costs 5 s of the 30 that a launcher leaves after TERM


def rank_file(rank):
    """The name of what is a rank's own; rank 0's holds what `state.still` gives, too."""
    return f"rank-{rank:05d}.safetensors"
