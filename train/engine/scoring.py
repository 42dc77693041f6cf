"""Rows on their way to the device, and whole data sets scored with them: what training and evaluation share."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import NamedTuple

import torch

from train.data.order import passes
from train.data.packing import Packed, pack
from train.engine import dist, preempt
from train.losses.logprobs import score
from train.losses.measures import of_pairs
from train.losses.preference import Pairs

PAIR_VALUES = ("row", "chosen", "rejected", "ref_chosen", "ref_rejected", "loss")  # columns of `score_pairs`


def ahead(plans: Iterable, data, device: torch.device, rows_of: Callable = attrgetter("rows")) -> Iterator[tuple]:
    """For each plan (a step, say): the plan, and its rows (`rows_of(plan)`, tuples of groups) packed on `device`.

    The next plan's rows are packed by a thread while this one's are computed. Before each row the ranks agree on
    whether they have been told to stop, and raise Preempted if so.
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
            preempt.check()
            yield row


def pairs_of(logps: torch.Tensor, ref_logps: torch.Tensor, row: Packed) -> Pairs:
    """Token log-probabilities (T,) of a row of pairs -> Pairs."""
    return Pairs.of(score(logps, row.lengths), score(ref_logps, row.lengths), row.lengths)


class Scored(NamedTuple):
    """A data set of n pairs under a policy."""

    sums: torch.Tensor  # measures.of_pairs over all ranks
    values: torch.Tensor  # (n, len(PAIR_VALUES)) fp64 on the CPU, all ranks' pairs in order of their data rows


class HeldOut:
    """A data set of pairs, scored as often as asked; the reference, which stands still, is asked once."""

    def __init__(self, data, budget: int, device: torch.device):
        self.data, self.device = data, device
        self.plan = passes(data.lengths.sum(1), budget, rank=dist.rank(), world=dist.world())
        self.reference_logps = []

    @torch.no_grad()
    def score(self, policy, reference, loss_of, beta: float, watch: Callable = iter) -> Scored:
        """Every pair exactly once; `watch` wraps the iterator over rows, for a progress bar. Every rank calls this."""
        known, sums, values = bool(self.reference_logps), 0, []
        rows = ahead(self.plan, self.data, self.device, rows_of=lambda groups: [groups])
        for number, (_, (row,)) in enumerate(watch(rows)):
            if not known:
                self.reference_logps.append(reference(row))
            pairs = pairs_of(policy(row), self.reference_logps[number], row)
            losses = loss_of(pairs)
            sums = sums + of_pairs(pairs, losses, beta)
            columns = (
                torch.tensor(row.group_rows),
                pairs.chosen,
                pairs.rejected,
                pairs.ref_chosen,
                pairs.ref_rejected,
                losses,
            )
            values.append(torch.stack([column.detach().double().cpu() for column in columns], 1))
        everyone = torch.cat(dist.gather(torch.cat(values)))
        return Scored(dist.total(sums).cpu(), everyone[everyone[:, 0].argsort(stable=True)])
