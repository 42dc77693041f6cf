"""Floating-point operations of a packed row, counted from the model's own matrices and the row's
own segments.

Multiplications and additions of matrix products only, as is usual for model FLOPs utilisation
(PaLM, arXiv 2204.02311, appendix B): a backward pass costs two forwards, and what is computed a
second time does not count.
"""

from torch import nn
from transformers.pytorch_utils import Conv1D


class Counter:
    """Counts rows of one Backbone; the constants are read off its modules once."""

    def __init__(self, backbone):
        head = backbone.lm.get_output_embeddings()
        config = backbone.lm.config.get_text_config()
        self.head = _numel(head.weight)  # V * H
        self.body = sum(
            _numel(m.weight)
            for m in backbone.lm.modules()
            if isinstance(m, nn.Linear | Conv1D) and m is not head
        )
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        windows = [_window(config, i) for i in range(config.num_hidden_layers)]
        self.attention = [(heads * size, window) for window in windows]

    def forward(self, row) -> int:
        """Operations of one forward pass over `row`, with the mask's share of attention and the
        scored tokens' head.
        """
        total = 2 * self.body * row.input_ids.shape[0] + 2 * self.head * row.target.shape[0]
        seen = {window: _visible(row.shape, window) for _, window in set(self.attention)}
        return total + sum(2 * 2 * width * seen[window] for width, window in self.attention)


def _numel(weight):
    return getattr(weight, "ds_numel", weight.numel())


def _window(config, layer):
    """The sliding window of a layer, 0 for none."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return (config.sliding_window or 0) if kinds[layer] == "sliding_attention" else 0
    return getattr(config, "sliding_window", None) or 0


def _visible(shape, window):
    """Pairs of query and key that the mask lets through, summed over the row's segments."""
    total = 0
    for prompt, *responses in shape:
        for j, size in enumerate(responses):
            first = 0 if j == 0 else prompt  # the prompt's own queries run with the first response
            total += sum(min(at + 1, window or at + 1) for at in range(first, prompt + size))
    return total
