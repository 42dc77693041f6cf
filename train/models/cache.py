"""Caches of keys and values for decoding: one that grows in place, and one that has its room from the
start.

Keys are kept in the values' dtype. Under autocast rotary embeddings leave them in fp32, and
attention would round all of them anew for each token, out of twice the memory.

Legend: A sequences, G heads of keys, D their size.
"""

import inspect

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Tokens that a layer has more room for whenever it is full.
ROOM = 64
# Tokens by which attention sees more of a RoomCache, whose shapes change no oftener.
STRIDE = 128


class GrowingLayer(DynamicLayer):
    """A layer's keys and values, (A, G heads, tokens, D), in memory that has room for more of them.

    transformers' own layer makes a new copy of all of them for each token: at 128 sequences of 100
    tokens that costs as much as all of attention and half of the products with weights.
    """

    def lazy_initialization(self, key_states, value_states):
        # not transformers', which makes empty tensors on the host and copies them
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        self.keys, self.values = (x[:, :, :0] for x in (key_states, value_states))
        self._memory = [self.keys, self.values]  # of which keys and values are the first tokens

    def update(self, key_states, value_states, *_, **__):
        """Add keys and values, (A, G, n, D); returns all of them."""
        key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self._memory[0].shape[2]:
            self._copy(slice(None), key_states.shape[0], end + ROOM)
        for memory, added in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, start:end] = added
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        """Keep the sequences `indices`, in that order. Of fewer than there are only those that change
        their places are copied.
        """
        tokens, num_sequences = self.keys.shape[2], len(indices)
        if num_sequences > self.keys.shape[0]:
            self._copy(indices, num_sequences, tokens + ROOM)
        else:
            moved = (indices != torch.arange(num_sequences, device=indices.device)).nonzero()[:, 0]
            for memory in self._memory:
                memory[moved, :, :tokens] = memory[indices[moved], :, :tokens]
            self._memory = [memory[:num_sequences] for memory in self._memory]
        self._show(tokens)

    def _copy(self, indices, num_sequences, room):
        """Take new memory of `room` tokens, with the sequences `indices` in it."""
        tokens, found = self.keys.shape[2], (self.keys, self.values)
        self._memory = [x.new_empty(num_sequences, x.shape[1], room, x.shape[3]) for x in found]
        for memory, old in zip(self._memory, found, strict=True):
            memory[:, :, :tokens] = old[indices]

    def _show(self, tokens):
        self.keys, self.values = (memory[:, :, :tokens] for memory in self._memory)


class WindowLayer(DynamicSlidingWindowLayer):
    """transformers' own layer of a sliding window, with keys in the values' dtype."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states.to(value_states.dtype), value_states, *args, **kwargs)


def make_cache(lm) -> DynamicCache:
    """An empty cache for `lm`."""
    cache = DynamicCache(config=lm.config.get_text_config())
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = GrowingLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[i] = WindowLayer(layer.sliding_window)
    return cache


class Room:
    """How far the sequences of a RoomCache have come."""

    def __init__(self, tokens: int, most: int, device):
        """tokens: there are so many. most: of the longest sequence."""
        self.tokens, self.most = tokens, most
        # on the device, so that what is launched for a token is the same for the next
        self.place = torch.full((1,), tokens - 1, dtype=torch.int64, device=device)  # of the last
        self.seen = tokens  # by attention; the mask hides those that are yet to come

    def advance(self):
        """Make room for one more token."""
        self.tokens += 1
        self.place += 1
        self.seen = min(self.most, -(-self.tokens // STRIDE) * STRIDE)


class RoomLayer(DynamicLayer):
    """A layer's keys and values in memory that has room for all that will come."""

    def __init__(self, room: Room, prompts: DynamicLayer, places: torch.Tensor):
        """prompts: keys and values of prompts, of which the sequences take those at `places` (A,)."""
        super().__init__()
        self.room = room
        self.dtype, self.device = prompts.keys.dtype, prompts.keys.device
        self.is_initialized = True
        found = (prompts.keys, prompts.values)
        self.keys, self.values = (self._in_room(x, places) for x in found)

    def _in_room(self, x, places):
        # zeros, since what is masked is multiplied all the same
        memory = x.new_zeros(len(places), x.shape[1], self.room.most, x.shape[3])
        memory[:, :, : x.shape[2]] = x[places]
        return memory  # (A, G, room, D)

    def update(self, key_states, value_states, *_, **__):
        """Put in a token's keys and values, (A, G, 1, D); returns those that attention sees."""
        room = self.room
        for memory, added in ((self.keys, key_states), (self.values, value_states)):
            memory.index_copy_(2, room.place, added.to(memory.dtype))
        return self.keys[:, :, : room.seen], self.values[:, :, : room.seen]

    def batch_select_indices(self, indices):
        """Keep the sequences `indices`, in that order, no more than there are; only those that change
        their places are copied.
        """
        count = len(indices)
        moved = (indices != torch.arange(count, device=indices.device)).nonzero()[:, 0]
        for memory in (self.keys, self.values):
            memory[moved] = memory[indices[moved]]
        self.keys, self.values = self.keys[:count], self.values[:count]


class RoomCache(Cache):
    """The keys and values of A sequences, with room from the start; `room` says how far they are."""

    def __init__(self, prompts: DynamicCache, places: torch.Tensor, most: int):
        """places (A,): the prompt of each sequence, in `prompts`. most: tokens of the longest."""
        self.room = Room(prompts.layers[0].keys.shape[2], most, places.device)
        super().__init__(layers=[RoomLayer(self.room, layer, places) for layer in prompts.layers])


def takes_room(lm) -> bool:
    """Whether `lm` can be decoded over a RoomCache: all of its layers see all tokens, through torch's
    attention.
    """
    layers = DynamicCache(config=lm.config.get_text_config()).layers
    return lm.config._attn_implementation == "sdpa" and all(
        type(layer) is DynamicLayer for layer in layers
    )


def as_argument(lm, cache: Cache) -> dict:
    """`cache` under the name by which `lm`'s forward takes it: newer versions of transformers call it
    "cache", older ones and models with code of their own "past_key_values".
    """
    is_new = "cache" in inspect.signature(lm.forward).parameters
    return {"cache" if is_new else "past_key_values": cache}
