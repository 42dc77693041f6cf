"""What stands in TensorBoard's files after interruptions, as TensorBoard reads it."""

import logging
import os

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.run.tensorboard import Board


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
