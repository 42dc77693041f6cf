"""Sampling from a causal language model with transformers' own cache and attention, for rollouts
and for evaluation.

A completion is a function of the weights, the prompt's tokens and (seed, the prompt's number,
sample, position): the noise is a hash of those, not a stream, so neither the batch in which a
prompt is decoded nor the rank can change it (beyond the last digits of logits, which a matrix
product's shape moves). Tokens are drawn by the Gumbel-max trick, so two models under the same seed
differ only where their distributions do: before and after are coupled.

Packed attention (train/models/attention.py) has no cache; inside `generate` the model runs
transformers' own.

Legend: P distinct prompts in a batch, N sequences (prompts x samples), A of them still running, V
vocabulary.
"""

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from transformers import DynamicCache

from train.models.backbone import STATEFUL

NOISE_BYTES = {
    "cpu": 1 << 19,
    "cuda": 1 << 28,
}  # hashed at a time: on a CPU a row or two, that stay in its cache
EVICT = 0.875  # running share of a batch below which the finished leave it: each time the cache is copied
# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), as
# signed 64-bit integers
GOLDEN, MIX_1, MIX_2 = (
    c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class Completion(NamedTuple):
    """What a model wrote."""

    ids: tuple[int, ...]  # at least one token; the end token included where there is one
    ended: bool  # an end token was drawn; else the completion was cut at max_new_tokens


@torch.no_grad()
def generate(
    lm,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Collection[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    samples_per_prompt: int = 1,
    numbers: Sequence[int] | None = None,
    batch_size: int = 32,
    autocast: torch.dtype | None = None,
    watch: Callable[[int], object] = lambda done: None,
) -> list[Completion]:
    """Completions of prompts (token ids) by a whole model: sample s of prompt i at i *
    samples_per_prompt + s.

    `ends`: token ids that end a completion. `temperature` 0 is greedy. `numbers`: what the noise
    knows the prompts by, by default their places. `batch_size`: sequences decoded at once. `watch`
    gets the number of sequences just done. ValueError for prompts that are empty or too long for
    the model, and for models that cannot be decoded here.
    """
    check(lm, prompts, max_new_tokens, temperature, batch_size, samples_per_prompt)
    numbers = range(len(prompts)) if numbers is None else numbers
    keys = [
        _key(seed, number, sample) for number in numbers for sample in range(samples_per_prompt)
    ]
    out = [None] * len(keys)
    with decoding(lm, autocast):
        for batch in batches(
            [len(prompts[i // samples_per_prompt]) for i in range(len(out))], batch_size
        ):
            distinct = list(dict.fromkeys(i // samples_per_prompt for i in batch))
            owners = [distinct.index(i // samples_per_prompt) for i in batch]
            done = _decode(
                lm,
                [prompts[i] for i in distinct],
                owners,
                [keys[i] for i in batch],
                sorted(ends),
                max_new_tokens,
                temperature,
            )
            for i, completion in zip(batch, done, strict=True):
                out[i] = completion
            watch(len(batch))
    return out


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of prompts of these `lengths`, in batches of at most `size`, longest first, as even in
    number as can be.

    A job's ranks share out these batches, so that what a batch holds does not depend on how many
    ranks there are.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = -(-len(order) // size)
    return [order[len(order) * b // count : len(order) * (b + 1) // count] for b in range(count)]


def check(lm, prompts, max_new_tokens: int, temperature=1.0, batch_size=1, samples_per_prompt=1):
    """ValueError where `generate` would raise one: to be asked before other work begins."""
    config = lm.config.get_text_config()
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
        ("samples_per_prompt", samples_per_prompt),
    ):
        if value < 1:
            raise ValueError(f"{name} is at least 1, not {value}")
    if not temperature >= 0:
        raise ValueError(f"temperature is at least 0, not {temperature}")
    if any(
        word in layer for layer in getattr(config, "layer_types", None) or () for word in STATEFUL
    ):
        raise ValueError(
            f"{type(lm).__name__} keeps a state that is no cache of keys and values: it cannot be decoded here"
        )
    if any(hasattr(p, "ds_id") for p in lm.parameters()):
        raise ValueError("the model is sharded over ranks; generation needs a whole copy on each")
    most = getattr(config, "max_position_embeddings", None)
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} has no tokens")
        if most and len(prompt) + max_new_tokens > most:
            raise ValueError(
                f"prompt {i} of {len(prompt)} tokens and {max_new_tokens} new ones exceed the model's {most} "
                "positions: lower --max_new_tokens or --max_prompt_length"
            )


@contextlib.contextmanager
def decoding(lm, autocast: torch.dtype | None = None):
    """Inside, `lm` runs transformers' own attention in evaluation mode, which keeps a cache, under
    autocast if told.
    """
    name, training = lm.config._attn_implementation, lm.training
    lm.set_attn_implementation("sdpa" if lm._supports_sdpa else "eager")
    lm.eval()
    try:
        with torch.autocast(lm.device.type, autocast) if autocast else contextlib.nullcontext():
            yield
    finally:
        lm.train(training)
        lm.set_attn_implementation(name)


def _decode(lm, prompts, owners, keys, ends, max_new_tokens, temperature) -> list[Completion]:
    """N sequences together: `owners` (N) into P `prompts`, in order; `keys` (N) of the noise. A
    prompt is read once.
    """
    device = lm.device
    keys, ends, owners = (
        torch.tensor(x, dtype=torch.int64, device=device) for x in (keys, ends, owners)
    )
    logits, cache, mask = _prefill(lm, prompts)  # (P, V), P, (P, longest)
    if len(owners) > len(prompts):
        cache.batch_select_indices(owners)
    logits, mask = logits[owners], mask[owners]
    rows = torch.arange(
        len(owners), device=device
    )  # (A,) the sequence that each row of the batch is
    written = torch.zeros(len(owners), max_new_tokens, dtype=torch.int64, device=device)
    length = torch.full_like(rows, max_new_tokens)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    for position in range(max_new_tokens):
        token = draw(logits, keys[rows], position, temperature)  # (A,)
        written[rows, position] = token
        stops = torch.isin(token, ends) & ~ended[rows]
        length[rows[stops]] = position + 1
        ended[rows[stops]] = True
        running = ~ended[rows]
        count = int(running.sum())
        if not count or position + 1 == max_new_tokens:
            break
        if count <= EVICT * len(rows):
            stay = running.nonzero().squeeze(1)
            rows, token, mask = rows[stay], token[stay], mask[stay]
            cache.batch_select_indices(stay)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        logits = lm(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    written, length, ended = written.tolist(), length.tolist(), ended.tolist()
    return [
        Completion(tuple(ids[:n]), end) for ids, n, end in zip(written, length, ended, strict=True)
    ]


def _prefill(lm, prompts):
    """Next-token logits (P, V) of prompts padded on the left, the cache that holds them, and its
    mask (P, longest).
    """
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device=lm.device)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(list(prompt), device=lm.device)
        mask[i, longest - len(prompt) :] = 1
    cache = DynamicCache(config=lm.config.get_text_config())
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    out = lm(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1], cache, mask


def draw(
    logits: torch.Tensor, keys: torch.Tensor, position: int, temperature: float
) -> torch.Tensor:
    """(A, V) logits -> (A,) token ids, distributed as softmax(logits / temperature); temperature 0:
    the likeliest.
    """
    if temperature == 0:
        return logits.argmax(1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    size = max(1, NOISE_BYTES.get(logits.device.type, 1 << 28) // (8 * logits.shape[1]))
    parts = zip(logits.split(size), keys.split(size), strict=True)
    return torch.cat(
        [
            (part.to(wide) / temperature + gumbel(key, position, part.shape[1], wide)).argmax(1)
            for part, key in parts
        ]
    )


def gumbel(keys: torch.Tensor, position: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(A,) keys -> (A, size) standard Gumbel noise of this position: -log(-log(u)), u uniform."""
    state = _mix(keys + _signed((position + 1) * GOLDEN))[:, None]
    bits = _mix(state + torch.arange(1, size + 1, device=keys.device) * GOLDEN)  # (A, size)
    share = (
        ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64).add_(0.5).mul_(2.0**-53).to(dtype)
    )  # 1 - u: exact near 0
    return share.neg_().log1p_().neg_().log_().neg_()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on fresh int64, in place: integers wrap around, `>>` copies the sign,
    hence the masks.
    """
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)
        x *= factor
    return x.bitwise_xor_((x >> 31) & ((1 << 33) - 1))


def _key(seed: int, number: int, sample: int) -> int:
    """The state from which the noise of one sequence counts on: a hash, so that neighbours share
    nothing.
    """
    state = 0
    for part in (seed, number, sample):
        state = int(_mix(torch.tensor([_signed(state + (part + 1) * GOLDEN)]))[0])
    return state


def _signed(x: int) -> int:
    """x modulo 2^64 as torch's int64 holds it."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)
