"""Sampling from a causal language model with transformers' own attention over a cache of keys and
values (train/models/cache.py), for rollouts and for evaluation.

A completion is a function of the weights, the prompt's tokens and (seed, the prompt's number,
sample, position): the noise is a hash of those, not a stream, so neither the batch in which a
prompt is decoded nor the rank can change it (beyond the last digits of logits, which a matrix
product's shape moves). Tokens are drawn by the Gumbel-max trick, so two models under the same seed
differ only where their distributions do: before and after are coupled.

On CUDA nothing waits for the device between two looks at which sequences have ended: what is drawn
is noted there, and the cache has its room from the start.

Packed attention (train/models/attention.py) has no cache; inside `generate` the model runs
transformers' own. A batch is sequences that are decoded together here, not a packed one.

Legend: P distinct prompts in a batch, W tokens of the longest, N sequences (prompts x samples), A
of them active (still in the batch), V vocabulary.
"""

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch

from train.models import matmul
from train.models.backbone import STATEFUL, own_attention
from train.models.cache import RoomCache, as_argument, make_cache, takes_room

# Bytes of noise that are hashed at a time, by the kind of device: on a CPU a row or two of the
# logits for each thread, which stay in its core's cache.
NOISE_BYTES = {"cpu": 1 << 19, "cuda": 1 << 28}

# Finished sequences leave the batch once no more than this share of it is running: not at once,
# because others' keys and values are moved to their places, and products of another shape are
# planned anew.
EVICT_BELOW = 0.875

# Tokens between two looks at which sequences have ended, by the kind of device: a look waits until
# all that was launched is done.
LOOK_EVERY = {"cpu": 1, "cuda": 16}


class Completion(NamedTuple):
    """What a model wrote."""

    ids: tuple[int, ...]  # at least one token; the end token included where there is one
    ended: bool  # an end token was drawn; else the completion was cut at max_new_tokens
    # of each token as it was drawn, nats, where they were asked for: not what is trained on, whose
    # batches have other shapes
    logps: tuple[float, ...] | None = None


class _Sampling(NamedTuple):
    """How tokens are drawn, and until when."""

    end_ids: list[int]
    max_new_tokens: int
    temperature: float
    stop: Callable[[], bool]  # asked at each look
    logps: bool  # whether the tokens' log-probabilities are wanted
    look_every: int  # tokens between two looks at which sequences have ended


@torch.no_grad()
def generate(
    lm,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_ids: Collection[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    samples_per_prompt: int = 1,
    prompt_numbers: Sequence[int] | None = None,
    batch_size: int = 32,
    autocast: torch.dtype | None = None,
    progress: Callable[[int], object] = lambda num_done: None,
    stop: Callable[[], bool] = lambda: False,
    logps: bool = False,
    look_every: int | None = None,
) -> list[Completion]:
    """Completions of prompts (token ids) by a whole model: sample s of prompt i at i *
    samples_per_prompt + s.

    `eos_token_ids`: token ids that end a completion. `temperature` 0 is greedy. `prompt_numbers`:
    what the noise knows the prompts by, by default their places. `batch_size`: sequences decoded at
    once. `progress` gets the number of sequences just done. `stop`: asked at each look; where it
    says so, sequences end there and the result is of no use. `logps`: give the tokens'
    log-probabilities at `temperature` as well. `look_every`: tokens between two looks at which
    sequences have ended, by default LOOK_EVERY; above 1 the cache has its room from the start. Raises
    ValueError for prompts that are empty or too long for the model, and for models that cannot be
    decoded here.
    """
    check(lm, prompts, max_new_tokens, temperature, batch_size, samples_per_prompt)
    if prompt_numbers is None:
        prompt_numbers = range(len(prompts))
    keys = [
        _noise_key(seed, number, sample)
        for number in prompt_numbers
        for sample in range(samples_per_prompt)
    ]
    prompt_of = [i // samples_per_prompt for i in range(len(keys))]  # of each sequence
    lengths = [len(prompts[i]) for i in prompt_of]
    look_every = look_every or LOOK_EVERY.get(lm.device.type, LOOK_EVERY["cuda"])
    sampling = _Sampling(
        sorted(eos_token_ids), max_new_tokens, temperature, stop, logps, look_every
    )
    completions = [None] * len(keys)
    with decoding(lm, autocast):
        for batch in batches(lengths, batch_size):
            distinct = list(dict.fromkeys(prompt_of[i] for i in batch))
            done = _decode(
                lm,
                prompts=[prompts[i] for i in distinct],
                prompt_places=[distinct.index(prompt_of[i]) for i in batch],
                keys=[keys[i] for i in batch],
                sampling=sampling,
            )
            for i, completion in zip(batch, done, strict=True):
                completions[i] = completion
            progress(len(batch))
    return completions


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
    """Raise ValueError where `generate` would: to be asked before other work begins."""
    config = lm.config.get_text_config()
    at_least_1 = {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "samples_per_prompt": samples_per_prompt,
    }
    for name, value in at_least_1.items():
        if value < 1:
            raise ValueError(f"{name} is at least 1, not {value}")
    if not temperature >= 0:  # nor NaN
        raise ValueError(f"temperature is at least 0, not {temperature}")
    layer_types = getattr(config, "layer_types", None) or ()
    if any(word in layer_type for layer_type in layer_types for word in STATEFUL):
        raise ValueError(
            f"{type(lm).__name__} keeps a state that is no cache of keys and values: "
            "it cannot be decoded here"
        )
    if any(hasattr(p, "ds_id") for p in lm.parameters()):  # as ZeRO-3 marks its shards
        raise ValueError("the model is sharded over ranks; generation needs a whole copy on each")
    max_positions = getattr(config, "max_position_embeddings", None)
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} has no tokens")
        if max_positions and len(prompt) + max_new_tokens > max_positions:
            raise ValueError(
                f"prompt {i} of {len(prompt)} tokens and {max_new_tokens} new ones exceed the "
                f"model's {max_positions} positions: lower --max_new_tokens or --max_prompt_length"
            )


@contextlib.contextmanager
def decoding(lm, autocast: torch.dtype | None = None):
    """Inside, `lm` runs transformers' own attention, which keeps a cache, in evaluation mode, and fp32
    products in one piece; under autocast where a dtype for it is given.
    """
    attention_name = lm.config._attn_implementation
    was_training = lm.training
    lm.set_attn_implementation(own_attention(lm))
    lm.eval()
    try:
        with (
            torch.autocast(lm.device.type, autocast) if autocast else contextlib.nullcontext(),
            matmul.in_one_piece(),
        ):
            yield
    finally:
        lm.train(was_training)
        lm.set_attn_implementation(attention_name)


def _decode(lm, prompts, prompt_places, keys, sampling: _Sampling) -> list[Completion]:
    """Decode N sequences together. `prompts`: P, each read once; `prompt_places` (N): the prompt of
    each sequence; `keys` (N): of its noise.
    """
    device = lm.device
    prompt_places = torch.tensor(prompt_places, dtype=torch.int64, device=device)  # (N,)
    logits, prompt_cache, mask = _prefill(lm, prompts)  # (P, V), of P prompts, (P, W)
    logits = logits[prompt_places]  # (N, V)
    if sampling.look_every > 1 and takes_room(lm):
        decoder = _InRoom(lm, prompt_cache, mask, prompt_places, sampling.max_new_tokens)
    else:
        decoder = _Growing(lm, prompt_cache, mask, prompt_places)
    del prompt_cache  # its memory, where the decoder has its own
    drawn = _Drawn(keys, sampling, device)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    for count in range(1, sampling.max_new_tokens + 1):
        token = drawn.draw(logits, position)  # (A,)
        if count == sampling.max_new_tokens:
            break
        if count % sampling.look_every == 0:
            running = ~drawn.ended[drawn.active]  # (A,)
            num_running = int(running.sum())
            if not num_running or sampling.stop():
                break
            if num_running <= EVICT_BELOW * len(running):
                stay = _close_gaps(running, num_running)
                drawn.active = drawn.active[stay]
                token = token[stay]
                decoder.keep(stay)
        logits = decoder.logits(token)  # (A, V)
        position += 1
    return drawn.completions()


class _Drawn:
    """What N sequences have drawn, on the device, which is not waited for until all is done."""

    def __init__(self, keys, sampling: _Sampling, device):
        self.sampling = sampling
        self.keys = torch.tensor(keys, dtype=torch.int64, device=device)  # (N,)
        self.end_ids = torch.tensor(sampling.end_ids, dtype=torch.int64, device=device)
        self.active = torch.arange(len(keys), device=device)  # (A,) sequences, in the cache's order
        shape = (len(keys), sampling.max_new_tokens)
        self.written = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logps = torch.zeros(shape, device=device) if sampling.logps else None  # nats
        # (N,) tokens of each completion
        self.length = torch.full_like(self.active, sampling.max_new_tokens)
        self.ended = torch.zeros_like(self.active, dtype=torch.bool)  # (N,)

    def draw(self, logits, position):
        """(A, V) logits, (1,) how many tokens there are before -> (A,) the next token of each active
        sequence, noted.
        """
        active, temperature = self.active, self.sampling.temperature
        token = draw(logits, self.keys[active], position, temperature)  # (A,)
        # what a finished sequence draws before it leaves lies behind its `length`
        self.written[active, position] = token
        if self.logps is not None:
            self.logps[active, position] = _logps(logits, token, temperature)
        had_ended = self.ended[active]  # (A,)
        ends = (token[:, None] == self.end_ids).any(1)  # (A,)
        # by `where`: the device would be asked how many places a mask has
        length = self.length[active]
        self.length[active] = torch.where(ends & ~had_ended, position + 1, length)
        self.ended[active] = had_ended | ends
        return token

    def completions(self) -> list[Completion]:
        """Of all N sequences: one copy each from the device, not one a sequence."""
        found = (self.written.tolist(), self.length.tolist(), self.ended.tolist())
        results = zip(*found, strict=True)
        done = [Completion(tuple(ids[:size]), has_ended) for ids, size, has_ended in results]
        if self.logps is None:
            return done
        each = zip(done, self.logps.tolist(), strict=True)
        return [c._replace(logps=tuple(values[: len(c.ids)])) for c, values in each]


class _Growing:
    """Logits of the next token, over a cache and a mask that grow by each."""

    def __init__(self, lm, prompt_cache, prompt_mask, prompt_places):
        self.lm = lm
        self.cache = prompt_cache
        if len(prompt_places) > len(prompt_mask):
            self.cache.batch_select_indices(prompt_places)
        self.mask = prompt_mask[prompt_places]  # (A, W)
        self._cache_argument = as_argument(lm, self.cache)

    def keep(self, stay):
        """Go on with the sequences `stay` of the A."""
        self.mask = self.mask[stay]
        self.cache.batch_select_indices(stay)

    def logits(self, token):
        """(A,) -> (A, V)"""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], 1)
        return self.lm(
            input_ids=token[:, None],
            attention_mask=self.mask,
            position_ids=self.mask.sum(1, keepdim=True) - 1,
            use_cache=True,
            **self._cache_argument,
        ).logits[:, -1]


class _InRoom:
    """Logits of the next token, over a cache and a mask that have room for all tokens: operations and
    shapes are the same for one token and the next, but for a longer part of the cache now and then.
    """

    def __init__(self, lm, prompt_cache, prompt_mask, prompt_places, max_new_tokens):
        self.lm = lm
        mask = prompt_mask[prompt_places].bool()  # (A, W)
        self.cache = RoomCache(prompt_cache, prompt_places, mask.shape[1] + max_new_tokens)
        self._cache_argument = as_argument(lm, self.cache)
        self.mask = torch.nn.functional.pad(mask, (0, max_new_tokens))  # (A, room)
        self.positions = mask.sum(1, keepdim=True) - 1  # (A, 1) of each sequence's last token

    def keep(self, stay):
        """Go on with the sequences `stay` of the A."""
        self.mask = self.mask[stay]
        self.positions = self.positions[stay]
        self.cache.batch_select_indices(stay)

    def logits(self, token):
        """(A,) -> (A, V)"""
        room = self.cache.room
        room.advance()
        self.mask.index_fill_(1, room.place, True)
        self.positions += 1
        # With four dimensions it is used as it is. Of two, transformers would ask the device.
        mask = self.mask[:, None, None, : room.seen]
        return self.lm(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=self.positions,
            use_cache=True,
            **self._cache_argument,
        ).logits[:, -1]


def _logps(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """(A,) nats: the log-probabilities of tokens (A,) under logits (A, V)."""
    scaled = logits.float() / (temperature or 1.0)
    return scaled.gather(1, tokens[:, None])[:, 0] - scaled.logsumexp(1)


def _close_gaps(running: torch.Tensor, num_running: int) -> torch.Tensor:
    """(num_running,) the running sequences' places, of a mask (A,): the last ones where others have
    finished, all others where they are, so that few of them move.
    """
    places = torch.arange(num_running, device=running.device)
    finished = (~running[:num_running]).nonzero().squeeze(1)
    places[finished] = running[num_running:].nonzero().squeeze(1) + num_running
    return places


def _prefill(lm, prompts):
    """Read prompts, padded on the left: next-token logits (P, V), the cache that holds the prompts,
    and its mask (P, W).
    """
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)  # (P, W)
    mask = torch.zeros_like(ids)  # (P, W)
    for i, prompt in enumerate(prompts):
        start = longest - len(prompt)
        ids[i, start:] = torch.tensor(list(prompt))
        mask[i, start:] = 1
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    cache = make_cache(lm)
    positions = (mask.cumsum(1) - 1).clamp_(min=0)  # (P, W), from 0 at a prompt's first token
    logits = lm(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        **as_argument(lm, cache),
        logits_to_keep=1,
    ).logits[:, -1]
    return logits, cache, mask


def draw(
    logits: torch.Tensor, keys: torch.Tensor, position: int | torch.Tensor, temperature: float
) -> torch.Tensor:
    """(A, V) logits -> (A,) token ids, distributed as softmax(logits / temperature); temperature 0:
    the likeliest. `position`: tokens before, one number or (1,).

    The Gumbel-max trick (see Maddison, Tarlow and Minka 2014, arXiv 1411.0030): the argmax of
    logits plus Gumbel noise is a draw from their softmax.
    """
    if temperature == 0:
        return logits.argmax(1)
    num_bytes = NOISE_BYTES.get(logits.device.type, NOISE_BYTES["cuda"])
    if logits.device.type == "cpu":
        num_bytes *= torch.get_num_threads()
    size = max(1, num_bytes // (8 * logits.shape[1]))  # rows at a time, of int64
    parts = zip(logits.split(size), keys.split(size), strict=True)
    return torch.cat([_draw_at_once(*part, position, temperature) for part in parts])


def _draw_at_once(logits, keys, position, temperature):
    wide = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits.to(wide) / temperature  # (A, V)
    return (scaled + gumbel(keys, position, logits.shape[1], wide)).argmax(1)


# The noise: SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
# generators"), used as a hash. Its constants are unsigned, torch's int64 is signed.


def _signed(x: int) -> int:
    """x modulo 2^64 as torch's int64 holds it."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


GOLDEN = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)


def gumbel(
    keys: torch.Tensor, position: int | torch.Tensor, size: int, dtype: torch.dtype
) -> torch.Tensor:
    """(A,) keys -> (A, size) standard Gumbel noise of this position: -log(-log(u)), u uniform."""
    state = _mix(keys + (torch.as_tensor(position) + 1) * GOLDEN)[:, None]  # (A, 1)
    bits = _mix(state + torch.arange(1, size + 1, device=keys.device) * GOLDEN)  # (A, size)
    bits = _shifted(bits, 11)  # as many as fp64 holds
    # u - 1 and not u, which is near 1 where the noise is large: u - 1 is exact near 0
    less_one = bits.to(torch.float64).add_(0.5).mul_(-(2.0**-53)).to(dtype)
    return less_one.log1p_().neg_().log_().neg_()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on fresh int64, in place: integers wrap around."""
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        x ^= _shifted(x, shift)
        x *= factor
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: torch.Tensor, shift: int) -> torch.Tensor:
    """int64 x >> shift as of unsigned integers: torch's copies the sign, hence the mask."""
    return (x >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _noise_key(seed: int, number: int, sample: int) -> int:
    """The state from which the noise of one sequence counts on: a hash, so that neighbours share
    nothing.
    """
    state = 0
    for part in (seed, number, sample):
        state = int(_mix(torch.tensor([_signed(state + (part + 1) * GOLDEN)]))[0])
    return state
