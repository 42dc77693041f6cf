"""A run that can be interrupted anywhere: when it saves, what it saves, how it continues.

A resumed run is bit for bit the uninterrupted one on the same number of ranks; on another number, or
under another ZeRO stage, it takes the same groups in the same order and differs in rounding.

**What is saved.** A script names all that survives a restart in one dict, `state: name -> part`. A
part has some of the methods below; those of a row go together.

    state_dict() -> dict                         JSON. Called after every step, so cheap.
    load_state_dict(dict)
    known_late = True                            Its state_dict depends on what the step came to: it is
                                                 called when that is known, before the next update.

    shapes(state=None) -> {key: shape}           Whole fp32 tensors, the same for any number of ranks
    tensors() -> iterator over them              and ZeRO stage. They must not change before the
    load_tensors(read, state)                    optimiser's next step.

    rank_tensors() -> function -> {key: tensor}  Tensors of each rank by itself. Called after every
    load_rank_tensors([{key: tensor}, ...])      step; the function only when a checkpoint is written.

    save_outline(folder)                         Files beside: a model's configuration, a tokenizer.

**The files** of OUTPUT/checkpoints/step-N, or step-N-U after U updates of the rollout that follows
step N, and every key in them. A part's keys begin with its name in `state`. PARAMETER is a trained
parameter's name in the module, lm.model... (with LoRA those of the adapters alone); NAME is a name in
the causal LM, model...:

    manifest.json             format, version, step, updates_within (updates of the next step), world,
                              precision, batch_tokens, decode_batch, order (data, groups,
                              groups_an_epoch of each source beside its groups, null where it takes
                              all, batch_size, seed),
                              consumed_groups, seconds, flags, parts (each part's state_dict by its
                              name), files (bytes and sha256 of every other file), sha256 (of the
                              manifest itself)
    state-RRRRR.safetensors   whole tensors, shared out over the ranks R:
                              policy/PARAMETER/weight, policy/PARAMETER/exp_avg and exp_avg_sq (AdamW's
                              moments, from the first update on), reference/PARAMETER/weight (where the
                              reference moves); another model that is trained has the same under its
                              own name: reward_model/, value/
    rank-RRRRR.safetensors    rng/torch, rng/others (Python's and numpy's), rng/cuda;
                              report/meter/sums, report/meter/kept/N (measures not yet shown);
                              report/sums (of launch/train_ppo.py: updates not yet shown);
                              on rank 0 policy/buffer/NAME and policy/frozen/NAME (what training
                              leaves as it is, for exports), policy/begin/NAME (first values of what it
                              began with, to tell another model), and between two updates of a rollout
                              rollout/groups, prompts, prompt_lengths, ids, lengths, ended, scores,
                              score, old, ref, values, entropy, advantages, returns
    policy/                   config.json, generation_config.json, the tokenizer's files
    parts in manifest.json    policy: updates, skipped, schedule, stage; reference: {};
                              running_mean: mean, count (of BCO's rewards); report: evaluated_at,
                              evaluated, last, health, meter, events (of launch/train_ppo.py:
                              evaluated_at, evaluated, answers, first_columns, comparison, last,
                              seconds, of_updates, events); rollout: number, updates, facts

Beside them OUTPUT/checkpoints/latest holds the name of the newest.

Only JSON and safetensors (run/checkpoint_files.py): reading a checkpoint runs nobody's code.
"""

import itertools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from train.config import Exit, fail
from train.data.steps import num_drawn
from train.engine import dist, preemption
from train.files import follow_umask
from train.run import checkpoint_files as files
from train.run import rng, trackers
from train.run.checkpoint_files import Place

# SLURM's count of how often it has put this job back into the queue
RESTARTS = int(os.environ.get("SLURM_RESTART_COUNT") or 0)

BEGIN_ANEW = "begin anew: --resume never, or another --output"


class Mark(NamedTuple):
    """What of a finished step, or of a finished update within one, is overwritten by what follows.

    Whole tensors, weights and moments above all, are not: only an optimiser's step changes them.
    """

    place: Place
    states: dict[str, dict | None]  # each part's state_dict; None in a draft where it is known late
    # by part, and "rng": what makes this rank's tensors
    rank_tensors: dict[str, Callable[[], dict]]


class Checkpointer:
    """The checkpoints of one run."""

    def __init__(self, run, settings, state: dict, order: dict):
        """state: all that survives a restart, by name. order: what decides which groups a step takes;
        a checkpoint with another one is refused. Every rank makes one.
        """
        assert "rng" not in state, "that name is the generators'"
        self.run, self.settings, self.state, self.order = run, settings, state, order
        self.path = run.folder.path / "checkpoints"
        self.from_another_run = False  # begun from another run's checkpoint
        self.resumed_within = 0  # updates of the step that was under way there
        self.before_use = lambda: None  # settles what the last step came to
        self._mark = None
        self._saved = Place(0)
        self._last_save = time.monotonic()

    @property
    def place(self) -> Place:
        """Where the last mark was set: what `save` would save. Place(0): nothing is done yet."""
        self.before_use()
        return self._mark.place if self._mark else Place(0)

    def directory(self) -> Path:
        """Where the checkpoint of the last mark is, or would be."""
        return self.path / files.directory_name(self.place)

    # Before the first step.

    def resume(self):
        """Put every part where the newest sound checkpoint has it, if there is one to continue from.

        Sets the run's plan: the steps already done, and the batches' budget of before. Ends the run
        with exit code 3 where there are checkpoints and none is sound. Every rank calls this.
        """
        manifest, path = self._find()
        if manifest is None:
            return
        self._refuse_other_order(manifest, path)
        self._load(manifest, path)
        plan = self.run.plan
        # the same batches give the same bits; a budget that was asked for goes before that
        same_ranks = manifest["world"] == dist.world_size()
        if same_ranks and not self.settings.micro_tokens:
            plan = plan._replace(batch_tokens=manifest["batch_tokens"])
        if plan.decode_batch and self.settings.decode_batch is None:
            plan = plan._replace(decode_batch=manifest.get("decode_batch") or plan.decode_batch)
        self.from_another_run = path.parent.resolve() != self.path.resolve()
        place = Place(manifest["step"], manifest.get("updates_within", 0))
        self.resumed_within = place.updates
        self._saved = Place(0) if self.from_another_run else place
        if dist.is_main() and not self.from_another_run:  # those after it are another future
            files.prune(self.path, self.settings.keep, after=place)
        self.run.set_plan(plan._replace(begun=place.step))
        self.run.say(f"continues after {place} from {path}")

    def _find(self):
        """The manifest and the path of the checkpoint to continue from, or (None, None)."""
        requeued = self.settings.resume == "never" and RESTARTS  # it goes on where it began anew
        choice = dist.broadcast("auto" if requeued else self.settings.resume)
        if dist.is_main():  # what a run left that was killed while it saved
            for path in self.path.glob("step-*.tmp"):
                shutil.rmtree(path, ignore_errors=True)
        if choice == "never":
            if dist.is_main():
                files.remove_all(self.path)
                trackers.forget(self.run.folder.path)
            return None, None
        named = [] if choice == "auto" else [Path(choice)]
        own = files.list_checkpoints(self.path) if dist.is_main() else []
        begun_there = any(files.flag_of(path, "resume") == choice for path in own)
        if named and dist.broadcast(begun_there):
            named = []  # where this run began; by now it has come further
        problems = []
        for path in dist.broadcast(named or own):
            manifest, problem = self._examine(path)
            if problem is None:
                return manifest, path
            problems.append(problem)
            self.run.say(f"damaged checkpoint: {problem}")
        if problems:
            advice = (
                "checkpoints lie in OUTPUT/checkpoints" if named else "--resume never starts over"
            )
            fail(f"no sound checkpoint: {problems[0]}; {advice}", Exit.CHECKPOINT)
        return None, None

    def _examine(self, path):
        """The manifest, and what is wrong with the checkpoint (None: nothing).

        The ranks share the hashing. One of another version ends the run: it is sound, and not ours.
        """
        manifest = problem = None
        try:
            manifest = files.read_manifest(path)
            mine = sorted(manifest["files"])[dist.rank() :: dist.world_size()]
            files.verify(path, mine, manifest)
        except files.OtherFormat as error:
            fail(str(error), Exit.CHECKPOINT)
        except files.Damaged as error:
            problem = str(error)
        found = [other for other in dist.all_gather(problem) if other]
        return manifest, found[0] if found else None

    def _refuse_other_order(self, manifest, path):
        """Refuse to continue where the consumed groups would mean others than the checkpoint's."""
        if manifest["step"] > self.run.plan.steps:
            fail(
                f"{path} is further than this run goes: {self.run.plan.steps} steps; raise --max_steps or "
                "--epochs, or name an earlier checkpoint",
                Exit.CHECKPOINT,
            )
        theirs = manifest["order"]
        different = [name for name in self.order if self.order[name] != theirs.get(name)]
        if different:
            shown = "; ".join(
                f"{name} was {theirs.get(name)!r}, is {self.order[name]!r}" for name in different
            )
            fail(
                f"{path} belongs to another order of the data ({shown}); put back what has changed since, "
                f"or {BEGIN_ANEW}",
                Exit.CHECKPOINT,
            )

    def _load(self, manifest, path):
        states, read = manifest["parts"], files.Reader(path, manifest)
        available = read.shapes()
        for name, part in self._sharded():
            for key, shape in part.shapes(states[name]).items():
                if available.get(f"{name}/{key}") != shape:
                    fail(
                        f"{path} has no {name}/{key} of shape {shape}: it is another model's; name that "
                        f"one, or {BEGIN_ANEW}",
                        Exit.CHECKPOINT,
                    )
        for name, part in self._sharded():
            part.load_tensors(lambda key, name=name: read(f"{name}/{key}"), states[name])
        tensors = self._read_rank_tensors(manifest, path)
        for name, part in self.state.items():
            part.load_state_dict(states[name])
            if hasattr(part, "rank_tensors"):
                part.load_rank_tensors([files.under(f"{name}/", of_rank) for of_rank in tensors])
        self.run.folder.began = time.time() - manifest["seconds"]

    def _read_rank_tensors(self, manifest, path) -> list[dict]:
        """What ranks kept by themselves and continues here: this rank's own, or on another number of
        ranks everybody's on the first. Random states continue on the same number only.
        """
        if manifest["world"] == dist.world_size():
            own = load_file(path / rank_file(dist.rank()))
            rng.restore(files.under("rng/", own))
            return [own]
        if not dist.is_main():
            return []
        return [load_file(path / rank_file(rank)) for rank in range(manifest["world"])]

    def _sharded(self):
        """The parts that have whole tensors, by name."""
        return [(name, part) for name, part in self.state.items() if hasattr(part, "tensors")]

    # At every step.

    def mark(self, step: int, updates: int = 0):
        """`step` steps are done, and `updates` updates of the next one: take down what is overwritten
        by what follows.
        """
        self.complete(self.draft(step, updates))

    def draft(self, step: int, updates: int = 0) -> Mark:
        """A mark but for what is not known yet where the device is still at it."""
        states = {
            name: None if getattr(part, "known_late", False) else part.state_dict()
            for name, part in self.state.items()
        }
        makers = {
            name: part.rank_tensors()
            for name, part in self.state.items()
            if hasattr(part, "rank_tensors")
        }
        return Mark(Place(step, updates), states, makers | {"rng": rng.capture()})

    def complete(self, draft: Mark):
        """Let `draft` be the last mark, before the next update changes the weights."""
        states = {
            name: self.state[name].state_dict() if state is None else state
            for name, state in draft.states.items()
        }
        self._mark = draft._replace(states=states)

    def is_due(self, step: int) -> bool:
        """Whether the flags say to save after `step` steps. Every rank calls this."""
        every, minutes = self.settings.save_every, self.settings.save_minutes
        due = bool(every) and step % every == 0
        if not due and minutes > 0:  # rank 0's clock counts
            late = dist.is_main() and time.monotonic() - self._last_save >= 60 * minutes
            due = preemption.any_rank(late)
        return due

    def save_now(self):
        """Save what was marked last; the clock of throughput stands still. Every rank calls this."""
        with self.run.report.pause():
            self.save()

    # Saving.

    def save(self) -> bool:
        """Write the checkpoint of the last mark; whether that went well. Every rank calls this."""
        mark, began = self._mark, time.monotonic()
        if mark.place == self._saved:
            return True
        final = self.directory()
        unfinished = final.with_name(final.name + ".tmp")
        problem, entries = self._make_folder(unfinished), {}
        if problem is None:
            try:
                entries = self._write(unfinished, mark)
            except Exception as error:  # a full disk has many names: safetensors has its own
                problem = str(error)
        everyone = dist.all_gather((problem, entries))
        problem = next((other for other, _ in everyone if other), None)
        if dist.is_main() and problem is None:
            try:
                self.run.report.sync()
                listed = {name: entry for _, part in everyone for name, entry in part.items()}
                files.commit(unfinished, final, self._manifest(mark) | {"files": listed})
                files.prune(self.path, self.settings.keep)
            except Exception as error:
                problem = str(error)
        if problem := dist.broadcast(problem):
            self._say_failed(problem, unfinished)
            return False
        self._saved = mark.place
        self._last_save = time.monotonic()
        self.run.folder.log.info("saved %s in %.2f s", final, time.monotonic() - began)
        return True

    def _make_folder(self, folder):
        """Make it empty, on rank 0; what went wrong, on every rank."""
        problem = None
        if dist.is_main():
            try:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            except OSError as error:
                problem = str(error)
        return dist.broadcast(problem)

    def _write(self, folder, mark) -> dict[str, dict]:
        """Write this rank's files; their entries for the manifest."""
        name = f"state-{dist.rank():05d}.safetensors"
        entries = {name: self._write_state(folder / name)}
        tensors = {}
        for part, make in mark.rank_tensors.items():
            tensors |= {f"{part}/{key}": value for key, value in make().items()}
        others = [rank_file(dist.rank())]
        save_file(tensors, folder / others[0])
        follow_umask(folder / others[0])
        if dist.is_main():
            for part_name, part in self.state.items():
                if hasattr(part, "save_outline"):
                    part.save_outline(folder / part_name)
                    written = sorted((folder / part_name).iterdir())
                    others += [f"{part_name}/{path.name}" for path in written]
        return entries | {other: files.manifest_entry(folder / other) for other in others}

    def _write_state(self, path) -> dict:
        """Write this rank's share of the whole tensors, all of which all ranks make together.

        Each tensor goes to the rank that has the least so far: a plan that is the same everywhere.
        """
        shapes = self._shapes()
        loads, owner = [0] * dist.world_size(), {}
        for key, shape in shapes.items():
            owner[key] = loads.index(min(loads))
            loads[owner[key]] += torch.Size(shape).numel()
        mine = {key: shape for key, shape in shapes.items() if owner[key] == dist.rank()}
        whole = itertools.chain.from_iterable(part.tensors() for _, part in self._sharded())
        given = (tensor if key in mine else None for key, tensor in zip(shapes, whole, strict=True))
        return files.write_tensors(path, mine, given)

    def _shapes(self) -> dict[str, tuple]:
        """All whole tensors' keys in a checkpoint and their shapes."""
        return {
            f"{name}/{key}": shape
            for name, part in self._sharded()
            for key, shape in part.shapes().items()
        }

    def _manifest(self, mark) -> dict:
        plan = self.run.plan
        return {
            "step": mark.place.step,
            "updates_within": mark.place.updates,
            "parts": mark.states,
            "world": dist.world_size(),
            "precision": plan.precision,
            "batch_tokens": plan.batch_tokens,
            "decode_batch": plan.decode_batch,
            "order": self.order,
            "consumed_groups": self._consumed_groups(mark.place.step),
            "seconds": self.run.folder.seconds(),
            "flags": self.run.folder.record["flags"],
        }

    def _consumed_groups(self, steps) -> int:
        """Groups drawn in `steps` steps, over all epochs and ranks."""
        groups, draws = self.order["groups"], self.order["groups_an_epoch"]
        an_epoch = sum(count for count, _ in draws) if draws else groups
        return num_drawn(steps, an_epoch, self.order["batch_size"])

    def _say_failed(self, problem, unfinished):
        exists = self.path if self.path.exists() else self.run.folder.path
        free = shutil.disk_usage(exists).free if dist.is_main() else 0
        needed = 4 * sum(torch.Size(shape).numel() for shape in self._shapes().values())
        if dist.is_main():
            shutil.rmtree(unfinished, ignore_errors=True)
        # the next try by the clock is as far away as after a success
        self._last_save = time.monotonic()
        if self._saved > Place(0):
            last = f"the last good one is {files.directory_name(self._saved)}"
        else:
            last = "there is none yet"
        self.run.say(
            f"no checkpoint after {self.place}: {problem}; it needs {needed / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB were free; {last}"
        )


def rank_file(rank: int) -> str:
    """The name of the file of what is a rank's own."""
    return f"rank-{rank:05d}.safetensors"
