"""Floating-point operations of a packed batch, counted from the model's own matrices and the
batch's own segments.

Multiplications and additions of matrix products only, as is usual for model FLOPs utilisation
(PaLM, arXiv 2204.02311, appendix B): what is computed a second time does not count.
"""

from torch import nn
from transformers.pytorch_utils import Conv1D


class FlopCounter:
    """Counts batches of one PackedModel; the constants are read off its modules once."""

    def __init__(self, model):
        lm = model.lm
        config = lm.config.get_text_config()
        head = model.head
        self.head_rows = model.head_rows
        matrices = [
            module.weight
            for module in lm.modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not head
        ]
        self.body_weights = sum(_numel(weight) for weight in matrices)
        self.trained_body_weights = sum(_numel(w) for w in matrices if w.requires_grad)
        self.head_weights = _numel(head.weight)  # V * H, or H of a score's
        self.trained_head_weights = self.head_weights * head.weight.requires_grad
        num_heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        self.attention_width = num_heads * head_size
        self.windows = [_window(config, layer) for layer in range(config.num_hidden_layers)]

    def forward(self, batch) -> int:
        """Operations of one forward pass over `batch`, with the mask's share of attention and the
        head of the tokens that it is computed for.
        """
        products = self._products(batch, self.body_weights, self.head_weights)
        return products + self._attention(batch)

    def backward(self, batch) -> int:
        """Operations of the backward pass: what a product of the forward pass costs, for the gradient of
        each of the two that were multiplied; a frozen weight needs none. So without adapters it is two
        forward passes.
        """
        inputs = self._products(batch, self.body_weights, self.head_weights)
        weights = self._products(batch, self.trained_body_weights, self.trained_head_weights)
        return inputs + weights + 2 * self._attention(batch)

    def _products(self, batch, body_weights: int, head_weights: int) -> int:
        # a weight costs a multiplication and an addition a token
        body = 2 * body_weights * batch.input_ids.shape[0]
        return body + 2 * head_weights * self.head_rows(batch)

    def _attention(self, batch) -> int:
        # as do a query and a key, for each of the heads' dimensions: once in the product of queries
        # and keys, once in that with the values
        pairs = {window: _visible_pairs(batch.shape, window) for window in set(self.windows)}
        return sum(2 * 2 * self.attention_width * pairs[window] for window in self.windows)


def _numel(weight):
    """Elements of a weight, also where ZeRO-3 holds a shard of it."""
    return getattr(weight, "ds_numel", weight.numel())


def _window(config, layer):
    """The sliding window of a layer in tokens, 0 for none."""
    window = getattr(config, "sliding_window", None) or 0
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None or layer_types[layer] == "sliding_attention":
        return window
    return 0


def _visible_pairs(shape, window):
    """Pairs of query and key that the mask lets through, summed over the batch's segments."""
    total = 0
    for prompt, *responses in shape:
        shared = _causal_pairs(prompt, window)  # the first response runs the prompt's queries
        total += shared
        total += sum(_causal_pairs(prompt + size, window) - shared for size in responses)
    return total


def _causal_pairs(tokens, window):
    """Pairs of a sequence's queries with the keys up to each, of which a window shows the last."""
    if not window or tokens <= window:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window
