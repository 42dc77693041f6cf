"""Rows on their way to the device, and their scores: what training and evaluation share."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter

import torch

from train.data.packing import pack
from train.engine import preemption


def ahead(
    plans: Iterable, data, device: torch.device, rows_of: Callable = attrgetter("rows")
) -> Iterator[tuple]:
    """For each plan (a step, say): the plan, and its rows (`rows_of(plan)`, tuples of groups)
    packed on `device`.

    The next plan's rows are packed by a thread while this one's are computed. Before each row the
    ranks agree on whether they have been told to stop, and raise Preempted if so.
    """

    def prepare(plan):
        rows = [pack([data.group(i) for i in groups]) for groups in rows_of(plan)]
        return plan, [row.pin() for row in rows] if device.type == "cuda" else rows

    with ThreadPoolExecutor(1) as thread:
        pending = None
        for plan in plans:
            following = thread.submit(prepare, plan)
            if pending is not None:
                yield _on(device, *pending.result())
            pending = following
        if pending is not None:
            yield _on(device, *pending.result())


def _on(device, plan, rows):
    return plan, _Watched(rows if device.type == "cpu" else [row.to(device) for row in rows])


class _Watched(list):
    """Rows that can be gone through as often as one likes, each after a look at the signals."""

    def __iter__(self):
        for row in super().__iter__():
            preemption.raise_if_preempted()
            yield row
