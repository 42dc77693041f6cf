"""What a run tells its user: bar, TensorBoard, run.json, the closing table.

Which numbers those are is the trainer's business (Measures); a Report sums them up, shows them, and
is a part of the run's checkpoints.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from train.data import mixing
from train.data.dataset import Tokenised
from train.engine import dist
from train.losses.metrics import Metric
from train.models.flops import FlopCounter
from train.run import card, worries
from train.run.meter import Meter, peak_flops
from train.run.tensorboard import open_board, overview
from train.settings import telling

# What the closing table has of each source: of pairs, of prompts, of answers that have no label.
SHOWN_OF_SOURCES = ("rewards/accuracies", "reward", "loss")


class Measures(NamedTuple):
    """What a trainer measures of its examples."""

    metrics: tuple[Metric, ...]  # in the order of the closing table
    columns: int  # of sums
    sums: Callable  # (examples, losses (B,)) -> (columns,) fp64, the number of examples first
    means: Callable  # summed sums -> {metric: mean}
    distributions: Callable  # examples -> {name: (B,)}, for histograms
    intervals: Callable  # (means, examples) -> {METRIC_interval: [low, high]}, 95 %
    bar: dict[str, tuple[str, str]]  # what the bar shows: label -> (metric, format)
    noun: str = "pairs"  # what examples are called
    # the last evaluation -> more rows of the closing table: title, before, after, what is behind them
    closing: Callable[[dict], list[tuple]] | None = None
    about: str = ""  # what the numbers are, below that table and among TensorBoard's texts


class HeldOut(Protocol):
    """Held-out data, scored again and again."""

    data: Tokenised

    def num_batches(self) -> int:
        """This rank's batches of one pass. Every rank calls this."""

    def evaluate(self, watch: Callable) -> tuple:
        """(examples, losses (B,)) of everything, once. Every rank calls this."""


class Report:
    """The numbers of one run, collected and shown. A part of its checkpoints (run/checkpoint.py)."""

    known_late = True

    def __init__(
        self,
        run,
        settings,
        model,
        measures: Measures,
        data: Tokenised,
        held_out: HeldOut | None,
        *,
        forwards: int = 1,
        health: Callable[[], dict] = dict,
        next_commands: Callable[[], list[str]] = list,
    ):
        """model: the TrainedModel. data: what is trained on. forwards: forward passes that a batch
        costs besides its backward pass. health: what else is looked at when the run is evaluated,
        {name: value, or None where it cannot be said}. next_commands: what the user may do when the
        run is done.
        """
        self.run, self.settings, self.model, self.measures = run, settings, model, measures
        self.sources, self.held_out = mixing.sources_of(data), held_out
        self.forwards, self.look_at_health, self.next_commands = forwards, health, next_commands
        self.flops = FlopCounter(model.module)
        dtype = torch.bfloat16 if run.plan.precision == "bf16" else torch.float32
        # of all rows, then of each source's where there are several
        columns = measures.columns * (1 + len(self.sources.several))
        self.meter = Meter(columns, run.device, peak_flops(run.device, dtype))
        self.board = None  # from `start` on
        self.evaluated = {}  # step -> what the held-out data said after it
        self.evaluated_at = -1  # the last step after which `evaluate` ran
        self.last = {}  # the last reading of training's measures
        self.health = {}  # the last look at it
        self._unread = None  # what the meter gave of the interval that the last step ended
        self._meter_state = None  # the meter's as the last step left it
        self._nothing_left = worries.NothingLeft()
        self._histogram_names = ()
        self._events = None  # where TensorBoard's files of an interrupted run are to be cut

    def start(self):
        """Open TensorBoard and the bar: the run's folder is its own, and where it begins is known."""
        with self.meter.pause():  # TensorBoard takes seconds to import
            self.board = open_board(self.run, self.settings.report_to)
        if not self.run.plan.begun:
            self.board.custom_scalars(overview({each.name for each in self.measures.metrics}))
            self.board.text("data/first_rows", self.run.sample)
            if self.measures.about:
                self.board.text("train/what_is_shown", self.measures.about)
        if self._events is not None:
            self.board.cut(self._events)
            self.run.note(evaluations=self.evaluated)

    def add(self, batch, examples, losses):
        """Take in a batch. No value leaves the device here."""
        sums = self._sums(examples, losses, batch.group_rows).to(self.run.device)
        values = self.measures.distributions(examples)
        self._histogram_names = tuple(values)
        kept = torch.stack(list(values.values()), 1).detach()
        work = self.forwards * self.flops.forward(batch) + self.flops.backward(batch)
        tokens = batch.input_ids.shape[0] if batch.num_responses else 0
        self.meter.add(sums, tokens, work, kept)

    def _sums(self, examples, losses, rows) -> torch.Tensor:
        """The sums of a batch, then those of each source where there are several. rows: its examples'
        data rows, by their numbers over all sources.
        """
        whole = self.measures.sums(examples, losses)
        found = [whole]
        for index in self.sources.split(rows):
            # a batch holds rows of few of many sources
            if len(index):
                found.append(self.measures.sums(*subset(examples, losses, index)))
            else:
                found.append(torch.zeros_like(whole))
        return torch.cat(found)

    def end_step(self, step):
        """Take down what the step leaves, before the next one adds to it; every `log_every` steps that
        ends an interval. No value leaves the device here. Every rank calls this.
        """
        number = step.number + 1
        if number % self.settings.log_every == 0 or number == self.run.plan.steps:
            self._unread = self.meter.close()
        self._meter_state = self.meter.state_dict()

    def step(self, step, update):
        """Show a finished step, and the sums of the interval where it ended one."""
        number = step.number + 1
        if self._unread is not None:
            sums, perf = self.meter.reading_of(*self._unread)
            self._unread = None
            sums, *of_sources = sums.split(self.measures.columns)
            mean = self.measures.means(sums)
            first = number - (number - 1) % self.settings.log_every
            if line := self._nothing_left.look(first, number, mean["loss"]):
                self.run.say(line)
            bar = {label: mean[name] for label, (name, _) in self.measures.bar.items()}
            self.last = bar | perf
            self._scalars(mean, number, "train/", "health/")
            for name, own in zip(self.sources.several, of_sources, strict=True):
                if own[0]:
                    self._scalars(finite(self.measures.means(own)), number, f"train/{name}/")
            progress = {
                "train/grad_norm": update.grad_norm,
                "train/learning_rate": update.lr,
                "train/epoch": step.epoch,
                "health/skipped_steps": self.model.skipped,
            }
            self.board.scalars(progress | perf, number)
            self.run.folder.log.info("step %d %s", number, {**mean, **perf, **update.as_dict()})
        shown = {}
        if self.last:
            shown = {
                label: format(self.last[label], form)
                for label, (_, form) in self.measures.bar.items()
            }
            shown["pairs/s"] = f"{self.last['perf/pairs_per_second']:.2f}"
            shown["tok/s"] = f"{self.last['perf/tokens_per_second']:.0f}"
        self.board.advance(shown)

    def _scalars(self, mean: dict, number: int, prefix: str, health_prefix: str = ""):
        """Put the metrics that there are on the board, those of health under a prefix of their own, or
        without one not at all.
        """
        for metric in self.measures.metrics:
            if metric.name in mean and (metric.logged or health_prefix):
                where = prefix if metric.logged else health_prefix
                self.board.scalars({metric.name: mean[metric.name]}, number, where)

    def evaluate(self, number: int):
        """Score the held-out data after `number` steps, and look at the run's health; once.

        Every rank calls this.
        """
        if number <= self.evaluated_at:
            return
        with self.meter.pause():
            self._training_histograms(number)
            seen = {k: v for k, v in self.look_at_health().items() if v is not None}
            self.health |= seen
            self.board.scalars(seen, number, "health/")
            if self.held_out is not None:
                self._score_held_out(number)
            self.evaluated_at = number

    def _score_held_out(self, number):
        def watch(batches):
            return tqdm(
                batches,
                total=self.held_out.num_batches(),
                desc=f"evaluate at step {number}",
                unit="batch",
                leave=False,
                disable=not dist.is_main(),
                dynamic_ncols=True,
            )

        examples, losses = self.held_out.evaluate(watch)
        mean = self.measures.means(self.measures.sums(examples, losses))
        self._scalars(mean, number, "val/", "val/")
        for name, values in self.measures.distributions(examples).items():
            # margins before the first step are all 0: beside that spike TensorBoard draws later
            # steps flat
            if len(values) and values.min() < values.max():
                self.board.histogram(f"val/histogram/{name}", values, number)
        counted = {"pairs": len(losses)} | self.measures.intervals(mean, examples)
        self.evaluated[number] = mean | counted
        by_source = {}
        for name, index in mixing.places_by_source(self.held_out.data).items():
            own = subset(examples, losses, index)
            mean = self.measures.means(self.measures.sums(*own))
            counted = {"pairs": len(index)} | self.measures.intervals(mean, own[0])
            by_source[name] = mean | counted
            self._scalars(finite(mean), number, f"eval/{name}/", f"eval/{name}/")
        if by_source:
            self.evaluated[number]["by_source"] = by_source
        self.run.note(evaluations=self.evaluated)

    def _training_histograms(self, number):
        values = self.meter.values()  # (examples since the last time, columns)
        if values.numel():
            for column, name in enumerate(self._histogram_names):
                self.board.histogram(f"train/histogram/{name}", values[:, column], number)

    # What the run around it needs.

    def pause(self):
        """A context in which the clock of `perf/*` stands still."""
        return self.meter.pause()

    def sync(self):
        """Fsync what TensorBoard was given."""
        self.board.sync()

    def close(self):
        """End the bar and TensorBoard's file."""
        if self.board is not None:
            self.board.close()

    def state_dict(self) -> dict:
        """What a resumed run needs to report on, for JSON."""
        return {
            "evaluated_at": self.evaluated_at,
            "evaluated": dict(self.evaluated),
            "last": self.last,
            "health": dict(self.health),
            "meter": self._meter_state or self.meter.state_dict(),
            "events": self.board.position(),
        }

    def load_state_dict(self, state: dict):
        """Continue from `state_dict`; before `start`."""
        self.evaluated_at, self.health = state["evaluated_at"], with_nan(state["health"])
        self.last = with_nan(state["last"])
        self.evaluated = {
            int(number): with_nan(values) for number, values in state["evaluated"].items()
        }
        self.meter.load_state_dict(state["meter"])
        self._events = state["events"]

    def rank_tensors(self):
        """What makes this rank's tensors of measures that are not shown yet."""
        return self.meter.rank_tensors()

    def load_rank_tensors(self, of_ranks):
        """Continue from `rank_tensors` of several ranks, or of none."""
        self.meter.load_rank_tensors(of_ranks)

    def forget_evaluations(self):
        """Drop evaluations of before: the run began from another one's checkpoint."""
        self.evaluated_at, self.evaluated = -1, {}

    # The end.

    def card(self):
        """What writes the model card, from what run.json says by now."""
        folder = self.run.folder
        return card.from_run(folder.record, seconds=folder.seconds(), perf=self._perf())

    def _perf(self) -> dict[str, float]:
        """The last reading of `perf/*`."""
        return {name: value for name, value in self.last.items() if name.startswith("perf/")}

    def finish(self, gap: float):
        """Write the results; print what changed, where it lies and what to do next.

        gap: of the exported model, see run/export.py.
        """
        folder = self.run.folder
        first = self.evaluated.get(min(self.evaluated, default=0), {})
        last = self.evaluated.get(max(self.evaluated, default=0), {})
        in_table = [metric for metric in self.measures.metrics if metric.in_table]
        results = {metric.name: last[metric.name] for metric in in_table if metric.name in last}
        tags = [f"val/{name}" for name in results] or ["train/loss"]
        results = results or {"train_loss": self.last["loss"]}
        final = {f"final/{name}": value for name, value in results.items()}
        self.board.hparams(telling(self.settings), tags, final, self.run.plan.steps)
        self.board.close(patience=60)
        module = self.model.module
        folder.finish(
            results=results,
            skipped_steps=self.model.skipped,
            perf=self._perf(),
            **self.health,
            **{module.gap_name: gap},
        )
        model = folder.path / "model"
        changed = []
        if last:
            more = self.measures.closing(last) if self.measures.closing else []
            more = rows_of_sources(in_table, first, last) + more
            changed = table(in_table, first, last, self.measures.noun, more)
            changed += [f"({self.measures.about})"] if self.measures.about else []
            worry = worries.chosen_fell(self.evaluated)
            changed += ["", worry] if worry else []
        lines = [
            *changed,
            "",
            f"model        {model}  (reloaded: {gap:.1g} {module.unit} from the trained one)",
            *self.board.where(),
            "",
            "next",
            *(f"  {command}" for command in self.next_commands()),
            *self.board.next_commands(),
        ]
        for line in lines:
            self.run.say(line)


def subset(examples, losses: torch.Tensor, index: np.ndarray) -> tuple:
    """(examples, losses) of those at the places `index`."""
    places = torch.from_numpy(index).to(losses.device, non_blocking=True)
    with torch.no_grad():
        return type(examples)(*(x[places] for x in examples)), losses[places]


def finite(mean: dict[str, float]) -> dict[str, float]:
    """Without what cannot be said, of a source of rejected answers alone say."""
    return {name: value for name, value in mean.items() if math.isfinite(value)}


def with_nan(value):
    """The same value with NaN where JSON had to write null."""
    if isinstance(value, dict):
        return {key: with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_nan(item) for item in value]
    return math.nan if value is None else value


def table(
    metrics: list[Metric], first: dict, last: dict, noun: str, more: list[tuple] = ()
) -> list[str]:
    """What the held-out data say, before and after, as lines of text. more: rows below the metrics'."""
    rows = [(f"{last['pairs']} held-out {noun}", "before", "after", "95 % interval")]
    rows += [_row(m.title, m.name, first, last) for m in metrics if m.name in last]
    return ["", *columns([*rows, *more])]


def _row(title: str, name: str, first: dict, last: dict) -> tuple[str, str, str, str]:
    """The closing table's row of a metric."""
    interval = last.get(f"{name}_interval")
    shown = f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return title, f"{first[name]:.4f}", f"{last[name]:.4f}", shown


def rows_of_sources(metrics: list[Metric], first: dict, last: dict) -> list[tuple]:
    """Rows of the closing table with the first of SHOWN_OF_SOURCES that there is, of each source."""
    title_of = {metric.name: metric.title for metric in metrics}
    name = next((name for name in SHOWN_OF_SOURCES if name in last), None)
    rows = []
    for source, after in last.get("by_source", {}).items():
        before = first.get("by_source", {}).get(source, {})
        if name in before and name in after:
            rows.append(_row(f"{title_of[name]}, {source}", name, before, after))
    return rows


def columns(rows: list[tuple[str, str, str, str]]) -> list[str]:
    """Rows of the closing table as lines: a title, two numbers, and what stands behind them."""
    # wide enough for what most runs have, so that their tables look alike
    widths = [max(least, *(len(row[i]) for row in rows)) for i, least in enumerate((22, 9, 9))]
    lines = []
    for title, before, after, behind in rows:
        line = f"{title:<{widths[0]}} {before:>{widths[1]}}  {after:>{widths[2]}}   {behind}"
        lines.append(line.rstrip())
    return lines
