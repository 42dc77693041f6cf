"""What the user watches: TensorBoard's files, other trackers and the progress bar."""

import contextlib
import logging
import os
import re
import time
from pathlib import Path

import torch
from tqdm import tqdm

from train.engine import dist
from train.files import fsync
from train.run import commands
from train.run.trackers import Trackers

# The page of CUSTOM SCALARS that training and evaluation write alike, and TensorBoard shows once: what
# was trained on, what was held out and what was evaluated in one chart. A run has one colour for all
# its lines, so a chart has one measure.
CHARTS = {
    "loss": "loss",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "reward of chosen": "rewards/chosen",
    "reward of rejected": "rewards/rejected",
    "log-prob of chosen": "logps/chosen",
    "log-prob of rejected": "logps/rejected",
}
# as TensorBoard names its files: the second, the host, the process
EVENTS = re.compile(r"events\.out\.tfevents\.\d+\.")


def open_board(run, report_to: list[str], within: bool = False) -> "Board":
    """The board of a training run that has its plan. report_to: TensorBoard, and other trackers. within:
    as Board's.
    """
    plan, folder = run.plan, run.folder
    facts = {
        name: folder.record[name] for name in ("hardware", "versions") if name in folder.record
    }
    trackers = Trackers(
        report_to if dist.is_main() else (),
        folder.path,
        config=folder.record["flags"] | facts | {"steps": plan.steps},
        say=run.say,
    )
    return Board(
        folder.path / "tensorboard",
        plan.steps,
        plan.begun,
        writes="tensorboard" in report_to,
        trackers=trackers,
        within=within,
    )


class Board:
    """Scalars, histograms and texts for TensorBoard, scalars for the other trackers, one bar on the
    terminal.

    Only rank 0 writes; all may call.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        start: int = 0,
        quiet: bool = False,
        writes: bool = True,
        trackers: Trackers | None = None,
        within: bool = False,
    ):
        """total, start: steps of the bar. quiet: no bar. writes: TensorBoard's files. trackers: those
        beside it. within: the step after `start` is under way, and some of it is shown already.
        """
        self.writer, self.folder, self.trackers = None, folder, trackers
        self.writes = writes
        self.older = []  # event files that stood here before
        if dist.is_main() and writes:
            from torch.utils.tensorboard import SummaryWriter

            self.older = self._files()
            if self.older:
                # files are read in the order of their names, which hold whole seconds
                second = int(self.older[-1].name.split(".")[3])
                time.sleep(min(max(0, second + 1 - time.time()), 2))
            is_new = not start and not within
            if is_new:
                self.cut({})
            # purge_step is for a TensorBoard that is looking on: what an interrupted run wrote of
            # later steps does not count
            first = 0 if is_new else start + 1 + within
            self.writer = SummaryWriter(str(folder), purge_step=first)
        hidden = quiet or not dist.is_main()
        self.bar = tqdm(
            total=total,
            initial=start,
            desc="train",
            unit="step",
            disable=hidden,
            dynamic_ncols=True,
        )

    def scalars(self, values: dict[str, float], step: int, prefix: str = ""):
        """Write each value under prefix + name."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(prefix + name, value, step)
        if self.trackers:
            self.trackers.scalars({prefix + name: value for name, value in values.items()}, step)

    def histogram(self, name: str, values: torch.Tensor, step: int):
        """Write the distribution of those of `values`, any shape, that are finite; nothing where there
        are none: TensorBoard's writer raises then.
        """
        if self.writer and (known := values[torch.isfinite(values)]).numel():
            self.writer.add_histogram(name, known, step)

    def text(self, name: str, value: str, step: int = 0):
        """Write Markdown."""
        if self.writer:
            self.writer.add_text(name, value, step)

    def custom_scalars(self, pages: dict[str, dict[str, list[str]]]):
        """Write what CUSTOM SCALARS shows: page -> chart -> the tags that it joins."""
        if self.writer:
            # TensorBoard takes tags for patterns
            layout = {
                page: {
                    chart: ["Multiline", [f"{re.escape(tag)}$" for tag in tags]]
                    for chart, tags in charts.items()
                }
                for page, charts in pages.items()
            }
            self.writer.add_custom_scalars(layout)

    def hparams(self, flags: dict, tags: list[str], results: dict[str, float], step: int):
        """Write the run's flags to the HPARAMS page, where the last values of these tags stand beside
        them; the other trackers have the flags, and get the results after `step`.
        """
        if self.trackers:
            self.trackers.results(results, step)
        if self.writer:
            from torch.utils.tensorboard import summary

            is_number = {
                name: isinstance(value, int | float) and not isinstance(value, bool)
                for name, value in flags.items()
            }
            values = {name: flags[name] if is_number[name] else str(flags[name]) for name in flags}
            # add_hparams would write the values again, in a file of its own
            for part in summary.hparams(values, dict.fromkeys(tags, 0.0)):
                self.writer.file_writer.add_summary(part)

    def advance(self, shown: dict[str, str]):
        """Move the bar one step on, with these figures beside it."""
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def flush(self):
        """Hand everything written to the operating system."""
        if self.writer:
            self.writer.flush()

    def sync(self):
        """Fsync everything written, and have the trackers sent theirs: a checkpoint counts on it."""
        if self.trackers:
            self.trackers.drain()
        self.flush()
        for path in self._files()[-1:] if self.writer else ():
            fsync(path)

    def where(self) -> list[str]:
        """Lines of the closing table: where the run is to be looked at."""
        output = self.folder.parent
        shown = ", tensorboard/" if self.writes else ""
        looks = self.trackers.looks() if self.trackers else {}
        return [
            f"run          {output / 'run.json'}, logs/{shown}",
            *(f"{name:<12} {look}" for name, look in looks.items()),
        ]

    def next_commands(self) -> list[str]:
        """Lines of the closing table: the command that shows the curves."""
        return [f"  {commands.tensorboard(self.folder.parent)}"] if self.writes else []

    def _files(self):
        return sorted(path for path in self.folder.glob("*") if EVENTS.match(path.name))

    def position(self) -> dict[str, int]:
        """The bytes of each event file by now: what `cut` keeps. {} where this rank writes none."""
        self.flush()
        found = {}
        for path in self._files() if self.writer else ():
            with contextlib.suppress(OSError):
                found[path.name] = path.stat().st_size
        return found

    def cut(self, position: dict[str, int]):
        """Cut the files that stood here before at `position`, so that no step is shown twice.

        A file that came wholly after it stays under a name that TensorBoard does not read.
        """
        for path in self.older:
            try:
                if path.name not in position:
                    name = path.name.replace("events.out.tfevents", "set-aside")
                    path.rename(path.with_name(name))
                elif path.stat().st_size > position[path.name]:
                    os.truncate(path, position[path.name])
            except OSError as error:  # a chart is no reason to stop
                logging.getLogger("zeropref").warning(
                    "%s may show some steps twice: %s", path, error
                )

    def close(self, patience: float = 5.0):
        """Flush and end. patience: seconds that the other trackers have for it."""
        self.bar.close()
        if self.trackers:
            self.trackers.close(patience)
        if self.writer:
            self.writer.close()


def overview(names) -> dict[str, dict[str, list[str]]]:
    """The shared page of a run that has metrics of these names: those of CHARTS that it can fill."""
    return {
        "overview: train, val and eval": {
            chart: [f"{split}/{name}" for split in ("train", "val", "eval")]
            for chart, name in CHARTS.items()
            if name in names
        }
    }
