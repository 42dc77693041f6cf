"""Batches on their way to the device: packed by a thread while the ones before are computed."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from train.data.packing import PackedBatch, pack


def packed(
    plans: Iterable[tuple[Any, list]], data, device: torch.device
) -> Iterator[tuple[Any, list[PackedBatch]]]:
    """For each (key, batches) of `plans`: the key, and the batches packed on `device`.

    A key is whatever the caller knows its batches by, a step say; a batch is a tuple of numbers of
    groups of `data`. One plan ahead is packed, no more, so memory holds two. Packing takes well under
    a millisecond, most of it in numpy: for so long at most the thread keeps the caller's from launching.
    """
    pin = device.type == "cuda"

    def prepare(plan):
        key, batches = plan
        return key, [pack([data.group(i) for i in groups], pin) for groups in batches]

    def on_device(key, batches):
        return key, batches if device.type == "cpu" else [batch.to(device) for batch in batches]

    with ThreadPoolExecutor(1) as thread:
        pending = None
        for plan in plans:
            following = thread.submit(prepare, plan)
            if pending is not None:
                yield on_device(*pending.result())
            pending = following
        if pending is not None:
            yield on_device(*pending.result())
