"""When a run says that it should not go on as it does."""

import pytest

from train.run.worries import NothingLeft, chosen_fell


def looks(losses, every=1):
    """(last step, line) of all lines said, over losses that are means of `every` steps."""
    watch = NothingLeft()
    steps = range(1, every * len(losses) + 1, every)
    found = [
        (first + every - 1, watch.look(first, first + every - 1, loss))
        for first, loss in zip(steps, losses, strict=True)
    ]
    return [(step, line) for step, line in found if line]


def test_a_loss_that_stays_low_is_said_once():
    [(step, line)] = looks([0.5] * 3 + [9e-4] * 60)
    assert step == 23 and "since step 4" in line and "--beta" in line
    [(step, _)] = looks([0.5] + [0.0] * 9, every=5)  # steps 6 to 25
    assert step == 25


@pytest.mark.parametrize("losses", [[1e-3] * 50, [9e-4] * 19, [-0.5] * 50, [float("nan")] * 50])
def test_what_is_not_low_or_not_for_long(losses):
    assert looks(losses) == []
    assert looks(([9e-4] * 19 + [0.1]) * 3) == []


def test_chosen_answers_that_lose_throughout():
    def evaluated(*logps):
        return {
            step: {"logps/chosen": value} for step, value in zip((0, 10, 9), logps, strict=False)
        }

    line = chosen_fell(evaluated(-200.0, -260.0, -240.0))  # by step: -200, -240, -260
    assert "from -200.0 to -260.0 nats" in line and "--loss dpop" in line
    assert chosen_fell(evaluated(-200.0, -240.0, -260.0)) is None  # up again in the end
    assert chosen_fell(evaluated(-200.0)) is None and chosen_fell({}) is None
    assert chosen_fell({0: {"reward": 1.0}, 5: {"reward": 0.5}}) is None
