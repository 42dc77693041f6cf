"""A cache of keys and values for decoding that grows in place.

Keys are kept in the values' dtype. Under autocast rotary embeddings leave them in fp32, and
attention would round all of them anew for each token, out of twice the memory.

Legend: A sequences, G heads of keys, D their size.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Tokens that a layer has more room for whenever it is full.
ROOM = 64


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
