"""What trackers beside TensorBoard are given: by a stand-in of accelerate's kind, and by the real ones
where they are installed.
"""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate import tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train import settings
from train.run import tensorboard, trackers
from train.run.trackers import Row, Trackers

ROOT = Path(__file__).resolve().parents[2]
LOGGED = []  # what the stand-ins were told, in order


class StandIn(tracking.GeneralTracker):
    """A tracker as a user would register one with accelerate."""

    name = "stand_in"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, project, run_id="new", **options):
        super().__init__()
        self.run_id, self.options = run_id, options
        LOGGED.append(("project", project, run_id, options))

    @property
    def tracker(self):
        return self

    @tracking.on_main_process
    def start(self):
        LOGGED.append("start")

    @tracking.on_main_process
    def store_init_configuration(self, values):
        LOGGED.append(values)

    @tracking.on_main_process
    def log(self, values, step=None):
        LOGGED.append((step, values))

    @tracking.on_main_process
    def finish(self):
        LOGGED.append("finish")


def options(output, name, before):
    return {"run_id": before} if before else {"run_id": "first", "called": name}


def run_id(tracker):
    return tracker.run_id


@pytest.fixture
def stand_in(monkeypatch):
    """The stand-in's row, and nothing logged."""
    LOGGED.clear()
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "stand_in", StandIn)
    monkeypatch.setitem(trackers.ROWS, "stand_in", Row("STAND_IN", options, run_id))


def told(folder, steps, config=None, names=("stand_in",), said=None):
    """What the stand-in is told by a run of these steps that has ended."""
    LOGGED.clear()
    opened = Trackers(
        names, folder, config or {"lr": 1.0}, (said if said is not None else []).append
    )
    for step in steps:
        opened.scalars({"train/loss": 10.0 + step}, step)
        opened.scalars({"val/loss": 20 + step}, step)
    opened.close(20)
    return list(LOGGED)


def test_scalars_configuration_and_results(stand_in, tmp_path, monkeypatch):
    output, said = tmp_path / "runs" / "a", []
    output.mkdir(parents=True)
    config = {"lr": 1e-6, "data": ["a", "b"], "loss_args": {"tau": 2}, "model": None}
    opened = Trackers(["tensorboard", "stand_in", "stand_in", "none"], output, config, said.append)
    opened.scalars({"train/loss": 1}, 1)
    opened.scalars({"val/loss": 2.5, "rewards/regex:[?]": 0, "rewards/regex:[!]": 1}, 1)
    opened.scalars({"train/loss": 3}, 2)
    opened.scalars({"rewards/regex:[!]": 4}, 3)
    opened.drain()
    assert json.loads((output / "trackers/stand_in.json").read_text()) == {
        "run": "first",
        "step": 3,
        "names": ["rewards/regex_____2"],
    }
    opened.results({"final/loss": 0.5}, 3)
    opened.close(20)
    assert said == []
    assert LOGGED == [
        ("project", "zeropref", "first", {"called": "runs/a"}),
        "start",
        {"lr": 1e-6, "data": '["a", "b"]', "loss_args.tau": 2, "model": None},
        # a step's values together, in names that every tracker takes, no two the same
        (1, {"train/loss": 1.0, "val/loss": 2.5, "rewards/regex____": 0.0, "rewards/regex_____2": 1.0}),
        (2, {"train/loss": 3.0}),
        (3, {"rewards/regex_____2": 4.0}),
        (3, {"final/loss": 0.5}),
        "finish",
    ]  # fmt: skip
    assert all(type(value) is float for entry in LOGGED[3:7] for value in entry[1].values())
    monkeypatch.setenv("STAND_IN", "mine")
    assert told(tmp_path, [])[0] == ("project", "mine", "first", {"called": f"{tmp_path.parent.name}/{tmp_path.name}"})  # fmt: skip


def test_a_resumed_run_goes_on_and_shows_no_step_twice(stand_in, tmp_path, monkeypatch):
    first = told(tmp_path, range(5))
    assert [entry[0] for entry in first[3:-1]] == [0, 1, 2, 3, 4]
    begun, *rest = told(tmp_path, range(3, 7), {"lr": 2.0})  # from the checkpoint after step 2
    assert begun == ("project", "zeropref", "first", {})
    values = [(step, {"train/loss": 10.0 + step, "val/loss": 20.0 + step}) for step in (5, 6)]
    assert rest == ["start", *values, "finish"]  # a parameter that has a value keeps it
    # results are no steps: a run killed while it wrote its model reports them
    opened = Trackers(["stand_in"], tmp_path, {}, print)
    opened.results({"final/loss": 1.0}, 6)
    opened.close(20)
    assert LOGGED[-2] == (6, {"final/loss": 1.0})
    # one that shows each step once by itself is told all
    row = trackers.ROWS["stand_in"]._replace(overwrites=True)
    monkeypatch.setitem(trackers.ROWS, "stand_in", row)
    again = told(tmp_path, [6, 7])
    assert again[2] == {"lr": 1.0} and [entry[0] for entry in again[3:-1]] == [6, 7]
    trackers.forget(tmp_path)  # --resume never
    assert told(tmp_path, [0])[0][2] == "first" and "called" in LOGGED[0][3]


def test_an_evaluation_that_was_interrupted_comes_behind_its_step(stand_in, tmp_path):
    for values in ({"train/loss": 3.0}, {"train/loss": 3.0, "val/loss": 4.0}, {"val/loss": 4.0}):
        opened = Trackers(["stand_in"], tmp_path, {}, print)
        opened.scalars(values, 6)
        opened.close(20)
    given = [entry for entry in LOGGED if type(entry) is tuple and entry[0] == 6]
    assert given == [(6, {"train/loss": 3.0}), (6, {"val/loss": 4.0})]  # and no value twice


def test_torch_computes_with_as_many_threads_as_before(stand_in, tmp_path, monkeypatch):
    threads = torch.get_num_threads()

    def state():  # as accelerate 1.10 makes it on a CPU
        if int(os.environ.get("OMP_NUM_THREADS", 0)) == 0:
            torch.set_num_threads(threads + 1)

    monkeypatch.setattr(accelerate, "PartialState", state)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        told(tmp_path, [1])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_tracker_that_no_row_knows_begins_anew(stand_in, tmp_path, monkeypatch):
    monkeypatch.delitem(trackers.ROWS, "stand_in")
    for _ in range(2):
        assert told(tmp_path, [1])[:1] == [("project", "zeropref", "new", {})]
        assert [entry[0] for entry in LOGGED[3:-1]] == [1]
    assert not (tmp_path / "trackers").exists()


@pytest.mark.parametrize(
    "place", ["__init__", "start", "store_init_configuration", "log", "finish"]
)
def test_a_tracker_that_fails_costs_itself_alone(stand_in, tmp_path, monkeypatch, place):
    class Failing(StandIn):
        pass

    def fail(*_, **__):
        raise SystemExit("no\nnetwork")

    setattr(Failing, place, fail)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "failing", Failing)
    said = []
    found = told(tmp_path, range(9), names=["failing", "stand_in"], said=said)
    whole = [step for step, _ in (e for e in found if isinstance(e, tuple) and e[0] != "project")]
    # the failing one shares the list where it got that far
    assert [step for step in range(9) if step in whole] == list(range(9)) and "finish" in found
    assert said == [
        "warning: --report_to failing: SystemExit: no network; the run goes on, and has every value "
        "in logs/: without it in --report_to nothing is tried"
    ]


def test_a_short_outage_costs_its_steps(stand_in, tmp_path, monkeypatch):
    def log(self, values, step=None):
        if step in (2, 3):
            raise OSError("away")
        LOGGED.append((step, values))

    monkeypatch.setattr(StandIn, "log", log)
    said = []
    found = told(tmp_path, range(7), said=said)
    assert [entry[0] for entry in found[3:-1]] == [0, 1, 4, 5, 6] and len(said) == 1
    assert json.loads((tmp_path / "trackers/stand_in.json").read_text())["step"] == 6


def test_a_tracker_that_is_away_for_good_is_given_up(stand_in, tmp_path, monkeypatch):
    tries = []

    def log(self, values, step=None):
        tries.append(step)
        raise OSError("away")

    monkeypatch.setattr(StandIn, "log", log)
    told(tmp_path, range(50))
    assert tries == list(range(trackers.MOST_FAILURES))


def test_a_tracker_that_hangs_holds_nobody_up(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(StandIn, "log", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(trackers, "MOST_WAITING", 3)
    said, began = [], time.monotonic()
    opened = Trackers(["stand_in"], tmp_path, {}, said.append)
    for step in range(20):
        opened.scalars({"loss": 1.0}, step)
    opened.drain(0.2)
    opened.close(0.2)
    assert time.monotonic() - began < 5
    assert said == [
        "warning: --report_to stand_in: is 3 steps behind; the run goes on, and has every value in "
        "logs/: without it in --report_to nothing is tried"
    ]


def test_the_board_tells_them_and_the_files_can_be_left_out(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "check_trackers", lambda _: None)
    said = []
    folder = SimpleNamespace(
        path=tmp_path, record={"flags": {"beta": 0.5}, "hardware": {"world": 2}}
    )
    plan = SimpleNamespace(steps=2, begun=0)
    run = SimpleNamespace(plan=plan, folder=folder, say=said.append)

    synced = []

    def through(report_to):
        LOGGED.clear()
        board = tensorboard.open_board(run, report_to)
        board.scalars({"loss": 1.5}, 1, "train/")
        board.sync()
        synced.append(LOGGED[-1:])  # what a checkpoint counts on is sent
        board.hparams({"beta": 0.5}, ["val/loss"], {"final/loss": 2.0}, 2)
        board.close()
        return board

    board = through(["stand_in"])
    assert synced == [[(1, {"train/loss": 1.5})]]
    assert LOGGED[2:-1] == [
        {"beta": 0.5, "hardware.world": 2, "steps": 2},
        (1, {"train/loss": 1.5}),
        (2, {"final/loss": 2.0}),
    ]
    assert not (tmp_path / "tensorboard").exists() and board.next_commands() == []
    assert board.where() == [f"run          {tmp_path}/run.json, logs/", "stand_in     zeropref"]
    board = through(["tensorboard"])
    assert LOGGED == [] and "tensorboard/" in board.where()[0] and board.next_commands()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[0].value == 1.5
    monkeypatch.setenv("RANK", "1")  # rank 0 alone tells
    through(["stand_in"])
    assert LOGGED == [] and said == []


def test_what_is_not_installed_is_refused_with_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dvclive").mkdir()  # a folder of that name is no package
    (tmp_path / "comet_ml.py").write_text("")
    settings.check_trackers(["tensorboard", "comet_ml"])
    settings.check_trackers(["none"])
    settings.check_trackers([])
    with pytest.raises(ValueError) as error:
        settings.check_trackers(["comet_ml", "dvclive", "clearml"])
    assert str(error.value) == (
        "--report_to dvclive clearml: not installed (pip install dvclive clearml)"
    )
    with pytest.raises(ValueError, match="^--report_to none stands alone$"):
        settings.check_trackers(["none", "tensorboard"])


def test_all_of_accelerates_trackers_may_be_named():
    named = set(settings.Tracker.__args__)
    assert named - {"none"} == set(tracking.LOGGER_TYPE_TO_CLASS) - {"stand_in"}
    assert set(trackers.ROWS) <= named


# The real ones.


def real(name):
    """Skip where that package is not installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[trackers]'")


def two_processes(folder, name):
    """A run that ended after step 3 and went on from step 2, and where it is to be looked at."""
    said = []
    for steps in (range(1, 4), range(2, 6)):
        opened = Trackers([name], folder, {"lr": 0.5, "loss_args": {"tau": 2}}, said.append)
        for step in steps:
            opened.scalars({"train/loss": 10.0 + step, "rewards/regex:[?]": 1.0}, step)
        opened.drain(60)
        opened.results({"final/loss": 7.0}, step)
        opened.close(60)
    assert said == []
    return opened.looks()[name]


def test_mlflow_in_a_local_store(tmp_path, monkeypatch):
    real("mlflow")
    import mlflow

    store = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    output = tmp_path / "runs" / "a"
    output.mkdir(parents=True)
    look = two_processes(output, "mlflow")
    client = mlflow.MlflowClient(store)
    (experiment,) = (e for e in client.search_experiments() if e.name == "zeropref")
    (run,) = client.search_runs([experiment.experiment_id])
    assert look == f"run {run.info.run_id} in {store}" and run.info.run_name == "runs/a"
    assert run.info.status == "FINISHED" and run.data.params == {"lr": "0.5", "loss_args.tau": "2"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(i, 10.0 + i) for i in range(1, 6)]
    assert run.data.metrics["final/loss"] == 7.0


def test_wandb_offline(tmp_path, monkeypatch):
    real("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    trackers.check(["wandb"])  # needs no login
    look = two_processes(tmp_path, "wandb")
    name = json.loads((tmp_path / "trackers/wandb.json").read_text())["run"]
    first, second = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert first.name.endswith(f"-{name}") and second.name.endswith(f"-{name}")
    assert look == f"wandb sync --id {name} {tmp_path}/wandb/offline-run-*-{name}"
    found = subprocess.run(f"{look} --dry-run", shell=True, capture_output=True, text=True)
    assert "Would sync 2 run(s)" in found.stdout + found.stderr, found
    for folder, steps in ((first, range(1, 4)), (second, range(2, 6))):
        found = list(records(folder / f"run-{name}.wandb"))
        (run,) = (r.run for r in found if r.HasField("run"))
        assert (run.run_id, run.project) == (name, "mine")
        config = {
            u.key: u.value_json for r in found for u in (*r.run.config.update, *r.config.update)
        }
        assert config["lr"] == "0.5" and config["loss_args.tau"] == "2"
        rows = [
            {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
            for r in found
            if r.HasField("history")
        ]
        assert [(row["_step"], row["train/loss"]) for row in rows] == [(i, 10.0 + i) for i in steps]
        assert rows[-1]["final/loss"] == 7.0


def records(path):
    """The records of a .wandb file: LevelDB's log format behind 7 bytes."""
    import struct

    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def in_a_process(code, folder, **variables):
    """What a process of its own prints: libraries that read the environment once, when imported."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wandb_without_a_login_is_refused_at_the_start(tmp_path):
    real("wandb")
    code = """
from train.run import trackers
try:
    trackers.check(["tensorboard", "wandb"])
except ValueError as error:
    print(error)
"""
    apart = {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
    assert in_a_process(code, tmp_path, **apart) == (
        "--report_to wandb is not logged in: `wandb login` first, or WANDB_MODE=offline to keep it on "
        "this machine\n"
    )
    assert in_a_process(code, tmp_path, **apart, WANDB_API_KEY="0123456789" * 4) == ""


def test_trackio_on_this_machine(tmp_path):
    real("trackio")
    code = """
import sys
from pathlib import Path
from tests.run.test_trackers import two_processes
print(two_processes(Path(sys.argv[1]), "trackio"))
"""
    shown = in_a_process(code, tmp_path, TRACKIO_DIR=str(tmp_path / "store"))
    assert "trackio show --project zeropref\n" in shown
    with sqlite3.connect(tmp_path / "store/zeropref.db") as store:
        rows = store.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    losses = [(step, json.loads(values).get("train/loss")) for _, step, values in rows]
    assert losses == [
        *((i, 10.0 + i) for i in (1, 2, 3)),
        (3, None),
        (4, 14.0),
        (5, 15.0),
        (5, None),
    ]
