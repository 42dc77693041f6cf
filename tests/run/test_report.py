"""The closing table: columns that hold at any size of number, and no interval where there is none."""

import json
import math
import types

import numpy as np
import pytest
import torch

from train.files import json_safe
from train.losses import metrics
from train.losses.composition import choose
from train.losses.preference import Pairs
from train.losses.reward import ScoredPairs
from train.methods import preference_report, reward_report
from train.methods.policy_report import PolicyReport
from train.run import report, tensorboard


@pytest.mark.parametrize("size", [1.0, 1e3, 1e5, 1e9])
def test_columns_stand_below_each_other(size):
    def evaluation(factor):
        found = {metric.name: 0.5 * factor for metric in metrics.METRICS}
        return found | {"logps/chosen": -1.25 * size * factor, "pairs": 64}

    last = evaluation(1.5) | {"rewards/margins_interval": [-1.0, 2.0], "chosen_fell": 0.25}
    in_table = [metric for metric in metrics.METRICS if metric.in_table]
    more = preference_report.closing(last) + [("longer answer wins", "", "0.5000", "no model")]
    blank, head, *lines = report.table(in_table, evaluation(1.0), last, "pairs", more)
    assert not blank and len(lines) == len(in_table) + 2
    ends = [head.index("before") + 6, head.index("after") + 5]
    for line in lines:
        # the last digit of either column stands under the last letter of its title
        assert line[ends[1] - 1].isdigit() and line[ends[1] : ends[1] + 1] in ("", " "), line
        assert line[ends[0]] == " " and line[ends[0] - 1] in " 0123456789", line
    (margin,) = (line for line in lines if line.startswith("reward margin"))
    assert margin.endswith("[-1.000, 2.000]") and margin.index("[") == head.index("95 %")
    (chosen,) = (line for line in lines if line.startswith("log-prob of chosen"))
    assert chosen.split()[-2:] == [f"{-1.25 * size:.4f}", f"{-1.875 * size:.4f}"]
    if size == 1:  # as README shows it
        assert head == "64 held-out pairs".ljust(26) + "before      after   95 % interval"


def test_one_pair_has_no_interval_of_its_margin():
    one = Pairs(*torch.tensor([[-3.0, -5, -4, -4]]).double().T, *torch.tensor([[4], [5]]))
    two = Pairs(*(torch.cat([x, 2 * x]) for x in one))
    mean = {"rewards/accuracies": 1.0}
    loss = choose("sigmoid", 0.5, {})
    assert preference_report.intervals(loss, mean, one).keys() == {"rewards/accuracies_interval"}
    # margins 1 and 2: mean 1.5, deviation sqrt(1/2), over sqrt(2): 1/2
    found = preference_report.intervals(loss, mean, two)["rewards/margins_interval"]
    assert found == pytest.approx([1.5 - 1.959964 / 2, 1.5 + 1.959964 / 2])
    scores = ScoredPairs(*torch.tensor([[1.0], [0.0], [0.0]]).double())
    assert reward_report.intervals(mean, scores).keys() == {"rewards/accuracies_interval"}
    low, high = found
    assert math.isfinite(low + high)
    last = {metric.name: 1.0 for metric in metrics.METRICS} | {"pairs": 1}
    last |= preference_report.intervals(loss, mean, one)
    assert "nan" not in "\n".join(report.table(list(metrics.METRICS), last, last, "pairs"))


def test_a_source_s_row_of_the_table():
    """Of what both evaluations have; a source that had no accuracy before has no row."""
    first = {"loss": 1.0, "by_source": {"a": {"rewards/accuracies": 0.5}, "b": {"loss": 1.0}}}
    after = {"rewards/accuracies": 0.75, "rewards/accuracies_interval": [0.25, 1.0]}
    last = {"rewards/accuracies": 0.75, "by_source": {"a": after, "b": after, "c": after}}
    assert report.rows_of_sources(list(metrics.METRICS), first, last) == [
        ("reward accuracy, a", "0.5000", "0.7500", "[0.250, 1.000]")
    ]
    assert report.rows_of_sources(list(metrics.METRICS), {}, {"loss": 1.0}) == []


def test_examples_at_places():
    pairs = Pairs(*(torch.arange(4.0) + 10 * i for i in range(6)))
    examples, losses = report.subset(pairs, torch.arange(4.0, requires_grad=True), np.array([3, 1]))
    assert examples.ref_chosen.tolist() == [23.0, 21.0] and losses.tolist() == [3.0, 1.0]
    assert not losses.requires_grad


def test_a_rollout_that_goes_on_knows_what_cannot_be_said(tmp_path):
    """Where all returns are equal no variance of theirs is explained, and a checkpoint has null there."""
    board = tensorboard.Board(tmp_path, total=1, quiet=True)
    run = types.SimpleNamespace(device=torch.device("cpu"))
    before, after = (PolicyReport(run, *[None] * 5) for _ in range(2))
    before.board = board
    before.last = {"val/explained_variance": math.nan, "objective/scores": 0.5}
    after.load_state_dict(json.loads(json.dumps(json_safe(before.state_dict()))))
    assert math.isnan(after.last["val/explained_variance"])
    assert after.last["objective/scores"] == 0.5
    board.scalars(after.last, 1)
    board.close()
