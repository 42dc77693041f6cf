"""The loop around a script's steps: resume, evaluate, save and stop where due.

It knows no loss and no model. The script computes; everything that surrounds a step is here, once
for all trainers:

    for step in loop.steps(run, settings, data, state, report):
        for batch in step.batches():
            ...                          # forward, loss, backward
        step.finish(policy.step())
"""

from collections.abc import Callable, Iterator
from typing import ContextManager, Protocol

from train.data import mixing
from train.data import steps as planning
from train.data.packing import PackedBatch
from train.engine import dist, preemption, prefetch
from train.run.checkpoint import Checkpointer
from train.run.session import NotFinite

# Devices where what a step, or an update of a rollout, came to is read when the next one's work is
# launched: a GPU, which the host runs ahead of, would have nothing to do while the host looks.
READS_LATE = ("cuda",)


class Report(Protocol):
    """What the loop asks of a run's report; run/report.py is one."""

    def start(self):
        """Open TensorBoard and the bar: the folder is taken, and run.plan says where it begins."""

    def end_step(self, step):
        """Take down what a step leaves, before the next adds to it. Every rank calls this."""

    def step(self, step, update):
        """Show a finished step, which `end_step` has seen: its values are on the host now."""

    def evaluate(self, number: int):
        """Score held-out data after `number` steps, once for a number. Every rank calls this."""

    def forget_evaluations(self):
        """Drop evaluations of before: the run began from another run's checkpoint."""

    def pause(self) -> ContextManager:
        """Stop the clock of throughput inside: the loop saves."""

    def sync(self):
        """Fsync what TensorBoard was given: a checkpoint counts on it."""

    def close(self):
        """End the bar and TensorBoard's file."""


class Step:
    """One optimiser step, under way."""

    def __init__(
        self,
        run,
        planned: planning.PlannedStep,
        batches: list[PackedBatch],
        before_update: Callable[[], None],
    ):
        """before_update: called when the last batch's work is launched."""
        self.number, self.epoch = planned.number, planned.epoch  # the number is 0-based
        self.groups = planned.groups  # of all ranks, as numbers into the data set
        self.num_groups = len(planned.groups)  # what a mean over the step divides by
        self.groups_of_batches = planned.batches  # this rank's batches as tuples of groups
        self.update = None
        self._run, self._batches, self._before_update = run, batches, before_update
        run.batch = batches[0]

    def batches(self) -> Iterator[PackedBatch]:
        """This rank's batches: as many on every rank, the last ones may be empty.

        Before each the ranks agree on whether one of them has been told to stop, and raise Preempted
        if so: an unfinished step is dropped. Every rank goes through them at the same time.
        """
        for batch in self._batches:
            preemption.raise_if_preempted()
            self._run.batch = batch
            yield batch
        self._run.batch = None  # what runs out of memory from here on is no batch's fault
        self._before_update()

    def finish(self, update):
        """Hand over what the optimiser did (engine/trained.py: Update).

        What follows from it, `steps` does when the script asks for the next step.
        """
        self.update = update


class RolloutStep:
    """One rollout and the updates it is used for, under way."""

    def __init__(
        self, run, checkpointer: Checkpointer, planned: planning.PlannedRollout, late: bool
    ):
        """late: what an update came to is not asked before the next one is about to change the weights."""
        self.number, self.epoch = planned.number, planned.epoch  # the number is 0-based
        self.groups = planned.groups  # the prompts of all ranks, as numbers into the data set
        self.updates = []  # of all models, as they came
        self.finished = False
        self._run, self._checkpointer, self._late = run, checkpointer, late
        self._draft = None  # of the mark of the last update, where that is not set yet

    def computes(self, batch):
        """Say which batch is computed next; None: none. Every rank calls this before each of its
        batches, as many times as the others: raises Preempted where one has been told to stop.
        """
        preemption.raise_if_preempted()
        self._run.batch = batch

    def updated(self, count: int, updates: list[tuple]):
        """`count` updates of this rollout are done, the last of them of these models' optimisers,
        (name, engine/trained.py: Update): a checkpoint may be made of it from now on.
        """
        self._run.batch = None
        self.updates += updates
        self._draft = self._checkpointer.draft(self.number, updates=count)
        if not self._late:
            self.settle()

    def settle(self):
        """Set the mark of the update that was done last, where that is still to be done: before the next
        one changes the weights, and before schedules go on.
        """
        if self._draft is not None:
            draft, self._draft = self._draft, None
            self._checkpointer.complete(draft)

    def finish(self):
        """All updates are done."""
        self.finished = True


def rollouts(run, settings, data, state: dict, report: Report) -> Iterator[RolloutStep]:
    """Yield the run's rollouts, from where an interrupted run has stopped, as `steps` does steps; a
    rollout counts as one. Every rank goes through them.

    data: a Tokenised of prompts. A rollout that was interrupted between two of its updates comes
    again; what is left of it is for the parts of `state` to know.
    """
    checkpointer = _begin(run, settings, data, state, report)
    skipped = {}  # in a row, of each model: one may be lost while the other learns
    plan = planning.plan_rollouts(
        mixing.mix_of(data),
        settings.batch_size,
        seed=settings.seed,
        start=run.plan.begun,
        total=run.plan.steps,
    )
    for planned in plan:
        step = RolloutStep(run, checkpointer, planned, late=run.device.type in READS_LATE)
        checkpointer.before_use = step.settle
        yield step
        assert step.finished, "the script finishes each rollout: step.finish()"
        number = planned.number + 1
        report.step(step, step.updates)
        for name, update in step.updates:
            skipped[name] = 0 if update.applied else skipped.get(name, 0) + 1
        skipped_in_a_row = max(skipped.values(), default=0)
        save_due = checkpointer.is_due(number)
        draft = checkpointer.draft(number)
        _end_of_step(run, settings, checkpointer, report, data, step, draft, skipped_in_a_row)
        if save_due:
            checkpointer.save_now()
    report.evaluate(run.plan.steps)
    preemption.raise_if_preempted()


def steps(run, settings, data, state: dict, report: Report) -> Iterator[Step]:
    """Yield the run's steps, from where an interrupted run has stopped. Every rank goes through them.

    data: a Tokenised, from which steps are drawn. state: all that survives a restart, by name
    (run/checkpoint.py says what a part is). report: one of the parts, a Report. Raises Preempted and
    NotFinite, which the session handles.
    """
    checkpointer = _begin(run, settings, data, state, report)
    ends = _Ends(run, settings, checkpointer, report, data, late=run.device.type in READS_LATE)
    checkpointer.before_use = ends.settle
    planned = planning.plan_steps(
        data.lengths.sum(1),
        settings.batch_size,
        run.plan.batch_tokens,
        seed=settings.seed,
        start=run.plan.begun,
        total=run.plan.steps,
        rank=dist.rank(),
        world=dist.world_size(),
        mix=mixing.mix_of(data),
    )
    prefetched = prefetch.packed(((plan, plan.batches) for plan in planned), data, run.device)
    for plan, batches in prefetched:
        step = Step(run, plan, batches, before_update=ends.settle)
        yield step
        assert step.update is not None, "the script finishes each step: step.finish(policy.step())"
        run.batch = None
        ends.add(step)
    ends.settle()
    report.evaluate(run.plan.steps)
    preemption.raise_if_preempted()


class _Ends:
    """What follows from steps: one is shown, marked, evaluated and saved after."""

    def __init__(self, run, settings, checkpointer, report, data, late: bool):
        """late: what a step came to is not asked before the next one's update, unless something is due
        after it that needs its weights.
        """
        self.run, self.settings, self.data, self.late = run, settings, data, late
        self.checkpointer, self.report = checkpointer, report
        self.skipped_in_a_row = 0
        self._unsettled = None  # a step, what was taken down of it, and whether to save after it

    def add(self, step):
        """A step has been launched, its update included. Every rank calls this."""
        number = step.number + 1
        self.report.end_step(step)
        save_due = self.checkpointer.is_due(number)
        self._unsettled = step, self.checkpointer.draft(number), save_due
        last = number == self.run.plan.steps
        if not self.late or save_due or last or _is_due(self.settings.eval_every, number):
            self.settle()

    def settle(self):
        """Do what follows from the step that was added last; nothing where that is done. Every rank
        calls this at the same step, before the next update changes the weights.
        """
        if self._unsettled is None:
            return
        (step, draft, save_due), self._unsettled = self._unsettled, None
        self.report.step(step, step.update)
        self.skipped_in_a_row = 0 if step.update.applied else self.skipped_in_a_row + 1
        _end_of_step(
            self.run,
            self.settings,
            self.checkpointer,
            self.report,
            self.data,
            step,
            draft,
            self.skipped_in_a_row,
        )
        if save_due:
            self.checkpointer.save_now()


def _begin(run, settings, data, state, report) -> Checkpointer:
    """Put every part where the run goes on, take the folder, and look at where it stands."""
    order = {
        "data": data.fingerprint,
        "groups": len(data),
        "groups_an_epoch": mixing.mix_of(data).draws(),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }
    checkpointer = Checkpointer(run, settings, state, order)
    run.checkpointer, run.report = checkpointer, report
    checkpointer.resume()
    if checkpointer.from_another_run:
        report.forget_evaluations()  # measured on other data, perhaps
    run.folder.start()
    report.start()
    checkpointer.mark(run.plan.begun, updates=checkpointer.resumed_within)
    due = _is_due(settings.eval_every, run.plan.begun) and not checkpointer.resumed_within
    if due or checkpointer.from_another_run:
        report.evaluate(run.plan.begun)
    return checkpointer


def _end_of_step(run, settings, checkpointer, report, data, step, draft, skipped_in_a_row):
    """What follows from a step: a mark of it, which was drafted, and evaluation where it is due."""
    number = step.number + 1
    applied = not skipped_in_a_row
    if applied:
        checkpointer.complete(draft)
    else:
        run.say(f"step {number}: the gradient is not finite; skipped ({skipped_in_a_row} in a row)")
        if skipped_in_a_row > settings.max_skipped:
            rows = sorted(int(data.rows[group]) for group in step.groups)
            raise NotFinite(skipped_in_a_row, rows)
    if _is_due(settings.eval_every, number):
        report.evaluate(number)
        if applied:  # the step's own mark knows nothing of the evaluation
            checkpointer.mark(number)


def _is_due(every: int, number: int) -> bool:
    """Whether to evaluate after `number` steps: at the start, then at each multiple of `every`."""
    return number % every == 0 if every else number == 0
