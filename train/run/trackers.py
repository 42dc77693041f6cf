"""Experiment trackers beside TensorBoard: wandb, mlflow, trackio, and what else accelerate knows.

    trackers = Trackers(["wandb"], OUTPUT, config, say=run.say)      # on rank 0
    trackers.scalars({"train/loss": 0.69}, step=1)                   # returns at once
    trackers.close(10)

Each has a thread of its own, which begins it, feeds it and ends it: one that fails, hangs or is slow
costs its own curves, and no step. TensorBoard and logs/ have every value in any case.

OUTPUT/trackers/NAME.json holds how a tracker calls the run, the last step that it was given, and
what of that: a run that goes on goes on there as well, and shows no value twice. (The steps that an interrupted run
had done after its last checkpoint come again bit for bit, perf/* aside.)

accelerate is imported inside the functions, and it imports a tracker's package when that begins.
"""

import json
import logging
import os
import queue
import re
import shlex
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from train.config import named
from train.files import write_json
from train.quiet import is_verbose

MOST_WAITING = 10_000  # steps on their way to one tracker
MOST_FAILURES = 5  # in a row, after which a tracker is given up
FOREIGN = re.compile(r"[^\w\-. /]")  # what mlflow and others refuse in the name of a metric
END = None  # the last item of a queue


class Row(NamedTuple):
    """What of a tracker is to be known beyond accelerate's class for it."""

    project: str = ""  # the environment variable that names the project
    # (OUTPUT, the run's name, how the tracker called it before or "") -> arguments of the class
    options: Callable[[Path, str, str], dict] | None = None
    # tracker -> how it calls the run; None: one that goes on is a new run there
    name_of: Callable | None = None
    look: Callable | None = None  # tracker -> where the user finds the run, in words
    lacks: Callable[[], bool] | None = None  # whether it could not begin at all, see `remedy`
    overwrites: bool = False  # it takes a step and the configuration again, and shows them once
    remedy: str = "without it in --report_to nothing is tried"


def wandb_options(output: Path, name: str, before: str) -> dict:
    """Arguments of wandb.init. Its files lie in OUTPUT/wandb unless WANDB_DIR says where."""
    if not is_verbose():
        os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_CONSOLE", "off")  # logs/ has what the terminal shows
    options = {} if "WANDB_DIR" in os.environ else {"dir": str(output)}
    if before:
        return options | {"id": before, "resume": "allow"}
    return options if "WANDB_NAME" in os.environ else options | {"name": name}


def wandb_lacks() -> bool:
    """Whether wandb would ask for a login."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    if not is_verbose():
        os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False)


def wandb_name(tracker) -> str:
    """The id of wandb's run."""
    return tracker.tracker.id


def wandb_look(tracker) -> str:
    """The run's page, or the command that sends what was kept on this machine: a folder for each time
    that it went on.
    """
    run = tracker.tracker
    if not run.offline:
        return run.url or "WANDB_MODE keeps nothing"
    folder = shlex.quote(str(Path(run.dir).parent.parent))
    return f"wandb sync --id {run.id} {folder}/offline-run-*-{run.id}"


def mlflow_options(output: Path, name: str, before: str) -> dict:
    """Arguments of accelerate's MLflowTracker. Where the store is, MLFLOW_TRACKING_URI says."""
    if not is_verbose():
        for library in ("mlflow", "alembic"):
            logging.getLogger(library).setLevel(logging.ERROR)
    return {"run_id": before} if before else {"run_name": name}


def mlflow_name(tracker) -> str:
    """The id of mlflow's run."""
    return tracker.tracker.info.run_id


def mlflow_look(tracker) -> str:
    """The store, and the run in it."""
    import mlflow

    return f"run {tracker.tracker.info.run_id} in {mlflow.get_tracking_uri()}"


def trackio_options(output: Path, name: str, before: str) -> dict:
    """Arguments of trackio.init. A run is its name there; where it lies, TRACKIO_DIR says."""
    return {"name": before or name, "resume": "allow" if before else "never"}


def trackio_name(tracker) -> str:
    """The name of trackio's run."""
    return tracker.tracker.name


def trackio_look(tracker) -> str:
    """The command that shows it."""
    return f"trackio show --project {tracker.tracker.project}"


# By accelerate's names. What has no row here begins as accelerate begins it, and anew where a run
# goes on.
ROWS = {
    "wandb": Row(
        project="WANDB_PROJECT",
        options=wandb_options,
        name_of=wandb_name,
        look=wandb_look,
        lacks=wandb_lacks,
        # killed outright, it loses what it holds in memory, the configuration too: so all comes again
        overwrites=True,
        remedy="`wandb login` first, or WANDB_MODE=offline to keep it on this machine",
    ),
    "mlflow": Row(
        project="MLFLOW_EXPERIMENT_NAME",
        options=mlflow_options,
        name_of=mlflow_name,
        look=mlflow_look,
        remedy="MLFLOW_TRACKING_URI says where its store is",
    ),
    "trackio": Row(
        project="TRACKIO_PROJECT",
        options=trackio_options,
        name_of=trackio_name,
        look=trackio_look,
        remedy="TRACKIO_DIR says where it is kept",
    ),
}


class Trackers:
    """All trackers of a run. Rank 0 makes one with names, the others one without."""

    def __init__(self, names: Collection[str], output: Path, config: dict, say: Callable):
        """names: accelerate's, or those of classes registered there; "tensorboard" and "none" are
        not for here. config: what the run is like, {name: value}, nested or not. say: prints a line.
        """
        self._feeders = []
        self._names = {}  # of metrics: ours -> theirs
        self._step, self._waiting = None, {}
        self._looks = {}  # once they are closed
        names = [name for name in names if name not in ("tensorboard", "none")]
        if not names:
            return
        _make_state()
        for name in dict.fromkeys(names):
            self._feeders.append(_Feeder(name, output, flat(config), say))
            self._feeders[-1].start()

    def scalars(self, values: dict[str, float], step: int):
        """Take in values of `step`. They leave together, when those of another step come."""
        if self._feeders:
            if step != self._step:
                self._send()
            self._step = step
            self._waiting |= {self._name(name): float(value) for name, value in values.items()}

    def results(self, values: dict[str, float], step: int):
        """Send the run's results after `step`: never held for something sent before."""
        self._send()
        values = {self._name(name): float(value) for name, value in values.items()}
        for feeder in self._feeders:
            feeder.put(_Values(step, values, is_result=True))

    def drain(self, seconds: float = 5.0):
        """Send what there is, and wait until it is gone, no longer than `seconds`: before a
        checkpoint, which a run goes on from.
        """
        self._send()
        gone = [feeder.put(threading.Event()) for feeder in self._feeders]
        until = time.monotonic() + seconds
        for event in gone:
            event.wait(max(0.0, until - time.monotonic()))

    def close(self, seconds: float):
        """Send what there is, and end all, waiting no longer than `seconds`; once."""
        self._send()
        until = time.monotonic() + seconds
        for feeder in self._feeders:
            feeder.put(END)
        for feeder in self._feeders:
            feeder.join(max(0.0, until - time.monotonic()))
            if feeder.is_alive():
                feeder.warn(f"is not done after {seconds:.0f} s")
        self._looks |= self.looks()
        self._feeders = []

    def looks(self) -> dict[str, str]:
        """Where each is to be looked at, by name."""
        return self._looks | {each.name: each.look for each in self._feeders if each.look}

    def _send(self):
        values, self._waiting = self._waiting, {}
        if values:
            for feeder in self._feeders:
                feeder.put(_Values(self._step, values))

    def _name(self, name: str) -> str:
        """A metric's name in characters that every tracker takes, no two the same."""
        if name not in self._names:
            plain, number = FOREIGN.sub("_", name), 2
            taken = set(self._names.values())
            free = plain
            while free in taken:
                free, number = f"{plain}_{number}", number + 1
            self._names[name] = free
        return self._names[name]


class _Values(NamedTuple):
    """Values of one step."""

    step: int
    values: dict[str, float]
    is_result: bool = False


class _Feeder(threading.Thread):
    """One tracker, begun, fed and ended in a thread: mlflow keeps its run in the thread's own
    variables.
    """

    def __init__(self, name: str, output: Path, config: dict, say: Callable):
        super().__init__(name=name, daemon=True)
        self.items = queue.Queue(MOST_WAITING)
        self.row, self.output, self.config, self.say = ROWS.get(name, Row()), output, config, say
        self.look = ""
        self._warned = False
        self._file = output / "trackers" / f"{name}.json"
        self._before = self._read() if self.row.name_of else {}
        # the last step that it was given, and which values of it
        self._given = self._before.get("step", -1), set(self._before.get("names", ()))

    def put(self, item):
        """Hand an item over, and return it; without waiting, so that it may be lost."""
        try:
            self.items.put_nowait(item)
        except queue.Full:
            self.warn(f"is {MOST_WAITING} steps behind")
            if isinstance(item, threading.Event):
                item.set()
        return item

    def warn(self, what: str):
        """Say that something is wrong with the tracker; the first time only."""
        if not self._warned:
            self._warned = True
            self.say(
                f"warning: --report_to {self.name}: {what}; the run goes on, and has every value in "
                f"logs/: {self.row.remedy}"
            )

    def run(self):
        """Begin, feed and end the tracker."""
        has_begun, failures = self._attempt(self._begin), 0
        if has_begun:
            self._attempt(self._describe)
        for item in iter(self.items.get, END):
            if isinstance(item, threading.Event):
                item.set()
            elif has_begun and failures < MOST_FAILURES and (values := self._lacking(item)):
                done = self._attempt(self._log, item.step, values)
                failures = 0 if done else failures + 1
        if has_begun:
            self._attempt(self.tracker.finish)

    def _attempt(self, action: Callable, *arguments) -> bool:
        """Whether that went well; what did not is said. A tracker may raise whatever it likes."""
        try:
            action(*arguments)
        except (Exception, SystemExit) as error:
            logging.getLogger("zeropref").warning("tracker %s", self.name, exc_info=True)
            self.warn(named(error))
            return False
        return True

    def _begin(self):
        """Begin a run there, or go on with that of before."""
        from accelerate import tracking

        kind, row = tracking.LOGGER_TYPE_TO_CLASS[self.name], self.row
        project = os.environ.get(row.project) or "zeropref"
        run_name = "/".join(self.output.resolve().parts[-2:])
        before = self._before.get("run", "")
        places = [str(self.output)] if kind.requires_logging_directory else []
        options = row.options(self.output, run_name, before) if row.options else {}
        self.tracker = kind(project, *places, **options)
        self.tracker.start()
        if row.name_of:
            self._run = row.name_of(self.tracker)
            self._write()
        self.look = row.look(self.tracker) if row.look else project

    def _describe(self):
        """Say what the run is like."""
        if self.row.overwrites or not self._before:  # mlflow refuses a second value of a parameter
            self.tracker.store_init_configuration(self.config)

    def _log(self, step: int, values: dict[str, float]):
        self.tracker.log(values, step=step)
        last, names = self._given
        self._given = step, (names if step == last else set()) | set(values)
        self._write()

    def _lacking(self, item: _Values) -> dict[str, float]:
        """Those of the values that the tracker was not given before the run was interrupted: of the
        last step perhaps the training's, and not yet the evaluation's.
        """
        last = self._before.get("step", -1)
        if item.step > last or item.is_result or self.row.overwrites:
            return item.values
        if item.step < last:
            return {}
        known = self._before["names"]
        return {name: value for name, value in item.values.items() if name not in known}

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            names = [str(name) for name in found["names"]]
            return {"run": str(found["run"]), "step": int(found["step"]), "names": names}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _write(self):
        """Keep how the tracker calls the run, and what it was given last."""
        if self.row.name_of is None:
            return
        try:
            self._file.parent.mkdir(exist_ok=True)
            step, names = self._given
            write_json(self._file, {"run": self._run, "step": step, "names": sorted(names)})
        except OSError as error:  # a full disk: a resumed run sends some steps twice
            logging.getLogger("zeropref").warning("%s was not written: %s", self._file, error)


def _make_state():
    """Make the state of accelerate's that its trackers' own logging asks for. It joins nothing, for the
    ranks have met; but up to 1.10 at least it sets torch's threads on a CPU, those of rank 0 alone, to
    the machine's cores, where OMP_NUM_THREADS does not say how many.
    """
    import torch
    from accelerate import PartialState

    is_set = "OMP_NUM_THREADS" in os.environ
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    try:
        PartialState()
    finally:
        if not is_set:
            del os.environ["OMP_NUM_THREADS"]


def check(names: Collection[str]):
    """ValueError where a tracker cannot begin as things are. For rank 0 alone."""
    for name in names:
        lacks = ROWS.get(name, Row()).lacks
        is_lacking = False
        try:
            is_lacking = lacks is not None and lacks()
        except Exception:  # another version's affair: it is said where it fails to begin
            logging.getLogger("zeropref").warning("tracker %s", name, exc_info=True)
        if is_lacking:
            raise ValueError(f"--report_to {name} is not logged in: {ROWS[name].remedy}")


def forget(output: Path):
    """Have the next Trackers begin new runs: the run starts over."""
    for path in (output / "trackers").glob("*.json"):
        path.unlink(missing_ok=True)


def flat(config: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings as names with dots and values that every tracker takes: lists are JSON."""
    found = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, bool | int | float | str):
            found[prefix + name] = value
        else:
            found[prefix + name] = json.dumps(value, default=str)
    return found
