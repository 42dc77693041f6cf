"""The reference model of a preference loss: who gives log pi_ref for a row."""

import hashlib
import logging
import random

import numpy as np
import torch

from train.data.order import passes
from train.data.packing import digest, pack
from train.engine import checks, dist, scoring, shelf, zero

SPOT_CHECKS = 4  # sequences that are computed again each time a shelf is used


class Live:
    """A frozen model that scores each row as the policy does: same kernels, same precision, same row."""

    forwards = 1  # forward passes that a row costs

    def __init__(self, module, config: dict):
        """`config`: with stage 3 the weights stay sharded (ds_configs/frozen_zero3.json), else each rank has them all.

        Every rank calls this.
        """
        module.requires_grad_(False)
        if module.autocast and zero.stage_of(config) < 3:
            _cast_matrices(module)
        self.module = self._forward = module
        if zero.stage_of(config) == 3:
            import deepspeed

            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
            self._forward, *_ = deepspeed.initialize(model=module, config=config)

    @torch.no_grad()
    def __call__(self, row) -> torch.Tensor:
        """(T,) nats, without gradient."""
        return self._forward(row)


class Cached:
    """A frozen model's log-probabilities, looked up: a run pays for them once, and later runs on the same texts never."""

    forwards, module = 0, None

    def __init__(self, live: Live, datasets: list, budget: int, precision: str, say=print):
        """Find the records of every response in `datasets`, and let all ranks make those that are missing.

        `live` is needed for that, and for computing a few again; nothing here keeps it. `budget`: tokens of a row.
        ValueError where a record is not what the model gives. Every rank calls this.
        """
        self.device = next(live.module.parameters()).device
        place = shelf.folder(dist.share(_identity(live)))
        wanted = {}
        for data in datasets:
            for i in range(len(data)):
                group = data.group(i)
                wanted |= {digest(group.prompt, response): (data, i, j) for j, response in enumerate(group.responses)}
        records = dist.share(shelf.read(place, set(wanted)) if dist.first() else None)
        missing = list(dict.fromkeys((id(data), i) for name, (data, i, _) in wanted.items() if name not in records))
        if missing:
            of = {id(data): data for data in datasets}
            made = _make(live, _Picked([(of[key], i) for key, i in missing]), budget, self.device)
            if dist.first():
                shelf.write(place, made)
                shelf.bound(place)
            records |= made
        _spot_check(live, wanted, records, precision)
        self._keep({name: records[name] for name in wanted})
        if dist.first():
            say(f"reference: {len(wanted):,} sequences, {len(missing):,} groups of them made now; {place} holds "
                f"{shelf.size(place) / 1e6:.1f} MB (all of them at most {shelf.MOST_BYTES / 1e9:.0f} GB)")  # fmt: skip

    def _keep(self, records):
        lengths = [len(values) for values in records.values()]
        starts = np.cumsum([0, *lengths])[:-1]
        self.place = dict(zip(records, zip(starts.tolist(), lengths, strict=True), strict=True))
        self.values = torch.from_numpy(np.concatenate([*records.values(), np.empty(0, np.float32)])).to(self.device)

    def __call__(self, row) -> torch.Tensor:
        """(T,) nats. ValueError names the data row of a response that has no record."""
        parts = []
        for number, name in enumerate(row.digests):
            if name not in self.place:
                k = row.num_responses // len(row.group_rows)
                raise ValueError(f"row {row.group_rows[number // k]}: the cached reference has no record of it")
            start, length = self.place[name]
            parts.append(self.values[start : start + length])
        return torch.cat(parts) if parts else self.values.new_zeros(0)


class Absent:
    """No reference, for losses that need none: every log-ratio is the policy's own log-probability."""

    forwards, module = 0, None

    def __call__(self, row) -> torch.Tensor:
        """(T,) zeros."""
        return torch.zeros(row.target.shape, device=row.target.device)


class _Picked:
    """Groups out of several data sets, as one."""

    def __init__(self, places):
        self.places = places

    def group(self, i):
        data, number = self.places[i]
        return data.group(number)


@torch.no_grad()
def _make(live, picked, budget, device) -> dict[bytes, np.ndarray]:
    """Score all groups in large rows, on all ranks; everybody's records on each. Every rank calls this."""
    sizes = [picked.group(i).tokens for i in range(len(picked.places))]
    plan, mine = passes(sizes, budget, rank=dist.rank(), world=dist.world()), {}
    for _, (row,) in scoring.ahead(plan, picked, device, rows_of=lambda groups: [groups]):
        values = live(row).float().cpu().split(row.lengths.tolist())
        mine |= {name: part.numpy() for name, part in zip(row.digests, values, strict=True)}
    return {name: part for records in dist.gather(mine) for name, part in records.items()}


@torch.no_grad()
def _spot_check(live, wanted, records, precision):
    names = sorted(wanted)
    for name in dist.share(random.Random().sample(names, min(SPOT_CHECKS, len(names)))):
        data, i, j = wanted[name]
        group = data.group(i)
        row = pack([group._replace(responses=(group.responses[j],))]).to(next(live.module.parameters()).device)
        difference = float((live(row).float().cpu() - torch.from_numpy(records[name])).abs().mean())
        if not difference <= checks.TOLERANCE[precision]:
            raise ValueError(f"row {group.row}: the cached reference is off by {difference:.2g} nats a token")


def _identity(live) -> str | None:
    """What a record depends on beside its tokens: the weights, their type and mode, and the kernels. Every rank calls this."""
    module, total = live.module, hashlib.sha256()
    for name, p in module.named_parameters():
        with zero.gathered_one(p):
            if dist.first():
                total.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
                total.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    device = next(module.parameters()).device
    kernels = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    total.update(f"{module.autocast} {module.layout} {kernels} {torch.__version__}".encode())
    return total.hexdigest()[:32]


def _cast_matrices(module):
    """Hold the linear layers' weights in the type that autocast computes in: the same digits, cast once.

    Embeddings and norms stay wide, and so does a head tied to them, for the residual stream's sake.
    """
    tied = module.lm.get_input_embeddings().weight
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight is not tied:
            layer.to(module.autocast)
