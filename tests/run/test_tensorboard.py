"""What stands in TensorBoard's files after interruptions, as TensorBoard reads it."""

import logging
import os

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from tests.launch.compare import layout
from train.losses import metrics
from train.run.tensorboard import CHARTS, Board, overview


def told(folder, tag="loss"):
    """[(step, value)] of a tag."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def run(folder, start, steps, position=None):
    """A process that goes on after `start`; the position after each of its steps."""
    board, positions = Board(folder, total=9, start=start, quiet=True), []
    if position is not None:
        board.cut(position)
    for step in steps:
        board.scalars({"loss": 10 * start + step}, step)
        positions.append(board.position())
    board.scalars({"val": start}, steps[-1])  # an evaluation after the last position
    board.flush()
    return positions


def events_of(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_the_overview_joins_training_and_evaluation(tmp_path):
    names = {metric.name for metric in metrics.METRICS}
    board = Board(tmp_path, total=0, quiet=True)
    board.custom_scalars(overview(names))
    board.close()
    (charts,) = layout(events_of(tmp_path)).values()
    assert list(charts) == list(CHARTS)
    assert charts["margin"] == [f"{split}/rewards/margins$" for split in ("train", "val", "eval")]
    # of the whole name: logps/chosen_per_token has a scale of its own
    assert "val/logps/chosen$" in charts["log-prob of chosen"]
    (of_rewards,) = overview({metric.name for metric in metrics.REWARD_METRICS}).values()
    assert set(charts) - set(of_rewards) == {"log-prob of chosen", "log-prob of rejected"}


def test_flags_stand_beside_the_last_values(tmp_path):
    """As HPARAMS reads them; no scalar is written twice, and no group of its own for them."""
    board = Board(tmp_path, total=0, quiet=True)
    board.scalars({"val/loss": 0.5}, 6)
    board.hparams({"lr": 0.1, "loss": "ipo", "trust": False, "model": None}, ["val/loss"], {}, 6)
    board.close()
    (path,) = tmp_path.iterdir()
    events = events_of(tmp_path)
    assert events.Tags()["scalars"] == ["val/loss"] and len(events.Scalars("val/loss")) == 1
    data = events.summary_metadata
    content = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(m.plugin_data.content)
        for tag, m in data.items()
        if m.plugin_data.plugin_name == "hparams"
    }
    given = content["_hparams_/session_start_info"].session_start_info.hparams
    assert given["lr"].number_value == pytest.approx(0.1) and given["loss"].string_value == "ipo"
    assert given["trust"].string_value == "False" and given["model"].string_value == "None"
    (info,) = content["_hparams_/experiment"].experiment.metric_infos
    assert info.name.tag == "val/loss"


def test_what_came_after_the_position_is_gone(tmp_path):
    first = run(tmp_path, 0, [1, 2, 3, 4])
    second = run(tmp_path, 2, [3, 4, 5], first[1])
    run(tmp_path, 3, [4, 5, 6], second[0])  # from an older checkpoint than the last
    assert told(tmp_path) == [(1, 1), (2, 2), (3, 23), (4, 34), (5, 35), (6, 36)]
    assert told(tmp_path, "val") == [(6, 3)]
    run(
        tmp_path, 4, [5], {"events.out.tfevents.1.elsewhere.1.0": 99}
    )  # begun from another run's checkpoint
    assert told(tmp_path) == [(5, 45)]


def test_a_new_start_sets_the_old_curves_aside(tmp_path):
    mine = tmp_path / "events.out.tfevents.mine"  # not a file of TensorBoard's, whatever it is
    mine.write_text("notes")
    run(tmp_path, 0, [1, 2])
    run(tmp_path, 0, [1])
    assert told(tmp_path) == [(1, 1)] and mine.read_text() == "notes"
    aside = [path for path in tmp_path.iterdir() if path.name.startswith("set-aside.")]
    assert len(aside) == 1 and aside[0].stat().st_size > 100


def test_a_disk_that_cannot_costs_the_chart_only(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError("not here")

    first = run(tmp_path, 0, [1, 2, 3])
    monkeypatch.setattr(os, "truncate", refuse)
    with caplog.at_level(logging.WARNING, "zeropref"):
        run(tmp_path, 1, [2], first[0])
    assert "may show some steps twice: not here" in caplog.text


def test_a_histogram_is_of_what_is_finite(tmp_path):
    board = Board(tmp_path, total=2, quiet=True)
    board.histogram("margins", torch.tensor([[torch.nan, 1.0], [torch.inf, 3.0]]), 1)
    board.histogram("margins", torch.tensor([torch.nan, -torch.inf]), 2)
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (shown,) = events.Histograms("margins")
    found = shown.histogram_value
    assert (shown.step, found.num, found.min, found.max, found.sum) == (1, 2, 1, 3, 4)
