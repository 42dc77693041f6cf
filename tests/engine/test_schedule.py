"""The learning rate's schedule as the flags say it, by hand."""

import math

import pytest
import torch
from transformers import get_scheduler

from train.engine.trained import schedule_options

PEAK = 1e-3


def rates(scheduler, warmup, steps, **flags):
    """The rate of each step, 0 to `steps`."""
    options = {"num_cycles": None, "min_lr": None} | flags
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = get_scheduler(
        scheduler,
        adamw,
        warmup,
        steps,
        scheduler_specific_kwargs=schedule_options(scheduler, **options),
    )
    found = []
    for _ in range(steps + 1):
        found.append(schedule.get_last_lr()[0])
        adamw.step()
        schedule.step()
    return found


def cosine(cycles, floor=0.0):
    """Ten steps, two of warm-up: floor + (peak - floor) (1 + cos(2 pi cycles p)) / 2."""
    waves = [(1 + math.cos(2 * math.pi * cycles * n / 8)) / 2 for n in range(9)]
    return [0.0, PEAK / 2] + [floor + (PEAK - floor) * wave for wave in waves]


@pytest.mark.parametrize(
    "scheduler, flags, expected",
    [
        ("cosine", {}, cosine(0.5)),
        ("cosine", {"num_cycles": 1.5}, cosine(1.5)),
        ("cosine_with_min_lr", {"min_lr": 1e-4}, cosine(0.5, 1e-4)),
        ("cosine_with_min_lr", {"min_lr": 1e-4, "num_cycles": 1.0}, cosine(1.0, 1e-4)),
        (
            "polynomial",
            {"min_lr": 1e-4},
            [0.0, PEAK / 2] + [1e-4 + (PEAK - 1e-4) * (1 - n / 8) for n in range(9)],
        ),
        # each wave falls from the peak to 0, and the next begins at the peak; the end is 0
        (
            "cosine_with_restarts",
            {"num_cycles": 2.0},
            [0.0, PEAK / 2]
            + [PEAK * (1 + math.cos(math.pi * (n / 4 % 1))) / 2 for n in range(8)]
            + [0.0],
        ),
    ],
)
def test_what_flags_make_of_a_schedule(scheduler, flags, expected):
    assert rates(scheduler, 2, 10, **flags) == pytest.approx(expected, rel=1e-9, abs=1e-18)


def test_nothing_is_said_where_nothing_is_given():
    for scheduler in ("linear", "cosine", "polynomial"):
        assert schedule_options(scheduler, None, None) == {}
