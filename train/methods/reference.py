"""The reference model of a preference loss: who gives log pi_ref for a row."""

import hashlib
import json
import logging
import random

import numpy as np
import torch
import transformers

from train.data.packing import digest, pack
from train.data.steps import plan_pass
from train.engine import checks, dist, ds_config, prefetch, sharded_state
from train.methods import reference_cache
from train.models import lora

SPOT_CHECKS = 4  # sequences that are computed again each time a shelf is used


class Live:
    """A frozen model that scores each row as the policy does: same kernels, same precision, same
    row.
    """

    forwards = 1  # forward passes that a row costs

    def __init__(self, module, config: dict, moves: bool = False):
        """`config`: with stage 3 the weights stay sharded (ds_configs/frozen_zero3.json), else each
        rank has them all.

        `moves`: it will `follow` the policy; ValueError where it is sharded. Every rank calls this.
        """
        module.requires_grad_(False)
        self.device = next(module.parameters()).device
        self.version, self._wide = 0, {}  # version: how often it has moved
        if moves and ds_config.zero_stage(config) == 3:
            raise ValueError(
                "a reference that moves stands whole on each rank: --reference_ds_config ds_configs/zero0.json"
            )
        if moves:
            self._wide = {
                name: p.detach().float().clone() if p.dtype != torch.float32 else p.detach()
                for name, p in module.named_parameters()
            }
        elif module.autocast and ds_config.zero_stage(config) < 3:
            _cast_matrices(module)
        self.module = self._forward = module
        if ds_config.zero_stage(config) == 3:
            import deepspeed

            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
            self._forward, *_ = deepspeed.initialize(model=module, config=config)

    @torch.no_grad()
    def __call__(self, row) -> torch.Tensor:
        """(T,) nats, without gradient."""
        return self._forward(row)

    @torch.no_grad()
    def follow(self, policy, share: float):
        """Move towards the policy: share * policy + (1 - share) * reference, in fp32. Every rank
        calls this.

        TR-DPO, Gorbatovski et al. 2024 (arXiv 2404.09656), equation 5; with a share of 1 it is
        equation 6, the hard update.
        """
        for (name, p), theirs in zip(
            self.module.named_parameters(), sharded_state.weights(policy), strict=True
        ):
            p.copy_(self._wide[name].lerp_(theirs.to(p.device), share))
        self.version += 1

    def moved(self) -> dict[str, torch.Tensor]:
        """The weights in fp32 by their keys in a checkpoint; none where it stands still."""
        return {f"reference/{name}": value for name, value in self._wide.items()}

    @torch.no_grad()
    def restore(self, read):
        """Put back what `moved` gave. `read`: the tensor of a key."""
        for name, p in self.module.named_parameters() if self._wide else ():
            p.copy_(self._wide[name].copy_(read(f"reference/{name}")))
        self.version += 1


class Cached:
    """A frozen model's log-probabilities, looked up: paid for once, and never again by later runs
    on the same texts.
    """

    forwards, module, version = 0, None, 0

    def __init__(self, live: Live, datasets: list, budget: int, precision: str, say=print):
        """Find the records of every response in `datasets`, and let all ranks make those that are
        missing.

        `live` is needed for that, and for computing a few again; nothing here keeps it. `budget`:
        tokens of a row. ValueError where a record is not what the model gives. Every rank calls
        this.
        """
        self.device = live.device
        place = reference_cache.directory(dist.broadcast(_identity(live)))
        wanted = {}
        for data in datasets:
            for i in range(len(data)):
                group = data.group(i)
                wanted |= {
                    digest(group.prompt, response): (data, i, j)
                    for j, response in enumerate(group.responses)
                }
        records = dist.broadcast(
            reference_cache.read_records(place, set(wanted)) if dist.is_main() else None
        )
        missing = list(
            dict.fromkeys(
                (id(data), i) for name, (data, i, _) in wanted.items() if name not in records
            )
        )
        if missing:
            of = {id(data): data for data in datasets}
            made = _make_records(
                live, _Picked([(of[key], i) for key, i in missing]), budget, self.device
            )
            if dist.is_main():
                self._put(place, made, say)
            records |= made
        _spot_check(live, wanted, records, precision)
        self._keep({name: records[name] for name in wanted})
        if dist.is_main():
            say(
                f"reference: {len(wanted):,} sequences, {len(missing):,} groups of them made now; {place} holds "
                f"{reference_cache.size(place) / 1e6:.1f} MB (all of them at most {reference_cache.MOST_BYTES / 1e9:.0f} GB)"
            )

    def _put(self, place, made, say):
        try:
            reference_cache.write_records(place, made)
            reference_cache.evict(place)
        except (
            Exception
        ) as error:  # safetensors has its own for a full disk; the records are at hand all the same
            say(
                f"reference: {place} does not keep what was made ({error}); set ZEROPREF_CACHE to where there is room"
            )

    def _keep(self, records):
        lengths = [len(values) for values in records.values()]
        starts = np.cumsum([0, *lengths])[:-1]
        self.place = dict(zip(records, zip(starts.tolist(), lengths, strict=True), strict=True))
        self.values = torch.from_numpy(
            np.concatenate([*records.values(), np.empty(0, np.float32)])
        ).to(self.device)

    def __call__(self, row) -> torch.Tensor:
        """(T,) nats. ValueError names the data row of a response that has no record."""
        parts = []
        for number, name in enumerate(row.digests):
            if name not in self.place:
                k = row.num_responses // len(row.group_rows)
                raise ValueError(
                    f"row {row.group_rows[number // k]}: the cached reference has no record of it"
                )
            start, length = self.place[name]
            parts.append(self.values[start : start + length])
        return torch.cat(parts) if parts else self.values.new_zeros(0)


class AdaptersOff:
    """The policy with its adapters switched off: no second model."""

    forwards, module, version = 1, None, 0

    def __init__(self, policy):
        self.policy = policy

    @torch.no_grad()
    def __call__(self, row) -> torch.Tensor:
        """(T,) nats, without gradient."""
        with lora.switched_off(self.policy.module.lm):
            return self.policy(row)


class NoReference:
    """No reference, for losses that need none: every log-ratio is the policy's own log-probability."""

    forwards, module, version = 0, None, 0

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
def _make_records(live, picked, budget, device) -> dict[bytes, np.ndarray]:
    """Score all groups in large rows, on all ranks; everybody's records on each. Every rank calls
    this.
    """
    sizes = [picked.group(i).tokens for i in range(len(picked.places))]
    plan, mine = plan_pass(sizes, budget, rank=dist.rank(), world=dist.world_size()), {}
    for _, (row,) in prefetch.ahead(plan, picked, device, rows_of=lambda groups: [groups]):
        values = live(row).float().cpu().split(row.lengths.tolist())
        mine |= {name: part.numpy() for name, part in zip(row.digests, values, strict=True)}
    return {name: part for records in dist.all_gather(mine) for name, part in records.items()}


@torch.no_grad()
def _spot_check(live, wanted, records, precision):
    names = sorted(wanted)
    for name in dist.broadcast(random.Random().sample(names, min(SPOT_CHECKS, len(names)))):
        data, i, j = wanted[name]
        group = data.group(i)
        row = pack([group._replace(responses=(group.responses[j],))]).to(live.device)
        difference = float((live(row).float().cpu() - torch.from_numpy(records[name])).abs().mean())
        if not difference <= checks.TOLERANCE[precision]:
            raise ValueError(
                f"row {group.row}: the cached reference is off by {difference:.2g} nats a token"
            )


def _identity(live) -> str | None:
    """What a record depends on beside its tokens: weights, their type and mode, kernels. Every rank
    calls this.
    """
    module, total = live.module, hashlib.sha256()
    for name, p in module.named_parameters():
        with sharded_state.gathered_param(p):
            if dist.is_main():
                total.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
                total.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    config = {
        key: value
        for key, value in module.lm.config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version")
    }
    total.update(
        json.dumps([config, transformers.__version__], sort_keys=True, default=str).encode()
    )
    for name, buffer in module.named_buffers():
        total.update(
            name.encode()
            + buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    device = next(module.parameters()).device
    kernels = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    total.update(f"{module.autocast} {module.layout} {kernels} {torch.__version__}".encode())
    return total.hexdigest()[:32]


def _cast_matrices(module):
    """Hold the linear layers' weights in the type that autocast computes in: the same digits, cast
    once.

    Embeddings and norms stay wide, and so does a head tied to them, for the residual stream's sake:
    in memory of their own, because the file that they were read from stays in memory as a whole.
    """
    tied = module.lm.get_input_embeddings().weight
    for layer in module.modules():
        narrow = isinstance(layer, torch.nn.Linear) and layer.weight is not tied
        for p in layer.parameters(recurse=False):
            p.data = p.to(module.autocast) if narrow else p.clone()
