"""The reference of a preference loss: who gives log pi_ref of a batch's scored tokens.

One of four, by --reference and --lora_rank; all are called on a PackedBatch, and are parts of a
checkpoint (run/checkpoint.py), of which only one that moves has anything to say.

Legend: T scored tokens of a batch.
"""

import contextlib
import hashlib
import json
import random

import numpy as np
import torch
import transformers

from train.data.packing import Group, digest, pack
from train.data.steps import plan_pass
from train.engine import checks, dist, ds_config, loading, sharded_state, sweep
from train.engine.offload import Offloaded
from train.methods import reference_cache
from train.models import lora

SPOT_CHECKS = 4  # sequences that are computed again each time cached records are used


class Reference:
    """What all four share: one that stands still, costs nothing and has no state."""

    forwards = 0  # forward passes that a batch costs
    module = None  # the Backbone that computes it, where there is one of its own
    version = 0  # how often it has moved

    def at_hand(self):
        """A context around many calls: what has to be brought to the device is brought once."""
        return contextlib.nullcontext()

    def state_dict(self) -> dict:
        """Nothing for JSON."""
        return {}

    def load_state_dict(self, state: dict):
        """Nothing to continue from."""

    def shapes(self, state: dict | None = None) -> dict[str, tuple]:
        """Keys and shapes of `tensors`: none."""
        return {}

    def tensors(self):
        """No tensors."""
        return ()

    def load_tensors(self, read, state: dict):
        """Nothing to put back."""


class Live(Reference):
    """A frozen model that scores each batch as the policy does: same kernels, same precision."""

    forwards = 1

    def __init__(self, module, config: dict, moves: bool = False, offload: bool = False):
        """config: with stage 3 the weights stay sharded (ds_configs/frozen_zero3.json), else each
        rank has them all. moves: it will `follow` the policy. offload: it lies in main memory between
        uses. ValueError for either where it is sharded. Every rank calls this.
        """
        module.requires_grad_(False)
        self.device = next(module.parameters()).device
        self.moves = moves
        sharded = ds_config.zero_stage(config) == 3
        if moves and sharded:
            raise ValueError(
                "a reference that moves stands whole on each rank: --reference_ds_config "
                "ds_configs/zero0.json"
            )
        if offload and sharded:
            raise ValueError(
                "--offload_frozen is for a reference that stands whole on each rank; a sharded one is "
                "offloaded by offload_param in its --reference_ds_config"
            )
        self._fp32_weights = {}  # of one that moves: small steps would be lost in bf16
        if moves:
            for name, p in module.named_parameters():
                weight = p.detach()
                narrow = weight.dtype != torch.float32
                self._fp32_weights[name] = weight.float().clone() if narrow else weight
        elif module.autocast and not sharded:
            _cast_matrices(module)
        self.module = module
        self._forward = loading.frozen_forward(module, config)
        self._place = Offloaded(module, self.device) if offload else contextlib.nullcontext()

    def at_hand(self):
        """See Reference."""
        return self._place

    @torch.no_grad()
    def __call__(self, batch, **options) -> torch.Tensor:
        """(T,) nats, without gradient. options: of Backbone.forward, say a temperature."""
        with self._place:
            return self._forward(batch, **options)

    @torch.no_grad()
    def follow(self, policy, mixup: float):
        """Move towards the policy: mixup * policy + (1 - mixup) * reference, in fp32.

        TR-DPO, Gorbatovski et al. 2024 (arXiv 2404.09656), equation 5; with a mixup of 1 it is
        equation 6, the hard update. Every rank calls this.
        """
        weights = sharded_state.full_weights(policy)
        for (name, p), theirs in zip(self.module.named_parameters(), weights, strict=True):
            p.copy_(self._fp32_weights[name].lerp_(theirs.to(p.device), mixup))
        self.version += 1

    def shapes(self, state: dict | None = None) -> dict[str, tuple]:
        """Keys and shapes of its fp32 weights, PARAMETER/weight; none where it stands still."""
        return {f"{name}/weight": tuple(w.shape) for name, w in self._fp32_weights.items()}

    def tensors(self):
        """The weights of `shapes`, in that order."""
        return self._fp32_weights.values()

    @torch.no_grad()
    def load_tensors(self, read, state: dict):
        """Put back what `tensors` gave. read: the tensor of a key."""
        if not self._fp32_weights:
            return
        for name, p in self.module.named_parameters():
            p.copy_(self._fp32_weights[name].copy_(read(f"{name}/weight")))
        self.version += 1


class AdaptersOff(Reference):
    """The policy with its adapters switched off: no second model."""

    forwards = 1

    def __init__(self, policy):
        self.policy = policy

    @torch.no_grad()
    def __call__(self, batch, **options) -> torch.Tensor:
        """(T,) nats, without gradient. options: of Backbone.forward, say a temperature."""
        with lora.switched_off(self.policy.module.lm):
            return self.policy(batch, **options)


class NoReference(Reference):
    """For losses that need none: every log-ratio is the policy's own log-probability."""

    def __call__(self, batch) -> torch.Tensor:
        """(T,) zeros."""
        return torch.zeros(batch.target.shape, device=batch.target.device)


class Cached(Reference):
    """A frozen model's log-probabilities, looked up: paid for once, and never again by later runs on
    the same texts.
    """

    def __init__(self, live: Live, datasets: list, batch_tokens: int, precision: str, say=print):
        """Find the records of every response in `datasets`; all ranks make those that are missing.

        `live` is needed for that, and for computing a few again; nothing here keeps it. batch_tokens:
        of the batches it is scored in. ValueError where a record is not what the model gives. Every
        rank calls this.
        """
        self.device = live.device
        folder = reference_cache.directory(dist.broadcast(_identity(live)))
        wanted = {}  # digest -> (data set, number of the group, number of the response)
        for data in datasets:
            for i in range(len(data)):
                group = data.group(i)
                for j, response in enumerate(group.responses):
                    wanted[digest(group.prompt, response)] = (data, i, j)
        found = reference_cache.read_records(folder, set(wanted)) if dist.is_main() else None
        records = dist.broadcast(found)
        missing = [(data, i) for name, (data, i, _) in wanted.items() if name not in records]
        groups = _Groups(list({(id(data), i): (data, i) for data, i in missing}.values()))
        if len(groups):
            made = _make_records(live, groups, batch_tokens)
            if dist.is_main():
                self._write(folder, made, say)
            records |= made
        _spot_check(live, wanted, records, precision)
        self._keep({name: records[name] for name in wanted})
        if dist.is_main():
            say(
                f"reference: {len(wanted):,} sequences, {len(groups):,} groups of them made now; "
                f"{folder} holds {reference_cache.size(folder) / 1e6:.1f} MB (all of them at most "
                f"{reference_cache.MOST_BYTES / 1e9:.0f} GB)"
            )

    def _write(self, folder, records, say):
        try:
            reference_cache.write_records(folder, records)
            reference_cache.evict(folder)
        except Exception as error:  # safetensors has its own for a full disk
            # the records are at hand all the same
            say(
                f"reference: {folder} does not keep what was made ({error}); set ZEROPREF_CACHE to "
                "where there is room"
            )

    def _keep(self, records):
        """Hold all records in one tensor on the device, and where each stands in it."""
        lengths = [len(values) for values in records.values()]
        starts = np.cumsum([0, *lengths])[:-1].tolist()
        self.places = dict(zip(records, zip(starts, lengths, strict=True), strict=True))
        values = np.concatenate([*records.values(), np.empty(0, np.float32)])
        self.values = torch.from_numpy(values).to(self.device)

    def __call__(self, batch) -> torch.Tensor:
        """(T,) nats. ValueError names the data row of a response that has no record."""
        parts = []
        for number, name in enumerate(batch.digests):
            if name not in self.places:
                k = batch.num_responses // len(batch.group_rows)
                row = batch.group_rows[number // k]
                raise ValueError(f"row {row}: the cached reference has no record of it")
            start, length = self.places[name]
            parts.append(self.values[start : start + length])
        return torch.cat(parts) if parts else self.values.new_zeros(0)


class _Groups:
    """Groups out of several data sets, as one."""

    def __init__(self, places: list):
        self.places = places  # (data set, number of the group in it)

    def __len__(self):
        return len(self.places)

    def group(self, i) -> Group:
        data, number = self.places[i]
        return data.group(number)


def _make_records(live, groups: _Groups, batch_tokens: int) -> dict[bytes, np.ndarray]:
    """Score all groups in large batches, on all ranks; everybody's records on each.

    Every rank calls this.
    """
    sizes = [groups.group(i).tokens for i in range(len(groups))]
    plan = plan_pass(sizes, batch_tokens, rank=dist.rank(), world=dist.world_size())

    def score(batch):
        values = live(batch).float().cpu().split(batch.lengths.tolist())
        named = zip(batch.digests, (part.numpy() for part in values), strict=True)
        return [dict(next(named) for _ in range(k)) for k in sweep.responses_per_group(batch)]

    everything = range(len(groups))
    records = {}
    for of_group in sweep.score_groups(plan, everything, groups, live.device, score):
        records |= of_group
    return records


@torch.no_grad()
def _spot_check(live, wanted, records, precision):
    """ValueError where one of a few random records is not what the model gives today."""
    names = sorted(wanted)
    for name in dist.broadcast(random.Random().sample(names, min(SPOT_CHECKS, len(names)))):
        data, i, j = wanted[name]
        group = data.group(i)
        batch = pack([group._replace(responses=(group.responses[j],))]).to(live.device)
        recorded = torch.from_numpy(records[name])
        difference = float((live(batch).float().cpu() - recorded).abs().mean())
        if not difference <= checks.TOLERANCE[precision]:
            raise ValueError(
                f"row {group.row}: the cached reference is off by {difference:.2g} nats a token"
            )


def _identity(live) -> str | None:
    """A hash of what a record depends on beside its tokens: weights, their type and mode, kernels.

    None on ranks but the first. Every rank calls this.
    """
    module, total = live.module, hashlib.sha256()
    for name, p in module.named_parameters():
        with sharded_state.gathered_param(p):
            if dist.is_main():
                total.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
                total.update(_bytes(p))
    config = module.lm.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    parts = [config, transformers.__version__]
    total.update(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, buffer in module.named_buffers():
        total.update(name.encode())
        total.update(_bytes(buffer))
    device = next(module.parameters()).device
    kernels = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    total.update(f"{module.autocast} {module.layout} {kernels} {torch.__version__}".encode())
    return total.hexdigest()[:32]


def _bytes(tensor) -> np.ndarray:
    """A tensor's bytes, without a copy where it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


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
